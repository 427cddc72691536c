//! A file or block device through a worker's io_uring, in which it has a fixed number.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::AsFd;

use super::{Begin, FileSpec, Limits, Storage, Transfer};
use crate::worker::ring::{FixedFile, Ring};

/// A file in a ring.
#[derive(Debug)]
pub(super) struct UringStorage {
    file: FixedFile,
    limits: Limits,
}

impl UringStorage {
    pub(super) fn open(spec: &FileSpec, ring: &mut Ring) -> io::Result<Self> {
        let file = ring.register_file(spec.as_fd())?;
        Ok(Self {
            file: if spec.off_thread {
                file.off_thread()
            } else {
                file
            },
            limits: Limits {
                memory_align_bytes: spec.memory_align_bytes,
                length_align_bytes: spec.offset_align_bytes,
            },
        })
    }
}

impl Storage for UringStorage {
    fn limits(&self) -> Limits {
        self.limits
    }

    #[inline]
    fn begin(&self, ring: &mut Ring, token: u64, transfer: Transfer) -> Begin {
        match ring.push(token, self.file, transfer) {
            Ok(_) => Begin::Later,
            Err(transfer) => Begin::Full(transfer),
        }
    }

    fn close(&self, ring: &mut Ring) {
        ring.forget_file(self.file);
    }
}
