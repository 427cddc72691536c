//! `vhost_user_stream`: a frontend that sends any bytes with any descriptors, in any pieces and order,
//! through framing and session; the workers that the session talks to answer, fail or retire queues when
//! the bytes say so.
//!
//! What must hold: nothing panics; one reply at a time; a session asks nothing of a queue that no worker
//! has, and asks for a start once; after the end every queue stops, and no descriptor is left.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bulkhead_dataplane::blk::{BlkDevice, Geometry, config_space};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::vhost_user::message::code;
use bulkhead_dataplane::vhost_user::{
    Facts, Framing, Incoming, Outbox, Session, feature, protocol_feature,
};
use bulkhead_dataplane::worker::message::{DeviceId, FromWorker, QueueId, ToWorker};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::ftruncate;

use crate::input::Input;

const QUEUES: u16 = 2;
const DEVICE: DeviceId = DeviceId(1);
/// Bytes of a memory file.
const MEMORY_BYTES: u64 = 0x1_0000;
/// Frontend address of its first byte.
const USER: u64 = 0x7f00_0000_0000;
/// Longest reply: header, and the whole configuration space with its own header.
const LONGEST_REPLY: usize = 12 + 12 + 256;
/// Most messages that a session has under way: a region that comes and goes tells each queue twice.
const MOST_TO_DO: usize = 4 * QUEUES as usize + 4;

thread_local! {
    /// Descriptors of every kind, made once.
    static KINDS: Vec<OwnedFd> = kinds();
}

fn kinds() -> Vec<OwnedFd> {
    let event =
        EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let file = |bytes: u64| {
        let fd = memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd");
        ftruncate(&fd, i64::try_from(bytes).expect("small")).expect("its length");
        fd
    };
    let (pipe, _) = nix::unistd::pipe().expect("pipe");
    let (socket, _) = UnixStream::pair().expect("sockets");
    let null = fs::File::open("/dev/null").expect("/dev/null");
    let event = event.as_fd().try_clone_to_owned().expect("dup");
    vec![
        file(MEMORY_BYTES),
        event,
        file(100),
        pipe,
        socket.into(),
        null.into(),
    ]
}

fn open() -> usize {
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

fn facts() -> Facts {
    let geometry = Geometry {
        logical_block_bytes: 512,
        read_only: false,
        serial: [0; 20],
        queues: QUEUES,
        discard: false,
    };
    Facts {
        id: DEVICE,
        features: config_space::features(&geometry),
        queues: QUEUES,
        device: BlkDevice::new(geometry, 4096, StorageSpec::Null, None).into(),
    }
}

pub fn run(data: &[u8]) {
    KINDS.with(|kinds| {
        let _ = bulkhead_dataplane::fds::know_eventfds();
        let before = open();
        Conversation::new(kinds).hold(&mut Input::new(data));
        assert_eq!(open(), before, "descriptors are left over");
    });
}

/// Workers as the session sees them: what they were told and have not answered, and the queues they have.
#[derive(Default)]
struct Workers {
    to_do: VecDeque<ToWorker>,
    has: BTreeSet<QueueId>,
}

impl Workers {
    fn take(&mut self, out: &mut Outbox) {
        self.to_do
            .extend(out.to_workers.drain(..).map(|(_, message)| message));
        assert!(self.to_do.len() <= MOST_TO_DO, "messages pile up");
    }

    fn answer(&mut self, fails: bool) -> Option<FromWorker> {
        let known = |has: &BTreeSet<QueueId>, queue| {
            assert!(has.contains(&queue), "no worker has {queue:?}")
        };
        Some(match self.to_do.pop_front()? {
            ToWorker::Start(start) if fails => FromWorker::StartFailed {
                queue: start.queue,
                reason: "as the bytes say".to_owned(),
            },
            ToWorker::Start(start) => {
                assert!(
                    self.has.insert(start.queue),
                    "started twice: {:?}",
                    start.queue
                );
                FromWorker::Started { queue: start.queue }
            }
            ToWorker::Stop { queue } => FromWorker::Stopped {
                queue,
                base: self.has.remove(&queue).then_some(3),
                left: false,
            },
            ToWorker::SetMemory { queue, .. } => {
                known(&self.has, queue);
                FromWorker::MemorySet { queue }
            }
            ToWorker::SetEnabled { queue, .. }
            | ToWorker::SetLog { queue, .. }
            | ToWorker::SetKick { queue, .. }
            | ToWorker::SetCall { queue, .. }
            | ToWorker::SetError { queue, .. } => {
                known(&self.has, queue);
                FromWorker::Changed { queue }
            }
            ToWorker::Flush { queue } => FromWorker::Flushed { queue },
            other => panic!("a session does not say {other:?}"),
        })
    }
}

/// A connection and both of its ends.
struct Conversation<'a> {
    kinds: &'a [OwnedFd],
    frontend: UnixStream,
    framing: Framing,
    session: Session,
    workers: Workers,
}

