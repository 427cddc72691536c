//! Where a large request is encrypted: by the worker that has it (inline), or shared with a helper on
//! another core (pool). What both cost, so that the choice rests on figures.
//!
//! A request is cut in two halves, as a pool of one helper would: the worker hands one half over, encrypts
//! the other, and waits for the first. The halves travel by value, so that nothing is copied. Two things are
//! asked:
//! - *latency*: one request at a time, the other core idle but for the helper. The best case of a pool.
//! - *throughput*: the same two cores, both busy: as two workers that encrypt inline, or as a worker with
//!   its helper. What a host with work on all cores gets.
//!
//! The helper waits for work by looking again and again (`spinning`: it costs a core that does nothing
//! else) or asleep (`sleeping`: it costs a wake-up, and the worker pays the system call).
#![forbid(unsafe_code)]

use std::hint::spin_loop;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_crypto::{DataUnit, XtsKey};
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::ratio::median;

/// Sizes of requests in bytes. The data plane encrypts at most 256 KiB of one at a time, since that is
/// what a piece of staging holds; the last shows where a larger one would lead.
pub const REQUEST_BYTES: [usize; 5] = [16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20];

/// How the helper waits for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It looks again and again.
    Spinning,
    /// It sleeps.
    Sleeping,
}

/// What was measured of one size.
#[derive(Debug, Clone, Copy)]
pub struct Placement {
    /// Bytes of a request.
    pub bytes: usize,
    /// How the helper waited.
    pub wait: Wait,
    /// Median time of one request alone, in nanoseconds, encrypted inline.
    pub inline_ns: f64,
    /// The same with half of it handed over.
    pub pool_ns: f64,
    /// Requests a second of two cores, as two workers that encrypt inline.
    pub inline_rate: f64,
    /// The same two cores as a worker and its helper.
    pub pool_rate: f64,
}

/// Half a request on its way.
#[derive(Debug)]
struct Half {
    source: Vec<u8>,
    destination: Vec<u8>,
}

impl Half {
    fn new(bytes: usize) -> Self {
        Self {
            source: vec![0x5a; bytes],
            destination: vec![0; bytes],
        }
    }

    fn encrypt(&mut self, key: &XtsKey) {
        let done = key.encrypt(DataUnit::B4096, 7, &self.source, &mut self.destination);
        debug_assert!(done.is_ok(), "whole data units");
    }
}

/// The worker's ends of the way to its helper.
#[derive(Debug)]
struct Helper {
    give: Sender<Half>,
    take: Receiver<Half>,
}

impl Helper {
    /// Encrypts a request together with the helper.
    fn encrypt(&self, key: &XtsKey, own: &mut Half, other: Half) -> Half {
        // The helper lives until its channel is dropped.
        if let Err(unsent) = self.give.send(other) {
            return unsent.0;
        }
        own.encrypt(key);
        receive(&self.take, Wait::Spinning).unwrap_or_else(|| Half::new(0))
    }
}

