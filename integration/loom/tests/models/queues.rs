//! The end of a queue, and other memory under its requests.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bulkhead_loom::{Channel, Event, explore};
use loom::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use loom::thread;

/// A completion of the kernel, or a message of the control thread.
#[derive(PartialEq, Eq)]
enum To {
    Stop,
    Completion,
}

#[derive(Default)]
struct Stop {
    /// What a worker waits for: its ring and its messages wake it alike.
    inbox: Channel<To>,
    wake: Event,
    answers: Channel<u16>,
    answered: Event,
    /// Guest memory: what a request reads, and the used index.
    data: AtomicU64,
    used: AtomicU16,
}

impl Stop {
    fn give(&self, what: To) {
        self.inbox.send(what);
        self.wake.write();
    }

    /// `Worker::publish`.
    fn publish(&self, ended: u16) {
        self.used.store(ended, Ordering::Release);
    }

    /// `Worker::stop`, `Worker::give_up_if_drained` and `Worker::take_completions`: the queue is given up
    /// once nothing is in flight and what ended is published.
    fn worker(&self, answers_at_once: bool) {
        let (mut in_flight, mut stopping, mut ended) = (1u16, false, 0);
        loop {
            while let Some(what) = self.inbox.try_recv() {
                match what {
                    To::Stop => stopping = true,
                    To::Completion => {
                        in_flight -= 1;
                        ended += 1;
                    }
                }
                let drained = in_flight == 0 || answers_at_once;
                if stopping && drained {
                    self.publish(ended);
                    self.answers.send(ended);
                    self.answered.write();
                    return;
                }
            }
            self.wake.read();
        }
    }
}

fn stop(answers_at_once: bool) {
    explore(move || {
        let shared = Arc::new(Stop::default());
        let kernel = Arc::clone(&shared);
        let kernel = thread::spawn(move || {
            kernel.data.store(7, Ordering::Relaxed);
            kernel.give(To::Completion);
        });
        let worker = Arc::clone(&shared);
        let worker = thread::spawn(move || worker.worker(answers_at_once));
        // The control thread, then the frontend that it answers, which takes the queue elsewhere.
        shared.give(To::Stop);
        shared.answered.read();
        let base = shared.answers.try_recv();
        assert_eq!(base, Some(1), "a request is left behind");
        assert_eq!(shared.used.load(Ordering::Acquire), 1);
        assert_eq!(
            shared.data.load(Ordering::Relaxed),
            7,
            "a used request without its data"
        );
        kernel.join().expect("it completes");
        worker.join().expect("it stops");
    });
}

#[test]
fn a_stopped_queue_has_nothing_in_flight_and_has_shown_all() {
    stop(false);
}

#[test]
#[should_panic(expected = "a request is left behind")]
fn a_stop_that_is_answered_at_once_leaves_a_request_behind() {
    stop(true);
}

/// Guest memory: mapped until it drops. What it is made of are the standard library's types, whose steps
/// loom doesn't take apart: the order of the threads is what is explored.
struct Memory {
    mapped: AtomicBool,
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            mapped: AtomicBool::new(true),
        })
    }

    /// A request's access, by the worker or by the kernel.
    fn touch(&self) {
        assert!(
            self.mapped.load(Ordering::SeqCst),
            "memory is used that is gone"
        );
    }

    fn unmap(&self) {
        self.mapped.store(false, Ordering::SeqCst);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmap();
    }
}

/// `Session::set_memory` on the control thread and `ToWorker::SetMemory` on the worker: the queue takes the
/// new memory, what is in flight keeps its lease on the old, and the last to let go of it unmaps it.
fn swap(unmaps_at_the_answer: bool) {
    explore(move || {
        let old = Memory::new();
        let new = Memory::new();
        let messages = Arc::new((Channel::<Arc<Memory>>::default(), Event::default()));
        let answered = Arc::new(Event::default());
        let (queue, inbox, answer) = (
            Arc::clone(&old),
            Arc::clone(&messages),
            Arc::clone(&answered),
        );
        let worker = thread::spawn(move || {
            let mut queue = queue;
            let lease = Arc::clone(&queue);
            // The kernel transfers while the queue gets other memory.
            let kernel = thread::spawn(move || {
                thread::yield_now();
                lease.touch();
                drop(lease);
            });
            inbox.1.read();
            queue = inbox.0.try_recv().unwrap_or(queue);
            answer.write();
            queue.touch();
            kernel.join().expect("it transfers");
        });
        messages.0.send(Arc::clone(&new));
        messages.1.write();
        answered.read();
        if unmaps_at_the_answer {
            // Broken: the answer says that the queue has other memory, not that nobody uses the old.
            old.unmap();
        }
        drop(old);
        new.touch();
        worker.join().expect("it goes on");
    });
}

#[test]
fn memory_stays_until_the_last_request_in_it_has_ended() {
    swap(false);
}

#[test]
#[should_panic(expected = "memory is used that is gone")]
fn memory_that_is_unmapped_at_the_answer_is_used_after() {
    swap(true);
}