/// The connection has ended.
struct End;

impl<'a> Conversation<'a> {
    fn new(kinds: &'a [OwnedFd]) -> Self {
        let (frontend, backend) = UnixStream::pair().expect("sockets");
        frontend.set_nonblocking(true).expect("non-blocking");
        Self {
            kinds,
            frontend,
            framing: Framing::new(backend).expect("framing"),
            session: Session::new(facts()),
            workers: Workers::default(),
        }
    }

    fn hold(mut self, input: &mut Input<'_>) {
        while !input.is_empty() {
            let done = match input.u8() % 8 {
                0 => self.send_raw(input),
                1 => self.answer_one(input.flag()),
                2 => self.retire(input),
                3 => self.set_up(),
                _ => self.send_message(input),
            };
            if done.and_then(|()| self.read()).is_err() {
                break;
            }
        }
        self.end();
    }

    /// Any bytes, with up to 12 descriptors of any kind.
    fn send_raw(&mut self, input: &mut Input<'_>) -> Result<(), End> {
        let (count, length) = (input.u8() % 12, usize::from(input.u8()));
        let fds: Vec<u8> = (0..count).map(|_| input.u8()).collect();
        self.send(input.bytes(length), &fds)
    }

    /// A message with its header right: its number and body, and the descriptors that it is to have, or not.
    fn send_message(&mut self, input: &mut Input<'_>) -> Result<(), End> {
        let code = u32::from(input.u8() % 44);
        let flags = input.u8();
        let index = u32::from(flags & 3);
        let value = input.u16();
        let (body, fds) = message(code, index, value, input);
        let fds = match flags >> 2 & 3 {
            0 => vec![],
            1 => vec![input.u8(), input.u8()],
            _ => fds,
        };
        let body = if flags & 0x10 != 0 {
            &body[..body.len() / 2]
        } else {
            &body[..]
        };
        let mut bytes = Vec::new();
        bytes.extend(code.to_le_bytes());
        let need_reply = if flags & 0x80 != 0 { 0 } else { 8 };
        bytes.extend((1u32 | need_reply).to_le_bytes());
        bytes.extend(u32::try_from(body.len()).expect("short").to_le_bytes());
        bytes.extend(body);
        if flags & 0x20 == 0 {
            return self.send(&bytes, &fds);
        }
        // In two pieces: the second with the descriptors.
        let (first, second) = bytes.split_at(bytes.len() / 2);
        self.send(first, &[])?;
        self.read()?;
        self.send(second, &fds)
    }

