//! A volume whose requests kill every data plane that takes them up: it is set aside, the other one is served on, and it comes
//! back when it is attached anew or the data plane is upgraded (ADR 0037).

use std::time::{Duration, Instant};

use super::fleet::Scene;
use super::kills::{Away, BACK_PATIENCE, Child, KillError, Victim as _, is_alive};
use super::load::Load;
use super::scenarios::{Row, on_host};
use crate::disk::{DATA, Disk, Options, Request};
use crate::driver::kind;
use crate::host::{BundleSpec, Host};

/// Where the data plane dies, each time that it works for the volume.
const POINT: &str = "submit.begun";
/// Deaths that it takes.
const DEATHS: u32 = 4;
/// When another request is sent, if nothing has died of those before: they may have ended before the process was told.
const AGAIN: Duration = Duration::from_millis(200);
/// How long all deaths may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests that fit.
const SLOTS: u16 = 16;
/// The volume that kills, and the one beside it.
const KILLER: &str = "spare";
const OTHER: &str = "disk0";

fn wrong(text: impl Into<String>) -> KillError {
    KillError::Grown(text.into())
}

/// What the status says of the volume's fault; none: nothing.
fn fault(host: &Host) -> Option<String> {
    let status = host.status().ok()?;
    let volumes = status["volumes"].as_array()?;
    let is_it = |volume: &&serde_json::Value| volume["name"] == KILLER;
    let fault = &volumes.iter().find(is_it)?["state"]["fault"];
    fault.as_str().map(str::to_owned)
}

fn is_aside(host: &Host) -> bool {
    fault(host).is_some_and(|fault| fault.starts_with("set aside"))
}

/// The slot of the volume in the store: slots are given in the order of attaching.
fn slot(host: &Host) -> Result<u16, KillError> {
    let log = host.log();
    let at = |name: &str| {
        let is_its = |line: &str| {
            line.contains("volume attached") && line.ends_with(&format!("socket={name}"))
        };
        log.lines().position(is_its)
    };
    match (at(KILLER), at(OTHER)) {
        (Some(killer), Some(other)) => Ok(u16::from(killer > other)),
        _ => Err(wrong("the volumes were not attached")),
    }
}

/// A frontend of the volume, which sends requests and takes no answers.
struct Frontend {
    disk: Disk,
    next: u16,
}

impl Frontend {
    fn connect(host: &Host) -> Result<Self, KillError> {
        let disk = Disk::attach(&host.socket(KILLER), &Options::default());
        let mut disk = disk.map_err(|e| wrong(format!("{KILLER}: {e}")))?;
        let read = disk.read(0, 0, 4096);
        read.map_err(|e| wrong(format!("{KILLER} is not served: {e}")))?;
        Ok(Self { disk, next: 1 })
    }

    fn ask(&mut self) -> Result<(), KillError> {
        let request = Request {
            kind: kind::IN,
            sector: 0,
            segments: vec![(DATA, 4096)],
        };
        let slot = self.next;
        self.next = 1 + slot % SLOTS;
        let asked = self.disk.push(0, slot, &request);
        asked
            .and_then(|()| self.disk.publish(0))
            .map_err(|e| wrong(format!("a request to {KILLER}: {e}")))
    }
}

/// Everything that the scenario acts on.
struct Scenario<'a> {
    host: &'a Host,
    load: &'a mut Load,
    victim: Child<'a>,
    slot: u16,
    away: Away,
}

impl Scenario<'_> {
    /// The data plane dies of the volume until that is set aside; the other one comes back each time.
    fn kill_until_aside(&mut self, frontend: &mut Frontend) -> Result<(), KillError> {
        let deadline = Instant::now() + PATIENCE;
        for death in 1..=DEATHS {
            let (switch, pid) = self.victim.switch()?;
            switch.arm_for(POINT, self.slot)?;
            let mut asked = None;
            while is_alive(pid) {
                if asked.is_none_or(|at: Instant| at.elapsed() > AGAIN) {
                    frontend.ask()?;
                    asked = Some(Instant::now());
                }
                if Instant::now() > deadline {
                    return Err(KillError::NotReached(POINT));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            self.victim.has_died();
            self.load.killed(Instant::now());
            self.away.kills += 1;
            if death == DEATHS {
                self.load.wait_back(BACK_PATIENCE)?;
            }
        }
        self.host.wait_until("it is not set aside", is_aside)?;
        Ok(())
    }

    /// It is served as before.
    fn comes_back(&self) -> Result<Frontend, KillError> {
        self.host.wait_until("it stays set aside", |host| {
            host.status().is_ok() && fault(host).is_none()
        })?;
        Frontend::connect(self.host)
    }

    fn apply(&self, epoch: u64, volumes: &[&str]) -> Result<(), KillError> {
        let envelope = self.host.sign(&BundleSpec::new(epoch, volumes))?;
        self.host.apply(&envelope)?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), KillError> {
        let mut frontend = Frontend::connect(self.host)?;
        self.kill_until_aside(&mut frontend)?;
        // A death that is nobody's fault changes nothing.
        self.load.killed(self.victim.kill()?);
        self.away.kills += 1;
        self.load.wait_back(BACK_PATIENCE)?;
        self.host.wait_until("it was forgotten", is_aside)?;
        self.apply(2, &[OTHER])?;
        self.apply(3, &[OTHER, KILLER])?;
        let mut frontend = self.comes_back()?;
        self.kill_until_aside(&mut frontend)?;
        self.host.upgrade("dataplane", 1)?;
        self.comes_back()?;
        Ok(())
    }
}

/// A volume kills; the load of the one beside it goes on.
#[must_use]
pub fn a_volume_that_kills(what: &str) -> Row {
    let scene = Scene {
        disks: 1,
        spare: true,
        own_binaries: true,
        size: "2MiB",
        ..Scene::default()
    };
    on_host(what, &scene, |host, load, _| {
        let mut scenario = Scenario {
            slot: slot(host)?,
            victim: Child::data_plane(host),
            host,
            load,
            away: Away::default(),
        };
        scenario.run()?;
        Ok(scenario.away)
    })
}
