//! What the models in `tests/models` are made of: a channel, an eventfd, and the exploration itself.
//!
//! A model is a transcription of a protocol in the data plane, small enough that loom can run it in every
//! order of its steps and with every value that the memory model lets a load see. Each names the functions
//! that it transcribes; whoever changes one of them changes the model. Each has a twin in which the
//! protocol is broken at one place, and which must fail: so the model is known to look at that place.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use loom::model::Builder;
use loom::sync::{Condvar, Mutex, MutexGuard};

/// Switches away from a thread that could go on, in one run.
const PREEMPTIONS: usize = 3;

/// Runs a model in every way; panics where one fails, or waits for ever.
pub fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread of a model panics alone")
}

/// A channel, as crossbeam's: what comes out is what went in, and it orders memory.
#[derive(Debug)]
pub struct Channel<T>(Mutex<VecDeque<T>>);

impl<T> Default for Channel<T> {
    fn default() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }
}

impl<T> Channel<T> {
    /// Puts a message in.
    pub fn send(&self, message: T) {
        lock(&self.0).push_back(message);
    }

    /// Takes the first message.
    pub fn try_recv(&self) -> Option<T> {
        lock(&self.0).pop_front()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }
}

/// An eventfd: a counter that is waited for.
#[derive(Debug)]
pub struct Event {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Default for Event {
    fn default() -> Self {
        Self {
            count: Mutex::new(0),
            changed: Condvar::new(),
        }
    }
}

impl Event {
    /// Signals it.
    pub fn write(&self) {
        *lock(&self.count) += 1;
        self.changed.notify_one();
    }

    /// Resets it.
    pub fn clear(&self) {
        *lock(&self.count) = 0;
    }

    /// Waits until it is signalled.
    pub fn wait(&self) {
        let mut count = lock(&self.count);
        while *count == 0 {
            count = self
                .changed
                .wait(count)
                .expect("no thread of a model panics alone");
        }
    }

    /// Waits until it is signalled, and resets it: a read in a ring.
    pub fn read(&self) {
        self.wait();
        self.clear();
    }
}
