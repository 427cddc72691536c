//! One frontend's connection: its stream and its session, driven together, and remembered for a successor.
//!
//! A message goes through these steps, and wherever the process dies, its successor does the rest once
//! ([`Framing::resumed`]):
//!
//! | step | what a successor finds and does |
//! | --- | --- |
//! | 1. it is looked at, and stays in the socket | nothing is remembered of it: reads it again |
//! | 2. the session and workers do what it asks for | the same |
//! | 3. new descriptors are stored | the same; what no state names is removed |
//! | 4. the state is written: done, and whether a reply is owed | without a reply: takes it out |
//! | 5. the reply is sent | **owed: nobody knows whether it was sent, and the connection ends** |
//! | 6. the state is marked: sent | takes it out |
//! | 7. it is taken out of the socket, and the state says so | goes on with what is left of it, if anything |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::crash_point;
use crate::stored::{Place, Reply, Step};
use crate::vhost_user::{Facts, Framing, Incoming, Message, Outbox, ProtocolError, Session};
use crate::worker::message::{FromWorker, QueueId, ToWorker};

/// Whether the frontend is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It is.
    Open,
    /// It is gone, or was sent away: its queues are being stopped.
    Closing,
    /// Nothing of it is left.
    Closed,
}

/// The message that lies first in the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hand {
    /// None was looked at.
    Empty,
    /// It is being done; the session may wait for workers.
    Doing,
    /// It is done, and the frontend does not take all of its reply yet.
    Replying,
}

/// Messages taken from one frontend before others have their turn: so many that say something only. One that brings
/// descriptors, which are looked at, mapped and passed to the store, counts for more.
const MESSAGES_PER_TURN: usize = 32;
/// Messages that one descriptor counts for.
const MESSAGES_PER_DESCRIPTOR: usize = 8;

/// What a message takes of its frontend's turn.
fn share_of(message: &Message) -> usize {
    1 + MESSAGES_PER_DESCRIPTOR * message.fds.len()
}

/// Where driving a connection has led.
#[derive(Debug)]
#[must_use]
pub(super) enum Driven {
    /// It waits: for the frontend, or for a worker.
    Waits,
    /// It has had its turn, and there may be more to read.
    HadItsTurn,
    /// It ends; by an error, or because the frontend is gone.
    Ended(Option<ProtocolError>),
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// None once it was hung up.
    framing: Option<Framing>,
    pub(super) session: Session,
    stage: Stage,
    hand: Hand,
    /// What it said last, if that waits for the fence.
    held: Option<Message>,
    /// The volume is to be taken as soon as the session waits for nothing else.
    retry_due: bool,
    /// The frontend has closed its end, whatever of what it said was not read yet.
    peer_gone: bool,
}

/// Messages that a step makes for workers.
pub(super) type ToWorkers = Vec<(QueueId, ToWorker)>;

impl Connection {
    /// A frontend has connected.
    pub(super) fn new(stream: UnixStream, facts: Facts, place: &mut Place) -> io::Result<Self> {
        let (framing, session) = (Framing::new(stream)?, Session::new(facts));
        let connection = Self::over(framing, session, place);
        connection.remember(place);
        Ok(connection)
    }

    fn over(framing: Framing, mut session: Session, place: &Place) -> Self {
        if place.keeps() {
            session.keep_in_flight();
        }
        Self {
            framing: Some(framing),
            session,
            stage: Stage::Open,
            hand: Hand::Empty,
            held: None,
            retry_due: false,
            peer_gone: false,
        }
    }

    /// The connection that a predecessor left in this place, if it left one; its queues run from
    /// [`Connection::start_again`] on.
    ///
    /// # Errors
    /// It can't go on, and is to be forgotten.
    pub(super) fn resumed(place: &mut Place, facts: Facts) -> Result<Option<Self>, ProtocolError> {
        let left = place.connection().cloned();
        let Some(left) = left else {
            return Ok(None);
        };
        let (socket, step) = (Arc::clone(&left.socket), left.step);
        let framing = Framing::resumed(socket, step)?;
        let connection = Self::over(framing, Session::resumed(facts, left)?, place);
        connection.remember(place);
        Ok(Some(connection))
    }

    /// Starts what a predecessor's workers had.
    pub(super) fn start_again(&mut self, place: &mut Place, out: &mut ToWorkers) -> Driven {
        let mut outbox = Outbox::default();
        let started = self.session.start_again(&mut outbox);
        out.append(&mut outbox.to_workers);
        match started {
            Ok(()) => self.drive(place, out),
            Err(error) => {
                self.close(out);
                Driven::Ended(Some(error))
            }
        }
    }

    /// Remembers the session as it is, unless a message is on its way: it is as it was before that for a
    /// successor then.
    pub(super) fn remember(&self, place: &mut Place) {
        if self.hand == Hand::Empty {
            self.put(place, Step::Idle);
        }
    }