/// The next half; none once the other side is gone.
fn receive(from: &Receiver<Half>, wait: Wait) -> Option<Half> {
    if wait == Wait::Sleeping {
        return from.recv().ok();
    }
    loop {
        match from.try_recv() {
            Ok(half) => return Some(half),
            Err(TryRecvError::Empty) => spin_loop(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
}

/// The CPUs that this process may run on; pinning is left out where there are fewer than two.
fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect()
}

/// Keeps the calling thread on one CPU; without that right it runs where it is put.
fn pin(cpu: Option<usize>) {
    let mut set = CpuSet::new();
    if let Some(cpu) = cpu
        && set.set(cpu).is_ok()
    {
        let _ = sched_setaffinity(Pid::from_raw(0), &set);
    }
}

/// Measures every size both ways, for about `sample` each; none where there is only one CPU.
#[must_use]
pub fn measure(key: &XtsKey, sample: Duration) -> Vec<Placement> {
    let cpus = cpus();
    let [first, second, ..] = cpus[..] else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for bytes in REQUEST_BYTES {
        for wait in [Wait::Spinning, Wait::Sleeping] {
            all.push(thread::scope(|scope| {
                let one = scope.spawn(|| {
                    pin(Some(first));
                    one_size(key, bytes, wait, second, sample)
                });
                one.join().expect("the worker's thread does not panic")
            }));
        }
    }
    all
}

fn one_size(key: &XtsKey, bytes: usize, wait: Wait, second: usize, sample: Duration) -> Placement {
    let (inline_rate, pool_rate);
    let (inline_ns, pool_ns);
    let mut own = Half::new(bytes / 2);
    let mut whole = Half::new(bytes);
    (inline_ns, pool_ns, pool_rate) = with_helper(key, wait, second, |helper| {
        let mut other = Some(Half::new(bytes / 2));
        let mut inline = Vec::new();
        let mut pool = Vec::new();
        let mut shared = || {
            if let Some(half) = other.take() {
                other = Some(helper.encrypt(key, &mut own, half));
            }
        };
        let end = Instant::now() + sample;
        while Instant::now() < end {
            inline.push(time_ns(|| whole.encrypt(key)));
            // Long enough for a sleeper to be asleep, as between requests that come alone.
            pause(Duration::from_micros(100));
            pool.push(time_ns(&mut shared));
        }
        (median(inline), median(pool), rate(sample, &mut shared))
    });
    inline_rate = two_workers(key, bytes, second, sample);
    Placement {
        bytes,
        wait,
        inline_ns,
        pool_ns,
        inline_rate,
        pool_rate,
    }
}

/// Runs `work` beside a helper on another CPU.
fn with_helper<T>(key: &XtsKey, wait: Wait, cpu: usize, work: impl FnOnce(&Helper) -> T) -> T {
    thread::scope(|scope| {
        let (give, get) = bounded(1);
        let (put, take) = bounded(1);
        scope.spawn(move || {
            pin(Some(cpu));
            while let Some(mut half) = receive(&get, wait) {
                half.encrypt(key);
                if put.send(half).is_err() {
                    return;
                }
            }
        });
        let helper = Helper { give, take };
        work(&helper)
    })
}

/// Requests a second of two workers that encrypt inline.
fn two_workers(key: &XtsKey, bytes: usize, second: usize, sample: Duration) -> f64 {
    thread::scope(|scope| {
        let other = scope.spawn(move || {
            pin(Some(second));
            let mut whole = Half::new(bytes);
            rate(sample, || whole.encrypt(key))
        });
        let mut whole = Half::new(bytes);
        let own = rate(sample, || whole.encrypt(key));
        own + other.join().unwrap_or(f64::NAN)
    })
}

fn rate(sample: Duration, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut count = 0u32;
    while start.elapsed() < sample {
        work();
        count += 1;
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}

fn time_ns(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9
}

/// Busy, so that the worker's own core stays awake.
fn pause(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_crypto::SecretArena;
    use bulkhead_crypto::xts::KEY_BYTES;

    use super::*;

    fn key() -> XtsKey {
        let arena = SecretArena::new(1).expect("secret memory");
        let bytes: [u8; KEY_BYTES] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
        XtsKey::new(&arena, &bytes).expect("the halves differ")
    }

    #[test]
    fn a_request_that_is_shared_is_encrypted_as_one_that_is_not() {
        let key = key();
        let mut alone = Half::new(4096);
        alone.encrypt(&key);
        for wait in [Wait::Spinning, Wait::Sleeping] {
            with_helper(&key, wait, 0, |helper| {
                let mut own = Half::new(4096);
                let other = helper.encrypt(&key, &mut own, Half::new(4096));
                assert_eq!(own.destination, alone.destination);
                assert_eq!(other.destination, alone.destination);
            });
        }
    }

    #[test]
    fn each_size_is_measured_both_ways() {
        let figures = measure(&key(), Duration::from_millis(2));
        if cpus().len() < 2 {
            assert!(figures.is_empty());
            return;
        }
        assert_eq!(figures.len(), 2 * REQUEST_BYTES.len());
        for one in figures {
            let values = [one.inline_ns, one.pool_ns, one.inline_rate, one.pool_rate];
            assert!(values.iter().all(|v| v.is_finite() && *v > 0.0), "{one:?}");
        }
    }
}
