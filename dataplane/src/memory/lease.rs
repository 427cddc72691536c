//! A worker's hold on guest memory, which remembers the region that was asked for last.
//!
//! UNSAFETY: a window is a region of the memory that the lease holds, copied: an address inside of it lies inside
//! that region's mapping.
#![expect(unsafe_code, reason = "addresses inside a region")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::Cell;
use std::ops::Deref;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use super::{GuestMemory, will_write};

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Guest memory, held: cheap to copy within its thread.
#[derive(Debug, Clone)]
pub struct Lease(Rc<Held>);

#[derive(Debug)]
struct Held {
    memory: Arc<GuestMemory>,
    /// Where an address was found last: the next one is likely to lie there, too.
    recent: Cell<Window>,
}

/// A region, for looking up addresses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(super) guest_addr: u64,
    /// 0: no address is inside.
    pub(super) bytes: u64,
    pub(super) host: NonNull<u8>,
}

impl Window {
    /// Where `bytes` bytes at a guest address lie in this process, if these are some, and all in this region: for as long
    /// as the memory is held that it is of.
    #[inline(always)]
    pub(crate) fn find(&self, guest_addr: u64, bytes: u32) -> Option<NonNull<u8>> {
        let offset = guest_addr.wrapping_sub(self.guest_addr);
        // No bytes at all are more than there ever are.
        let last = u64::from(bytes).wrapping_sub(1);
        if offset >= self.bytes || last >= self.bytes - offset {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: offset lies inside the region, which the memory's mapping covers.
        Some(unsafe { self.host.add(offset) })
    }
}

impl Lease {
    /// A hold on this memory.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let nowhere = Window {
            guest_addr: 0,
            bytes: 0,
            host: NonNull::dangling(),
        };
        Self(Rc::new(Held {
            memory,
            recent: Cell::new(nowhere),
        }))
    }

    /// Whether both are the same hold.
    #[must_use]
    #[inline]
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Where `bytes` bytes at a guest address lie in this process, if these are some, and all in the region
    /// that was asked for last.
    #[inline]
    pub(super) fn recent(&self, guest_addr: u64, bytes: u32) -> Option<NonNull<u8>> {
        self.0.recent.get().find(guest_addr, bytes)
    }

    /// The region that was asked for last.
    #[inline(always)]
    pub(crate) fn window(&self) -> Window {
        self.0.recent.get()
    }

    /// As [`Window::find`] in that region, after it was not found in `window`, which is that region from then on.
    #[cold]
    pub(crate) fn find_elsewhere(
        &self,
        window: &mut Window,
        guest_addr: u64,
        bytes: u32,
    ) -> Option<NonNull<u8>> {
        self.remember(guest_addr);
        *window = self.window();
        window.find(guest_addr, bytes)
    }

    /// Has the CPU fetch what is going to be written there, of `bytes` bytes the first `most`.
    #[inline]
    pub(crate) fn announce(&self, guest_addr: u64, bytes: u32, most: u32) {
        let Some(first) = self.recent(guest_addr, bytes) else {
            return;
        };
        // With the last byte comes its line, wherever the first one lies in its own.
        let last = bytes.min(most) - 1;
        for at in (0..last).step_by(LINE_BYTES).chain([last]) {
            // SAFETY: below the range's length, which lies in the mapping as a whole.
            will_write(unsafe { first.add(at as usize) });
        }
    }

    /// Has the region of this address looked at first from now on.
    pub(super) fn remember(&self, guest_addr: u64) {
        if let Some(window) = self.0.memory.window(guest_addr) {
            self.0.recent.set(window);
        }
    }
}

impl Deref for Lease {
    type Target = Arc<GuestMemory>;

    #[inline]
    fn deref(&self) -> &Arc<GuestMemory> {
        &self.0.memory
    }
}
