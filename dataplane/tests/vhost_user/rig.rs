//! A session with a frontend and a worker that do as a test says.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use bulkhead_dataplane::vhost_user::message::{ProtocolError, code};
use bulkhead_dataplane::vhost_user::{Facts, Outbox, Session, protocol_feature};
use bulkhead_dataplane::worker::message::{FromWorker, QueueId, ToWorker};

use crate::messages::{
    MEMORY_BYTES, QUEUES, SPLIT, addresses, bytes, event, facts, halves, memfd, message, table,
    with_fd, words,
};

/// What a frontend gets back for a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// A reply with this body.
    Reply(Vec<u8>),
    /// Nothing yet: it waits for a worker.
    Pending,
    /// The connection ends.
    End,
}

pub fn ack(code: u64) -> Answer {
    Answer::Reply(words(&[code]))
}

pub struct Rig {
    pub session: Session,
    /// What the worker has not answered.
    pub to_worker: VecDeque<ToWorker>,
    last_code: u32,
}

impl Rig {
    /// Nothing was said yet.
    pub fn new() -> Self {
        Self::of(facts())
    }

    /// Nothing was said yet of this device.
    pub fn of(facts: Facts) -> Self {
        Self {
            session: Session::new(facts),
            to_worker: VecDeque::new(),
            last_code: 0,
        }
    }

    /// Acknowledgements are negotiated.
    pub fn negotiated() -> Self {
        Self::negotiated_of(facts())
    }

    /// Acknowledgements are negotiated with this device.
    pub fn negotiated_of(facts: Facts) -> Self {
        let mut rig = Self::of(facts);
        rig.quietly(code::SET_FEATURES, words(&[SPLIT]), vec![]);
        let protocol = words(&[protocol_feature::OFFERED]);
        assert_eq!(
            rig.send(code::SET_PROTOCOL_FEATURES, protocol, vec![]),
            ack(0)
        );
        rig
    }

    /// Memory and all queues run.
    pub fn running() -> Self {
        let mut rig = Self::negotiated();
        assert_eq!(rig.share(&[(0, MEMORY_BYTES)]), ack(0));
        for index in 0..u32::from(QUEUES) {
            rig.place(index);
            assert_eq!(rig.kick(index), Answer::Pending);
            assert_eq!(rig.work(), ack(0));
            let enable = halves(&[index, 1]);
            assert_eq!(
                rig.send(code::SET_VRING_ENABLE, enable, vec![]),
                Answer::Pending
            );
            assert_eq!(rig.work(), ack(0));
        }
        rig
    }

    fn settle(&mut self, out: &mut Outbox) {
        let messages = out.to_workers.drain(..).map(|(_, message)| message);
        self.to_worker.extend(messages);
    }

    fn answer(&self, out: &Outbox, result: Result<(), ProtocolError>) -> Answer {
        if result.is_err() {
            assert!(out.replies.is_empty());
            return Answer::End;
        }
        if out.replies.is_empty() {
            return Answer::Pending;
        }
        let body = out.replies[12..].to_vec();
        assert_eq!(out.replies, bytes(self.last_code, 5, &body));
        Answer::Reply(body)
    }

    /// Sends a message that asks for an acknowledgement.
    pub fn send(&mut self, code: u32, body: Vec<u8>, fds: Vec<OwnedFd>) -> Answer {
        assert!(!self.session.is_pending(), "nothing is read while it waits");
        self.last_code = code;
        let mut out = Outbox::default();
        let result = self.session.handle(message(code, body, fds), &mut out);
        self.settle(&mut out);
        self.answer(&out, result)
    }

    /// Sends a message without asking for an acknowledgement; it may not fail.
    pub fn quietly(&mut self, code: u32, body: Vec<u8>, fds: Vec<OwnedFd>) {
        let mut message = message(code, body, fds);
        message.header.need_reply = false;
        let mut out = Outbox::default();
        self.session.handle(message, &mut out).expect("taken");
        assert!(out.replies.is_empty());
        self.settle(&mut out);
    }

