//! A Linux guest in QEMU that verifies what its disk holds, while the processes die under it (T40).

use std::path::Path;
use std::time::{Duration, Instant};

use super::kills::{Child, KillError, Victim as _};
use crate::guest::boot::Boot;
use crate::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestError, GuestSpec, Machine};
use crate::host::Host;
use crate::processes::binary;
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
        host: &Host,
        volume: &str,
        packed: bool,
    ) -> Result<Self, ThroughError> {
        let disks = [GuestDisk::VhostUser {
            socket: host.socket(volume),
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
        guest.wait_for("round=1", BOOT_PATIENCE + PATIENCE)?;
        Ok(Self { guest })
    }

    fn number(&self, name: &str) -> u64 {
        let value = self.guest.value(name);
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    }

    fn wrong(&self, what: &str) -> ThroughError {
        ThroughError::Wrong {
            what: what.to_owned(),
            console: self.guest.console(),
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

    /// Kills the data plane under it, so often, with up to `pause_ms` between two kills.
    ///
    /// # Errors
    /// See [`ThroughError`].
    pub fn survives(
        &self,
        host: &Host,
        kills: u32,
        pause_ms: u64,
        random: &mut Random,
    ) -> Result<Through, ThroughError> {
        let mut victim = Child::data_plane(host);
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(random.below(pause_ms)));
            victim.kill()?;
        }
        self.goes_on()
    }
}
