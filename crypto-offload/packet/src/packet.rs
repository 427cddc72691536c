//! Where a packet's bytes lie, with lengths checked once, when it is made.
//!
//! UNSAFETY: a packet holds raw ranges. They come from slices that it borrows, or from segments
//! that its maker vouched for; source and output are the same range or don't overlap. Bytes of a
//! segment may change at any time: each is read once, by an instruction that the compiler doesn't
//! see into, and no reference to them is ever made.
#![expect(unsafe_code, reason = "guest memory by raw pointer")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::marker::PhantomData;

use bulkhead_crypto::raw;

/// Length of a tag in bytes.
pub const TAG_BYTES: usize = 16;

/// Longest plaintext of a packet, in bytes: the largest segmentation offload with its headers
/// (virtio 1.2, 5.1.6.3) and room to spare.
pub const MAX_PLAINTEXT_BYTES: usize = 1 << 17;

/// Most associated data of a packet, in bytes.
pub const MAX_ASSOCIATED_BYTES: usize = 1 << 16;

/// Lengths that make no packet. Nothing was read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LengthError {
    /// More than [`MAX_PLAINTEXT_BYTES`].
    #[error("a packet of {bytes} bytes is too long: {MAX_PLAINTEXT_BYTES} are the most")]
    TooLong {
        /// Length of the plaintext in bytes.
        bytes: usize,
    },
    /// More than [`MAX_ASSOCIATED_BYTES`].
    #[error("{bytes} bytes of associated data are too many: {MAX_ASSOCIATED_BYTES} are the most")]
    AssociatedTooLong {
        /// Their number.
        bytes: usize,
    },
    /// No room for the tag, or no tag.
    #[error("{bytes} bytes can't hold a packet: its tag alone has {TAG_BYTES}")]
    NoTag {
        /// Length of the buffer in bytes.
        bytes: usize,
    },
    /// The output has another length than the packet needs.
    #[error("the packet needs an output of {needed} bytes, this one has {given}")]
    Output {
        /// What the packet needs, in bytes.
        needed: usize,
        /// What was given, in bytes.
        given: usize,
    },
}

/// Part of a packet in memory that others may change meanwhile, such as a guest's.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// First byte.
    pub address: *const u8,
    /// Length in bytes.
    pub bytes: usize,
}

/// The ranges of a packet and its number, as the kernels take them.
#[derive(Debug)]
pub(crate) struct Ranges {
    pub(crate) source: *const u8,
    pub(crate) output: *mut u8,
    /// Length of plaintext and ciphertext in bytes, without the tag.
    pub(crate) bytes: usize,
    pub(crate) associated: *const u8,
    pub(crate) associated_bytes: usize,
    pub(crate) sequence: u64,
    /// The source may change while it is read.
    pub(crate) shared: bool,
}

/// What kernels work on.
pub(crate) trait Job {
    fn ranges(&self) -> &Ranges;
}

/// A packet to be sealed: associated data, plaintext, and where ciphertext and tag go.
#[derive(Debug)]
pub struct SealPacket<'a> {
    ranges: Ranges,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> SealPacket<'a> {
    /// Plaintext that is replaced by its ciphertext: `buffer` is the plaintext, then [`TAG_BYTES`]
    /// for the tag.
    ///
    /// # Errors
    /// [`LengthError`] if the buffer is shorter than a tag, or something is too long.
    pub fn in_place(associated: &'a [u8], buffer: &'a mut [u8]) -> Result<Self, LengthError> {
        let bytes = without_tag(buffer.len())?;
        let output = buffer.as_mut_ptr();
        Self::new(associated, output.cast_const(), bytes, output, false)
    }

    /// Plaintext in one buffer, ciphertext and tag into another, which is [`TAG_BYTES`] longer.
    ///
    /// # Errors
    /// [`LengthError`] if the output has another length, or something is too long.
    pub fn between(
        associated: &'a [u8],
        plaintext: &'a [u8],
        output: &'a mut [u8],
    ) -> Result<Self, LengthError> {
        check_output(plaintext.len().saturating_add(TAG_BYTES), output.len())?;
        Self::new(
            associated,
            plaintext.as_ptr(),
            plaintext.len(),
            output.as_mut_ptr(),
            false,
        )
    }

    /// Plaintext in memory that others may change meanwhile, ciphertext and tag into a buffer that
    /// is [`TAG_BYTES`] longer. Each byte is read once: several segments are copied to the output
    /// now, a single one is read when the packet is sealed. Whatever the others do, the tag is that
    /// of the ciphertext. Until the packet is sealed, the output may hold plaintext: one that never is, or whose
    /// batch was refused, is not to be sent.
    ///
    /// # Errors
    /// [`LengthError`] if the output has another length, or something is too long.
    ///
    /// # Safety
    /// Each segment is readable until the packet drops and doesn't overlap `output`.
    pub unsafe fn from_segments(
        associated: &'a [u8],
        segments: &[Segment],
        output: &'a mut [u8],
    ) -> Result<Self, LengthError> {
        let bytes = segments
            .iter()
            .fold(0usize, |sum, segment| sum.saturating_add(segment.bytes));
        check_output(bytes.saturating_add(TAG_BYTES), output.len())?;
        let to = output.as_mut_ptr();
        if let &[Segment { address, bytes }] = segments {
            return Self::new(associated, address, bytes, to, true);
        }
        let packet = Self::new(associated, to.cast_const(), bytes, to, false)?;
        let mut at = 0;
        for segment in segments {
            // SAFETY: the caller vouches for the segment; the output has the sum of all of them.
            unsafe { raw::copy(segment.address, to.add(at), segment.bytes) };
            at += segment.bytes;
        }
        Ok(packet)
    }

    fn new(
        associated: &'a [u8],
        source: *const u8,
        bytes: usize,
        output: *mut u8,
        shared: bool,
    ) -> Result<Self, LengthError> {
        Ok(Self {
            ranges: ranges(associated, source, bytes, output, shared)?,
            borrowed: PhantomData,
        })
    }

    /// Length of its plaintext in bytes.
    #[must_use]
    pub fn plaintext_bytes(&self) -> usize {
        self.ranges.bytes
    }

    pub(crate) fn number(&mut self, sequence: u64) {
        self.ranges.sequence = sequence;
    }

    /// Leaves zeroes where ciphertext and tag would be.
    pub(crate) fn clear(&mut self) {
        // SAFETY: the output is ours for the plaintext's length and the tag.
        unsafe {
            self.ranges
                .output
                .write_bytes(0, self.ranges.bytes + TAG_BYTES)
        };
    }
}

