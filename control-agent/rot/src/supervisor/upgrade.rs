//! Upgrades, one at a time: each of a binary that keyd approved, each undone if it fails.
//!
//! The data plane is upgraded live, by a candidate beside it (the steps stand in
//! [`bulkhead_protocol::rot`]). keyd and agent touch no I/O: they are stopped and started from the
//! new binary, and from the old one again if that says no `Hello`. rot itself: [`super::replacing`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::release::{Component, Release};
use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use nix::poll::PollFlags;

use super::Supervisor;
use crate::binary::MeasuredBinary;
use crate::child::Child;
use crate::children::Seat;
use crate::programs::{Loader, Program, hex};
use crate::stores::Change;

/// How long the data plane may take from Freeze to Frozen. It drains: guests wait meanwhile.
const FREEZE_WITHIN: Duration = Duration::from_secs(1);
/// How long keyd and agent may take to stop.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// Where an upgrade stands.
#[derive(Debug)]
enum Step {
    /// The candidate prepares itself.
    Preparing,
    /// The old data plane was told to freeze.
    Freezing { by: Instant, attempt: u64 },
    /// The candidate was told to go, and has the data plane's seat.
    TakingOver { previous: Program },
    /// keyd or agent was told to stop; what starts next is new.
    Restarting {
        previous: Program,
        /// Generation of the process that stops.
        old: u64,
        /// When that is killed.
        by: Instant,
    },
}

/// An upgrade that is not over.
#[derive(Debug)]
struct Upgrade {
    release: Release,
    request_id: u64,
    /// Generation of the agent that asked: another did not.
    agent: u64,
    step: Step,
}

/// The one that is under way, and what came of those before.
#[derive(Debug)]
pub(super) struct Upgrades {
    pub(super) loader: Loader,
    approved: BTreeMap<Component, Release>,
    /// The number of the last attempt to freeze a data plane.
    attempts: u64,
    under_way: Option<Upgrade>,
    /// What was upgraded to.
    pub(super) runs: BTreeMap<Component, Release>,
    /// Why the last one came to nothing.
    pub(super) failed: BTreeMap<Component, String>,
    /// The request that is answered as soon as this rot supervises.
    pub(super) replaced_for: Option<u64>,
}

impl Upgrades {
    pub(super) fn new(loader: Loader) -> Self {
        Self {
            loader,
            approved: BTreeMap::new(),
            attempts: first_attempt(),
            under_way: None,
            runs: BTreeMap::new(),
            failed: BTreeMap::new(),
            replaced_for: None,
        }
    }

    /// When [`Supervisor::upgrade_overdue`] has something to do.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        match self.under_way.as_ref()?.step {
            Step::Freezing { by, .. } | Step::Restarting { by, .. } => Some(by),
            Step::Preparing | Step::TakingOver { .. } => None,
        }
    }

    fn is_freezing(&self) -> bool {
        let step = self.under_way.as_ref().map(|upgrade| &upgrade.step);
        matches!(step, Some(Step::Freezing { .. }))
    }

    /// Whether an answer is that of the attempt under way. One without a number counts, too: it is of a version that had none.
    fn is_of_attempt(&self, answered: Option<u64>) -> bool {
        match self.under_way.as_ref().map(|upgrade| &upgrade.step) {
            Some(Step::Freezing { attempt, .. }) => {
                answered.is_none_or(|number| number == *attempt)
            }
            _ => false,
        }
    }
}

/// A number that no rot before this one has used.
fn first_attempt() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs() << 20)
}

/// Is it what was released?
///
/// # Errors
/// Says what it is, for the operator.
pub(super) fn is_released(binary: &MeasuredBinary, release: &Release) -> Result<(), String> {
    if binary.measurement() == release.measurement {
        return Ok(());
    }
    Err(format!(
        "bulkhead-{} in --bin-dir is not what was released: it measures {}, version {} of the \
         release {}; install that, and try again",
        release.component,
        hex(&binary.measurement()),
        release.version,
        hex(&release.measurement)
    ))
}

