//! A storage that fails as it is told, over another one: for tests, and for `serve` when somebody wants to
//! see what a guest makes of it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Action, Begin, Completion, Limits, Polled, Storage, StorageSpec, Transfer};
use crate::worker::ring::Ring;

/// Which transfers a fault is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Zeroes.
    Zero,
    /// All of them.
    Any,
}

/// What happens to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// They end with this errno, and nothing is done.
    Errno(i32),
    /// Reads and writes end after half of their bytes.
    Short,
}

/// A fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Of which transfers.
    pub kind: Kind,
    /// Only those that begin in this range of bytes; none: wherever they are.
    pub bytes: Option<Range<u64>>,
    /// The first of so many of them, then again: 1 is each.
    pub every: u32,
    /// So many times, then never again.
    pub times: u32,
    /// What happens.
    pub what: What,
}

impl Fault {
    /// Each transfer of a kind, from now on.
    #[must_use]
    pub fn each(kind: Kind, what: What) -> Self {
        Self {
            kind,
            bytes: None,
            every: 1,
            times: u32::MAX,
            what,
        }
    }

    /// The next so many transfers of a kind.
    #[must_use]
    pub fn next(times: u32, kind: Kind, what: What) -> Self {
        Self {
            times,
            ..Self::each(kind, what)
        }
    }

    fn concerns(&self, transfer: &Transfer) -> bool {
        let kind = match transfer.action {
            Action::Read => Kind::Read,
            Action::Write { .. } => Kind::Write,
            Action::Flush => Kind::Flush,
            Action::Discard => Kind::Discard,
            Action::Zero { .. } => Kind::Zero,
        };
        let inside = |range: &Range<u64>| range.contains(&transfer.offset_bytes);
        let has_half = matches!(kind, Kind::Read | Kind::Write);
        (self.what != What::Short || has_half)
            && (self.kind == Kind::Any || self.kind == kind)
            && self.bytes.as_ref().is_none_or(inside)
    }
}

/// A storage and what is wrong with it; several workers share the faults.
#[derive(Debug)]
pub struct ErrorSpec {
    /// What does the work otherwise.
    pub inner: StorageSpec,
    /// Each with how many transfers it has met.
    faults: Mutex<Vec<(Fault, u32)>>,
    injected: AtomicU64,
}

impl ErrorSpec {
    /// Nothing wrong yet.
    #[must_use]
    pub fn new(inner: StorageSpec) -> Arc<Self> {
        Arc::new(Self {
            inner,
            faults: Mutex::new(Vec::new()),
            injected: AtomicU64::new(0),
        })
    }

    /// One fault more; of several that concern a transfer, the first counts.
    pub fn inject(&self, fault: Fault) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.push((fault, 0));
    }

    /// Nothing wrong any more.
    pub fn heal(&self) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.clear();
    }

    /// How many transfers it has failed.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.injected.load(Ordering::Acquire)
    }

    fn strike(&self, transfer: &Transfer) -> Option<What> {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let concerns = |(fault, _): &&mut (Fault, u32)| fault.times > 0 && fault.concerns(transfer);
        let (fault, met) = faults.iter_mut().find(concerns)?;
        let strikes = met.is_multiple_of(fault.every.max(1));
        *met = met.wrapping_add(1);
        if !strikes {
            return None;
        }
        if fault.times != u32::MAX {
            fault.times -= 1;
        }
        self.injected.fetch_add(1, Ordering::AcqRel);
        Some(fault.what)
    }
}

/// A worker's way to it.
#[derive(Debug)]
pub(super) struct ErrorStorage {
    spec: Arc<ErrorSpec>,
    inner: Box<dyn Storage>,
}

impl ErrorStorage {
    pub(super) fn open(spec: &Arc<ErrorSpec>, ring: &mut Ring) -> io::Result<Self> {
        Ok(Self {
            spec: Arc::clone(spec),
            inner: spec.inner.open(ring)?,
        })
    }
}

impl Storage for ErrorStorage {
    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn begin(&self, ring: &mut Ring, token: u64, transfer: Transfer) -> Begin {
        match self.spec.strike(&transfer) {
            None => self.inner.begin(ring, token, transfer),
            Some(What::Errno(errno)) => Begin::Done(transfer, Err(errno)),
            Some(What::Short) => {
                let half = transfer.bytes / 2;
                Begin::Done(transfer, Ok(half))
            }
        }
    }

    fn poll(&self, ring: &mut Ring) -> Option<Polled> {
        self.inner.poll(ring)
    }

    fn cancel(&self) -> Option<Completion> {
        self.inner.cancel()
    }

    fn close(&self, ring: &mut Ring) {
        self.inner.close(ring);
    }
}