    /// What a frontend does to have a queue running, which single messages seldom come to.
    fn set_up(&mut self) -> Result<(), End> {
        let nothing = &mut Input::new(&[]);
        for (code, index, value) in [
            (code::SET_PROTOCOL_FEATURES, 0, 0),
            (code::SET_FEATURES, 0, 0),
            (code::SET_MEM_TABLE, 0, 1),
            (code::SET_VRING_NUM, 0, 3),
            (code::SET_VRING_ADDR, 0, 0),
            (code::SET_VRING_CALL, 0, 0),
            (code::SET_VRING_KICK, 0, 0),
            (code::SET_VRING_ENABLE, 0, 1),
        ] {
            let (body, fds) = message(code, index, value, nothing);
            let length = u32::try_from(body.len()).expect("short");
            let header = [code, 9, length].map(u32::to_le_bytes).concat();
            self.send(&[header, body].concat(), &fds)?;
            self.read()?;
            while self.session.is_pending() {
                self.answer_one(false)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8], fds: &[u8]) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        let kind = |which: &u8| self.kinds[usize::from(*which) % self.kinds.len()].as_raw_fd();
        let fds: Vec<_> = fds.iter().map(kind).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() {
            &rights[..0]
        } else {
            &rights[..]
        };
        let fd = self.frontend.as_raw_fd();
        let parts = [IoSlice::new(bytes)];
        // A frontend that sends more than the socket holds is one that waits: here, that ends.
        let sent = sendmsg::<()>(fd, &parts, control, MsgFlags::MSG_DONTWAIT, None);
        sent.map(drop).map_err(|_| End)
    }

    /// Takes in what has come, as the server does: nothing while a worker is waited for.
    fn read(&mut self) -> Result<(), End> {
        while !self.session.is_pending() {
            match self.framing.receive() {
                Ok(Incoming::Message(message)) => {
                    let mut out = Outbox::default();
                    let handled = self.session.handle(message, &mut out);
                    self.framing.consume().map_err(|_| End)?;
                    self.settle(out)?;
                    handled.map_err(|_| End)?;
                }
                Ok(Incoming::Later) => return Ok(()),
                Ok(Incoming::End) | Err(_) => return Err(End),
            }
        }
        Ok(())
    }

    fn settle(&mut self, mut out: Outbox) -> Result<(), End> {
        assert!(out.replies.len() <= LONGEST_REPLY, "one reply at a time");
        self.workers.take(&mut out);
        let (running, retired) = self.session.queues();
        assert!(running + retired <= QUEUES);
        let sent = self.framing.send(&out.replies, out.reply_fd.take());
        // The frontend reads what it gets.
        let mut bytes = [0; 4096];
        while std::io::Read::read(&mut self.frontend, &mut bytes).is_ok_and(|count| count > 0) {}
        sent.map_err(|_| End)
    }

    fn answer_one(&mut self, fails: bool) -> Result<(), End> {
        match self.workers.answer(fails) {
            Some(answer) => self.say(answer),
            None => Ok(()),
        }
    }

    fn retire(&mut self, input: &mut Input<'_>) -> Result<(), End> {
        let queue = QueueId {
            device: DEVICE,
            index: input.below(QUEUES),
        };
        if !self.workers.has.contains(&queue) {
            return Ok(());
        }
        let reason = "as the bytes say".to_owned();
        self.say(FromWorker::Retired { queue, reason })
    }

    fn say(&mut self, message: FromWorker) -> Result<(), End> {
        let mut out = Outbox::default();
        let result = self.session.on_worker(message, &mut out);
        self.settle(out)?;
        match result {
            Ok(gone) => {
                assert!(!gone, "it is gone before it ended");
                Ok(())
            }
            Err(_) => Err(End),
        }
    }

    /// The frontend goes; every queue stops, and then nothing is left.
    fn end(mut self) {
        let mut out = Outbox::default();
        let mut gone = !self.session.close(&mut out);
        self.workers.take(&mut out);
        while let Some(answer) = self.workers.answer(false) {
            assert!(!gone, "it is gone before the last answer");
            let mut out = Outbox::default();
            gone = matches!(self.session.on_worker(answer, &mut out), Ok(true));
            assert!(out.replies.is_empty() && out.to_workers.is_empty());
        }
        assert!(gone, "it waits for an answer that does not come");
        assert!(self.workers.has.is_empty(), "a queue still runs");
        assert_eq!(self.session.queues(), (0, 0));
    }
}

