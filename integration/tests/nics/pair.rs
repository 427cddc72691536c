//! Two guests on one switch: one that serves, and one that does what a script says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestNic, GuestSpec, Machine};
use bulkhead_integration::processes::{Process, binary};
use tempfile::TempDir;

use crate::script;
use crate::support::{boot, folder, guest_net};

/// How long the guests' work may take: the machine may have other work.
pub const PATIENCE: Duration = Duration::from_secs(900);
/// Addresses of the two cards.
pub const MACS: [&str; 2] = ["02:00:00:00:77:01", "02:00:00:00:77:02"];

/// What the client's card is.
#[derive(Debug, Clone, Copy)]
pub struct Card {
    /// Queue pairs, and processors.
    pub pairs: u16,
    /// Packed rings.
    pub packed: bool,
    /// Its driver is offered no offloads: the data plane computes checksums and cuts segments for it.
    pub bare: bool,
}

/// Both guests, and what their cards are connected to.
pub struct Pair {
    dir: TempDir,
    _serve: Process,
    /// The one that serves.
    pub server: Guest,
}

/// Where the cards' sockets lie in a test's folder.
fn socket(dir: &TempDir, index: usize) -> PathBuf {
    dir.path().join(format!("{index}.sock"))
}

impl Pair {
    /// The switch, and the guest that serves; the client's card will be such a one.
    pub fn start(card: Card) -> Result<Self, Box<dyn std::error::Error>> {
        let dir = folder()?;
        let mut arguments = Vec::new();
        for (index, mac) in MACS.iter().enumerate() {
            let socket = socket(&dir, index);
            let pairs = card.pairs;
            arguments.push("--net".to_owned());
            arguments.push(format!(
                "{},switch:lan,mac={mac},pairs={pairs}",
                socket.display()
            ));
        }
        let serve = Process::start(&binary("serve", "bulkhead-benches")?, &arguments)?;
        let last = format!("listening on {}", socket(&dir, MACS.len() - 1).display());
        if !serve.wait_for_log(&last, Duration::from_secs(60)) {
            return Err(format!("serve is not ready:\n{}", serve.log()).into());
        }
        // The server's rings are the other format, so that one frame meets both.
        let other = Card {
            packed: !card.packed,
            bare: false,
            ..card
        };
        let own = dir.path().join("server");
        let mut server = guest(
            &own,
            other.nic(&dir, 0),
            &script::server(),
            Machine::default(),
        )?;
        server.wait_for("server=ready", BOOT_PATIENCE)?;
        Ok(Self {
            dir,
            _serve: serve,
            server,
        })
    }

    /// The client, which runs a script. With `reboots` it comes up again when it reboots.
    pub fn client(
        &self,
        card: Card,
        script: &str,
        reboots: bool,
    ) -> Result<Guest, Box<dyn std::error::Error>> {
        let own = self.dir.path().join("client");
        let machine = Machine {
            reboots,
            ..Machine::default()
        };
        guest(&own, card.nic(&self.dir, 1), script, machine)
    }
}

/// A guest with this card, in a folder of its own; it has a processor for each queue pair.
pub fn guest(
    dir: &Path,
    nic: GuestNic,
    script: &str,
    machine: Machine,
) -> Result<Guest, Box<dyn std::error::Error>> {
    std::fs::create_dir_all(dir)?;
    // What is left of a boot.
    let disk = dir.join("disk");
    std::fs::write(&disk, [0; 4096])?;
    let spec = GuestSpec {
        dir,
        disks: &[GuestDisk::Raw(disk)],
        script,
        programs: &["iperf3", "ethtool"],
        files: &[guest_net()?],
        modules: &[],
        uid: None,
        machine: Machine {
            cpus: nic.pairs,
            nics: vec![nic],
            ..machine
        },
    };
    Ok(Guest::start(&boot()?, &spec)?)
}

impl Card {
    fn nic(self, dir: &TempDir, index: usize) -> GuestNic {
        GuestNic {
            pairs: self.pairs,
            packed: self.packed,
            bare: self.bare,
            ..GuestNic::new(socket(dir, index), MACS[index])
        }
    }
}
