//! Taking in a bundle, up to the point of no return: verify, plan, open the files, have the data
//! plane prepare what goes, have keyd accept. Whoever refuses, everything before is undone and the
//! host is as it was. From the commit on, a convergence pass does the rest.
//!
//! If keyd was asked and gave no answer, nobody here knows whether it accepted. The envelope then
//! stays as the candidate, on disk, and the next passes ask until keyd says.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bulkhead_bundle::text::to_hex;
use bulkhead_bundle::{HostBundle, Policy, verify};
use bulkhead_protocol::ServedId;
use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::control::{AgentToDataplane, VolumeStatus};
use bulkhead_protocol::envelope::{read_capped, to_memfd};
use bulkhead_protocol::keys::{AgentToKeyd, Undelivered};

use crate::agent::{ACCEPT_TIME, Agent, Job, Outcome};
use crate::message::{Action, Answer, ClientId, Peer};
use crate::open_files::{self, Files};
use crate::plan::{Leaving, Plan, kind, refuse_shrinking};
use crate::ports::{self, Ports};
use crate::rekey;
use crate::store::Stored;
use crate::text::first_lines;

/// A bundle being taken in.
#[derive(Debug)]
pub(crate) struct Apply {
    client: ClientId,
    stored: Stored,
    plan: Plan,
    files: Files,
    ports: Ports,
    /// Volumes and NICs that the data plane was asked to prepare, the one being asked included.
    prepared: Vec<ServedId>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Which volumes does the data plane have?
    Survey,
    /// The first of these is being prepared.
    Prepare(VecDeque<Leaving>),
    /// keyd was asked, maybe several generations of it.
    Accept { decide_by: Instant },
}

impl Apply {
    /// When the operator is told that keyd's decision is not known.
    pub(crate) fn decide_by(&self) -> Option<Instant> {
        match self.phase {
            Phase::Accept { decide_by } => Some(decide_by),
            _ => None,
        }
    }
}

/// An envelope that passed everything which asks nobody.
struct Checked {
    stored: Stored,
    plan: Plan,
    files: Files,
    ports: Ports,
}

impl Agent {
    /// Begins with an operator's envelope; the files and the reply are all that a dry run makes.
    pub(crate) fn start_apply(
        &mut self,
        now: Instant,
        client: ClientId,
        dry_run: bool,
        envelope: &OwnedFd,
    ) {
        let checked = match self.check(envelope) {
            Ok(checked) => checked,
            Err(reason) => {
                tracing::warn!("bundle refused: {reason}");
                return self.reply(client, AdminReply::Refused { reason });
            }
        };
        let Checked {
            stored,
            plan,
            files,
            ports,
        } = checked;
        let again = self.store.last_digest() == Some(stored.bundle.digest());
        let mut steps = plan.describe(&stored.bundle);
        if dry_run {
            let reply = AdminReply::Applied {
                epoch: stored.bundle.epoch,
                steps: first_lines(steps),
                pending: Vec::new(),
            };
            return self.reply(client, reply);
        }
        if again && self.known.accepted.is_some() {
            steps = vec!["this bundle is in force already; nothing to change".to_owned()];
            return self.start_pass(now, Some((client, steps)));
        }
        self.job = Job::Apply(Box::new(Apply {
            client,
            stored,
            plan,
            files,
            ports,
            prepared: Vec::new(),
            phase: Phase::Survey,
        }));
        self.start_prepare(now);
    }

    /// Steps 1 to 4: nothing outside this process is changed.
    fn check(&self, envelope: &OwnedFd) -> Result<Checked, String> {
        if let Some(candidate) = &self.known.candidate {
            return Err(format!(
                "keyd has not said yet whether it accepted epoch {}: try again when \
                 `bulkhead status` shows that it has",
                candidate.bundle.epoch
            ));
        }
        let envelope = read_capped(envelope.as_fd()).map_err(|error| error.to_string())?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let policy = Policy {
            trust: &self.host.trust,
            host: &self.host.name,
            epoch_floor: self.store.floor_epoch(),
            last_digest: self.store.last_digest(),
            now: since_1970.map_or(0, |time| time.as_secs()),
        };
        let bundle = verify(&envelope, &policy).map_err(|error| error.to_string())?;
        let old = self.known.accepted.as_ref().map(|stored| &*stored.bundle);
        refuse_shrinking(old, &bundle)?;
        rekey::refuse_resizing(old, &bundle)?;
        let plan = Plan::between(old, &bundle);
        let files = open_files::open_new(
            &self.host.directories,
            old,
            &self.known.files,
            &bundle,
            &plan,
        )?;
        rekey::check_files(&self.host.directories, &bundle, &plan)?;
        self.refuse_mirrors(old, &bundle)?;
        let ports = ports::open_new(old, &bundle, &self.host.prepared)?;
        Ok(Checked {
            stored: Stored { bundle, envelope },
            plan,
            files,
            ports,
        })
    }

