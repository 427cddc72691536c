//! T92: more than ten wraps of 16-bit indexes through the whole system (in the full number), at
//! several batch sizes, with calls and kicks by event index.

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, Options, PATIENCE, feature};
use bulkhead_integration::driver::ring::Desc;
use bulkhead_integration::driver::{header, kind, status};
use bulkhead_integration::random::Random;

use crate::Outcome;

/// Chains of a batch, in turn: among them those that divide the ring and those that don't.
const BATCHES: [u16; 6] = [1, 2, 7, 16, 33, 42];

/// So many requests.
pub fn run(arena: &mut Arena, _: &mut Random, rounds: u64) -> Outcome {
    let mut options = Options::default();
    options.features |= feature::EVENT_IDX;
    let mut disk = Disk::attach(&arena.other_socket, &arena.options(&options))?;
    let (mut requests, mut turn) = (0u64, 0usize);
    let headers = Disk::header_addr(0);
    disk.memory.write(headers, &header(kind::GET_ID, 0))?;
    // One stretch of each size, so that each goes over wraps.
    let stretch = rounds.div_ceil(BATCHES.len() as u64);
    while requests < rounds {
        let turns = usize::try_from(requests / stretch)?;
        let batch = BATCHES[turns % BATCHES.len()];
        let statuses = headers + 2048;
        disk.memory
            .fill(statuses, usize::from(batch), status::UNTOUCHED)?;
        for i in 0..batch {
            let descs = [
                Desc::readable(headers, 16),
                Desc::writable(DATA + u64::from(i) * 32, 20),
                Desc::writable(statuses + u64::from(i), 1),
            ];
            disk.rings[0].offer(&disk.memory, i * 3, &descs)?;
        }
        disk.publish(0)?;
        for _ in 0..batch {
            let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
            if used.len != 21 || used.id >= u32::from(batch) * 3 || used.id % 3 != 0 {
                return Err(format!("request {requests}: {used:?}").into());
            }
        }
        let bytes = disk.memory.read(statuses, usize::from(batch))?;
        if bytes.iter().any(|byte| *byte != status::OK) {
            return Err(format!("request {requests}: statuses {bytes:?}").into());
        }
        requests += u64::from(batch);
        turn += 1;
    }
    Ok(format!("{requests} requests in {turn} batches"))
}
