//! Where a device is between attach and detach, and the step that is possible next.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsRawFd;
use std::time::Instant;

use mio::Registry;
use mio::unix::SourceFd;

use super::State;
use crate::blk::Level;
use crate::server::Event;
use crate::server::alarm::InWords;
use crate::server::connection::{Connection, ToWorkers};
use crate::server::patience::Due;
use crate::worker::message::FromWorker;
/// Where a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// So many workers have not said yet that they can serve it.
    Attaching(usize),
    /// It is offered.
    Attached,
    /// It goes, once its connection is closed.
    Leaving,
    /// So many workers still hold it.
    Detaching(usize),
    /// Nothing of it is left.
    Gone,
}

impl State {
    /// A worker says something about it.
    pub(in crate::server) fn on_worker(&mut self, message: FromWorker, out: &mut ToWorkers) {
        match message {
            FromWorker::Attached { result, .. } => {
                if let Err(reason) = result {
                    self.failure.get_or_insert(reason);
                }
                if let Stage::Attaching(left) = &mut self.stage {
                    *left = left.saturating_sub(1);
                }
            }
            FromWorker::Detached { .. } => {
                if let Stage::Detaching(left) = &mut self.stage {
                    *left = left.saturating_sub(1);
                }
            }
            message => {
                if let FromWorker::Retired { queue, reason } = &message {
                    self.report_retired(queue.index, reason);
                }
                if let Some(connection) = &mut self.connection {
                    let driven = connection.on_worker(message, &mut self.place, out);
                    self.note(driven);
                }
            }
        }
    }

    pub(in crate::server) fn detach(&mut self, out: &mut ToWorkers) {
        if matches!(self.stage, Stage::Attaching(_) | Stage::Attached) {
            // Workers that still answer the attach do so before they answer the detach.
            self.stage = Stage::Leaving;
            if let Some(connection) = &mut self.connection {
                connection.close(out);
            }
        }
    }

    /// Takes one step that has become possible; true if another may follow.
    pub(in crate::server) fn advance(
        &mut self,
        registry: &Registry,
        out: &mut ToWorkers,
        events: &mut Vec<Event>,
    ) -> bool {
        let id = self.facts.id;
        self.look_at_health(events);
        self.look_at_patience(registry, events);
        if self.connection.as_ref().is_some_and(Connection::is_closed) {
            self.drop_connection(registry);
            events.push(Event::Disconnected { id });
            return true;
        }
        let starts = self
            .connection
            .as_ref()
            .is_some_and(|c| c.session.is_resuming());
        if self.resumes && self.stage == Stage::Attached && !starts {
            self.resumes = false;
            events.push(Event::Resumed { id });
        }
        match self.stage {
            Stage::Attaching(0) => {
                let result = self.failure.take().map_or(Ok(()), Err);
                self.stage = match &result {
                    Ok(()) => Stage::Attached,
                    Err(_) => Stage::Leaving,
                };
                let attached = result.is_ok();
                events.push(Event::Attached { id, result });
                if attached {
                    self.go_on(registry, out, events);
                }
                true
            }
            Stage::Attached
                if self.connection.is_none() && !self.refuse_new && self.aside.is_none() =>
            {
                self.accept(registry, out, events)
            }
            Stage::Leaving if self.connection.is_none() && !self.fenced => {
                let _ = registry.deregister(&mut SourceFd(&self.listener.as_raw_fd()));
                // The rekeyer is one more.
                self.stage = Stage::Detaching(self.workers + 1);
                self.detach_due = true;
                false
            }
            Stage::Detaching(0) => {
                self.forget();
                self.stage = Stage::Gone;
                events.push(Event::Detached { id });
                false
            }
            _ => false,
        }
    }

    /// Gives up what has been waited for too long.
    fn look_at_patience(&mut self, registry: &Registry, events: &mut Vec<Event>) {
        let connection = self.connection.as_ref();
        let closing = connection.is_some_and(Connection::is_closing);
        let leaving = matches!(self.stage, Stage::Leaving | Stage::Detaching(_));
        let give_up = self.facts.device.give_up_after();
        let now = Instant::now();
        match self.waiting.look(now, (closing, leaving), give_up) {
            None => {}
            Some(Due::GiveUp { wipe }) => {
                self.warn("what is under way has not ended, and is given up");
                self.give_up_due = Some(wipe);
                self.hang_up(registry);
            }
            Some(Due::Tell) => {
                self.forget();
                let health = self.facts.device.health();
                events.push(Event::GivenUp {
                    id: self.facts.id,
                    requests: health.map_or(0, |health| health.summary().old),
                });
            }
        }
    }

    /// Tells people, and the manager, where the storage does worse than before, or better for a while.
    fn look_at_health(&mut self, events: &mut Vec<Event>) {
        let Some(health) = self.facts.device.health() else {
            return;
        };
        let summary = health.summary();
        if !self.alarm.take(Instant::now(), summary.level) {
            return;
        }
        let (id, level) = (self.facts.id, self.alarm.level());
        let words = InWords {
            level,
            summary,
            patience: health.patience(),
        };
        if level == Level::Fine {
            tracing::info!("{}: {words}", self.label);
        } else {
            tracing::warn!("{}: {words}", self.label);
        }
        events.push(Event::Health { id, level, summary });
    }
}
