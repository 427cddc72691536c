//! A storage that takes its time, over another one: transfers begin there later than they were given, each
//! by another while, so that they end in another order. For tests, and to see what a slow disk does.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::{Begin, Completion, Limits, Polled, Storage, StorageSpec, Transfer};
use crate::worker::ring::Ring;

/// A storage and how slow it is.
#[derive(Debug)]
pub struct DelaySpec {
    /// What does the work.
    pub inner: StorageSpec,
    /// No transfer waits for longer than that.
    most: Duration,
    /// None begins while this is set: it hangs.
    stopped: AtomicBool,
    /// Nor in this time, once it was said.
    pause: OnceLock<(Instant, Option<Instant>)>,
}

impl DelaySpec {
    /// Each transfer waits for some time up to `most`.
    #[must_use]
    pub fn new(inner: StorageSpec, most: Duration) -> Arc<Self> {
        Arc::new(Self {
            inner,
            most,
            stopped: AtomicBool::new(false),
            pause: OnceLock::new(),
        })
    }

    /// Nothing goes on from so long after now, for so long or for ever. Said once.
    pub fn stop_later(&self, after: Duration, lasts: Option<Duration>) {
        let from = Instant::now() + after;
        let to = lasts.and_then(|lasts| from.checked_add(lasts));
        let _ = self.pause.set((from, to));
    }

    fn is_stopped(&self, now: Instant) -> bool {
        let is_in =
            |(from, to): &(Instant, Option<Instant>)| *from <= now && to.is_none_or(|to| now < to);
        self.stopped.load(Ordering::Acquire) || self.pause.get().is_some_and(is_in)
    }

    /// Nothing goes on until it is told otherwise.
    pub fn stop(&self, stopped: bool) {
        self.stopped.store(stopped, Ordering::Release);
    }
}

#[derive(Debug)]
struct Held {
    due: Instant,
    token: u64,
    transfer: Transfer,
}

#[derive(Debug)]
struct State {
    held: Vec<Held>,
    /// For the times: any will do, the same in each run.
    random: u64,
}

/// A worker's way to it.
#[derive(Debug)]
pub(super) struct DelayStorage {
    spec: Arc<DelaySpec>,
    inner: Box<dyn Storage>,
    state: RefCell<State>,
}

impl DelayStorage {
    pub(super) fn open(spec: &Arc<DelaySpec>, ring: &mut Ring) -> io::Result<Self> {
        Ok(Self {
            spec: Arc::clone(spec),
            inner: spec.inner.open(ring)?,
            state: RefCell::new(State {
                held: Vec::new(),
                random: 0x9e37_79b9_7f4a_7c15,
            }),
        })
    }
}

impl State {
    /// Some time up to `most` (xorshift).
    fn wait(&mut self, most: Duration) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let thousandths = u32::try_from(self.random % 1001).unwrap_or(0);
        most * thousandths / 1000
    }
}

impl Storage for DelayStorage {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn begin(&self, _ring: &mut Ring, token: u64, transfer: Transfer) -> Begin {
        let mut state = self.state.borrow_mut();
        let due = Instant::now() + state.wait(self.spec.most);
        state.held.push(Held {
            due,
            token,
            transfer,
        });
        Begin::Held
    }

    fn poll(&self, ring: &mut Ring) -> Option<Polled> {
        if let Some(polled) = self.inner.poll(ring) {
            return Some(polled);
        }
        let now = Instant::now();
        if self.spec.is_stopped(now) {
            return None;
        }
        let mut state = self.state.borrow_mut();
        let at = state.held.iter().position(|held| held.due <= now)?;
        let Held {
            due,
            token,
            transfer,
        } = state.held.swap_remove(at);
        match self.inner.begin(ring, token, transfer) {
            Begin::Later => Some(Polled::Passed),
            // It is held there now.
            Begin::Held => None,
            Begin::Done(transfer, done) => Some(Polled::Ended(Completion {
                token,
                transfer,
                done,
            })),
            Begin::Full(transfer) => {
                state.held.push(Held {
                    due,
                    token,
                    transfer,
                });
                None
            }
        }
    }

    fn cancel(&self) -> Option<Completion> {
        let Some(held) = self.state.borrow_mut().held.pop() else {
            return self.inner.cancel();
        };
        Some(Completion {
            token: held.token,
            transfer: held.transfer,
            done: Err(libc::ECANCELED),
        })
    }

    fn close(&self, ring: &mut Ring) {
        self.inner.close(ring);
    }
}
