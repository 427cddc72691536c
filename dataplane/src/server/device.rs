//! A device on the control thread: what it is and does; in [`frontends`] its listener and who is connected, in [`stages`]
//! where it is between attach and detach.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use super::alarm::Alarm;
use super::balance;
use super::connection::{Connection, Driven, ToWorkers};
use super::patience::Waiting;
use super::placement::Together;
use super::{Access, DeviceStatus, Offer};
use crate::blk::BlkDevice;
use crate::device::Device;
use crate::hand::Hand;
use crate::log_limit::LogLimit;
use crate::net::part_of;
use crate::port::PortSpec;
use crate::stored::Place;
use crate::vhost_user::Facts;
use crate::worker::message::DeviceId;

mod frontends;
mod stages;

pub(super) use frontends::{id_of, is_connection};
use stages::Stage;

/// A device.
#[derive(Debug)]
pub(super) struct State {
    facts: Facts,
    listener: UnixListener,
    access: Access,
    label: String,
    /// Where it is remembered for a successor.
    pub(super) place: Place,
    stage: Stage,
    workers: usize,
    /// Why a worker can't serve it.
    failure: Option<String>,
    connection: Option<Connection>,
    pub(super) refuse_new: bool,
    /// Why nothing of it is served although it is offered, if so: it stays like that until it is detached.
    aside: Option<String>,
    /// Requests of an earlier process may still be under way.
    pub(super) fenced: bool,
    /// A predecessor's connection is to go on, or its queues are starting.
    resumes: bool,
    /// The detach is to be sent to the workers.
    detach_due: bool,
    /// The connection has had its turn, and there may be more to read.
    look_again: bool,
    /// The last frontend could not be accepted: to be tried again soon, since nothing will say when.
    accept_failed: bool,
    /// What people were told of its storage.
    alarm: Alarm,
    /// How long it has waited for what is under way.
    waiting: Waiting,
    /// Workers are to give up what is under way: with the keys?
    give_up_due: Option<bool>,
    /// Lines about frontends that come and go, and about what they did wrong.
    comings: LogLimit,
    warnings: LogLimit,
}

impl State {
    pub(super) fn new(offer: Offer, id: DeviceId, workers: usize) -> Self {
        let facts = Facts::of(id, offer.device);
        let resumes = offer.place.connection().is_some();
        Self {
            facts,
            listener: offer.listener,
            access: offer.access,
            label: offer.label,
            place: offer.place,
            stage: Stage::Attaching(workers),
            workers,
            failure: None,
            connection: None,
            refuse_new: false,
            aside: offer.aside,
            fenced: false,
            resumes,
            detach_due: false,
            look_again: false,
            accept_failed: false,
            alarm: Alarm::default(),
            waiting: Waiting::default(),
            give_up_due: None,
            comings: LogLimit::new(),
            warnings: LogLimit::new(),
        }
    }

    /// Whether a successor knows of it, or nobody is connected.
    pub(super) fn can_be_handed_over(&self) -> bool {
        let is_card = self.facts.device.net().is_some();
        self.connection.is_none() || self.place.keeps() || is_card
    }

    /// Its name in log lines.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// What a thread that works for it has in hand.
    pub(super) fn hand(&self) -> Hand {
        self.facts.device.hand().get()
    }

    /// Whether a queue's driver broke it.
    pub(super) fn is_retired(&self, index: u16) -> bool {
        let session = self.connection.as_ref().map(|c| &c.session);
        session.is_some_and(|session| session.is_retired(index))
    }

    /// No successor is to know of it any more.
    pub(super) fn forget(&mut self) {
        std::mem::replace(&mut self.place, Place::none()).remove();
    }

