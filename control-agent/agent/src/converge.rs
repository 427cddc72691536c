//! A convergence pass: steps taken one after the other until none is due, each failure kept as
//! pending with its reason. A peer that does not answer is not asked again in the same pass.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::Instant;

use bulkhead_bundle::{HostBundle, SocketSpec};
use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::control::{AgentToDataplane, VolumeStatus};
use bulkhead_protocol::keys::AgentToKeyd;
use bulkhead_protocol::rot::ToRot;
use bulkhead_protocol::{SocketName, VolumeId, envelope};

use crate::agent::{Agent, Job, Outcome};
use crate::message::{Action, Answer, ClientId, Peer};
use crate::step::{self, Step};
use crate::text::first_lines;

/// A pass.
#[derive(Debug, Default)]
pub(crate) struct Pass {
    current: Option<Step>,
    failed: BTreeMap<Step, String>,
    silent: BTreeSet<Peer>,
    /// Whether anything was done.
    busy: bool,
    /// The data plane refused a volume.
    grant_again: bool,
    /// For whom, and what was done before.
    operator: Option<(ClientId, Vec<String>)>,
}

/// How a step began.
enum Begun {
    /// Its answer is waited for.
    Asked,
    /// There was nothing to ask.
    Done,
}

impl Pass {
    /// What failed because of a peer's earlier generation is due again.
    pub(crate) fn peer_is_back(&mut self, peer: Peer) {
        self.silent.remove(&peer);
        self.failed.retain(|step, _| step.peer() != peer);
    }

    fn lines(self, bundle: Option<&bulkhead_bundle::HostBundle>) -> Vec<String> {
        let line = |(step, reason): (Step, String)| format!("{}: {reason}", step.describe(bundle));
        self.failed.into_iter().map(line).collect()
    }
}

impl Agent {
    /// Starts a pass; `operator` waits for its end, with lines on what happened already.
    pub(crate) fn start_pass(&mut self, now: Instant, operator: Option<(ClientId, Vec<String>)>) {
        self.job = Job::Pass(Pass {
            busy: operator.is_some(),
            operator,
            ..Pass::default()
        });
        self.run_pass(now);
    }

    /// How the current step's question ended.
    pub(crate) fn pass_outcome(&mut self, now: Instant, peer: Peer, outcome: Outcome) {
        let Job::Pass(pass) = &mut self.job else {
            return;
        };
        let Some(step) = pass.current.take() else {
            return;
        };
        if matches!(outcome, Outcome::Silent) {
            pass.silent.insert(peer);
        }
        // Whatever grant it lacks: keyd sends them all again in the next pass.
        pass.grant_again |= matches!(
            (&step, &outcome),
            (
                Step::Attach(_) | Step::AttachNic(_) | Step::AttachSwitch(_),
                Outcome::Answer(Answer::Refused(_))
            )
        );
        let result = match outcome {
            Outcome::Answer(answer) => self.step_answered(&step, answer),
            Outcome::PeerGone => Err(format!("{peer} ended before it answered")),
            Outcome::Silent => Err("no answer in time".to_owned()),
        };
        if let (Job::Pass(pass), Err(reason)) = (&mut self.job, result) {
            pass.failed.insert(step, reason);
        }
        self.run_pass(now);
    }

    /// Takes steps until one has to wait for its answer, or none is due.
    fn run_pass(&mut self, now: Instant) {
        loop {
            let Job::Pass(pass) = &mut self.job else {
                return;
            };
            let Some(step) = step::next(&self.known, self.store.unfinished(), &pass.failed) else {
                return self.finish_pass(now);
            };
            let peer = step.peer();
            pass.busy = true;
            pass.current = Some(step.clone());
            let begun = if pass.silent.contains(&peer) {
                Err(format!("{peer} does not answer"))
            } else if self.is_there(peer) {
                self.begin(now, &step)
            } else {
                Err(format!("{peer} is not there; rot starts it again"))
            };
            if matches!(begun, Ok(Begun::Asked)) {
                return;
            }
            if let Job::Pass(pass) = &mut self.job {
                pass.current = None;
                if let Err(reason) = begun {
                    pass.failed.insert(step, reason);
                }
            }
        }
    }

