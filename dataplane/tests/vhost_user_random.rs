//! Valid messages in random order, with workers that answer at random times: nothing panics, a worker is
//! told nothing that makes no sense, and no descriptor is left over. One test in a process of its own, so
//! that descriptors can be counted.

#[path = "vhost_user/messages.rs"]
#[allow(dead_code, reason = "shared with the other tests of the protocol")]
mod messages;

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_dataplane::stored::{self, Fd, StoredConnection};
use bulkhead_dataplane::vhost_user::message::{ProtocolError, code};
use bulkhead_dataplane::vhost_user::{Outbox, Session, feature, protocol_feature};
use bulkhead_dataplane::worker::message::{FromWorker, QueueId, ToWorker};
use messages::{
    addresses, event, facts, halves, memfd, message, one_region, table, with_fd, without_fd, words,
};
use proptest::prelude::*;

/// What a frontend does next.
#[derive(Debug, Clone)]
enum Step {
    /// A message: which, of which queue, a value, and the descriptors it comes with.
    Message {
        which: u8,
        index: u32,
        value: u64,
        fds: u8,
        acknowledge: bool,
    },
    /// The worker answers what it was told first.
    Worker { fails: bool },
    /// The worker retires a queue.
    Retire { index: u16 },
    /// The process dies, and another goes on.
    Die,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0u8..24, 0u32..3, 0u64..5, prop_oneof![4 => Just(9u8), 1 => 0u8..4], prop::bool::weighted(0.9))
            .prop_map(|(which, index, value, fds, acknowledge)| Step::Message {
                which, index, value, fds, acknowledge
            }),
        4 => prop::bool::weighted(0.1).prop_map(|fails| Step::Worker { fails }),
        1 => (0u16..2).prop_map(|index| Step::Retire { index }),
        1 => Just(Step::Die),
    ];
    prop::collection::vec(step, 1..120)
}

/// Memory, and both queues run.
fn prelude() -> Vec<Step> {
    let message = |which, index, value| Step::Message {
        which,
        index,
        value,
        fds: 9,
        acknowledge: true,
    };
    let queue = |index| {
        let kick = [
            message(8, index, 3),
            message(10, index, 0),
            message(14, index, 0),
        ];
        kick.into_iter().chain([Step::Worker { fails: false }])
    };
    let memory = [message(3, 0, 0)].into_iter();
    memory.chain(queue(0)).chain(queue(1)).collect()
}

/// Code, body and the right number of eventfds or memfds.
fn request(which: u8, index: u32, value: u64) -> (u32, Vec<u8>, Vec<OwnedFd>) {
    let small = u64::from(index);
    let number = u32::try_from(value).unwrap_or(0);
    let tables: [&[(u64, u64)]; 5] = [
        &[(0, 0x1_0000)],
        &[(0, 0x1000), (0x1000, 0x1000)],
        &[],
        &[(0x10_0000, 0x1000)],
        &[(0, 0x1000), (0x800, 0x1000)],
    ];
    let of_table = tables[usize::try_from(value).unwrap_or(0)];
    let features = feature::TRANSPORT & !(value << 28);
    match which {
        0 => (code::SET_FEATURES, words(&[features]), vec![]),
        1 => (code::SET_OWNER, vec![], vec![]),
        2 => (code::RESET_OWNER, vec![], vec![]),
        3 | 4 => {
            let fds = of_table.iter().map(|(_, bytes)| memfd(*bytes)).collect();
            (code::SET_MEM_TABLE, table(of_table), fds)
        }
        5 => (
            code::ADD_MEM_REG,
            one_region(value * 0x1000, 0x1000),
            vec![memfd(0x1000)],
        ),
        6 => (
            code::REM_MEM_REG,
            one_region(value * 0x1000, 0x1000),
            vec![],
        ),
        7 => (code::REM_MEM_REG, one_region(0, 0x1_0000), vec![]),
        8 | 9 => (code::SET_VRING_NUM, halves(&[index, 1 << number]), vec![]),
        10 | 11 => (code::SET_VRING_ADDR, addresses(index), vec![]),
        12 => (code::SET_VRING_BASE, halves(&[index, number]), vec![]),
        13 => (code::GET_VRING_BASE, halves(&[index, 0]), vec![]),
        14..=16 => (code::SET_VRING_KICK, with_fd(small), vec![event()]),
        17 => (code::SET_VRING_CALL, with_fd(small), vec![event()]),
        18 => (code::SET_VRING_ERR, with_fd(small), vec![event()]),
        19 => (code::SET_VRING_CALL, without_fd(small), vec![]),
        20 => (code::SET_VRING_ENABLE, halves(&[index, number % 2]), vec![]),
        21 => (
            code::GET_CONFIG,
            [halves(&[0, 4, 0]), vec![0; 4]].concat(),
            vec![],
        ),
        22 => (number * 13, words(&[value]), vec![]),
        _ => (
            code::SET_PROTOCOL_FEATURES,
            words(&[protocol_feature::OFFERED]),
            vec![],
        ),
    }
}

