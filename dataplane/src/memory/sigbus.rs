//! A frontend may cut the file behind guest memory: the next access raises SIGBUS. The handler
//! here puts zeroed private pages in its place and marks the mapping as lost, so that only the
//! device that uses it fails, and the access that was interrupted goes on.
//!
//! UNSAFETY: the handler runs anywhere, so it may only touch atomics and make system calls. The
//! table's ranges must be mappings of this module's callers, and leave the table before they are
//! unmapped, so that it never replaces pages that are something else by then. A range is only acted
//! on if both its ends were read from one state of its entry: entries change hands on the control
//! thread while the handler runs on a worker.
#![expect(unsafe_code, reason = "a signal handler")]

use std::io;
use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// Most mappings at a time in one process: 256 devices with 32 regions each, a dirty log and an
/// in-flight region, and as many again that requests in flight still hold.
const MAX_MAPPINGS: usize = 17_408;

struct Entry {
    /// A guard has it.
    taken: AtomicBool,
    /// Grows with each change of the range; odd while it changes.
    version: AtomicUsize,
    start: AtomicUsize,
    /// Exclusive; 0: no range.
    end: AtomicUsize,
    lost: AtomicBool,
}

impl Entry {
    const fn free() -> Self {
        Self {
            taken: AtomicBool::new(false),
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
        }
    }

    /// Sets the range; only whoever has taken the entry does.
    fn set_range(&self, start: usize, end: usize) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The range, unless there is none or it is changing right now: then it is not that of a mapping
    /// that the calling thread is using.
    fn range(&self) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let same = version == self.version.load(Ordering::Relaxed);
        (version.is_multiple_of(2) && same && end != 0).then_some((start, end))
    }
}

static TABLE: [Entry; MAX_MAPPINGS] = [const { Entry::free() }; MAX_MAPPINGS];

/// One past the highest entry ever taken: as far as the handler has to look.
static HIGHEST: AtomicUsize = AtomicUsize::new(0);

/// A mapping that the handler knows, until it is released.
pub(super) struct Guard {
    entry: &'static Entry,
    released: AtomicBool,
}

/// Makes a mapping known.
///
/// # Errors
/// When the table is full, or the handler can't be installed.
pub(super) fn guard(address: NonNull<u8>, bytes: usize) -> io::Result<Guard> {
    install()?;
    for (index, entry) in TABLE.iter().enumerate() {
        if entry.taken.swap(true, Ordering::AcqRel) {
            continue;
        }
        entry.lost.store(false, Ordering::Relaxed);
        let start = address.addr().get();
        entry.set_range(start, start + bytes);
        HIGHEST.fetch_max(index + 1, Ordering::AcqRel);
        return Ok(Guard {
            entry,
            released: AtomicBool::new(false),
        });
    }
    Err(io::Error::other(format!(
        "this process already maps {MAX_MAPPINGS} regions of guest memory: detach a device first"
    )))
}

impl Guard {
    /// Whether pages of it were replaced.
    pub(super) fn is_lost(&self) -> bool {
        self.entry.lost.load(Ordering::Acquire)
    }

    /// Takes the mapping off the table, before it is unmapped.
    pub(super) fn release(&self) {
        if !self.released.swap(true, Ordering::AcqRel) {
            self.entry.set_range(0, 0);
            self.entry.taken.store(false, Ordering::Release);
        }
    }
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard")
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.release();
    }
}

/// Installs the handler, once per process; before the process locks itself in.
///
/// # Errors
/// What `sigaction` fails with.
pub fn install() -> io::Result<()> {
    static INSTALLED: Once = Once::new();
    static FAILED: AtomicBool = AtomicBool::new(false);
    INSTALLED.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value of this plain C struct.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        // SAFETY: the handler keeps to atomics and system calls.
        let rc = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
        FAILED.store(rc != 0, Ordering::Release);
    });
    if FAILED.load(Ordering::Acquire) {
        return Err(io::Error::other("the SIGBUS handler can't be installed"));
    }
    Ok(())
}

extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo, which is valid while the handler runs.
    let code = unsafe { (*info).si_code };
    if code <= 0 {
        // Some process sent it, and it has no address: as deadly as without a handler.
        // SAFETY: abort may be called in a handler.
        unsafe { libc::abort() };
    }
    // SAFETY: a SIGBUS that the kernel raised has an address.
    let address = unsafe { (*info).si_addr() }.addr();
    // SAFETY: the thread's own errno: the interrupted code may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    if !replace(address) {
        crate::hand::blame();
        // Not guest memory: a fault of this process. With the default action the access, which is
        // made again on return, ends it.
        // SAFETY: signal takes plain integers.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zeroed pages in the place of the mapping that has this address; whether there is one.
fn replace(address: usize) -> bool {
    for entry in TABLE.iter().take(HIGHEST.load(Ordering::Acquire)) {
        let Some((start, end)) = entry.range() else {
            continue;
        };
        if address < start || address >= end {
            continue;
        }
        entry.lost.store(true, Ordering::Release);
        // SAFETY: the range is a mapping of a guard that is still on the table; whoever reads it
        // reads zeroes from now on.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::without_provenance_mut(start),
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        return mapped != libc::MAP_FAILED;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_is_changing_is_none() {
        let entry = Entry::free();
        assert_eq!(entry.range(), None);
        entry.set_range(0x1000, 0x3000);
        assert_eq!(entry.range(), Some((0x1000, 0x3000)));
        // As in the middle of set_range.
        entry.version.fetch_add(1, Ordering::Relaxed);
        entry.start.store(0x8000, Ordering::Relaxed);
        assert_eq!(entry.range(), None);
    }

    #[test]
    fn a_range_is_read_in_one_piece() {
        let entry = Entry::free();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for n in 1..200_000 {
                    entry.set_range(n * 0x1000, n * 0x1000 + 0x1000);
                }
            });
            while !writer.is_finished() {
                if let Some((start, end)) = entry.range() {
                    assert_eq!(end - start, 0x1000, "{start:#x}");
                }
            }
        });
    }
}