    fn finish_pass(&mut self, now: Instant) {
        let Job::Pass(mut pass) = mem::replace(&mut self.job, Job::Idle) else {
            return;
        };
        let operator = pass.operator.take();
        let busy = pass.busy;
        self.known.granted &= !pass.grant_again;
        // What is attached may not be what it was taken for: an interface may be in use because it is the NIC's.
        let is_of_networks =
            |step: &Step| matches!(step, Step::AttachNic(_) | Step::AttachSwitch(_));
        if pass.failed.keys().any(is_of_networks) {
            self.known.networks = None;
        }
        let bundle = self.known.accepted.as_ref().map(|s| &*s.bundle);
        let pending = pass.lines(bundle);
        let epoch = bundle.map_or(0, |bundle| bundle.epoch);
        if busy && pending.is_empty() && self.known.accepted.is_some() {
            // Exactly these words are waited for by whoever watches the log.
            tracing::info!(epoch, "bundle applied");
        }
        let reply = operator.map(|(client, steps)| {
            let reply = AdminReply::Applied {
                epoch,
                steps: first_lines(steps),
                pending: first_lines(pending.clone()),
            };
            (client, reply)
        });
        self.schedule(now, pending);
        self.end_job(reply);
    }

    /// Puts a step's question.
    fn begin(&mut self, now: Instant, step: &Step) -> Result<Begun, String> {
        let peer = step.peer();
        match step {
            Step::Decide | Step::Accept => {
                if *step == Step::Accept && !self.is_there(Peer::Dataplane) {
                    return Err("the data plane is not there to take the grants".to_owned());
                }
                let envelope = self.envelope_of(step)?;
                self.ask(now, peer, |request_id| {
                    Action::Keyd(AgentToKeyd::Accept { request_id }, envelope)
                });
            }
            Step::Unbind(name) => {
                let name = name.clone();
                self.ask(now, peer, |request_id| {
                    Action::Rot(ToRot::Unbind { request_id, name })
                });
            }
            Step::Bind(name) => {
                let socket = self.listener(name)?.clone();
                self.ask(now, peer, |request_id| {
                    Action::Rot(ToRot::Bind {
                        request_id,
                        name: socket.name,
                        uid: socket.uid,
                        gid: socket.gid,
                        mode: socket.mode,
                    })
                });
            }
            Step::Attach(id) => self.begin_attach(now, *id)?,
            Step::AttachSwitch(name) => self.begin_attach_switch(now, name)?,
            Step::AttachNic(id) => self.begin_attach_nic(now, *id)?,
            Step::Mirror(id) => self.begin_mirror(now, *id)?,
            Step::SurveyNetworks => {
                self.ask_dataplane(now, |request_id| AgentToDataplane::Networks { request_id })
            }
            Step::Survey => {
                self.ask_dataplane(now, |request_id| AgentToDataplane::Status { request_id })
            }
            Step::Detach(volume) => {
                let volume = *volume;
                if !self
                    .known
                    .attached
                    .as_ref()
                    .is_some_and(|a| a.contains(&volume))
                {
                    return self.detached(volume).map(|()| Begun::Done);
                }
                self.ask_dataplane(now, |request_id| AgentToDataplane::Detach {
                    request_id,
                    id: volume.into(),
                });
            }
            Step::Cancel(id) => {
                let id = *id;
                self.ask_dataplane(now, |request_id| AgentToDataplane::CancelRemove {
                    request_id,
                    id,
                });
            }
        }
        Ok(Begun::Asked)
    }

    /// Puts a question without a descriptor to the data plane.
    pub(crate) fn ask_dataplane(
        &mut self,
        now: Instant,
        make: impl FnOnce(u64) -> AgentToDataplane,
    ) {
        self.ask(now, Peer::Dataplane, |id| {
            Action::Dataplane(make(id), Vec::new())
        });
    }

    fn envelope_of(&self, step: &Step) -> Result<std::os::fd::OwnedFd, String> {
        let stored = match step {
            Step::Decide => &self.known.candidate,
            _ => &self.known.accepted,
        };
        let stored = stored.as_ref().ok_or("there is no bundle")?;
        envelope::to_memfd(&stored.envelope).map_err(|error| error.to_string())
    }

    fn listener(&self, name: &SocketName) -> Result<&SocketSpec, String> {
        let bundle = self.known.accepted.as_ref().map(|stored| &*stored.bundle);
        let mut sockets = bundle.into_iter().flat_map(HostBundle::sockets);
        sockets
            .find(|(_, socket)| socket.name == *name)
            .map(|(_, socket)| socket)
            .ok_or_else(|| "nothing has it".to_owned())
    }