    /// The worker says something.
    pub fn say(&mut self, message: FromWorker) -> Answer {
        let mut out = Outbox::default();
        let result = self.session.on_worker(message, &mut out).map(drop);
        self.settle(&mut out);
        self.answer(&out, result)
    }

    /// The worker does everything it was told, and all goes well; the last answer.
    pub fn work(&mut self) -> Answer {
        let mut last = Answer::Pending;
        while let Some(message) = self.to_worker.pop_front() {
            assert_eq!(last, Answer::Pending, "an answer before the last worker's");
            last = self.say(done(&message));
        }
        last
    }

    /// SET_MEM_TABLE.
    pub fn share(&mut self, regions: &[(u64, u64)]) -> Answer {
        let fds = regions.iter().map(|(_, bytes)| memfd(*bytes)).collect();
        self.send(code::SET_MEM_TABLE, table(regions), fds)
    }

    /// Size, base, addresses, call and error descriptor of a queue.
    pub fn place(&mut self, index: u32) {
        let small = u64::from(index);
        for (code, body, fds) in [
            (code::SET_VRING_NUM, halves(&[index, 8]), vec![]),
            (code::SET_VRING_BASE, halves(&[index, 3]), vec![]),
            (code::SET_VRING_ADDR, addresses(index), vec![]),
            (code::SET_VRING_CALL, with_fd(small), vec![event()]),
            (code::SET_VRING_ERR, with_fd(small), vec![event()]),
        ] {
            assert_eq!(self.send(code, body, fds), ack(0));
        }
    }

    pub fn kick(&mut self, index: u32) -> Answer {
        self.send(
            code::SET_VRING_KICK,
            with_fd(u64::from(index)),
            vec![event()],
        )
    }

    /// The frontend goes; whether workers have to stop something first.
    pub fn close(&mut self) -> bool {
        let mut out = Outbox::default();
        let waits = self.session.close(&mut out);
        self.settle(&mut out);
        waits
    }

    /// What the worker was told, by name.
    pub fn told(&self) -> Vec<String> {
        self.to_worker.iter().map(name).collect()
    }
}

pub fn queue(index: u16) -> QueueId {
    QueueId {
        device: facts().id,
        index,
    }
}

fn name(message: &ToWorker) -> String {
    match message {
        ToWorker::Start(start) => format!("start {}", start.queue.index),
        ToWorker::Stop { queue } => format!("stop {}", queue.index),
        ToWorker::SetMemory { queue, .. } => format!("memory {}", queue.index),
        ToWorker::SetEnabled { queue, enabled } => format!("enabled {} {enabled}", queue.index),
        ToWorker::SetKick { queue, fd } => format!("kick {} {}", queue.index, fd.is_some()),
        ToWorker::SetCall { queue, fd } => format!("call {} {}", queue.index, fd.is_some()),
        ToWorker::SetError { queue, fd } => format!("error {} {}", queue.index, fd.is_some()),
        other => format!("{other:?}"),
    }
}

/// What a worker says when it has done something.
pub fn done(message: &ToWorker) -> FromWorker {
    match message {
        ToWorker::Start(start) => {
            assert_nonblocking(start.call.as_ref());
            FromWorker::Started { queue: start.queue }
        }
        ToWorker::Stop { queue } => FromWorker::Stopped {
            queue: *queue,
            base: Some(77),
            left: false,
        },
        ToWorker::SetMemory { queue, .. } => FromWorker::MemorySet { queue: *queue },
        ToWorker::Flush { queue } => FromWorker::Flushed { queue: *queue },
        ToWorker::SetEnabled { queue, .. }
        | ToWorker::SetKick { queue, .. }
        | ToWorker::SetCall { queue, .. }
        | ToWorker::SetLog { queue, .. }
        | ToWorker::SetError { queue, .. } => FromWorker::Changed { queue: *queue },
        other => panic!("a session does not say {other:?}"),
    }
}

fn assert_nonblocking(fd: Option<&OwnedFd>) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    if let Some(fd) = fd {
        let flags = fcntl(fd.as_fd(), FcntlArg::F_GETFL).expect("flags");
        assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }
}