    fn put(&self, place: &mut Place, step: Step) {
        let open = self.stage == Stage::Open && !self.session.is_answering();
        if let Some(framing) = self.framing.as_ref().filter(|_| open && place.keeps()) {
            let now = self.session.remembered(framing.socket(), step);
            place.put_connection(self.session.cache_mode(), Some(now));
        }
    }

    /// Its socket, unless it was hung up.
    pub(super) fn fd(&self) -> Option<RawFd> {
        let framing = self.framing.as_ref();
        framing.map(|framing| framing.as_fd().as_raw_fd())
    }

    /// Whether it waits for its queues to stop.
    pub(super) fn is_closing(&self) -> bool {
        self.stage == Stage::Closing
    }

    /// Closes the socket of a connection that is being closed anyway, before its queues have stopped. A successor
    /// has nothing of it.
    pub(super) fn hang_up(&mut self, place: &mut Place) {
        self.framing = None;
        place.put_connection(self.session.cache_mode(), None);
    }

    /// The frontend has closed its end. What it said before is handled, unless a worker has to answer first: nobody
    /// waits for that any more.
    pub(super) fn peer_is_gone(&mut self) {
        self.peer_gone = true;
    }

    pub(super) fn is_closed(&self) -> bool {
        self.stage == Stage::Closed
    }

    /// Reads and handles what there is, for one turn.
    pub(super) fn drive(&mut self, place: &mut Place, out: &mut ToWorkers) -> Driven {
        let driven = self
            .exchange(place, out)
            .unwrap_or_else(|e| Driven::Ended(Some(e)));
        if matches!(driven, Driven::Ended(_)) {
            self.close(out);
        }
        driven
    }

    fn exchange(
        &mut self,
        place: &mut Place,
        out: &mut ToWorkers,
    ) -> Result<Driven, ProtocolError> {
        if self.stage != Stage::Open {
            return Ok(Driven::Waits);
        }
        self.finish(place)?;
        let mut taken = 0;
        while taken < MESSAGES_PER_TURN {
            let Some(framing) = &mut self.framing else {
                return Ok(Driven::Waits);
            };
            if self.session.is_pending() || framing.has_unsent() {
                return Ok(if self.peer_gone {
                    Driven::Ended(None)
                } else {
                    Driven::Waits
                });
            }
            let held = self.held.take().map(Incoming::Message);
            match held.map_or_else(|| framing.receive(), Ok)? {
                Incoming::Message(message) if self.session.waits_for_fence(&message) => {
                    self.held = Some(message);
                    return Ok(if self.peer_gone {
                        Driven::Ended(None)
                    } else {
                        Driven::Waits
                    });
                }
                Incoming::Message(message) => {
                    crash_point!("message.looked");
                    taken += share_of(&message);
                    self.hand = Hand::Doing;
                    let mut outbox = Outbox::default();
                    let handled = self.session.handle(message, &mut outbox);
                    for (queue, message) in &outbox.to_workers {
                        if matches!(message, ToWorker::Start(start) if start.anew) {
                            place.begins(queue.index);
                        }
                    }
                    out.append(&mut outbox.to_workers);
                    handled?;
                    self.reply(place, outbox)?;
                }
                Incoming::Later => return Ok(Driven::Waits),
                Incoming::End => return Ok(Driven::Ended(None)),
            }
        }
        Ok(Driven::HadItsTurn)
    }

    /// The message in hand is done, unless it waits for workers: it is remembered and answered.
    fn reply(&mut self, place: &mut Place, outbox: Outbox) -> Result<(), ProtocolError> {
        if self.session.is_answering() {
            return Ok(());
        }
        let reply = match outbox.replies.is_empty() {
            true => Reply::None,
            false => Reply::Owed,
        };
        let bytes = self.framing.as_ref().map_or(0, Framing::in_hand);
        crash_point!("message.applied");
        self.put(place, Step::Applied { bytes, reply });
        crash_point!("message.recorded");
        self.hand = Hand::Replying;
        if let Some(framing) = &mut self.framing {
            framing.send(&outbox.replies, outbox.reply_fd)?;
        }
        if reply == Reply::None {
            return self.take_out(place);
        }
        self.finish(place)
    }

    /// The reply is sent as far as the frontend takes it, and then the message is over.
    fn finish(&mut self, place: &mut Place) -> Result<(), ProtocolError> {
        let Some(framing) = &mut self.framing else {
            return Ok(());
        };
        framing.flush()?;
        if self.hand != Hand::Replying || framing.has_unsent() {
            return Ok(());
        }
        crash_point!("message.sent");
        let bytes = framing.in_hand();
        let reply = Reply::Sent;
        place.mark(Step::Applied { bytes, reply });
        crash_point!("message.marked");
        self.take_out(place)
    }

