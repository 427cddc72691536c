//! Serving operators: one at a time, in the order in which they asked, from a bounded queue.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use bulkhead_protocol::NicId;
use bulkhead_protocol::admin::{AdminReply, AdminRequest};
use bulkhead_protocol::control::AgentToDataplane;

use crate::agent::{Agent, Job, Question};
use crate::message::{Action, Answer, ClientId, Peer};

/// Most operators that wait.
const MAX_WAITING: usize = 8;
/// How long the data plane may take to answer for a status.
const STATUS_TIME: Duration = Duration::from_secs(1);

/// An operator that waits, and for what.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) client: ClientId,
    ask: Ask,
}

#[derive(Debug)]
enum Ask {
    Status,
    Nics { after: Option<NicId> },
    Apply { dry_run: bool, envelope: OwnedFd },
    Upgrade { statement: OwnedFd },
}

/// What the operator that is served asked about.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) enum About {
    /// All but the NICs.
    #[default]
    Host,
    /// Some NICs.
    Nics { after: Option<NicId> },
}

impl Agent {
    /// Queues a request, or refuses it at once.
    pub(crate) fn asked(
        &mut self,
        client: ClientId,
        request: AdminRequest,
        envelope: Option<OwnedFd>,
    ) {
        let refuse = |reason: &str| AdminReply::Refused {
            reason: reason.to_owned(),
        };
        if self.waiting.len() >= MAX_WAITING {
            let reason = "the agent is busy with other requests: try again in a moment";
            return self.act(Action::Reply(client, refuse(reason)));
        }
        let ask = match (request, envelope) {
            (AdminRequest::Status, _) => Ask::Status,
            (AdminRequest::Nics { after }, _) => Ask::Nics { after },
            (AdminRequest::Apply { dry_run }, Some(envelope)) => Ask::Apply { dry_run, envelope },
            (AdminRequest::Upgrade, Some(statement)) => Ask::Upgrade { statement },
            (AdminRequest::Apply { .. } | AdminRequest::Upgrade, None) => {
                let reason = "the request came without an envelope";
                return self.act(Action::Reply(client, refuse(reason)));
            }
        };
        self.waiting.push_back(Waiting { client, ask });
    }

    /// Whether another operator's request was begun.
    pub(crate) fn serve_next(&mut self, now: Instant) -> bool {
        // While keyd's decision is open, a bundle is refused at once.
        let idle = matches!(self.job, Job::Idle) || self.known.candidate.is_some();
        let ready = |w: &Waiting| idle || !matches!(w.ask, Ask::Apply { .. });
        if !self.waiting.front().is_some_and(ready) {
            return false;
        }
        let Some(Waiting { client, ask }) = self.waiting.pop_front() else {
            return false;
        };
        self.serving = Some(client);
        match ask {
            Ask::Status => self.ask_status(now, About::Host),
            Ask::Nics { after } => self.ask_status(now, About::Nics { after }),
            Ask::Apply { dry_run, envelope } => self.start_apply(now, client, dry_run, &envelope),
            Ask::Upgrade { statement } => self.start_upgrade(now, client, statement),
        }
        true
    }

    fn ask_status(&mut self, now: Instant, about: About) {
        self.asked_about = about;
        if !self.is_there(Peer::Dataplane) {
            return self.answer_status(None);
        }
        let request_id = self.fresh_id();
        self.status_question = Some(Question {
            id: request_id,
            peer: Peer::Dataplane,
            deadline: now + STATUS_TIME,
        });
        let message = match about {
            About::Host => AgentToDataplane::Status { request_id },
            About::Nics { after } => AgentToDataplane::Nics { request_id, after },
        };
        self.act(Action::Dataplane(message, Vec::new()));
    }

    /// Answers the operator that is served, with what the data plane said, if it did.
    pub(crate) fn answer_status(&mut self, said: Option<Answer>) {
        let reply = match (self.asked_about, said) {
            (About::Host, Some(Answer::Volumes(volumes, _))) => AdminReply::Status {
                status: self.status(Some(volumes)),
            },
            (About::Host, _) => AdminReply::Status {
                status: self.status(None),
            },
            (About::Nics { after }, Some(Answer::Nics(nics, switches))) => {
                self.nic_status(after, nics, &switches)
            }
            (About::Nics { after }, _) => self.nic_status(after, Vec::new(), &[]),
        };
        if let Some(client) = self.serving {
            self.reply(client, reply);
        }
    }
}
