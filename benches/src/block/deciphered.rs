//! A bare file, read or written as `fio` does it, with every request's bytes deciphered or enciphered as they come: what
//! encryption leaves of a file without rings of a guest.
//!
//! It is no sum of `fio` and the cipher alone: `fio` never looks at what it has read, and the cipher alone finds its
//! bytes in the cache. Who uses what a disk has read fetches it from where the disk has put it, and the disk (on a
//! virtual machine a thread of the host) has to take those lines back before it writes them again.
//!
//! UNSAFETY: the kernel reads and writes `staging` through addresses of it. It is mapped for as long as the ring, each
//! request has a part of its own, and nobody else touches that before its completion: a run ends when all have.
#![expect(
    unsafe_code,
    reason = "buffers of requests that io_uring has under way"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_integration::random::Random;
use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;

use super::alone::memory;
use super::bench::{Bench, in_file};
use super::shape::Shape;
use super::side::Side;
use super::{BlockError, thread};
use crate::serve::cpus;

/// Requests that it submits, or reaps, at once at most: as many as `fio` does.
const BATCH: usize = 16;
/// Bytes of a data unit.
const UNIT_BYTES: usize = 4096;

impl<'a> Side<'a> {
    /// The file without rings of a guest, from the CPU that serves, deciphered or enciphered.
    #[must_use]
    pub fn deciphered(bench: &'a Bench, path: &Path, shape: Shape) -> Self {
        let path = path.to_owned();
        Self::new(move || {
            std::thread::scope(|scope| {
                let turn = scope.spawn(|| {
                    cpus::pin(&[bench.worker_cpu]).map_err(|e| BlockError::Program {
                        what: "binding a thread to its CPU".to_owned(),
                        source: io::Error::other(e),
                    })?;
                    let mut bare = Bare::new(&path, shape)?;
                    bare.run(bench.pace.warm_up)?;
                    bare.run(bench.pace.sample)
                });
                thread::joined(turn)
            })
        })
    }
}

struct Bare {
    ring: IoUring,
    _file: File,
    shape: Shape,
    /// Requests that fit into the file.
    places: u64,
    next: u64,
    random: Random,
    key: XtsKey,
    /// A part for each request under way, known to the kernel.
    staging: MmapMut,
    /// Where the guest's memory would be.
    guest: MmapMut,
    /// Of each part: the place in the file.
    under_way: Vec<u64>,
}

fn ring_failed(source: io::Error) -> BlockError {
    BlockError::Program {
        what: "io_uring on a bare file".to_owned(),
        source,
    }
}

