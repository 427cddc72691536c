//! How often each volume's work has killed a data plane lately (ADR 0037): a memfd in the store, that threads which are about to
//! die write to ([`crate::hand`]) and a successor counts.
//!
//! | word of a slot | what |
//! | --- | --- |
//! | 0 | not 0: a thread died with this volume in hand, and nobody has counted that yet |
//! | 1 | deaths in a row, each within [`FORGIVEN_AFTER`] of the one before |
//! | 2 | when the last of them was counted: seconds since the host started |
//! | 3 | 0 |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::memfd_create;
use nix::sys::stat::fstat;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::ftruncate;

use super::names::SLOTS;
use crate::hand::WORDS_OF_A_SLOT;
use crate::memory::{SharedArea, SharedWords};
use crate::vhost_user::inflight_flags;

/// A volume that has killed so many processes in a row is set aside. rot drops everything that is stored after six
/// starts that come to nothing: this has to be sooner.
pub const MOST_DEATHS: u32 = 4;
/// A death so long after the one before is the first of a row.
pub const FORGIVEN_AFTER: Duration = Duration::from_secs(60);
/// Length of the memfd in bytes.
const FILE_BYTES: u64 = 16 << 10;
const _: () = assert!(SLOTS as u64 * WORDS_OF_A_SLOT as u64 * 4 <= FILE_BYTES);

/// The memfd.
#[derive(Debug)]
pub struct Deaths {
    fd: OwnedFd,
    words: Arc<SharedWords>,
}

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

impl Deaths {
    /// A fresh one: nobody has killed anything.
    ///
    /// # Errors
    /// What making or mapping a memfd fails with.
    pub fn create() -> io::Result<Self> {
        let fd = memfd_create("deaths", inflight_flags())?;
        ftruncate(&fd, FILE_BYTES.cast_signed())?;
        fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals()))?;
        Self::of(fd)
    }

    /// A predecessor's.
    ///
    /// # Errors
    /// It is none, or can't be mapped.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        let length = fstat(&fd)?.st_size;
        let sealed = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        if length != FILE_BYTES.cast_signed() || !sealed.is_ok_and(|s| s.contains(seals())) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Self::of(fd)
    }

    fn of(fd: OwnedFd) -> io::Result<Self> {
        let area = SharedArea::map(fd.as_fd(), 0, FILE_BYTES)?;
        let words = SharedWords::new(area).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self {
            fd,
            words: Arc::new(words),
        })
    }

    /// Where threads blame a volume.
    #[must_use]
    pub fn words(&self) -> Arc<SharedWords> {
        Arc::clone(&self.words)
    }

    fn word(&self, slot: u16, which: usize) -> Option<&AtomicU32> {
        self.words.get(usize::from(slot) * WORDS_OF_A_SLOT + which)
    }

    fn get(&self, slot: u16, which: usize) -> u32 {
        let word = self.word(slot, which);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn set(&self, slot: u16, which: usize, value: u32) {
        if let Some(word) = self.word(slot, which) {
            word.store(value, Ordering::Release);
        }
    }

    /// Counts the death of the process before this one, for the volumes that it had in hand.
    pub fn count_all(&self) {
        let since_start = clock_gettime(ClockId::CLOCK_MONOTONIC);
        let now = since_start.map_or(0, |time| u32::try_from(time.tv_sec()).unwrap_or(u32::MAX));
        for slot in 0..SLOTS {
            self.count(slot, now);
        }
    }

    fn count(&self, slot: u16, now: u32) {
        if self.get(slot, 0) == 0 {
            return;
        }
        let since = now.saturating_sub(self.get(slot, 2));
        let before = match u64::from(since) <= FORGIVEN_AFTER.as_secs() {
            true => self.get(slot, 1),
            false => 0,
        };
        // A process that dies in between has it counted once more, which is one of its own.
        self.set(slot, 1, before.saturating_add(1));
        self.set(slot, 2, now);
        self.set(slot, 0, 0);
    }

    /// How often in a row a volume's work has killed the process.
    #[must_use]
    pub fn of_slot(&self, slot: u16) -> u32 {
        self.get(slot, 1)
    }

    /// The slot is another volume's, or the same volume begins anew.
    pub fn forgive(&self, slot: u16) {
        (0..WORDS_OF_A_SLOT).for_each(|which| self.set(slot, which, 0));
    }

    /// Another program may do what this one died of.
    pub fn forgive_all(&self) {
        (0..SLOTS).for_each(|slot| self.forgive(slot));
    }
}

impl AsFd for Deaths {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blame(deaths: &Deaths, slot: u16) {
        deaths.set(slot, 0, 1);
    }

    #[test]
    fn deaths_in_a_row_are_counted_and_forgiven() {
        let deaths = Deaths::create().expect("a memfd");
        for n in 1..=3 {
            blame(&deaths, 7);
            deaths.count(7, 100 + 60 * n);
            assert_eq!(deaths.of_slot(7), n);
        }
        deaths.count(7, 300);
        assert_eq!(deaths.of_slot(7), 3, "nothing new");
        blame(&deaths, 7);
        deaths.count(7, 280 + 61);
        assert_eq!(deaths.of_slot(7), 1, "it served for longer than a minute");
        assert_eq!(deaths.of_slot(6), 0);
        assert_eq!(deaths.of_slot(8), 0);
    }

    #[test]
    fn a_successor_finds_them() {
        let first = Deaths::create().expect("a memfd");
        blame(&first, 0);
        blame(&first, SLOTS - 1);
        let fd = first.as_fd().try_clone_to_owned().expect("duplicated");
        let next = Deaths::open(fd).expect("the same");
        next.count_all();
        assert_eq!((next.of_slot(0), next.of_slot(SLOTS - 1)), (1, 1));
        next.forgive(0);
        assert_eq!((first.of_slot(0), first.of_slot(SLOTS - 1)), (0, 1));
        next.forgive_all();
        assert_eq!(first.of_slot(SLOTS - 1), 0);
    }

    #[test]
    fn another_file_is_none() {
        let short = memfd_create("short", inflight_flags()).expect("memfd");
        ftruncate(&short, 4096).expect("grown");
        assert!(Deaths::open(short).is_err());
        let open = memfd_create("open", inflight_flags()).expect("memfd");
        ftruncate(&open, FILE_BYTES.cast_signed()).expect("grown");
        assert!(Deaths::open(open).is_err(), "its length is not sealed");
        let (pipe, _other) = nix::unistd::pipe().expect("pipe");
        assert!(Deaths::open(pipe).is_err());
    }
}