/// A worker that knows which queues it has, and answers when it is told to.
#[derive(Default)]
struct Worker {
    to_do: VecDeque<ToWorker>,
    has: HashMap<QueueId, Box<bulkhead_dataplane::worker::message::QueueStart>>,
    /// Queues of the process before that did not start again: retired, or their ring is in no region.
    left: HashSet<QueueId>,
}

impl Worker {
    fn take(&mut self, out: &mut Outbox) {
        self.to_do.extend(out.to_workers.drain(..).map(|(_, m)| m));
        assert!(self.to_do.len() <= 8, "messages pile up");
    }

    fn answer(&mut self, fails: bool) -> Option<FromWorker> {
        Some(match self.to_do.pop_front()? {
            ToWorker::Start(start) => {
                let queue = start.queue;
                assert!(!self.has.contains_key(&queue), "started twice: {queue:?}");
                if fails {
                    let reason = "as the test wants it".to_owned();
                    FromWorker::StartFailed { queue, reason }
                } else {
                    self.has.insert(queue, start);
                    FromWorker::Started { queue }
                }
            }
            ToWorker::Stop { queue } => {
                let base = self.has.remove(&queue).map(|start| start.base);
                let left = false;
                FromWorker::Stopped { queue, base, left }
            }
            ToWorker::SetMemory { queue, memory } => {
                let start = self
                    .has
                    .get_mut(&queue)
                    .expect("memory for a queue that runs");
                start.memory = memory;
                FromWorker::MemorySet { queue }
            }
            ToWorker::SetEnabled { queue, .. }
            | ToWorker::SetKick { queue, .. }
            | ToWorker::SetCall { queue, .. }
            | ToWorker::SetLog { queue, .. }
            | ToWorker::SetError { queue, .. } => {
                assert!(
                    self.has.contains_key(&queue) || self.left.contains(&queue),
                    "a change of a queue that does not run"
                );
                FromWorker::Changed { queue }
            }
            ToWorker::Flush { queue } => FromWorker::Flushed { queue },
            other => panic!("a session does not say {other:?}"),
        })
    }
}

/// Any socket.
fn socket() -> Fd {
    Arc::new(event())
}

/// What is remembered, with which value it is in place of each descriptor.
fn remembered(session: &Session, socket: &Fd) -> StoredConnection<usize> {
    let left = session.remembered(socket, stored::Step::Idle);
    let numbers = left.try_map(&mut |fd: Fd| Ok::<_, ()>(Arc::as_ptr(&fd).addr()));
    numbers.expect("no failure")
}

