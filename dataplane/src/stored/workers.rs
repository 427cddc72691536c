//! How many workers this process has, for a successor: one that finds volumes to go on with does not wait for keyd to say it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use bulkhead_protocol::workers::Workers;
use nix::sys::memfd::memfd_create;
use nix::sys::uio::{pread, pwrite};

use crate::vhost_user::inflight_flags;

/// Most bytes of it: the largest number of workers, each with its CPU, takes less.
const MAX_BYTES: usize = 1024;

/// A memfd that says it.
///
/// # Errors
/// What making or writing one fails with.
pub(super) fn write(workers: &Workers) -> io::Result<OwnedFd> {
    let bytes = minicbor::to_vec(workers).map_err(io::Error::other)?;
    let fd = memfd_create("workers", inflight_flags())?;
    match pwrite(&fd, &bytes, 0)? {
        count if count == bytes.len() => Ok(fd),
        _ => Err(io::Error::other("a write to memory was cut short")),
    }
}

/// What a predecessor's says; none if it makes no sense.
pub(super) fn read(fd: &OwnedFd) -> Option<Workers> {
    let mut bytes = [0; MAX_BYTES];
    let count = pread(fd.as_fd(), &mut bytes, 0).ok()?;
    let workers: Workers = minicbor::decode(bytes.get(..count)?).ok()?;
    workers.check().is_ok().then_some(workers)
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::workers::{MAX_CPU, MAX_WORKERS};

    use super::*;

    #[test]
    fn it_reads_back_and_what_makes_no_sense_does_not() {
        let most = (0..MAX_WORKERS).map(|at| MAX_CPU - at).collect();
        let most = Workers::new(None, most).expect("workers");
        for workers in [Workers::default(), most] {
            let fd = write(&workers).expect("written");
            assert_eq!(read(&fd), Some(workers));
        }
        let none = Workers {
            count: 0,
            cpus: Vec::new(),
        };
        assert_eq!(read(&write(&none).expect("written")), None);
        let empty = memfd_create("empty", inflight_flags()).expect("memfd");
        assert_eq!(read(&empty), None);
        let (pipe, _other) = nix::unistd::pipe().expect("pipe");
        assert_eq!(read(&pipe), None);
    }
}