    /// Step 5 begins with what the data plane has: a volume it was never granted can't be in use.
    fn start_prepare(&mut self, now: Instant) {
        let Job::Apply(apply) = &self.job else { return };
        if apply.plan.leaving.is_empty() {
            return self.ask_keyd(now);
        }
        if self.is_there(Peer::Dataplane) {
            let ask = |request_id| AgentToDataplane::Status { request_id };
            return self.ask_dataplane(now, ask);
        }
        match apply.plan.leaving.iter().find(|leaving| !leaving.force) {
            None => self.ask_keyd(now),
            Some(leaving) => {
                let reason = format!(
                    "{} {}: whether it is in use can't be asked while the data plane is not \
                     there; try again when `bulkhead status` shows it, or set force_removal",
                    kind(leaving.id),
                    leaving.name
                );
                self.refuse(reason);
            }
        }
    }

    /// How the question of this phase ended.
    pub(crate) fn apply_outcome(&mut self, now: Instant, outcome: Outcome) {
        let Job::Apply(apply) = &mut self.job else {
            return;
        };
        let answer = match outcome {
            Outcome::Answer(answer) => answer,
            // The next generation of keyd is asked again, until the time is up.
            Outcome::PeerGone if apply.decide_by().is_some() => return,
            Outcome::Silent if apply.decide_by().is_some() => return self.leave_open(),
            Outcome::PeerGone => return self.refuse("the data plane ended meanwhile: try again"),
            Outcome::Silent => return self.refuse("the data plane did not answer: try again"),
        };
        match (&mut apply.phase, answer) {
            (Phase::Survey, Answer::Volumes(volumes, _)) => self.surveyed(now, &volumes),
            (Phase::Prepare(left), Answer::Done) => {
                left.pop_front();
                self.prepare_next(now);
            }
            (Phase::Prepare(left), Answer::Refused(reason)) => {
                let reason = left.front().map_or(reason.clone(), |l| in_use(l, &reason));
                self.refuse(reason);
            }
            (
                Phase::Accept { .. },
                Answer::Accepted {
                    epoch, undelivered, ..
                },
            ) => {
                self.accepted_by_keyd(now, epoch, undelivered);
            }
            (Phase::Accept { .. }, Answer::Refused(reason)) => self.refused_by_keyd(&reason),
            (Phase::Accept { .. }, _) => self.leave_open(),
            (Phase::Survey, Answer::Refused(reason)) => self.refuse(reason),
            _ => self.refuse("the data plane gave an answer of another kind"),
        }
    }

    fn surveyed(&mut self, now: Instant, volumes: &[VolumeStatus]) {
        let Job::Apply(apply) = &mut self.job else {
            return;
        };
        // A NIC that it has not is prepared at once.
        let has = |leaving: &&Leaving| match leaving.id {
            ServedId::Volume(id) => volumes.iter().any(|status| status.volume == id),
            ServedId::Nic(_) => true,
        };
        let leaving = apply.plan.leaving.iter().filter(has).cloned().collect();
        apply.phase = Phase::Prepare(leaving);
        self.prepare_next(now);
    }

    fn prepare_next(&mut self, now: Instant) {
        let Job::Apply(apply) = &mut self.job else {
            return;
        };
        let Phase::Prepare(left) = &apply.phase else {
            return;
        };
        let Some(leaving) = left.front() else {
            return self.ask_keyd(now);
        };
        let (id, force) = (leaving.id, leaving.force);
        apply.prepared.push(id);
        self.ask_dataplane(now, |request_id| AgentToDataplane::PrepareRemove {
            request_id,
            id,
            force,
        });
    }

    /// Step 6. The envelope is on disk before keyd hears of it.
    fn ask_keyd(&mut self, now: Instant) {
        if !self.is_there(Peer::Keyd) {
            return self.refuse("keyd is not there: try again when `bulkhead status` shows it");
        }
        let Job::Apply(apply) = &mut self.job else {
            return;
        };
        if let Err(error) = self.store.put_candidate(&apply.stored.envelope) {
            return self.refuse(format!("the bundle can't be kept: {error}"));
        }
        apply.phase = Phase::Accept {
            decide_by: now + ACCEPT_TIME,
        };
        self.send_accept(now);
    }

    fn send_accept(&mut self, now: Instant) {
        let Job::Apply(apply) = &self.job else { return };
        match to_memfd(&apply.stored.envelope) {
            Ok(envelope) => self.ask(now, Peer::Keyd, |request_id| {
                Action::Keyd(AgentToKeyd::Accept { request_id }, envelope)
            }),
            Err(error) => {
                tracing::error!("the envelope can't be handed to keyd: {error}");
                self.leave_open();
            }
        }
    }

    /// A restarted keyd is asked about the same envelope.
    pub(crate) fn apply_peer_back(&mut self, now: Instant, peer: Peer) {
        if let Job::Apply(apply) = &self.job
            && apply.decide_by().is_some()
            && peer == Peer::Keyd
            && self.question.is_none()
        {
            self.send_accept(now);
        }
    }

