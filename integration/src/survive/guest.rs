//! A Linux guest in QEMU that verifies what its disk holds, while the processes die under it (T40).

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::finding::Report;
use super::kills::{Away, Child, KillError, Serve, Victim};
use super::scenarios::{Row, explained, folder};
use crate::guest::boot::Boot;
use crate::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestError, GuestSpec, Machine, QEMU};
use crate::host::{BundleSpec, Host, VolumeSpec, own_binaries};
use crate::processes::{binary, binary_dir, installed};
use crate::random::Random;

/// How long some rounds of the guest's work may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Rounds that show that the guest goes on.
const MORE: u64 = 2;
/// Works, and looks for complaints of the kernel.
const SCRIPT: &str = "\
guest-io rounds /dev/vda &\n\
look=0\n\
while sleep 1; do\n\
  if dmesg | grep -i -e 'i/o error' -e 'blocked for more'; then echo complaints=$look; fi\n\
  look=$((look+1))\n\
  echo look=$look\n\
done";

/// The last lines of a console, without those that only say that it goes on.
fn tail(console: &str) -> String {
    let told = |line: &&str| !line.starts_with("look=");
    let lines: Vec<&str> = console.lines().filter(told).collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Why a guest did not get through.
#[derive(Debug, thiserror::Error)]
pub enum ThroughError {
    /// It can't be started.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The kills.
    #[error(transparent)]
    Kill(#[from] KillError),
    /// It read something else, or its kernel complained.
    #[error("{what}\n--- console:\n{console}")]
    Wrong {
        /// What.
        what: String,
        /// What it printed.
        console: String,
    },
}

/// A guest that works.
#[derive(Debug)]
pub struct WorkingGuest {
    guest: Guest,
}

/// What became of a guest.
#[derive(Debug, Clone, Copy)]
pub struct Through {
    /// Rounds of its work.
    pub rounds: u64,
    /// Its longest request in milliseconds, by its own clock.
    pub longest_ms: u64,
}

impl WorkingGuest {
    /// Boots it from a disk's socket, and waits until it works.
    ///
    /// # Errors
    /// See [`ThroughError`].
    pub fn start(
        dir: &Path,
        boot: &Boot,
        socket: PathBuf,
        packed: bool,
    ) -> Result<Self, ThroughError> {
        let disks = [GuestDisk::VhostUser {
            socket,
            queues: 2,
            packed,
            platform: false,
        }];
        let program = binary("guest-io", "bulkhead-integration").map_err(KillError::from)?;
        let program = std::fs::read(program).map_err(KillError::from)?;
        let spec = GuestSpec {
            dir,
            disks: &disks,
            script: SCRIPT,
            programs: &[],
            files: &[("/bin/guest-io", program)],
            modules: &[],
            uid: None,
            machine: Machine {
                cpus: 2,
                ..Machine::default()
            },
        };
        let mut guest = Guest::start(boot, &spec)?;
        guest.wait_for("look=1", BOOT_PATIENCE)?;
        let this = Self { guest };
        this.goes_on()?;
        Ok(this)
    }

    fn number(&self, name: &str) -> u64 {
        let value = self.guest.value(name);
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    fn wrong(&self, what: &str) -> ThroughError {
        ThroughError::Wrong {
            what: what.to_owned(),
            console: tail(&self.guest.console()),
        }
    }

    /// Waits for some more rounds, and for another look at the kernel's messages.
    ///
    /// # Errors
    /// [`ThroughError::Wrong`] if they don't come, or something is wrong.
    pub fn goes_on(&self) -> Result<Through, ThroughError> {
        let (round, look) = (self.number("round"), self.number("look"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            if self.guest.console().contains("guest-io-failed=") {
                return Err(self.wrong("the guest read something else, or its disk failed"));
            }
            if self.guest.value("complaints").is_some() {
                return Err(self.wrong("the guest's kernel complained"));
            }
            let rounds = self.number("round");
            if rounds >= round + MORE && self.number("look") > look + 1 {
                let longest_ms = self.number("longest_ms");
                return Ok(Through { rounds, longest_ms });
            }
            if Instant::now() > deadline {
                return Err(self.wrong("the guest does not go on"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills its disk's back-end under it, so often, with up to `pause_ms` between two kills.
    ///
    /// # Errors
    /// See [`ThroughError`].
    pub fn survives(
        &self,
        victim: &mut dyn Victim,
        kills: u32,
        pause_ms: u64,
        random: &mut Random,
    ) -> Result<Through, ThroughError> {
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(random.below(pause_ms)));
            victim.kill()?;
        }
        self.goes_on()
    }
}

/// The kernel of all guests, unpacked once, beside the folders of the profiles.
fn boot() -> Result<Boot, ThroughError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let dir = binary_dir();
    let cache = dir.parent().unwrap_or(&dir).join("guest");
    Ok(Boot::prepare(&cache).map_err(GuestError::from)?)
}

/// What a machine lacks for guests, if it lacks something.
#[must_use]
pub fn missing() -> Option<String> {
    let programs = [QEMU, "busybox", "lz4"];
    let program = programs
        .iter()
        .find(|program| installed(program).is_none())?;
    Some(format!(
        "{program} is not installed: `cargo xtask test` installs it"
    ))
}

/// A guest's disk is a volume of a host, whose data plane is killed and upgraded so often: QEMU never connects again.
#[must_use]
pub fn guest_on_host(what: &str, packed: bool, kills: u32, upgrades: u32) -> Row {
    row(what, kills + upgrades, || {
        let dir = folder().map_err(KillError::from)?;
        let binaries = own_binaries(dir.path()).map_err(KillError::from)?;
        let host = Host::create_with(dir.path(), &binaries);
        let mut host = host.map_err(KillError::from)?;
        let spec = VolumeSpec {
            queues: 2,
            more: ["--discard", "pass"].map(str::to_owned).to_vec(),
            ..VolumeSpec::new("disk", "16MiB", 4096)
        };
        let prepared = host.create_volume(&spec).and_then(|()| {
            let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
            host.start()?;
            host.apply(&envelope)
        });
        prepared.map_err(KillError::from)?;
        let guest = WorkingGuest::start(dir.path(), &boot()?, host.socket("disk"), packed)?;
        let mut random = Random::named(what);
        for version in 1..=u64::from(upgrades) {
            std::thread::sleep(Duration::from_millis(random.below(500)));
            let upgraded = host.upgrade("dataplane", version);
            upgraded.map_err(|error| guest.wrong(&format!("{error}\n{}", host.log())))?;
        }
        let through = guest.survives(&mut Child::data_plane(&host), kills, 1500, &mut random);
        let log = host.log();
        let through = through.map_err(|error| guest.wrong(&format!("{error}\n{log}")))?;
        let connections = log.matches("frontend connected to volume").count() as u64;
        // The firmware and the kernel have one each; and there is the window of a reply.
        if connections > 2 + explained(&log) {
            return Err(guest.wrong(&format!("{connections} connections were made\n{log}")));
        }
        Ok(through)
    })
}

/// A guest's disk is `serve`'s, which is killed and started again: QEMU connects again (`reconnect-ms`).
#[must_use]
pub fn guest_on_serve(what: &str, packed: bool, kills: u32) -> Row {
    row(what, kills, || {
        let dir = folder().map_err(KillError::from)?;
        let (socket, image) = (dir.path().join("a.sock"), dir.path().join("disk.img"));
        let file = std::fs::File::create(&image).map_err(KillError::from)?;
        file.set_len(16 << 20).map_err(KillError::from)?;
        let blk = format!("file:{}", image.display());
        let path = socket.display().to_string();
        let mut serve = Serve::start(&["--socket", &path, "--blk", &blk, "--queues", "2"])?;
        let guest = WorkingGuest::start(dir.path(), &boot()?, socket, packed)?;
        guest.survives(&mut serve, kills, 1500, &mut Random::named(what))
    })
}

fn row(what: &str, kills: u32, run: impl FnOnce() -> Result<Through, ThroughError>) -> Row {
    let mut away = Away::default();
    let mut what = what.to_owned();
    let problem = match run() {
        Ok(through) => {
            away.kills = kills;
            what.push_str(&format!(
                " ({} rounds, its longest request {} ms)",
                through.rounds, through.longest_ms
            ));
            None
        }
        Err(error) => Some(error.to_string()),
    };
    Row {
        what,
        away,
        report: Report::default(),
        unexpected_disconnects: 0,
        problem,
    }
}