    /// Sends the volume's file, opened when the bundle was taken in or now. Nothing of it stays here.
    fn begin_attach(&mut self, now: Instant, id: VolumeId) -> Result<(), String> {
        let bundle = self.known.accepted.as_ref().map(|stored| &stored.bundle);
        let volume = bundle
            .and_then(|bundle| bundle.volume(id))
            .ok_or("it is not in the bundle")?;
        let socket = volume.socket.name.clone();
        let file = match self.known.files.remove(&id) {
            Some(file) => file,
            None => self
                .host
                .directories
                .open_volume(volume)
                .map_err(|error| error.to_string())?,
        };
        let descriptor = file.into_descriptor();
        self.ask(now, Peer::Dataplane, |request_id| {
            let message = AgentToDataplane::Attach {
                request_id,
                volume: id,
                socket,
            };
            Action::Dataplane(message, vec![descriptor])
        });
        Ok(())
    }

    /// Records what an answer says; an answer of another kind than the question's is a refusal.
    fn step_answered(&mut self, step: &Step, answer: Answer) -> Result<(), String> {
        match (step, answer) {
            (
                Step::Decide,
                Answer::Accepted {
                    epoch, undelivered, ..
                },
            ) => self.candidate_accepted(epoch, undelivered),
            (Step::Decide, Answer::Refused(reason)) => self.candidate_refused(&reason),
            (
                Step::Accept,
                Answer::Accepted {
                    epoch, undelivered, ..
                },
            ) => {
                let ours = self.known.accepted.as_ref().map(|s| s.bundle.epoch);
                if ours != Some(epoch) {
                    return Err(format!("keyd says that it accepted epoch {epoch}"));
                }
                self.take_grants(undelivered)
            }
            // Nothing was prepared: so much the better.
            (Step::Cancel(id), Answer::Done | Answer::Refused(_)) => {
                self.known.cancel.remove(id);
                Ok(())
            }
            (_, Answer::Refused(reason)) => Err(reason),
            (Step::Survey, Answer::Volumes(volumes, _)) => {
                self.take_survey(&volumes);
                Ok(())
            }
            (Step::Bind(name), Answer::Done) => {
                let socket = self.listener(name)?.clone();
                self.known.bound.insert(name.clone(), socket);
                Ok(())
            }
            (Step::Detach(id), Answer::Done) => self.detached(*id),
            (Step::Detach(id), Answer::GivenUp(requests)) => {
                // Nothing is served, which is what was asked for. An attach is refused until they have ended,
                // and tried again.
                tracing::warn!(volume = %id, requests, "detached, with requests still with the kernel");
                self.detached(*id)
            }
            (Step::Attach(id), Answer::Done) => {
                self.known.attached.get_or_insert_default().insert(*id);
                Ok(())
            }
            (Step::SurveyNetworks, Answer::Networks(networks)) => {
                self.known.networks = Some(networks.into());
                Ok(())
            }
            (Step::AttachSwitch(name), Answer::Done) => {
                let networks = self.known.networks.get_or_insert_default();
                networks.switches.insert(name.clone());
                Ok(())
            }
            (Step::AttachNic(id), Answer::Done) => {
                self.known.networks.get_or_insert_default().nics.insert(*id);
                Ok(())
            }
            (Step::Mirror(id), Answer::Done) => {
                let networks = self.known.networks.get_or_insert_default();
                networks.mirrored.insert(*id);
                Ok(())
            }
            (Step::Unbind(name), Answer::Done) => self.unbound(name),
            (step, _) => Err(format!("{} gave an answer of another kind", step.peer())),
        }
    }

    fn take_survey(&mut self, volumes: &[VolumeStatus]) {
        let attached = volumes.iter().filter(|status| status.attached);
        self.known.attached = Some(attached.map(|status| status.volume).collect());
    }

    /// The mark goes before the volume is attached again: were it left, a crash would detach the
    /// volume once more, with a frontend connected.
    fn detached(&mut self, id: VolumeId) -> Result<(), String> {
        let mut unfinished = self.store.unfinished().clone();
        unfinished.detach.remove(&id);
        self.store
            .set_unfinished(unfinished)
            .map_err(|error| error.to_string())?;
        let attached = self.known.attached.as_mut();
        if attached.is_some_and(|attached| attached.remove(&id)) {
            // Its key was wiped with it, and comes back only with another grant. A grant that did not
            // suit the file it had may suit the one it gets.
            self.known.granted = false;
            if let Job::Pass(pass) = &mut self.job {
                pass.failed.remove(&Step::Accept);
            }
        }
        Ok(())
    }

    fn unbound(&mut self, name: &SocketName) -> Result<(), String> {
        self.known.bound.remove(name);
        let mut unfinished = self.store.unfinished().clone();
        unfinished.listeners.remove(name);
        self.store
            .set_unfinished(unfinished)
            .map_err(|error| error.to_string())
    }
}