    /// keyd's time is up, whichever generation of it was asked.
    pub(crate) fn apply_overdue(&mut self, now: Instant) {
        if let Job::Apply(apply) = &self.job
            && apply.decide_by().is_some_and(|at| at <= now)
        {
            self.question = None;
            self.leave_open();
        }
    }

    /// Step 7, and on to the pass that takes the others.
    fn accepted_by_keyd(&mut self, now: Instant, epoch: u64, undelivered: Vec<Undelivered>) {
        let Some(apply) = self.take_apply() else {
            return;
        };
        let client = apply.client;
        if epoch != apply.stored.bundle.epoch {
            tracing::error!("keyd says that it accepted epoch {epoch}");
            self.job = Job::Apply(apply);
            return self.leave_open();
        }
        let mut steps = plan_and_keyd(&apply);
        steps.extend(self.told_of_key(&apply.stored.bundle));
        self.known.cancel.extend(&apply.prepared);
        self.known.candidate = Some(apply.stored);
        if let Err(error) = self.commit() {
            // keyd has it: there is no way back, and nothing else to wait for.
            let pending = vec![format!("keep it as the bundle in force: {error}")];
            self.want_pass();
            let applied = AdminReply::Applied {
                epoch,
                steps,
                pending,
            };
            return self.end_job(Some((client, applied)));
        }
        self.known.files.extend(apply.files);
        self.known.ports.extend(apply.ports);
        steps.push("kept as the bundle in force".to_owned());
        // What did not arrive is due as a step of the pass.
        let _ = self.take_grants(undelivered);
        self.start_pass(now, Some((client, steps)));
    }

    /// What became of the host's key, for the operator, where the bundle shreds a volume.
    fn told_of_key(&self, bundle: &HostBundle) -> Option<String> {
        let keys = self.known.keys.as_ref()?;
        let last = keys.shreds.iter().find(|s| s.epoch == bundle.epoch)?;
        let mut line = format!(
            "host key {} destroyed: volumes are sealed to {} from now on (`bulkhead host public`)",
            to_hex(&last.destroyed_key[..]),
            to_hex(&keys.fingerprint[..])
        );
        if let Some(reason) = &keys.unfinished {
            line = format!("host key replaced, but the old one may still be on the disk: {reason}");
        }
        Some(line)
    }

    fn refused_by_keyd(&mut self, reason: &str) {
        if let Err(error) = self.store.drop_candidate() {
            // Asked again at the next start, keyd refuses it again.
            tracing::error!("a refused bundle can't be removed: {error}");
        }
        self.refuse(format!("keyd refused the bundle: {reason}"));
    }

    /// Undoes everything, closes the files and tells the operator.
    fn refuse(&mut self, reason: impl Into<String>) {
        let Some(apply) = self.take_apply() else {
            return;
        };
        if self.is_there(Peer::Dataplane) {
            for id in apply.prepared {
                let request_id = self.fresh_id();
                let cancel = AgentToDataplane::CancelRemove { request_id, id };
                self.act(Action::Dataplane(cancel, Vec::new()));
            }
        }
        let reason = reason.into();
        tracing::warn!("bundle refused: {reason}");
        self.end_job(Some((apply.client, AdminReply::Refused { reason })));
    }

    /// keyd may have accepted: neither done nor undone until it says.
    fn leave_open(&mut self) {
        let Some(apply) = self.take_apply() else {
            return;
        };
        let reason = format!(
            "keyd gave no answer: whether it accepted epoch {} is not known. It is asked until it \
             says, and the bundle is then completed or dropped; look at `bulkhead status`",
            apply.stored.bundle.epoch
        );
        tracing::warn!("{reason}");
        self.known.cancel.extend(&apply.prepared);
        self.known.candidate = Some(apply.stored);
        self.want_pass();
        self.end_job(Some((apply.client, AdminReply::Open { reason })));
    }

    fn take_apply(&mut self) -> Option<Box<Apply>> {
        match mem::replace(&mut self.job, Job::Idle) {
            Job::Apply(apply) => Some(apply),
            other => {
                self.job = other;
                None
            }
        }
    }
}

/// Why something can't go, for the operator.
fn in_use(leaving: &Leaving, reason: &str) -> String {
    let (kind, name) = (kind(leaving.id), &leaving.name);
    let list = match leaving.id {
        ServedId::Volume(_) => "force_remove",
        ServedId::Nic(_) => "force_remove_nics",
    };
    format!(
        "{kind} {name} is in use and can't be removed or changed ({reason}): disconnect its frontend, or sign \
         the bundle with force_removal = true for the {kind} (one that goes: name it in {list})"
    )
}

fn plan_and_keyd(apply: &Apply) -> Vec<String> {
    let signers = apply.stored.bundle.signers().join(", ");
    let mut steps = vec![format!("verified: signed by {signers}")];
    steps.extend(apply.plan.describe(&apply.stored.bundle));
    steps.push("accepted by keyd".to_owned());
    steps
}
