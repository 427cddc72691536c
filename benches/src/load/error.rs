//! What can go wrong while loading a back-end: what, where, and what to do about it.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_integration::frontend::FrontendError;

use super::source::Kind;

/// Why a run ended without figures.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Nobody listens.
    #[error(
        "{path}: can't connect: {source}; start the back-end first, and name the socket it listens on"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: FrontendError,
    },
    /// A message of the set-up failed.
    #[error("{path}: {step}: {source}; the back-end's log may say why")]
    Setup {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: FrontendError,
    },
    /// Needed and not offered.
    #[error("{path}: the back-end does not offer {what}; {instead}")]
    NotOffered {
        /// The socket.
        path: PathBuf,
        /// The feature.
        what: &'static str,
        /// What to do.
        instead: &'static str,
    },
    /// The disk is not one for these options.
    #[error("{path}: {what}")]
    Unfit {
        /// The socket.
        path: PathBuf,
        /// Why, and what to do.
        what: String,
    },
    /// Options that contradict each other or the machine.
    #[error("{0}")]
    Options(String),
    /// No memory.
    #[error(
        "can't get {bytes} bytes of shared memory: {source}; choose a smaller --depth, --block-size or --queues"
    )]
    Memory {
        /// How much.
        bytes: usize,
        /// Why not.
        source: io::Error,
    },
    /// A mistake in this program's own layout.
    #[error("{count} items at offset {at} are not in shared memory: a mistake of `load`")]
    OutOfMemory {
        /// Offset.
        at: usize,
        /// Items.
        count: usize,
    },
    /// A queue failed.
    #[error("{device}, queue {queue}: {source}")]
    Queue {
        /// The socket, or the ring echo.
        device: String,
        /// Its queue.
        queue: u16,
        /// What happened.
        source: QueueError,
    },
    /// The back-end went away.
    #[error("{0}: the back-end closed the connection during the run: see its log")]
    Closed(PathBuf),
    /// The back-end signalled that a queue failed.
    #[error(
        "{path}: the back-end gave queue {queue} up (its error descriptor was signalled): see its log"
    )]
    GaveUp {
        /// The socket.
        path: PathBuf,
        /// Its queue.
        queue: u16,
    },
    /// Nothing comes back.
    #[error(
        "no request was answered for {waited:?} (in flight: {in_flight}): the back-end hangs, or a kick or a used entry was lost; --timeout waits longer"
    )]
    Stalled {
        /// How long.
        waited: Duration,
        /// Requests that are in flight, all queues together.
        in_flight: u64,
    },
    /// Another thread failed first.
    #[error("stopped, because another thread failed")]
    Abandoned,
    /// A thread panicked: a mistake here.
    #[error("a thread of `load` ended by a panic: a mistake of `load`")]
    Panicked,
    /// A system call.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// What a device did wrong on a queue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The used index is where it can't be.
    #[error("the used index went from {last} to {now} with {in_flight} requests in flight")]
    UsedJumped {
        /// Looked at last.
        last: u16,
        /// Now.
        now: u16,
        /// How many could have been used.
        in_flight: u16,
    },
    /// A used entry names what was never offered, or was used already.
    #[error("the used ring names {id}, which is not in flight")]
    NotInFlight {
        /// Head (split) or buffer id (packed).
        id: u32,
    },
    /// A used length beyond what the device may write.
    #[error(
        "the device says it wrote {given} bytes into a request that has {room} writable ones ({kind} of offset {offset})"
    )]
    Length {
        /// What it said.
        given: u32,
        /// What there is.
        room: u32,
        /// The request.
        kind: Kind,
        /// Bytes from the disk's start.
        offset: u64,
    },
    /// A request failed.
    #[error("the {kind} of {bytes} bytes at offset {offset} ended with status {status} ({})", status_name(*.status))]
    Status {
        /// The request.
        kind: Kind,
        /// Bytes from the disk's start.
        offset: u64,
        /// Bytes.
        bytes: u32,
        /// The status byte.
        status: u8,
    },
    /// The data is not what was written last.
    #[error(
        "corrupt data at offset {offset} (found by the read of the {bytes} bytes at {request}): {found}"
    )]
    Corrupt {
        /// Bytes from the disk's start, of the sector.
        offset: u64,
        /// Where the request began.
        request: u64,
        /// Its bytes.
        bytes: u32,
        /// What is there instead.
        found: super::stamp::Mismatch,
    },
    /// A received frame that lies in no buffer.
    #[error("the header of a received frame says that it lies in no buffer")]
    NoBuffers,
    /// A received frame that came before, or after one that was sent later.
    #[error("frame {found} came, of a sender of which {expected} or a later one was to come")]
    Order {
        /// The next one at least.
        expected: u32,
        /// What came.
        found: u32,
    },
    /// The device's side of a ring echo met what the driver's side can't have written.
    #[error("the echo met a {0} that the driver's side can't have written: a mistake of `load`")]
    Echo(&'static str),
}

fn status_name(status: u8) -> &'static str {
    match status {
        1 => "I/O error",
        2 => "unsupported",
        super::requests::UNTOUCHED => "never written by the device",
        _ => "unknown",
    }
}
