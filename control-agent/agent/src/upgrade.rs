//! An upgrade for an operator: keyd verifies the release statement and tells rot, rot carries it
//! out, and the operator hears how it ended. The agent decides nothing here.
//!
//! It runs beside the agent's one job: the peers that an upgrade replaces come back in the middle of
//! it, and are to be served then.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::keys::AgentToKeyd;
use bulkhead_protocol::release::{Component, Release};
use bulkhead_protocol::rot::ToRot;

use crate::agent::{Agent, Question};
use crate::message::{Action, Answer, ClientId, Peer};

/// How long keyd may take to verify a statement. A bundle that is being delivered goes first.
const CHECK_TIME: Duration = Duration::from_secs(25);
/// How long rot may take: more than it gives a new data plane to prepare itself.
const UPGRADE_TIME: Duration = Duration::from_secs(140);

/// An upgrade that is not over.
#[derive(Debug)]
pub(crate) struct Upgrade {
    client: ClientId,
    /// What keyd or rot was asked.
    pub(crate) question: Question,
    /// What keyd approved; none before it did.
    release: Option<Release>,
}

impl Agent {
    /// Begins with an operator's release statement.
    pub(crate) fn start_upgrade(&mut self, now: Instant, client: ClientId, statement: OwnedFd) {
        // Others are served meanwhile.
        self.serving = None;
        if self.upgrade.is_some() {
            let reason = "another upgrade is under way: wait for it".to_owned();
            return self.reply(client, AdminReply::Refused { reason });
        }
        if !self.is_there(Peer::Keyd) {
            let reason = "keyd, which verifies releases, does not run: try again".to_owned();
            return self.reply(client, AdminReply::Refused { reason });
        }
        let id = self.fresh_id();
        self.upgrade = Some(Upgrade {
            client,
            question: Question {
                id,
                peer: Peer::Keyd,
                deadline: now + CHECK_TIME,
            },
            release: None,
        });
        let check = AgentToKeyd::CheckRelease { request_id: id };
        self.act(Action::Keyd(check, statement));
    }

    /// Is this the answer that an upgrade waits for?
    pub(crate) fn is_of_upgrade(&self, peer: Peer, request_id: u64) -> bool {
        let upgrade = self.upgrade.as_ref();
        upgrade.is_some_and(|u| u.question.peer == peer && u.question.id == request_id)
    }

    /// The answer to what keyd or rot was asked.
    pub(crate) fn upgrade_answered(&mut self, now: Instant, answer: Answer) {
        let Some(upgrade) = &self.upgrade else {
            return;
        };
        match (answer, upgrade.release) {
            (Answer::Approved(release), None) => self.ask_rot(now, release),
            // There will be no one to hear how it ends.
            (Answer::Upgrading, Some(release)) if release.component == Component::Agent => {
                // Whoever asks until the next one answers is not to take what this one was for what came of it.
                self.programs.retain(|p| p.component != Component::Agent);
                self.end_upgrade(AdminReply::UpgradeBegun { release });
            }
            (Answer::Upgrading, Some(_)) => {}
            (Answer::Done, Some(release)) => {
                tracing::info!(component = %release.component, version = release.version, "upgraded");
                self.end_upgrade(AdminReply::Upgraded { release });
            }
            (Answer::Refused(reason), _) => self.refuse_upgrade(reason),
            (other, _) => self.refuse_upgrade(format!("the answer makes no sense: {other:?}")),
        }
    }

    fn ask_rot(&mut self, now: Instant, release: Release) {
        let request_id = self.fresh_id();
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.release = Some(release);
            upgrade.question = Question {
                id: request_id,
                peer: Peer::Rot,
                deadline: now + UPGRADE_TIME,
            };
        }
        let component = release.component;
        self.act(Action::Rot(ToRot::Upgrade {
            request_id,
            component,
        }));
    }

    /// A peer is gone.
    pub(crate) fn upgrade_lost(&mut self, peer: Peer) {
        let asked = |u: &Upgrade| u.question.peer == peer;
        if self.upgrade.as_ref().is_some_and(asked) {
            self.refuse_upgrade(format!("{peer} ended before it answered: try again"));
        }
    }

    /// Gives up what has taken too long.
    pub(crate) fn upgrade_overdue(&mut self, now: Instant) {
        let late = |u: &Upgrade| u.question.deadline <= now;
        if let Some(upgrade) = self.upgrade.as_ref().filter(|u| late(u)) {
            let peer = upgrade.question.peer;
            self.refuse_upgrade(format!("{peer} did not answer in time: see its log"));
        }
    }

    fn refuse_upgrade(&mut self, reason: String) {
        tracing::warn!("upgrade refused: {reason}");
        self.end_upgrade(AdminReply::Refused { reason });
    }

    fn end_upgrade(&mut self, reply: AdminReply) {
        if let Some(upgrade) = self.upgrade.take() {
            self.act(Action::Reply(upgrade.client, reply));
        }
    }
}
