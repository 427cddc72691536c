//! T24: a connection that is abused: messages of any size with any number of descriptors, cut
//! anywhere. The process keeps neither descriptors nor memory of it.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::PATIENCE;
use bulkhead_integration::frontend::message::{self, FLAG_NEED_REPLY, VERSION};
use bulkhead_integration::frontend::{Frontend, FrontendError};
use bulkhead_integration::random::Random;
use nix::sys::eventfd::EventFd;

use crate::Outcome;

/// The most descriptors that one message can carry (SCM_MAX_FD).
const MOST_FDS: u64 = 253;
/// What the process may grow by, after a tenth of the rounds.
pub const GROWTH_KIB: u64 = 1024;

/// So many messages.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let event = EventFd::new()?;
    let mut settled = 0;
    let (mut connections, mut fds) = (0, 0);
    let mut frontend = None;
    for round in 0..rounds {
        if round == rounds / 10 {
            settled = arena.process.own_kib()?;
        }
        let connected = match frontend.take() {
            Some(frontend) => frontend,
            None => {
                connections += 1;
                Frontend::connect(&arena.socket, PATIENCE)?
            }
        };
        let count = count(random);
        fds += count as u64;
        let carried = vec![event.as_fd(); count];
        let sent = send(&connected, random, &carried);
        match sent {
            Ok(true) => frontend = Some(connected),
            Ok(false) | Err(FrontendError::Closed) => {}
            Err(other) => return Err(other.into()),
        }
        if round % 200 == 0 {
            arena.check_other()?;
        }
    }
    drop(frontend);
    arena.check_other()?;
    let grown = arena.process.own_kib()?.saturating_sub(settled);
    if grown > GROWTH_KIB {
        return Err(format!("{rounds} messages left {grown} KiB behind").into());
    }
    Ok(format!(
        "{rounds} messages with {fds} descriptors on {connections} connections, {grown} KiB grown"
    ))
}

fn count(random: &mut Random) -> usize {
    let most = match random.below(8) {
        0 => MOST_FDS + 1,
        1 => 12,
        2 | 3 => 3,
        _ => 1,
    };
    random.index(usize::try_from(most).unwrap_or(1))
}

/// One message, or part of one; whether the connection is still of use.
fn send(
    frontend: &Frontend,
    random: &mut Random,
    fds: &[BorrowedFd<'_>],
) -> Result<bool, FrontendError> {
    let len = body_len(random);
    let code = match random.below(6) {
        0 => u32::try_from(random.below(1 << 32)).unwrap_or(0),
        _ => 1 + u32::try_from(random.below(43)).unwrap_or(0),
    };
    let flags = match random.below(6) {
        0 => u32::try_from(random.below(16)).unwrap_or(0),
        1 => VERSION | FLAG_NEED_REPLY,
        _ => VERSION,
    };
    let body = random.bytes(len);
    let mut bytes = message::encode(code, flags, &body);
    if random.below(8) == 0 {
        // A size that is not the body's.
        let size = u32::try_from(body_len(random)).unwrap_or(0);
        bytes[8..12].copy_from_slice(&size.to_le_bytes());
    }
    let cut = random.below(4) == 0;
    if cut {
        bytes.truncate(1 + random.index(bytes.len()));
    }
    frontend.send_raw(&bytes, fds)?;
    // Answers are read, so that the backend can go on; a connection with half a message ends here.
    let closed = frontend.closes_within(Duration::from_micros(random.below(300)));
    Ok(!closed && !cut)
}

fn body_len(random: &mut Random) -> usize {
    match random.below(8) {
        0 => random.index(65537),
        1 => random.index(4097),
        2 => random.index(300),
        3 => 0,
        4 => 4,
        5 => 40,
        _ => 8,
    }
}
