//! Everything at once for some minutes (T90): kills, upgrades, configurations and a peer that talks nonsense, while
//! memory and descriptors of the processes that live on stay flat.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::fleet::Scene;
use super::kills::{Away, BACK_PATIENCE, Child, KillError, Victim as _};
use super::load::Load;
use super::scenarios::{Row, on_host};
use crate::host::{BundleSpec, Host};
use crate::random::Random;

const KILL_EVERY: Duration = Duration::from_secs(15);
const UPGRADE_EVERY: Duration = Duration::from_secs(10);
const CONFIGURE_EVERY: Duration = Duration::from_secs(5);
/// Who lives on.
const STEADY: [&str; 3] = ["rot", "keyd", "agent"];
/// Descriptors that may be open more at the end than after the warm-up: what is just under way.
const MORE_FDS: usize = 8;
/// KiB of memory that a process may have more.
const MORE_RSS_KIB: u64 = 4096;

/// What a process has.
#[derive(Debug, Clone, Copy)]
struct Usage {
    fds: usize,
    rss_kib: u64,
}

impl Usage {
    fn of(pid: u32) -> std::io::Result<Self> {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        Ok(Self {
            fds,
            rss_kib: kib.unwrap_or(0),
        })
    }
}

/// When what is done next.
struct Schedule {
    kill: Instant,
    upgrade: Instant,
    configure: Instant,
}

fn is_due(at: &mut Instant, every: Duration) -> bool {
    let due = Instant::now() >= *at;
    if due {
        *at += every;
    }
    due
}

/// The host under all of it.
struct Mixed<'a> {
    host: &'a Host,
    epoch: u64,
    version: u64,
    volumes: Vec<String>,
    away: Away,
}

impl Mixed<'_> {
    fn kill(&mut self, load: &mut Load) -> Result<(), KillError> {
        let mut victim = Child::data_plane(self.host);
        let at = victim.kill()?;
        load.killed(at);
        let times = load.wait_back(BACK_PATIENCE)?;
        self.away.kills += 1;
        self.away.note(at, victim.seen(), &times);
        Ok(())
    }

    fn upgrade(&mut self) -> Result<(), KillError> {
        self.version += 1;
        self.host.upgrade("dataplane", self.version)?;
        Ok(())
    }

    fn configure(&mut self) -> Result<(), KillError> {
        self.epoch += 1;
        let volumes: Vec<&str> = self.volumes.iter().map(String::as_str).collect();
        let envelope = self.host.sign(&BundleSpec::new(self.epoch, &volumes))?;
        self.host.apply(&envelope)?;
        Ok(())
    }

    /// Some nonsense to a socket that nobody else uses. What becomes of it does not matter.
    fn talk_nonsense(&self, random: &mut Random) {
        if let Ok(mut stream) = UnixStream::connect(self.host.socket("spare")) {
            let bytes = 1 + random.index(64);
            let _ = stream.write_all(&random.bytes(bytes));
        }
    }

    fn usage(&self) -> Result<Vec<Usage>, KillError> {
        let mut all = Vec::new();
        for role in STEADY {
            let pid = match role {
                "rot" => self.host.rot_pid(),
                role => self.host.process(role)?.0,
            };
            all.push(Usage::of(pid)?);
        }
        Ok(all)
    }
}

/// Everything at once, for so long, with so much guest memory.
#[must_use]
pub fn mixed(what: &str, packed: bool, how_long: Duration, memory_gib: u64) -> Row {
    let scene = Scene {
        packed,
        memory_bytes: memory_gib << 30,
        own_binaries: true,
        spare: true,
        ..Scene::default()
    };
    on_host(what, &scene, |host, load, random| {
        let mut mixed = Mixed {
            host,
            epoch: 1,
            version: 0,
            volumes: ["disk0", "disk1", "spare"].map(str::to_owned).to_vec(),
            away: Away::default(),
        };
        let began = Instant::now();
        let mut schedule = Schedule {
            kill: began + KILL_EVERY / 3,
            upgrade: began + UPGRADE_EVERY / 2,
            configure: began + CONFIGURE_EVERY,
        };
        // All kinds of things have happened by then.
        let warm = began + how_long.mul_f64(0.4).max(KILL_EVERY);
        let mut before = None;
        while began.elapsed() < how_long || before.is_none() {
            if is_due(&mut schedule.kill, KILL_EVERY) {
                mixed.kill(load)?;
            }
            if is_due(&mut schedule.upgrade, UPGRADE_EVERY) {
                mixed.upgrade()?;
            }
            if is_due(&mut schedule.configure, CONFIGURE_EVERY) {
                mixed.configure()?;
            }
            mixed.talk_nonsense(random);
            std::thread::sleep(Duration::from_millis(200));
            if before.is_none() && Instant::now() > warm {
                before = Some(mixed.usage()?);
            }
        }
        compare(&before.unwrap_or_default(), &mixed.usage()?)?;
        Ok(mixed.away)
    })
}

fn compare(before: &[Usage], after: &[Usage]) -> Result<(), KillError> {
    for ((role, before), after) in STEADY.iter().zip(before).zip(after) {
        let grown =
            after.fds > before.fds + MORE_FDS || after.rss_kib > before.rss_kib + MORE_RSS_KIB;
        if grown {
            return Err(KillError::Grown(format!(
                "{role} has grown from {before:?} to {after:?}"
            )));
        }
    }
    Ok(())
}
