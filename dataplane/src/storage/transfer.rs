//! One step of a request as a storage takes it: what to do with which bytes, and the buffer that goes with
//! it. It moves to the storage and comes back with the result, unchanged, so that it can be tried again.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use crate::memory::GuestBuffer;
use crate::worker::staging::Chunk;

/// What a storage is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// From the storage into the buffer.
    Read,
    /// From the buffer to the storage; `durable`: completed only when stable.
    Write {
        /// Write-through.
        durable: bool,
    },
    /// Make completed writes stable, those of other workers too.
    Flush,
    /// Give the range's blocks up: what is read there afterwards can be anything.
    Discard,
    /// The range reads as zeroes afterwards.
    Zero {
        /// Its blocks may be given up.
        unmap: bool,
    },
}

/// Where the bytes are.
#[derive(Debug)]
pub enum Buffer {
    /// Nowhere: flush, discard, zeroes.
    None,
    /// The front of a chunk.
    Staging(Chunk),
    /// All of a guest buffer.
    Guest(GuestBuffer),
}

/// A transfer.
#[derive(Debug)]
pub struct Transfer {
    /// What to do.
    pub action: Action,
    /// From which byte of the storage on.
    pub offset_bytes: u64,
    /// With how many: as many as the buffer gives or takes, where there is one; none for a flush.
    pub bytes: u64,
    /// With which buffer.
    pub buffer: Buffer,
    /// How often it was tried again: all that changes on the way.
    pub retries: u8,
}

/// What a storage has done: so many bytes, or an errno.
pub type Done = Result<u64, i32>;

/// A transfer that ended.
#[derive(Debug)]
pub struct Completion {
    /// As it was given at the start.
    pub token: u64,
    /// The transfer back.
    pub transfer: Transfer,
    /// What was done.
    pub done: Done,
}

impl Transfer {
    /// What a flush is.
    #[must_use]
    pub fn flush() -> Self {
        Self {
            action: Action::Flush,
            offset_bytes: 0,
            bytes: 0,
            buffer: Buffer::None,
            retries: 0,
        }
    }

    /// Whether it was done in full, or the errno: EIO for a transfer that was cut short.
    ///
    /// # Errors
    /// See above.
    #[inline]
    pub fn judge(&self, done: Done) -> Result<(), i32> {
        match (self.action, done) {
            (_, Err(errno)) => Err(errno),
            (Action::Read | Action::Write { .. }, Ok(bytes)) if bytes != self.bytes => {
                Err(libc::EIO)
            }
            (_, Ok(_)) => Ok(()),
        }
    }

    /// Copies what a write brings; false where it has another length.
    #[must_use]
    pub fn copy_out(&self, to: &mut [u8]) -> bool {
        match &self.buffer {
            Buffer::None => false,
            Buffer::Staging(chunk) => chunk.copy_out(to),
            Buffer::Guest(buffer) => buffer.copy_out(0, to),
        }
    }

    /// Copies what a read is to get; false where it has another length.
    #[must_use]
    pub fn copy_in(&mut self, from: &[u8]) -> bool {
        match &mut self.buffer {
            Buffer::None => false,
            Buffer::Staging(chunk) => chunk.copy_in(from),
            Buffer::Guest(buffer) => buffer.copy_in(0, from),
        }
    }
}
