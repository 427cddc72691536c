//! The bytes of a state (`docs/formats/state.md`): a frame with version, sequence number and
//! digest around CBOR, written to two copies in turn, so that a death in the middle of a write leaves the
//! copy before.
//!
//! A frame says which version wrote it and the oldest that can read it. A reader takes what is readable by
//! it: unknown fields come last and are left out. So the version before can go on with what this one wrote,
//! and the other way round. A build with `--cfg previous_state_format` is the version before.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::kinds::Stored;
use super::volume::{FdNumber, Step, StoredConnection};
use crate::vhost_user::message::{HEADER_BYTES, MAX_BODY_BYTES, MAX_REGIONS};

/// The version that this build writes.
pub const WRITTEN_BY: u16 = if cfg!(previous_state_format) { 2 } else { 3 };
/// Bytes of one copy, frame and all.
pub const COPY_BYTES: usize = 16 << 10;
/// Copies of a state, one behind the other.
pub const COPIES: usize = 2;
/// Bytes of a frame before its payload.
pub const FRAME_BYTES: usize = 80;
/// Most bytes of a payload.
pub const MAX_PAYLOAD_BYTES: usize = COPY_BYTES - FRAME_BYTES;

const MAGIC: &[u8; 16] = b"bulkhead volume ";
/// Where it says what is stored.
const KIND_AT: usize = 32;
/// Where the digest of everything else lies.
const DIGEST_AT: usize = 48;
/// A sequence number counts messages: none ever comes near. (A forged one must not make us overflow.)
const MAX_SEQUENCE: u64 = 1 << 62;
/// Most queues of a volume, and their largest size in entries.
const MAX_QUEUES: usize = 64;
const MAX_QUEUE_SIZE: u16 = 32768;

/// Why a state can't be read, or not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Nothing was written there yet.
    #[error("nothing was written there")]
    Empty,
    /// The bytes are not those of a state, or not as they were written.
    #[error("the state is damaged: {0}")]
    Damaged(&'static str),
    /// A version that this one can't read.
    #[error(
        "the state was written by version {written_by} for readers from version {readable_by} on, \
         and this is version {WRITTEN_BY}: start a newer bulkhead-dataplane"
    )]
    Newer {
        /// Who wrote it.
        written_by: u16,
        /// The oldest that can read it.
        readable_by: u16,
    },
    /// A value that can't be.
    #[error("the state says what can't be: {0}")]
    Value(&'static str),
    /// More than fits into a copy.
    #[error("a state of {0} bytes is longer than {MAX_PAYLOAD_BYTES}")]
    TooLong(usize),
}

/// A state, and which it is in the row of those that were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbered {
    /// From 1 on.
    pub sequence: u64,
    /// What it says.
    pub stored: Stored<FdNumber>,
}

/// The bytes of a copy, without what lies behind them in it.
///
/// # Errors
/// [`FormatError::TooLong`].
pub fn encode(sequence: u64, stored: &Stored<FdNumber>) -> Result<Vec<u8>, FormatError> {
    let kind = Kind::of(stored);
    if kind.readable_by() > WRITTEN_BY {
        return Err(FormatError::Value("this version has nothing of its kind"));
    }
    let mut bytes = vec![0; FRAME_BYTES];
    match stored {
        Stored::Volume(volume) => minicbor::encode(volume, &mut bytes),
        Stored::Nic(nic) => minicbor::encode(nic, &mut bytes),
        Stored::Switch(switch) => minicbor::encode(switch, &mut bytes),
    }
    .map_err(|_| FormatError::Value("it does not encode"))?;
    let payload_bytes = bytes.len() - FRAME_BYTES;
    let length = u32::try_from(payload_bytes).unwrap_or(u32::MAX);
    if payload_bytes > MAX_PAYLOAD_BYTES {
        return Err(FormatError::TooLong(payload_bytes));
    }
    let head = [
        &MAGIC[..],
        &WRITTEN_BY.to_le_bytes(),
        &kind.readable_by().to_le_bytes(),
        &length.to_le_bytes(),
        &sequence.to_le_bytes(),
        &[kind as u8],
    ]
    .concat();
    put(&mut bytes, 0, &head);
    let digest = digest(&bytes);
    put(&mut bytes, DIGEST_AT, &digest);
    Ok(bytes)
}

/// What is stored. The versions before 3 know volumes alone, and wrote nothing there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Volume = 0,
    Nic = 1,
    Switch = 2,
}

impl Kind {
    fn of(stored: &Stored<FdNumber>) -> Self {
        match stored {
            Stored::Volume(_) => Self::Volume,
            Stored::Nic(_) => Self::Nic,
            Stored::Switch(_) => Self::Switch,
        }
    }

    fn parse(byte: u64) -> Option<Self> {
        let all = [Self::Volume, Self::Nic, Self::Switch];
        all.into_iter().find(|kind| *kind as u64 == byte)
    }

    /// The oldest version that reads what this build writes of it.
    fn readable_by(self) -> u16 {
        match self {
            Self::Volume => 1,
            Self::Nic | Self::Switch => 3,
        }
    }
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + what.len()) {
        place.copy_from_slice(what);
    }
}

/// Of everything but the digest's own place.
fn digest(bytes: &[u8]) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(bytes.get(..DIGEST_AT).unwrap_or_default());
    digest.update(bytes.get(FRAME_BYTES..).unwrap_or_default());
    digest.finalize().into()
}