impl Supervisor {
    /// keyd says that operators released a binary.
    pub(super) fn approve(&mut self, release: Release) {
        let (component, version) = (release.component, release.version);
        tracing::info!(%component, version, sha384 = hex(&release.measurement), "release approved");
        self.upgrades.approved.insert(component, release);
    }

    /// The agent's request. Once it is accepted the agent is told of the rest.
    pub(super) fn begin_upgrade(
        &mut self,
        component: Component,
        request_id: u64,
        now: Instant,
    ) -> Result<(), String> {
        if self.stop_by.is_some() {
            return Err("rot is stopping".to_owned());
        }
        if let Some(upgrade) = &self.upgrades.under_way {
            let other = upgrade.release.component;
            return Err(format!("an upgrade of {other} is under way: wait for it"));
        }
        // keyd said it before it answered the agent, but may not have been heard yet.
        self.on_channel(Seat::Of(Role::Keyd), PollFlags::POLLIN, now);
        let release = self.upgrades.approved.remove(&component);
        let release = release.ok_or_else(|| format!("keyd approved no release of {component}"))?;
        // keyd may have approved it before it heard of what runs by now.
        if let Some(runs) = self.upgrades.runs.get(&component)
            && runs.version > release.version
        {
            return Err(format!(
                "version {} of {component} is older than {}, which runs",
                release.version, runs.version
            ));
        }
        let Some(role) = component.role() else {
            return self.replace_rot(release, request_id, now);
        };
        let program = self.released(role, &release)?;
        let step = match role {
            Role::Dataplane => self.start_candidate(program, now)?,
            Role::Keyd | Role::Agent => self.restart_from(role, program, now)?,
        };
        let agent = self.children.get_mut(Role::Agent);
        self.upgrades.under_way = Some(Upgrade {
            release,
            request_id,
            agent: agent.generation(),
            step,
        });
        tracing::info!(%component, version = release.version, "upgrade begun");
        agent.send(FromRot::Upgrading { request_id }, Vec::new(), now);
        if role != Role::Dataplane {
            self.children
                .get_mut(role)
                .send(FromRot::Stop, Vec::new(), now);
        }
        Ok(())
    }

    /// The program that lies on the disk, if it is what was released.
    fn released(&self, role: Role, release: &Release) -> Result<Program, String> {
        let program = self.upgrades.loader.load(role);
        let program = program.map_err(|error| error.to_string())?;
        is_released(&program.binary, release)?;
        Ok(program)
    }

    fn start_candidate(&mut self, program: Program, now: Instant) -> Result<Step, String> {
        let old = self.children.get(Role::Dataplane);
        if !old.is_up() {
            return Err("the data plane does not run: wait until it does".to_owned());
        }
        let mut candidate = old.candidate(program, now);
        let stored = self.stores.stored(Role::Dataplane);
        candidate
            .start_as_candidate(&stored, now)
            .map_err(|error| format!("can't start the new data plane: {error}"))?;
        self.children.candidate = Some(candidate);
        Ok(Step::Preparing)
    }

    fn restart_from(&mut self, role: Role, program: Program, now: Instant) -> Result<Step, String> {
        let child = self.children.get_mut(role);
        if !child.is_up() {
            return Err(format!("{role} does not run: wait until it does"));
        }
        Ok(Step::Restarting {
            old: child.generation(),
            by: now + STOP_WITHIN,
            previous: child.replace_program(program),
        })
    }

    /// What the data plane stored or removed reaches the candidate too.
    pub(super) fn follow(&mut self, change: &Change, now: Instant) {
        let candidate = self.children.candidate.as_ref();
        let Some(keeper) = candidate.and_then(|c| c.running()?.keeper.as_ref()) else {
            return;
        };
        let sent = match change {
            Change::Nothing => Ok(()),
            Change::Removed(name) => keeper.hand_removal(*name),
            Change::Stored(name, fds) => {
                let entries = fds.iter().map(|fd| (*name, fd.as_fd()));
                keeper.hand_over(&entries.collect::<Vec<_>>())
            }
        };
        if let Err(error) = sent {
            let reason = format!("the new one does not follow what the old one stores: {error}");
            self.abort_upgrade(&reason, now);
        }
    }