fn words(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn halves(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// A region of a table: guest address and bytes, from the file's first byte on.
fn region(guest: u64, bytes: u64) -> [u64; 4] {
    [guest, bytes, USER + guest, 0]
}

/// The body of a message of that number, as a frontend that means well would write it with these values,
/// and the kinds of descriptors that belong to it.
fn message(code: u32, index: u32, value: u16, input: &mut Input<'_>) -> (Vec<u8>, Vec<u8>) {
    let (memory, event) = (0, 1);
    let page = u64::from(value % 16) * 0x1000;
    let small = u64::from(value);
    match code {
        code::SET_FEATURES => {
            // Everything, split rings, or any part.
            let known = feature::TRANSPORT | facts().features;
            let less = match value % 3 {
                0 => 0,
                1 => feature::RING_PACKED,
                _ => input.u64(),
            };
            (words(&[known & !less]), vec![])
        }
        code::SET_PROTOCOL_FEATURES => (words(&[protocol_feature::OFFERED & !small]), vec![]),
        code::SET_MEM_TABLE => {
            let count = value % 4;
            let mut body = halves(&[u32::from(count), 0]);
            for at in 0..u64::from(count) {
                body.extend(words(&region(at * MEMORY_BYTES, MEMORY_BYTES)));
            }
            (body, vec![memory; usize::from(count)])
        }
        code::ADD_MEM_REG => (
            [words(&[0]), words(&region(page, 0x1000))].concat(),
            vec![memory],
        ),
        code::REM_MEM_REG => {
            let bytes = if value & 1 == 0 { MEMORY_BYTES } else { 0x1000 };
            (
                [words(&[0]), words(&region(page & !0xffff, bytes))].concat(),
                vec![],
            )
        }
        code::SET_VRING_NUM => (halves(&[index, 1 << (value % 17)]), vec![]),
        code::SET_VRING_ADDR => {
            let at = USER + page;
            (
                [halves(&[index, 0]), words(&[at, at + 0x800, at + 0x400, 0])].concat(),
                vec![],
            )
        }
        code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
            let none = if value & 7 == 7 { 0x100 } else { 0 };
            (
                words(&[u64::from(index) | none]),
                if none == 0 { vec![event] } else { vec![] },
            )
        }
        code::SET_VRING_BASE | code::GET_VRING_BASE | code::SET_VRING_ENABLE => {
            (halves(&[index, u32::from(value)]), vec![])
        }
        code::GET_CONFIG | code::SET_CONFIG => {
            let (offset, size) = (u32::from(value >> 8), u32::from(value & 0xff));
            let payload = vec![1; usize::from(value & 0xff)];
            ([halves(&[offset, size, 0]), payload].concat(), vec![])
        }
        code::SET_LOG_BASE => (
            words(&[MEMORY_BYTES >> (value & 15), small >> 4]),
            vec![memory],
        ),
        code::GET_INFLIGHT_FD | code::SET_INFLIGHT_FD => {
            let (queues, size) = (u32::from(value & 3), u32::from(value >> 2));
            let mut body = words(&[MEMORY_BYTES >> (index * 2), 0]);
            body.extend(halves(&[queues | (size << 16)]));
            (
                body,
                if code == code::SET_INFLIGHT_FD {
                    vec![memory]
                } else {
                    vec![]
                },
            )
        }
        code::SET_BACKEND_REQ_FD => (vec![], vec![4]),
        // The rest: nothing, a word, or whatever is there.
        _ => match value % 4 {
            0 | 1 => (vec![], vec![]),
            2 => (words(&[small >> 2]), vec![memory]),
            _ => (
                input.bytes(usize::from(value >> 2) % 64).to_vec(),
                vec![memory],
            ),
        },
    }
}
