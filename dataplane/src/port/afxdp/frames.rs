//! A queue's frames as a port uses them: which are free for what goes, which have come, which have gone.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::socket::XdpQueue;
use super::umem::{FRAMES, RECEIVING};
use crate::port::DropReason;

/// The frames of a queue.
#[derive(Debug)]
pub(super) struct Frames {
    pub(super) queue: XdpQueue,
    /// Those for what goes that are ours.
    unsent: Vec<u32>,
    /// Something was put into the ring of what goes since the kernel was told.
    pub(super) is_unkicked: bool,
}

impl Frames {
    pub(super) fn new(queue: XdpQueue) -> Self {
        let is_free = |frame: &u32| !queue.umem.is_kernels(*frame);
        let mut unsent = Vec::with_capacity((FRAMES - RECEIVING) as usize);
        unsent.extend((RECEIVING..FRAMES).filter(is_free));
        Self {
            unsent,
            // Of a process before, something may be there still.
            is_unkicked: queue.sending.used() > 0,
            queue,
        }
    }

    /// How many can be sent now.
    #[inline]
    pub(super) fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Takes back the frames that have gone.
    #[inline]
    pub(super) fn take_sent(&mut self) {
        let waiting = self.queue.sent.waiting();
        for _ in 0..waiting {
            let Some(address) = self.queue.sent.take() else {
                break;
            };
            // The kernel gives back what it got; one of the other kind, or one twice, would be an error of its own.
            let place = self.queue.umem.place(address);
            if let Some((frame, _)) = place.filter(|(frame, _)| *frame >= RECEIVING)
                && self.queue.umem.take(frame)
            {
                self.unsent.push(frame);
            }
        }
        if waiting > 0 {
            self.queue.sent.release();
        }
    }

    /// Has a frame of ours filled, and puts it into the ring of what goes.
    ///
    /// # Errors
    /// None is free; `fill`, which says how many bytes it has written, had no room.
    #[inline]
    pub(super) fn send(
        &mut self,
        fill: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Result<(), DropReason> {
        let frame = self.unsent.pop().ok_or(DropReason::PortBusy)?;
        let filled = self.queue.umem.bytes_mut(frame).and_then(fill);
        let Some(bytes) = filled.and_then(|bytes| u32::try_from(bytes).ok()) else {
            self.unsent.push(frame);
            return Err(DropReason::TooLong);
        };
        let entry = libc::xdp_desc {
            addr: self.queue.umem.address(frame),
            len: bytes,
            options: 0,
        };
        self.queue.umem.give(frame);
        if !self.queue.sending.put(entry) {
            // The ring has a place for each: an error of the kernel's, and the frame is ours again.
            self.queue.umem.take(frame);
            self.unsent.push(frame);
            return Err(DropReason::PortError);
        }
        // At once: what was given and never seen would be lost to a process that comes after this one.
        self.queue.sending.publish();
        self.is_unkicked = true;
        Ok(())
    }

    /// Shows one frame that came to `f`, if there is one, and gives its room back to the kernel; `f` gets nothing of one
    /// that is not as it must be. The kernel sees what became of it with [`Frames::has_received`].
    #[inline]
    pub(super) fn receive(&mut self, f: impl FnOnce(&[u8])) {
        let Some(entry) = self.queue.received.take() else {
            return;
        };
        let place = self.queue.umem.place(entry.addr);
        let Some((frame, at)) = place.filter(|(frame, _)| *frame < RECEIVING) else {
            return f(&[]);
        };
        if !self.queue.umem.take(frame) {
            return f(&[]);
        }
        let bytes = self.queue.umem.bytes(frame, at, entry.len as usize);
        // A part of a longer frame was not asked for.
        f(bytes.filter(|_| entry.options == 0).unwrap_or_default());
        self.queue.refill(frame);
    }

    /// Tells the kernel what was taken, then what it may fill again: a process that ends in between has lost some
    /// room, and never has the kernel write to what is still to be read.
    #[inline]
    pub(super) fn has_received(&self) {
        self.queue.received.release();
        self.queue.fill.publish();
    }
}