    /// A message of the candidate's.
    pub(super) fn on_candidate(&mut self, message: &ToRot, now: Instant) {
        let upgrades = &mut self.upgrades;
        let step = upgrades.under_way.as_mut().map(|u| &mut u.step);
        let (ToRot::Ready, Some(step @ Step::Preparing)) = (message, step) else {
            let reason = "the new one did not keep to the order of an upgrade";
            return self.abort_upgrade(reason, now);
        };
        upgrades.attempts += 1;
        let attempt = upgrades.attempts;
        *step = Step::Freezing {
            by: now + FREEZE_WITHIN,
            attempt,
        };
        if let Some(candidate) = &mut self.children.candidate {
            candidate.is_ready(now);
        }
        let old = self.children.get_mut(Role::Dataplane);
        let attempt = Some(attempt);
        old.send(FromRot::Freeze { attempt }, Vec::new(), now);
    }

    /// The data plane serves nothing any more: the candidate takes over.
    pub(super) fn on_frozen(&mut self, attempt: Option<u64>, now: Instant) {
        if !self.upgrades.is_of_attempt(attempt) {
            let child = self.children.get_mut(Role::Dataplane);
            return child.complain("it froze, and nobody wanted that");
        }
        // All that it stored before it said so.
        self.on_store(Seat::Of(Role::Dataplane), super::LEFT_BEHIND, now);
        let ended = self
            .children
            .candidate
            .as_ref()
            .is_none_or(Child::has_ended);
        if ended {
            return self.abort_upgrade("the new one ended before it took over", now);
        }
        let Some(upgrade) = self.upgrades.under_way.as_mut() else {
            return;
        };
        let previous = self.children.get(Role::Dataplane).program().clone();
        upgrade.step = Step::TakingOver { previous };
        self.children.take_over();
        let new = self.children.get_mut(Role::Dataplane);
        new.takes_over(now);
        new.send(FromRot::Go, Vec::new(), now);
    }

    /// The data plane goes on serving.
    pub(super) fn on_cant_freeze(&mut self, reason: &str, attempt: Option<u64>, now: Instant) {
        if self.upgrades.is_of_attempt(attempt) {
            let reason = plain(reason);
            self.abort_upgrade(&format!("the old one can't freeze: {reason}"), now);
        }
    }

    /// A child said its `Hello`.
    pub(super) fn up_in_upgrade(&mut self, role: Role, now: Instant) {
        let generation = self.children.get(role).generation();
        let is_new = |upgrade: &mut Upgrade| match upgrade.step {
            Step::TakingOver { .. } => role == Role::Dataplane,
            Step::Restarting { old, .. } => {
                upgrade.release.component == role.into() && generation > old
            }
            Step::Preparing | Step::Freezing { .. } => false,
        };
        let Some(upgrade) = self.upgrades.under_way.take_if(is_new) else {
            return;
        };
        let (component, version) = (upgrade.release.component, upgrade.release.version);
        if let Some(pid) = self.children.get(role).pid() {
            tracing::info!(%role, pid, generation, "runs in the place of the one before");
        }
        tracing::info!(%component, version, "upgraded");
        for old in &mut self.children.retired {
            old.kill("another has taken over from it");
        }
        self.upgrades.failed.remove(&component);
        self.upgrades.runs.insert(component, upgrade.release);
        let request_id = upgrade.request_id;
        self.answer(&upgrade, FromRot::Upgraded { request_id }, now);
        self.tell_keyd_what_runs(now);
        self.tell_programs(now);
    }

