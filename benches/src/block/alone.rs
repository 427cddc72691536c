//! The cipher and a copy alone, on the serving CPU and over as much memory as a disk has them go: what a request
//! that encrypts or copies costs at least beside its ring.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_integration::random::Random;
use memmap2::{Advice, MmapMut};

use super::bench::Bench;
use super::shape::Shape;
use super::side::Side;
use super::{BlockError, thread};
use crate::serve::cpus;

/// What is done to a request's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// AES-256-XTS in units of 4096 bytes.
    Cipher,
    /// A copy.
    Copy,
}

/// Where the other end of it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Other {
    /// One buffer, which stays in the cache.
    Buffer,
    /// Any place of a disk in memory of so many bytes.
    Disk(usize),
}

/// Requests between two looks at the clock.
const BATCH: u32 = 16;

impl<'a> Side<'a> {
    /// The work alone.
    ///
    /// # Errors
    /// [`BlockError::Program`] without memory, [`BlockError::Cipher`].
    pub fn alone(
        bench: &'a Bench,
        shape: Shape,
        work: Work,
        other: Other,
    ) -> Result<Self, BlockError> {
        let mut alone = Alone::new(shape, work, other)?;
        Ok(Self::new(move || {
            std::thread::scope(|scope| {
                let own = &mut alone;
                let alone = scope.spawn(move || {
                    cpus::pin(&[bench.worker_cpu]).map_err(|e| BlockError::Program {
                        what: "binding a thread to its CPU".to_owned(),
                        source: std::io::Error::other(e),
                    })?;
                    own.run(bench.pace.warm_up / 4)?;
                    own.run(bench.pace.sample / 3)
                });
                thread::joined(alone)
            })
        }))
    }
}

struct Alone {
    key: XtsKey,
    work: Work,
    /// Data comes from the guest's side; else it goes there.
    writes: bool,
    bytes: usize,
    /// As many requests as are in flight.
    guest: MmapMut,
    other: MmapMut,
    random: Random,
    next: usize,
}

impl Alone {
    fn new(shape: Shape, work: Work, other: Other) -> Result<Self, BlockError> {
        let bytes = shape.bytes as usize;
        let other = match other {
            Other::Buffer => bytes,
            Other::Disk(bytes) => bytes,
        };
        let key_bytes: [u8; KEY_BYTES] = std::array::from_fn(|i| u8::try_from(i).unwrap_or(0));
        let cipher = |e: &dyn std::fmt::Display| BlockError::Cipher(e.to_string());
        let arena = SecretArena::new(1).map_err(|e| cipher(&e))?;
        Ok(Self {
            key: XtsKey::new(&arena, &key_bytes).map_err(|e| cipher(&e))?,
            work,
            writes: shape.writes,
            bytes,
            guest: memory(bytes * usize::from(shape.depth))?,
            other: memory(other)?,
            random: Random::new(7),
            next: 0,
        })
    }

    /// Nanoseconds for a request, over this time.
    fn run(&mut self, time: Duration) -> Result<f64, BlockError> {
        let start = Instant::now();
        let mut count = 0u32;
        loop {
            for _ in 0..BATCH {
                self.request()?;
            }
            count += BATCH;
            let elapsed = start.elapsed();
            if elapsed >= time {
                return Ok(elapsed.as_secs_f64() * 1e9 / f64::from(count));
            }
        }
    }

    fn request(&mut self) -> Result<(), BlockError> {
        let places = self.other.len() / self.bytes;
        let place = self.random.index(places);
        let at = place * self.bytes;
        let other = self.other.get_mut(at..at + self.bytes);
        let from = self.next;
        self.next = (from + self.bytes) % self.guest.len();
        let guest = self.guest.get_mut(from..from + self.bytes);
        let (Some(other), Some(guest)) = (other, guest) else {
            return Err(BlockError::Cipher("a buffer is too small".to_owned()));
        };
        let (from, to) = if self.writes {
            (guest, other)
        } else {
            (other, guest)
        };
        let unit = place as u64;
        match (self.work, self.writes) {
            (Work::Copy, _) => {
                to.copy_from_slice(from);
                Ok(())
            }
            (Work::Cipher, true) => self.key.encrypt(DataUnit::B4096, unit, from, to),
            (Work::Cipher, false) => self.key.decrypt(DataUnit::B4096, unit, from, to),
        }
        .map_err(|e| BlockError::Cipher(e.to_string()))
    }
}

/// Memory in huge pages where the kernel has them, all of it there.
pub(crate) fn memory(bytes: usize) -> Result<MmapMut, BlockError> {
    let failed = |source| BlockError::Program {
        what: format!("{bytes} bytes of memory"),
        source,
    };
    let mut memory = MmapMut::map_anon(bytes).map_err(failed)?;
    // A hint, without effect where it is not supported.
    let _ = memory.advise(Advice::HugePage);
    memory.fill(0x5a);
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(writes: bool) -> Shape {
        Shape {
            writes,
            bytes: 4096,
            depth: 2,
            sequential: false,
        }
    }

    #[test]
    fn data_goes_where_a_request_would_take_it() {
        for writes in [false, true] {
            let mut alone = Alone::new(shape(writes), Work::Cipher, Other::Buffer).expect("memory");
            assert!(alone.run(Duration::from_millis(1)).expect("runs") > 0.0);
            let untouched = |memory: &[u8]| memory.iter().all(|byte| *byte == 0x5a);
            assert_eq!(untouched(&alone.guest), writes);
            assert_eq!(untouched(&alone.other), !writes);
        }
    }

    #[test]
    fn a_disk_is_used_all_over() {
        let disk = Other::Disk(64 << 12);
        let mut alone = Alone::new(shape(true), Work::Copy, disk).expect("memory");
        alone.guest.fill(1);
        for _ in 0..4096 {
            alone.request().expect("copies");
        }
        assert!(alone.other.iter().all(|byte| *byte == 1));
    }
}
