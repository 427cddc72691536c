//! A running guest moves between the Bulkheads of two hosts on one shared volume, whose key is sealed to
//! both, with verified I/O all the while; and moves that are cancelled, before and after the source has
//! stopped.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_integration::guest::qmp::Qmp;
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use serde_json::json;
use tempfile::TempDir;

use crate::support::{Outcome, boot, ensure, folder, guest_io};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_guest_migrates_split",
        needs: &[Need::Guest],
        run: || migrates(false),
    },
    Test {
        name: "system_guest_migrates_packed",
        needs: &[Need::Guest],
        run: || migrates(true),
    },
];

/// How long a hand-over, or some rounds of a guest's work, may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// Rounds that show that a guest goes on.
const MORE: u64 = 3;

/// Both hosts and what belongs to them.
pub struct Pair {
    _dir: TempDir,
    /// The host that the volume was made on.
    pub source: Host,
    /// The other.
    pub target: Host,
}

fn migrates(packed: bool) -> Outcome {
    let pair = Pair::start()?;
    let mut source = pair.guest(&pair.source, packed, None)?;
    source.guest.wait_for("round=2", BOOT_PATIENCE + PATIENCE)?;
    pair.held_by(true, false)?;
    let incoming = pair.target.path("incoming.sock");
    cancelled_while_it_copies(&pair, packed, &mut source, &incoming)?;
    cancelled_after_the_stop(&pair, packed, &mut source, &incoming)?;
    let mut target = pair.guest(&pair.target, packed, Some(&incoming))?;
    target.wait_until_it_listens()?;
    // Slow enough that the guest writes to and reads into memory that was copied before.
    source.configure(24 << 20, false)?;
    source.qmp.migrate(&incoming)?;
    source.qmp.wait_for_migration("completed", PATIENCE)?;
    target.goes_on(&pair)?;
    pair.held_by(false, true)?;
    // Somebody starts the guest on the source as well: there it gets no disk.
    let before = source.rounds();
    source.qmp.execute("cont", &json!({}))?;
    pair.source.wait_until("the source does not wait", |host| {
        host.status()
            .is_ok_and(|s| s["volumes"][0]["state"]["waits_for_volume"] == true)
    })?;
    target.goes_on(&pair)?;
    ensure(source.rounds() == before, || {
        format!("two guests have one disk:\n{}", source.guest.console())
    })?;
    // The source's QEMU ends as it would after a move, and the target does not notice.
    drop(source);
    target.goes_on(&pair)?;
    pair.held_by(false, true)
}

/// The guest never stopped; the target never had the volume.
fn cancelled_while_it_copies(
    pair: &Pair,
    packed: bool,
    source: &mut Running,
    incoming: &PathBuf,
) -> Outcome {
    let mut target = pair.guest(&pair.target, packed, Some(incoming))?;
    target.wait_until_it_listens()?;
    source.configure(1 << 20, false)?;
    source.qmp.migrate(incoming)?;
    source.qmp.wait_for_migration("active", PATIENCE)?;
    source.goes_on(pair)?;
    pair.held_by(true, false)?;
    source.cancel()?;
    drop(target);
    source.goes_on(pair)?;
    pair.held_by(true, false)
}

/// The source has stopped its guest and let go of the volume when the move is called off: it takes the
/// volume back.
fn cancelled_after_the_stop(
    pair: &Pair,
    packed: bool,
    source: &mut Running,
    incoming: &PathBuf,
) -> Outcome {
    let mut target = pair.guest(&pair.target, packed, Some(incoming))?;
    target.wait_until_it_listens()?;
    source.configure(10 << 30, true)?;
    source.qmp.migrate(incoming)?;
    source.qmp.wait_for_migration("pre-switchover", PATIENCE)?;
    pair.held_by(false, false)?;
    source.cancel()?;
    drop(target);
    source.goes_on(pair)?;
    pair.held_by(true, false)
}