/// Reads a copy.
///
/// # Errors
/// [`FormatError`]; every value of a state that is read lies in its range.
pub fn decode(copy: &[u8]) -> Result<Numbered, FormatError> {
    let frame = Frame::parse(copy)?;
    if frame.readable_by > WRITTEN_BY {
        return Err(FormatError::Newer {
            written_by: frame.written_by,
            readable_by: frame.readable_by,
        });
    }
    let kind = Kind::parse(frame.kind).ok_or(FormatError::Value("its kind"))?;
    let mut decoder = minicbor::Decoder::new(frame.payload);
    let stored = match kind {
        Kind::Volume => decoder.decode().map(Stored::Volume),
        Kind::Nic => decoder.decode().map(Stored::Nic),
        Kind::Switch => decoder.decode().map(Stored::Switch),
    };
    let stored = stored.map_err(|_| FormatError::Damaged("it does not decode"))?;
    if decoder.position() != frame.payload.len() {
        return Err(FormatError::Damaged("something follows it"));
    }
    check(&stored)?;
    Ok(Numbered {
        sequence: frame.sequence,
        stored,
    })
}

/// The later of the copies that can be read.
///
/// # Errors
/// Why the copy can't be read that was written at all, if none can.
pub fn latest(copies: [&[u8]; COPIES]) -> Result<Numbered, FormatError> {
    let [one, two] = copies.map(decode);
    match (one, two) {
        (Ok(one), Ok(two)) if two.sequence > one.sequence => Ok(two),
        (Ok(one), _) => Ok(one),
        (_, Ok(two)) => Ok(two),
        (Err(FormatError::Empty), Err(error)) | (Err(error), Err(_)) => Err(error),
    }
}

/// A frame whose digest is right.
struct Frame<'a> {
    written_by: u16,
    readable_by: u16,
    sequence: u64,
    kind: u64,
    payload: &'a [u8],
}

impl<'a> Frame<'a> {
    fn parse(copy: &'a [u8]) -> Result<Self, FormatError> {
        let short = FormatError::Damaged("it is too short");
        let head: &[u8; FRAME_BYTES] = copy.first_chunk().ok_or(short.clone())?;
        if head.iter().all(|&byte| byte == 0) {
            return Err(FormatError::Empty);
        }
        if !head.starts_with(MAGIC) {
            return Err(FormatError::Damaged("it does not begin as one"));
        }
        let half = |at: usize| u16::try_from(le(head, at, 2)).unwrap_or(u16::MAX);
        let length = usize::try_from(le(head, 20, 4)).unwrap_or(usize::MAX);
        let end = FRAME_BYTES.saturating_add(length);
        let whole = copy.get(..end).filter(|_| length <= MAX_PAYLOAD_BYTES);
        let whole = whole.ok_or(short)?;
        if head.get(DIGEST_AT..) != Some(&digest(whole)[..]) {
            return Err(FormatError::Damaged("its digest is another"));
        }
        let sequence = le(head, 24, 8);
        if !(1..=MAX_SEQUENCE).contains(&sequence) {
            return Err(FormatError::Value("its number"));
        }
        Ok(Self {
            written_by: half(16),
            readable_by: half(18),
            sequence,
            kind: le(head, KIND_AT, DIGEST_AT - KIND_AT),
            payload: whole.get(FRAME_BYTES..).unwrap_or_default(),
        })
    }
}

/// `bytes` bytes at `at`, little-endian.
fn le(head: &[u8; FRAME_BYTES], at: usize, bytes: usize) -> u64 {
    let field = head.get(at..at + bytes).unwrap_or_default();
    let shifted = field.iter().rev();
    shifted.fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// What the types leave open. (What keyd granted, and what is wrong with a descriptor, is found where it is
/// used.)
fn check(stored: &Stored<FdNumber>) -> Result<(), FormatError> {
    let mut seen = BTreeSet::new();
    let mut once = |number| match seen.insert(number) {
        true => Ok(()),
        false => Err(FormatError::Value("a descriptor is named twice")),
    };
    stored.clone().try_map(&mut once)?;
    match (stored.connection(), stored.queues()) {
        (Some(connection), Some(queues)) => check_connection(connection, queues),
        (Some(_), None) => Err(FormatError::Value("the number of its queues")),
        (None, _) => Ok(()),
    }
}

fn check_connection(
    connection: &StoredConnection<FdNumber>,
    queues: u16,
) -> Result<(), FormatError> {
    let bad = |what| Err(FormatError::Value(what));
    let vrings = &connection.vrings;
    if vrings.len() != usize::from(queues) || vrings.len() > MAX_QUEUES {
        return bad("the number of its queues");
    }
    if vrings.iter().any(|vring| vring.size > MAX_QUEUE_SIZE) {
        return bad("the size of a queue");
    }
    if connection.memory.len() as u64 > MAX_REGIONS {
        return bad("the number of its regions");
    }
    let message_bytes = match connection.step {
        Step::Idle => return Ok(()),
        Step::Applied { bytes, .. } => u64::from(bytes),
    };
    let least = HEADER_BYTES as u64;
    if !(least..=least + u64::from(MAX_BODY_BYTES)).contains(&message_bytes) {
        return bad("the length of a message");
    }
    Ok(())
}