    /// The process of a role ended.
    pub(super) fn ended_in_upgrade(&mut self, role: Role, how: &str, now: Instant) {
        let generation = self.children.get(role).generation();
        let Some(upgrade) = &self.upgrades.under_way else {
            return;
        };
        match &upgrade.step {
            Step::Preparing | Step::Freezing { .. } if role == Role::Dataplane => {
                self.abort_upgrade(&format!("the old one ended meanwhile: {how}"), now);
            }
            Step::TakingOver { previous } if role == Role::Dataplane => {
                let previous = previous.clone();
                self.go_back(role, previous, how, now);
            }
            Step::Restarting { previous, old, .. }
                if upgrade.release.component == role.into() && generation > *old =>
            {
                let previous = previous.clone();
                self.go_back(role, previous, how, now);
            }
            _ => {}
        }
    }

    /// The new process of a role ended before its `Hello`: the old binary is started again.
    fn go_back(&mut self, role: Role, previous: Program, how: &str, now: Instant) {
        self.children.get_mut(role).replace_program(previous);
        for old in &mut self.children.retired {
            old.kill("the one that took over from it ended");
        }
        let reason = format!("the new one ended before it was up: {how}; the old one is started");
        self.fail_upgrade(&reason, now);
    }

    /// Ends an upgrade that has not changed anything yet.
    pub(super) fn abort_upgrade(&mut self, reason: &str, now: Instant) {
        let begun = |u: &Upgrade| matches!(u.step, Step::Preparing | Step::Freezing { .. });
        if !self.upgrades.under_way.as_ref().is_some_and(begun) {
            return;
        }
        if let Some(mut candidate) = self.children.candidate.take() {
            candidate.kill("the upgrade came to nothing");
            self.children.retired.push(candidate);
        }
        if self.upgrades.is_freezing() {
            let old = self.children.get_mut(Role::Dataplane);
            old.send(FromRot::Thaw, Vec::new(), now);
        }
        self.fail_upgrade(reason, now);
    }

    fn fail_upgrade(&mut self, reason: &str, now: Instant) {
        let Some(upgrade) = self.upgrades.under_way.take() else {
            return;
        };
        let component = upgrade.release.component;
        tracing::error!(%component, version = upgrade.release.version, "the upgrade came to nothing: {reason}");
        self.upgrades.failed.insert(component, reason.to_owned());
        let failed = FromRot::Failed {
            request_id: upgrade.request_id,
            reason: reason.to_owned(),
        };
        self.answer(&upgrade, failed, now);
        self.tell_programs(now);
    }

    /// What has taken too long.
    pub(super) fn upgrade_overdue(&mut self, now: Instant) {
        let Some(upgrade) = &mut self.upgrades.under_way else {
            return;
        };
        match &mut upgrade.step {
            Step::Freezing { by, .. } if *by <= now => {
                self.abort_upgrade(
                    "the old one did not freeze in time: is its storage slow?",
                    now,
                );
            }
            Step::Restarting { old, by, .. } if *by <= now => {
                *by = now + STOP_WITHIN;
                let role = upgrade.release.component.role();
                let child = role.map(|role| self.children.get_mut(role));
                if let Some(child) = child.filter(|child| child.generation() == *old) {
                    child.kill("it did not stop in time");
                }
            }
            _ => {}
        }
    }

    fn answer(&mut self, upgrade: &Upgrade, answer: FromRot, now: Instant) {
        let agent = self.children.get_mut(Role::Agent);
        if agent.generation() == upgrade.agent && agent.is_up() {
            agent.send(answer, Vec::new(), now);
        }
    }
}

/// What a child says, as it may stand in a log and in a message to the agent, however it is meant.
fn plain(text: &str) -> String {
    /// Characters; a message has room for many times as many.
    const MOST: usize = 500;
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MOST).map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn what_a_child_says_is_cut_and_made_plain() {
        assert_eq!(plain("not\nnow\u{1b}[2J"), "not now [2J");
        assert_eq!(plain(&"x".repeat(190 << 10)).len(), 500);
    }
}