impl Job for SealPacket<'_> {
    fn ranges(&self) -> &Ranges {
        &self.ranges
    }
}

/// The packet did not authenticate: it was damaged, forged, or sealed under another key, salt,
/// number or associated data. Its output holds zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("packet {sequence} does not authenticate: damaged, forged, or not for this key; drop it")]
pub struct Refused {
    /// The number it was opened under.
    pub sequence: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unopened,
    Opened,
    Refused,
}

/// A packet to be opened: its number, associated data, ciphertext and tag, and where the
/// plaintext goes.
#[derive(Debug)]
pub struct OpenPacket<'a> {
    ranges: Ranges,
    state: State,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> OpenPacket<'a> {
    /// Ciphertext that is replaced by its plaintext: `buffer` is the ciphertext, then the tag.
    ///
    /// # Errors
    /// [`LengthError`] if the buffer is shorter than a tag, or something is too long.
    pub fn in_place(
        sequence: u64,
        associated: &'a [u8],
        buffer: &'a mut [u8],
    ) -> Result<Self, LengthError> {
        let bytes = without_tag(buffer.len())?;
        let output = buffer.as_mut_ptr();
        Self::new(sequence, associated, output.cast_const(), bytes, output)
    }

    /// Ciphertext and tag in one buffer, plaintext into another, which is [`TAG_BYTES`] shorter.
    ///
    /// # Errors
    /// [`LengthError`] if there is no tag, the output has another length, or something is too long.
    pub fn between(
        sequence: u64,
        associated: &'a [u8],
        sealed: &'a [u8],
        output: &'a mut [u8],
    ) -> Result<Self, LengthError> {
        let bytes = without_tag(sealed.len())?;
        check_output(bytes, output.len())?;
        Self::new(
            sequence,
            associated,
            sealed.as_ptr(),
            bytes,
            output.as_mut_ptr(),
        )
    }

    fn new(
        sequence: u64,
        associated: &'a [u8],
        source: *const u8,
        bytes: usize,
        output: *mut u8,
    ) -> Result<Self, LengthError> {
        let ranges = Ranges {
            sequence,
            ..ranges(associated, source, bytes, output, false)?
        };
        Ok(Self {
            ranges,
            state: State::Unopened,
            borrowed: PhantomData,
        })
    }

    /// The plaintext, after [`Opener::open_batch`](crate::Opener::open_batch).
    ///
    /// # Errors
    /// [`Refused`] if the packet did not authenticate or was not opened yet.
    pub fn plaintext(&mut self) -> Result<&mut [u8], Refused> {
        if self.state != State::Opened {
            return Err(Refused {
                sequence: self.ranges.sequence,
            });
        }
        // SAFETY: the output is borrowed for as long as the packet, and &mut self makes this the
        // only slice of it.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.ranges.output, self.ranges.bytes) })
    }

    /// The number it is opened under.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.ranges.sequence
    }

    /// Whether it still waits; one that was opened or refused isn't opened again.
    pub(crate) fn is_unopened(&self) -> bool {
        self.state == State::Unopened
    }

    pub(crate) fn opened(&mut self) {
        self.state = State::Opened;
    }

    /// Refuses the packet and leaves zeroes where its plaintext would be.
    #[cold]
    pub(crate) fn refuse(&mut self) {
        self.state = State::Refused;
        // SAFETY: the output is ours for the plaintext's length.
        unsafe { self.ranges.output.write_bytes(0, self.ranges.bytes) };
    }
}

impl Job for OpenPacket<'_> {
    fn ranges(&self) -> &Ranges {
        &self.ranges
    }
}

fn ranges(
    associated: &[u8],
    source: *const u8,
    bytes: usize,
    output: *mut u8,
    shared: bool,
) -> Result<Ranges, LengthError> {
    if bytes > MAX_PLAINTEXT_BYTES {
        return Err(LengthError::TooLong { bytes });
    }
    if associated.len() > MAX_ASSOCIATED_BYTES {
        return Err(LengthError::AssociatedTooLong {
            bytes: associated.len(),
        });
    }
    Ok(Ranges {
        source,
        output,
        bytes,
        associated: associated.as_ptr(),
        associated_bytes: associated.len(),
        sequence: 0,
        shared,
    })
}

fn without_tag(bytes: usize) -> Result<usize, LengthError> {
    bytes
        .checked_sub(TAG_BYTES)
        .ok_or(LengthError::NoTag { bytes })
}

fn check_output(needed: usize, given: usize) -> Result<(), LengthError> {
    if needed == given {
        Ok(())
    } else {
        Err(LengthError::Output { needed, given })
    }
}
