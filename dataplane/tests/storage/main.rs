//! What a device promises, on storage that forgets, fails and takes its time.
//!
//! `BULKHEAD_ROUNDS=N` runs N times as many rounds as the numbers in the tests say.

mod crash;
mod faults;
mod flush;
mod hung;
mod kernel;
mod moves;
mod rekey;
mod rig;
#[path = "../control/stuck.rs"]
mod stuck;
mod zeroes;

/// So many rounds, or as many more as were asked for.
fn rounds(count: usize) -> usize {
    let times = std::env::var("BULKHEAD_ROUNDS").ok();
    count * times.and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Numbers that look random and are the same in each run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).expect("it was one")
    }
}