/// The session of the next process, and its workers'.
fn die(session: Session, worker: &mut Worker) -> Result<Session, ProtocolError> {
    let socket = socket();
    let left = session.remembered(&socket, stored::Step::Idle);
    let before = remembered(&session, &socket);
    let had: HashSet<_> = worker.has.drain().map(|(queue, _)| queue).collect();
    drop(session);
    let mut session = Session::resumed(facts(), left)?;
    assert_eq!(remembered(&session, &socket), before);
    let mut out = Outbox::default();
    session.start_again(&mut out)?;
    assert_eq!(remembered(&session, &socket), before);
    assert!(out.replies.is_empty() && out.reply_fd.is_none());
    let started = out.to_workers.iter().map(|(queue, _)| *queue);
    let started: HashSet<_> = started.collect();
    worker.left.extend(had.difference(&started));
    worker.take(&mut out);
    Ok(session)
}

/// Runs the steps until the connection ends or they are over; then ends it.
fn converse(steps: &[Step]) {
    let (mut session, mut worker) = (Session::new(facts()), Worker::default());
    let mut out = Outbox::default();
    let negotiate = message(
        code::SET_PROTOCOL_FEATURES,
        words(&[protocol_feature::OFFERED]),
        vec![],
    );
    session.handle(negotiate, &mut out).expect("offered");
    for step in steps {
        let mut out = Outbox::default();
        let result = match step {
            Step::Message {
                which,
                index,
                value,
                fds,
                acknowledge,
            } => {
                if session.is_pending() {
                    continue;
                }
                let (code, body, mut sent) = request(*which, *index, *value);
                if *fds < 9 {
                    sent.truncate(usize::from(*fds));
                    sent.extend((sent.len()..usize::from(*fds)).map(|_| event()));
                }
                let mut message = message(code, body, sent);
                message.header.need_reply = *acknowledge;
                session.handle(message, &mut out)
            }
            Step::Worker { fails } => match worker.answer(*fails) {
                Some(answer) => session
                    .on_worker(answer, &mut out)
                    .map(|gone| assert!(!gone)),
                None => continue,
            },
            Step::Die => {
                if session.is_pending() || !worker.to_do.is_empty() {
                    continue;
                }
                match die(session, &mut worker) {
                    Ok(next) => {
                        session = next;
                        Ok(())
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Step::Retire { index } => {
                let queue = QueueId {
                    device: facts().id,
                    index: *index,
                };
                if !worker.has.contains_key(&queue) {
                    continue;
                }
                let reason = "as the test wants it".to_owned();
                let retired = FromWorker::Retired { queue, reason };
                session
                    .on_worker(retired, &mut out)
                    .map(|gone| assert!(!gone))
            }
        };
        worker.take(&mut out);
        assert!(out.replies.len() <= 12 + 12 + 256, "one reply at a time");
        let (running, retired) = session.queues();
        assert!(running + retired <= messages::QUEUES);
        if result.is_err() {
            break;
        }
    }
    let mut out = Outbox::default();
    let mut gone = !session.close(&mut out);
    worker.take(&mut out);
    while let Some(answer) = worker.answer(false) {
        let mut out = Outbox::default();
        assert!(!gone, "it is gone before the last answer");
        gone = session.on_worker(answer, &mut out).expect("an end");
        assert!(out.replies.is_empty() && out.to_workers.is_empty());
    }
    assert!(gone, "it waits for an answer that does not come");
    assert!(worker.has.is_empty(), "a queue still runs");
    assert_eq!(session.queues(), (0, 0));
}

#[test]
fn any_order_of_messages_and_answers() {
    // What is made once for the process.
    converse(&[]);
    drop(bulkhead_dataplane::fds::know_eventfds());
    let open = || fs::read_dir("/proc/self/fd").expect("fds").count();
    // proptest keeps one of its own.
    let before = std::cell::OnceCell::new();
    let config = ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(steps in steps(), running: bool)| {
        let steps = if running { [prelude(), steps].concat() } else { steps };
        let before = *before.get_or_init(open);
        converse(&steps);
        prop_assert_eq!(open(), before, "descriptors are left over");
    });
}
