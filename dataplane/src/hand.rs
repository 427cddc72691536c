//! Whose work each thread has in hand. A thread that is about to end the process by a fault of its own (a panic, an
//! access that can't be) blames that volume, in memory that outlives the process ([`Deaths`](crate::stored::Deaths)):
//! a volume that kills one process after the other is set aside by its successor (ADR 0037).
//!
//! Who is killed from outside blames nobody: nothing of ours runs then.
//!
//! UNSAFETY: the handler runs anywhere, so it touches nothing but a thread's own cell, a static that is never
//! changed once it is set, and atomics; it makes no system call but for the end of the process.
#![expect(unsafe_code, reason = "a signal handler")]

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::memory::SharedWords;

/// What a thread may have in hand: a volume that is remembered for a successor, by its slot; or nothing that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hand(u32);

impl Hand {
    /// Nothing.
    pub const NOTHING: Self = Self(0);

    /// The volume in this slot of the store.
    #[must_use]
    pub fn of(slot: u16) -> Self {
        Self(u32::from(slot) + 1)
    }

    /// The slot of the volume; none: nothing.
    #[must_use]
    pub fn slot(self) -> Option<u16> {
        u16::try_from(self.0.checked_sub(1)?).ok()
    }
}

/// The same where several threads read it.
#[derive(Debug, Default)]
pub struct SharedHand(AtomicU32);

impl SharedHand {
    /// Sets it, once, before anybody works for it.
    pub fn set(&self, hand: Hand) {
        self.0.store(hand.0, Ordering::Relaxed);
    }

    /// As it was set.
    #[inline]
    #[must_use]
    pub fn get(&self) -> Hand {
        Hand(self.0.load(Ordering::Relaxed))
    }
}

thread_local! {
    static IN_HAND: Cell<Hand> = const { Cell::new(Hand::NOTHING) };
}

/// Words of a slot in the blame's memory, of which the first is counted up.
pub const WORDS_OF_A_SLOT: usize = 4;

static BLAMED: OnceLock<Arc<SharedWords>> = OnceLock::new();

/// This thread works for that volume from now on.
#[inline(always)]
pub fn take(hand: Hand) {
    IN_HAND.set(hand);
}

/// What this thread works for.
#[must_use]
pub fn current() -> Hand {
    IN_HAND.get()
}

/// Has faults of this process blame whose work a thread had in hand, in these words. To be called once, before the process locks
/// itself in, and after the handler of SIGBUS was installed, which blames by itself.
///
/// # Errors
/// What `sigaction` fails with.
pub fn watch(words: Arc<SharedWords>) -> io::Result<()> {
    let _ = BLAMED.set(words);
    for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE] {
        // SAFETY: an all-zero sigaction is a valid value of this plain C struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        // Once: the instruction is run again on return, and ends the process by default. The stack may be at its end.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_ONSTACK;
        // SAFETY: the handler keeps to what a handler may do.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The process is about to end by a fault of this thread's.
#[cold]
pub fn blame() {
    let slot = current().slot().map(usize::from);
    let word = slot.and_then(|slot| BLAMED.get()?.get(slot * WORDS_OF_A_SLOT));
    if let Some(word) = word {
        word.fetch_add(1, Ordering::Release);
    }
}

extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo, which is valid while the handler runs.
    let code = unsafe { (*info).si_code };
    if code <= 0 {
        // Some process sent it, and no instruction is run again: as deadly as without a handler.
        // SAFETY: abort may be called in a handler.
        unsafe { libc::abort() };
    }
    blame();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_has_a_slot_or_nothing() {
        assert_eq!(Hand::NOTHING.slot(), None);
        assert_eq!(Hand::of(0).slot(), Some(0));
        assert_eq!(Hand::of(999).slot(), Some(999));
        let shared = SharedHand::default();
        assert_eq!(shared.get(), Hand::NOTHING);
        shared.set(Hand::of(3));
        take(shared.get());
        assert_eq!(current(), Hand::of(3));
        let other = std::thread::spawn(current).join().expect("it ends");
        assert_eq!(other, Hand::NOTHING, "each thread has its own");
    }
}