impl Bare {
    fn new(path: &Path, shape: Shape) -> Result<Self, BlockError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let file = options.custom_flags(libc::O_DIRECT).open(path);
        let file = file.map_err(in_file(path))?;
        let bytes = file.metadata().map_err(in_file(path))?.len();
        let mut ring = IoUring::builder();
        ring.setup_single_issuer().setup_defer_taskrun();
        let ring = ring
            .build(u32::from(shape.depth).next_power_of_two())
            .map_err(ring_failed)?;
        let room = shape.bytes as usize * usize::from(shape.depth);
        let mut staging = memory(room)?;
        let all = libc::iovec {
            iov_base: staging.as_mut_ptr().cast(),
            iov_len: room,
        };
        let submitter = ring.submitter();
        // SAFETY: `staging` stays mapped until after the ring is gone: fields drop in order.
        unsafe { submitter.register_buffers(&[all]) }.map_err(ring_failed)?;
        submitter
            .register_files(&[file.as_raw_fd()])
            .map_err(ring_failed)?;
        let cipher = |e: &dyn std::fmt::Display| BlockError::Cipher(e.to_string());
        let key_bytes: [u8; KEY_BYTES] = std::array::from_fn(|i| u8::try_from(i).unwrap_or(0));
        let arena = SecretArena::new(1).map_err(|e| cipher(&e))?;
        Ok(Self {
            ring,
            _file: file,
            shape,
            places: bytes / u64::from(shape.bytes),
            next: 0,
            random: Random::new(11),
            key: XtsKey::new(&arena, &key_bytes).map_err(|e| cipher(&e))?,
            staging,
            guest: memory(room)?,
            under_way: vec![0; usize::from(shape.depth)],
        })
    }

    /// Nanoseconds for a request, over this time. Nothing is under way afterwards.
    fn run(&mut self, time: Duration) -> Result<f64, BlockError> {
        let start = Instant::now();
        for part in 0..self.under_way.len() {
            self.begin(part)?;
        }
        let mut left = self.under_way.len();
        let (mut count, mut elapsed) = (0u32, Duration::ZERO);
        while left > 0 {
            self.ring.submit_and_wait(1).map_err(ring_failed)?;
            let ended: Vec<_> = self.ring.completion().take(BATCH).collect();
            for entry in ended {
                let part = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
                self.end(part, entry.result())?;
                if elapsed < time {
                    count += 1;
                    self.begin(part)?;
                } else {
                    left -= 1;
                }
            }
            elapsed = if elapsed < time {
                start.elapsed()
            } else {
                elapsed
            };
        }
        Ok(elapsed.as_secs_f64() * 1e9 / f64::from(count.max(1)))
    }

    fn begin(&mut self, part: usize) -> Result<(), BlockError> {
        let place = if self.shape.sequential {
            self.next += 1;
            self.next % self.places
        } else {
            self.random.below(self.places)
        };
        if let Some(under_way) = self.under_way.get_mut(part) {
            *under_way = place;
        }
        if self.shape.writes {
            self.cipher(part, place)?;
        }
        let bytes = self.shape.bytes;
        let at = self
            .staging
            .as_mut_ptr()
            .wrapping_add(part * bytes as usize);
        let offset = place * u64::from(bytes);
        let file = types::Fixed(0);
        let entry = if self.shape.writes {
            opcode::WriteFixed::new(file, at, bytes, 0)
                .offset(offset)
                .build()
        } else {
            opcode::ReadFixed::new(file, at, bytes, 0)
                .offset(offset)
                .build()
        };
        // SAFETY: the part is within `staging`, and nobody's until this request has ended.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(part as u64)) };
        pushed.map_err(|e| ring_failed(io::Error::other(e)))
    }

    fn end(&mut self, part: usize, result: i32) -> Result<(), BlockError> {
        if result < 0 {
            return Err(ring_failed(io::Error::from_raw_os_error(-result)));
        }
        if u32::try_from(result) != Ok(self.shape.bytes) {
            let short = format!("a request moved {result} of {} bytes", self.shape.bytes);
            return Err(ring_failed(io::Error::other(short)));
        }
        let place = self.under_way.get(part).copied();
        match place {
            Some(place) if !self.shape.writes => self.cipher(part, place),
            _ => Ok(()),
        }
    }

    /// Between the part and the guest's side of it.
    fn cipher(&mut self, part: usize, place: u64) -> Result<(), BlockError> {
        let bytes = self.shape.bytes as usize;
        let range = part * bytes..(part + 1) * bytes;
        let (staging, guest) = (
            self.staging.get_mut(range.clone()),
            self.guest.get_mut(range),
        );
        let (Some(staging), Some(guest)) = (staging, guest) else {
            return Err(BlockError::Cipher("a buffer is too small".to_owned()));
        };
        let unit = place * (bytes / UNIT_BYTES) as u64;
        if self.shape.writes {
            self.key.encrypt(DataUnit::B4096, unit, guest, staging)
        } else {
            self.key.decrypt(DataUnit::B4096, unit, staging, guest)
        }
        .map_err(|e| BlockError::Cipher(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: usize = 16;

    fn file() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new_in(".").expect("a file");
        std::fs::write(file.path(), vec![0x5a; BLOCKS * UNIT_BYTES]).expect("filled");
        file
    }

    fn shape(writes: bool) -> Shape {
        Shape {
            writes,
            bytes: 4096,
            depth: 4,
            sequential: true,
        }
    }

    /// What is written is what reading takes for the guest's bytes again.
    #[test]
    fn what_was_enciphered_is_deciphered() {
        let file = file();
        let mut bare = Bare::new(file.path(), shape(true)).expect("a ring");
        bare.guest.fill(0x77);
        assert!(bare.run(Duration::from_millis(20)).expect("writes") > 0.0);
        let written = std::fs::read(file.path()).expect("read");
        assert!(
            written
                .chunks(UNIT_BYTES)
                .all(|block| block != [0x77; UNIT_BYTES] && block != [0x5a; UNIT_BYTES])
        );
        let mut bare = Bare::new(file.path(), shape(false)).expect("a ring");
        assert!(bare.run(Duration::from_millis(20)).expect("reads") > 0.0);
        assert!(bare.guest.iter().all(|byte| *byte == 0x77));
    }

    #[test]
    fn a_short_transfer_is_an_error() {
        let file = file();
        let mut bare = Bare::new(file.path(), shape(false)).expect("a ring");
        bare.places *= 2;
        let error = bare
            .run(Duration::from_millis(20))
            .expect_err("past the end");
        assert!(
            error.to_string().contains("moved 0 of 4096 bytes"),
            "{error}"
        );
    }
}