    fn take_out(&mut self, place: &mut Place) -> Result<(), ProtocolError> {
        if let Some(framing) = &mut self.framing {
            framing.consume()?;
        }
        crash_point!("message.taken");
        self.hand = Hand::Empty;
        self.remember(place);
        Ok(())
    }

    /// Passes on what a worker says, and goes on with what waited for it.
    pub(super) fn on_worker(
        &mut self,
        message: FromWorker,
        place: &mut Place,
        out: &mut ToWorkers,
    ) -> Driven {
        let mut outbox = Outbox::default();
        let result = self.session.on_worker(message, &mut outbox);
        out.append(&mut outbox.to_workers);
        let done = match result {
            Ok(true) => {
                self.stage = Stage::Closed;
                return Driven::Waits;
            }
            Ok(false) if self.stage != Stage::Open => return Driven::Waits,
            Ok(false) => {
                let replied = match self.hand {
                    Hand::Doing => self.reply(place, outbox),
                    Hand::Empty | Hand::Replying => {
                        self.remember(place);
                        Ok(())
                    }
                };
                if self.retry_due && !self.session.is_pending() {
                    self.retry(place, out);
                }
                replied
            }
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => self.drive(place, out),
            Err(error) => {
                self.close(out);
                Driven::Ended(Some(error))
            }
        }
    }

    /// Tries again what nothing announces.
    pub(super) fn retry(&mut self, place: &mut Place, out: &mut ToWorkers) {
        self.retry_due = self.session.is_pending();
        let mut outbox = Outbox::default();
        self.session.retry_volume(&mut outbox);
        self.session.retry_backend();
        out.append(&mut outbox.to_workers);
        self.remember(place);
    }

    /// No request of an earlier process is under way any more: the volume is taken, and what waited goes on.
    pub(super) fn fence_is_gone(&mut self, place: &mut Place, out: &mut ToWorkers) -> Driven {
        self.session.set_fenced(false);
        self.retry(place, out);
        self.drive(place, out)
    }

    /// Sends the frontend away; its queues stop, and when they have, it is closed.
    pub(super) fn close(&mut self, out: &mut ToWorkers) {
        if self.stage != Stage::Open {
            return;
        }
        let mut outbox = Outbox::default();
        let waits = self.session.close(&mut outbox);
        out.append(&mut outbox.to_workers);
        self.stage = if waits { Stage::Closing } else { Stage::Closed };
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::os::fd::{AsRawFd, RawFd};

    use nix::sys::eventfd::EventFd;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;
    use crate::net::{NetDevice, Shape};
    use crate::vhost_user::message::code;
    use crate::worker::message::DeviceId;

    /// How many turns it takes to read so many messages, each with these descriptors.
    fn turns(messages: usize, fds: &[RawFd]) -> usize {
        let card = NetDevice::new(Shape {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queue_pairs: 1,
        });
        let (theirs, ours) = UnixStream::pair().expect("sockets");
        let facts = Facts::of(DeviceId(1), card.into());
        let mut place = Place::none();
        let mut connection = Connection::new(ours, facts, &mut place).expect("a connection");
        // Queue 0, without a descriptor if there is none.
        let queue = if fds.is_empty() { 1 << 8 } else { 0 };
        let said = [code::SET_VRING_CALL, 1, 8, queue, 0];
        let said: Vec<u8> = said.iter().flat_map(|word| word.to_le_bytes()).collect();
        let with = [ControlMessage::ScmRights(fds)];
        let with = if fds.is_empty() { &[][..] } else { &with };
        for _ in 0..messages {
            let bytes = [IoSlice::new(&said)];
            let sent = sendmsg::<()>(theirs.as_raw_fd(), &bytes, with, MsgFlags::empty(), None);
            assert_eq!(sent.expect("room"), said.len());
        }
        let mut out = ToWorkers::new();
        let mut turns = 1;
        loop {
            match connection.drive(&mut place, &mut out) {
                Driven::HadItsTurn => turns += 1,
                Driven::Waits => return turns,
                Driven::Ended(error) => panic!("it ended: {error:?}"),
            }
        }
    }

    #[test]
    fn messages_with_descriptors_take_more_of_a_turn() {
        assert_eq!(turns(MESSAGES_PER_TURN - 1, &[]), 1);
        assert_eq!(turns(MESSAGES_PER_TURN, &[]), 2);
        let event = EventFd::new().expect("an eventfd");
        let fds = [std::os::fd::AsFd::as_fd(&event).as_raw_fd()];
        let each = 1 + MESSAGES_PER_DESCRIPTOR;
        let whole = MESSAGES_PER_TURN.div_ceil(each);
        assert_eq!(turns(whole - 1, &fds), 1);
        assert_eq!(turns(whole, &fds), 2);
        assert_eq!(turns(3 * whole, &fds), 4);
    }
}
