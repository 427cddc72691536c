//! The upgrade of rot itself, in place: another binary is executed in this process, which keeps its
//! children, their channels and all that is stored. And what keyd and the agent are told of upgrades.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use bulkhead_protocol::release::{Component, ProgramStatus, Release};
use bulkhead_protocol::rot::{FromRot, Role};

use super::Supervisor;
use super::upgrade::is_released;
use crate::binary::MeasuredBinary;
use crate::handoff::{HANDOFF_ENV, Handoff, Leaving, TRY_ENV};
use crate::replace::Image;

/// How long the new rot may take to show that it can take over. Children that end meanwhile wait.
const TRY_WITHIN: Duration = Duration::from_secs(5);
/// The log filter is all of the environment that the new rot gets.
const LOG_ENV: &str = "BULKHEAD_LOG";

impl Supervisor {
    /// Executes the released rot in the place of this one. Returns only if that fails; everything
    /// goes on then.
    pub(super) fn replace_rot(
        &mut self,
        release: Release,
        request_id: u64,
        now: Instant,
    ) -> Result<(), String> {
        let binary = self.upgrades.loader.load_rot();
        let binary = binary.map_err(|error| error.to_string())?;
        is_released(&binary, &release)?;
        if self.children.candidate.is_some() || !self.children.retired.is_empty() {
            return Err("the last upgrade is not quite over: try again".to_owned());
        }
        let agent = self.children.get_mut(Role::Agent);
        agent.send(FromRot::Upgrading { request_id }, Vec::new(), now);
        let failed = self.execute_rot(&binary, release, request_id);
        let reason = failed.err().unwrap_or_else(|| "it returned".to_owned());
        let reason = format!("the new rot can't take over: {reason}");
        tracing::error!(version = release.version, "{reason}");
        self.upgrades.failed.insert(Component::Rot, reason.clone());
        self.tell_programs(now);
        Err(reason)
    }

    fn execute_rot(
        &self,
        binary: &MeasuredBinary,
        release: Release,
        request_id: u64,
    ) -> Result<(), String> {
        let mut leaving = Leaving::default();
        let handoff = self.leave(&mut leaving, release, request_id)?;
        let text = |error: io::Error| error.to_string();
        let handoff = handoff.write().map_err(text)?;
        leaving.number(handoff.as_fd());
        let mut image = self.image(binary, handoff.as_raw_fd()).map_err(text)?;
        let mut tried = image.environment.clone();
        tried.push(CString::new(format!("{TRY_ENV}=1")).map_err(|e| e.to_string())?);
        std::mem::swap(&mut image.environment, &mut tried);
        leaving
            .while_open(|| image.try_out(TRY_WITHIN))
            .map_err(text)?;
        std::mem::swap(&mut image.environment, &mut tried);
        leaving
            .while_open(|| Err(image.replace_this()))
            .map_err(text)
    }

    fn leave<'a>(
        &'a self,
        leaving: &mut Leaving<'a>,
        release: Release,
        request_id: u64,
    ) -> Result<Handoff, String> {
        let lock = leaving.number(self.own.lock.as_fd());
        let admin = leaving.number(self.own.admin.as_fd());
        let mut handoff = Handoff::new(lock, admin, request_id);
        for child in self.children.of_roles() {
            handoff.children.push(child.leave(leaving)?);
        }
        handoff.listeners = self.listeners.leave(leaving);
        self.stores.leave(leaving, &mut handoff)?;
        let mut runs = self.upgrades.runs.clone();
        runs.insert(Component::Rot, release);
        handoff.runs = runs.into_values().collect();
        let failed = self.upgrades.failed.iter();
        let others = failed.filter(|(component, _)| **component != Component::Rot);
        handoff.failed = others.map(|(c, reason)| (*c, reason.clone())).collect();
        Ok(handoff)
    }

    fn image<'a>(&self, binary: &'a MeasuredBinary, handoff: i32) -> io::Result<Image<'a>> {
        let words = self.upgrades.loader.arguments().to_words();
        let words = words.iter().map(|word| CString::new(word.as_bytes()));
        let arguments: Result<_, _> = std::iter::once(CString::new("bulkhead-rot"))
            .chain(words)
            .collect();
        let mut environment = vec![CString::new(format!("{HANDOFF_ENV}={handoff}"))?];
        if let Some(filter) = std::env::var_os(LOG_ENV) {
            let entry = [LOG_ENV.as_bytes(), b"=", filter.as_bytes()].concat();
            environment.push(CString::new(entry)?);
        }
        Ok(Image {
            binary: binary.as_fd(),
            arguments: arguments?,
            environment,
        })
    }

    /// Takes up what the rot before this one had come to: this one is its upgrade.
    pub fn goes_on(
        &mut self,
        runs: Vec<Release>,
        failed: Vec<(Component, String)>,
        request_id: u64,
    ) {
        let runs = runs.into_iter();
        self.upgrades.runs = runs.map(|release| (release.component, release)).collect();
        self.upgrades.failed = failed.into_iter().collect();
        self.upgrades.replaced_for = Some(request_id);
    }

    /// The first thing that a rot does which was executed in the place of another.
    pub(super) fn tell_of_replacement(&mut self, now: Instant) {
        let Some(request_id) = self.upgrades.replaced_for.take() else {
            return;
        };
        if let Some(release) = self.upgrades.runs.get(&Component::Rot) {
            tracing::info!(component = %release.component, version = release.version, "upgraded");
        }
        let agent = self.children.get_mut(Role::Agent);
        if agent.is_up() {
            agent.send(FromRot::Upgraded { request_id }, Vec::new(), now);
        }
        self.tell_keyd_what_runs(now);
        self.tell_programs(now);
    }

    /// keyd keeps what is the oldest that may run.
    pub(super) fn tell_keyd_what_runs(&mut self, now: Instant) {
        let keyd = self.children.get_mut(Role::Keyd);
        if keyd.is_up() {
            for release in self.upgrades.runs.values() {
                keyd.send(FromRot::Runs { release: *release }, Vec::new(), now);
            }
        }
    }

    /// The agent tells operators what runs.
    pub(super) fn tell_programs(&mut self, now: Instant) {
        let of_role = |role: Role| {
            let component = Component::from(role);
            ProgramStatus {
                component,
                measurement: self.children.get(role).program().binary.measurement(),
                version: self.upgrades.runs.get(&component).map(|r| r.version),
                failed: self.upgrades.failed.get(&component).cloned(),
            }
        };
        let mut programs: Vec<ProgramStatus> = Role::ALL.map(of_role).into();
        programs.push(ProgramStatus {
            component: Component::Rot,
            measurement: self.upgrades.loader.own(),
            version: self.upgrades.runs.get(&Component::Rot).map(|r| r.version),
            failed: self.upgrades.failed.get(&Component::Rot).cloned(),
        });
        let agent = self.children.get_mut(Role::Agent);
        if agent.is_up() {
            agent.send(FromRot::Programs { programs }, Vec::new(), now);
        }
    }
}