    /// Whether the volume is this host's, or is being taken.
    pub(super) fn has_volume(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|c| c.session.has_volume())
    }

    /// The device as workers have it.
    pub(super) fn shared(&self) -> &Device {
        &self.facts.device
    }

    /// The disk, if it is one.
    pub(super) fn disk(&self) -> Option<Arc<BlkDevice>> {
        self.facts.device.blk().cloned()
    }

    /// What one of its queues has cost the workers so far.
    pub(super) fn work(&self, queue: u16) -> u64 {
        balance::work(&self.facts.device, queue)
    }

    /// With which others a queue is served.
    pub(super) fn together(&self, queue: u16) -> Option<Together> {
        let card = self.facts.device.net()?;
        Some(match &card.port {
            PortSpec::Switch(switch) => Together::Switch(switch.number()),
            PortSpec::Null | PortSpec::Source(_) | PortSpec::Outside(_) => {
                Together::Pair(self.facts.id, part_of(queue).1)
            }
        })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connection.as_ref().is_some_and(|c| c.fd().is_some())
    }

    pub(super) fn is_gone(&self) -> bool {
        self.stage == Stage::Gone
    }

    /// Whether the workers are to be told to let go of it; says so once.
    pub(super) fn wants_detach(&mut self) -> bool {
        std::mem::take(&mut self.detach_due)
    }

    /// Whether the workers are to give up what is under way, and with the keys; says so once.
    pub(super) fn wants_give_up(&mut self) -> Option<bool> {
        self.give_up_due.take()
    }

    /// Whether something is to be tried again soon: a frontend waits that could not be accepted, the
    /// volume is somebody else's, or a frontend has not been told of a change.
    pub(super) fn wants_retry(&self) -> bool {
        let session = self.connection.as_ref().map(|c| &c.session);
        self.accept_failed
            || self.alarm.is_raised()
            || self.waiting.goes_on()
            || session.is_some_and(|s| s.waits_for_volume() || s.backend_is_due())
    }

    /// Tries again.
    pub(super) fn retry(&mut self, out: &mut ToWorkers) {
        if let Some(connection) = &mut self.connection {
            connection.retry(&mut self.place, out);
        }
    }

    /// No request of an earlier process is under way any more.
    pub(super) fn fence_is_gone(&mut self, out: &mut ToWorkers) {
        self.fenced = false;
        if let Some(connection) = &mut self.connection {
            let driven = connection.fence_is_gone(&mut self.place, out);
            self.note(driven);
        }
    }

    /// Gives the device another capacity, and tells the frontend.
    pub(super) fn resize(&mut self, capacity_sectors: u64) -> Result<(), String> {
        let disk = self.facts.device.blk();
        let disk = disk.ok_or("it is a network card, and has no capacity")?;
        disk.resize(capacity_sectors).map_err(|e| e.to_string())?;
        self.config_changed();
        Ok(())
    }

    /// Its configuration space changed: the frontend is told, and a successor.
    pub(super) fn config_changed(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.session.config_changed();
            connection.remember(&mut self.place);
        }
    }

    pub(super) fn status(&self) -> DeviceStatus {
        let Some(connection) = &self.connection else {
            return DeviceStatus {
                fault: self.aside.clone(),
                ..DeviceStatus::default()
            };
        };
        let (running_queues, retired_queues) = connection.session.queues();
        DeviceStatus {
            connected: connection.fd().is_some(),
            running_queues,
            retired_queues,
            fault: connection.session.trouble().map(str::to_owned),
            holds_volume: connection.session.holds_volume(),
            waits_for_volume: connection.session.waits_for_volume(),
        }
    }

    /// Its listener or its connection is ready; both are looked at.
    pub(super) fn ready(&mut self, frontend_gone: bool, out: &mut ToWorkers) {
        if let Some(connection) = &mut self.connection {
            if frontend_gone {
                connection.peer_is_gone();
            }
            let driven = connection.drive(&mut self.place, out);
            self.note(driven);
        }
    }

    fn note(&mut self, driven: Driven) {
        match driven {
            Driven::Waits | Driven::Ended(None) => {}
            Driven::HadItsTurn => self.look_again = true,
            Driven::Ended(Some(error)) => {
                self.warn(&format!("the connection is closed: {error}"));
            }
        }
    }

    fn report_retired(&self, index: u16, reason: &str) {
        self.warn(&format!("queue {index} is retired: {reason}"));
    }

    /// A line that a frontend or guest can cause; at most a few a second of each device.
    fn warn(&self, text: &str) {
        if self.warnings.allows() {
            tracing::warn!("{}: {text}", self.label);
        }
    }
}