impl Pair {
    /// Two hosts that serve one volume; the second was not known when it was made.
    pub fn start() -> Result<Self, Box<dyn std::error::Error>> {
        let dir = folder()?;
        let mut source = Host::create(&dir.path().join("a"))?;
        let mut target = source.beside("host-2", &dir.path().join("b"))?;
        source.create_volume(&VolumeSpec {
            queues: 2,
            more: ["--discard", "pass"].map(str::to_owned).to_vec(),
            ..VolumeSpec::new("disk", "16MiB", 4096)
        })?;
        let other = target.path("state/host.pub").display().to_string();
        source.cli(&[
            "volume",
            "reseal",
            "--volume",
            "disk.toml",
            "--recovery",
            "keys/recovery.key",
            "--host",
            &other,
            "--out",
            "both.toml",
        ])?;
        fs::copy(source.path("both.toml"), target.path("both.toml"))?;
        for (host, name) in [(&mut source, "host-1"), (&mut target, "host-2")] {
            let envelope = host.sign(&BundleSpec {
                host: name,
                ..BundleSpec::new(1, &["both"])
            })?;
            host.start()?;
            host.apply(&envelope)?;
        }
        Ok(Self {
            _dir: dir,
            source,
            target,
        })
    }

    fn guest(
        &self,
        on: &Host,
        packed: bool,
        incoming: Option<&PathBuf>,
    ) -> Result<Running, Box<dyn std::error::Error>> {
        let qmp = on.path("qmp.sock");
        for socket in incoming.into_iter().chain([&qmp]) {
            if socket.exists() {
                fs::remove_file(socket)?;
            }
        }
        let disks = [GuestDisk::VhostUser {
            socket: on.socket("disk"),
            queues: 2,
            packed,
            platform: false,
        }];
        let spec = GuestSpec {
            dir: on.dir(),
            disks: &disks,
            script: "guest-io rounds /dev/vda",
            programs: &[],
            files: &[guest_io()?],
            modules: &[],
            uid: None,
            machine: Machine {
                cpus: 2,
                qmp: Some(qmp.clone()),
                incoming: incoming.cloned(),
                ..Machine::default()
            },
        };
        let guest = Guest::start(&boot()?, &spec)?;
        let qmp = Qmp::connect(&qmp).map_err(|e| format!("{e}\n{}", guest.console()))?;
        Ok(Running { guest, qmp })
    }

    /// Which of the two hosts' data planes has the volume.
    pub fn held_by(&self, source: bool, target: bool) -> Outcome {
        for (host, holds) in [(&self.source, source), (&self.target, target)] {
            host.wait_until(&format!("it does not become so: holds {holds}"), |host| {
                let status = host.status().unwrap_or_default();
                let state = &status["volumes"][0]["state"];
                state["holds_volume"] == holds && state["waits_for_volume"] == false
            })
            .map_err(|e| {
                format!(
                    "{e}\nsource: {:?}\ntarget: {:?}",
                    self.source.status(),
                    self.target.status()
                )
            })?;
        }
        Ok(())
    }
}

/// A guest and the way to command its QEMU.
struct Running {
    guest: Guest,
    qmp: Qmp,
}

impl Running {
    /// How fast it may be copied, in bytes a second, and whether to wait once it has stopped.
    fn configure(&mut self, bandwidth: u64, pause: bool) -> Outcome {
        let capability = json!({"capability": "pause-before-switchover", "state": pause});
        self.qmp.execute(
            "migrate-set-capabilities",
            &json!({"capabilities": [capability]}),
        )?;
        self.qmp.execute(
            "migrate-set-parameters",
            &json!({"max-bandwidth": bandwidth, "downtime-limit": 2000}),
        )?;
        Ok(())
    }

    fn wait_until_it_listens(&mut self) -> Outcome {
        let running = self.qmp.execute("query-status", &json!({}))?;
        ensure(running["status"] == "inmigrate", || {
            format!("it does not wait for a guest: {running}")
        })
    }

    fn cancel(&mut self) -> Outcome {
        self.qmp.execute("migrate_cancel", &json!({}))?;
        self.qmp.wait_for_migration("cancelled", PATIENCE)?;
        Ok(())
    }

    fn rounds(&self) -> u64 {
        let round = self.guest.value("round");
        round.and_then(|round| round.parse().ok()).unwrap_or(0)
    }

    /// Some more rounds of verified I/O.
    fn goes_on(&mut self, pair: &Pair) -> Outcome {
        // What a target prints first is the number after the source's last.
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut first = self.rounds();
        while std::time::Instant::now() < deadline {
            let now = self.rounds();
            if first == 0 {
                first = now;
            }
            if first != 0 && now >= first + MORE {
                return Ok(());
            }
            if self.guest.console().contains("guest-io-failed=") {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(format!(
            "the guest does not go on: {}\nsource: {}\ntarget: {}",
            self.guest.console(),
            pair.source.log(),
            pair.target.log()
        )
        .into())
    }
}
