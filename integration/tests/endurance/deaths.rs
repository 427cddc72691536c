//! T39: frontends that are killed at any moment of their lives, and storms of connections. Whoever comes next is
//! served, with everything as it was but for what the dead ones wrote; nothing of them is left in the process.

use std::error::Error;
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::Options;
use bulkhead_integration::doomed::{Doomed, SCRATCH, storm};
use bulkhead_integration::random::Random;

use crate::Outcome;
use crate::socket::GROWTH_KIB;

/// Connections for each death.
const STORM: u64 = 20;
/// What the next frontend waits at most when the full number is asked for, on a machine of its own (T39).
const NEXT_SERVED: Duration = Duration::from_millis(100);

/// So many deaths, and [`STORM`] times as many connections.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut waits = Vec::new();
    let mut before = 0;
    arena.touch(SCRATCH);
    for round in 0..rounds {
        if round == rounds / 10 {
            before = arena.process.own_kib()?;
        }
        storm(&arena.socket, random, STORM)?;
        waits.push(death(arena, random, round % 2 == 0)?);
        if round % 20 == 0 {
            arena.check_other()?;
        }
    }
    let grown = arena.process.own_kib()?.saturating_sub(before);
    if grown > GROWTH_KIB {
        return Err(format!("{rounds} deaths left {grown} KiB behind").into());
    }
    waits.sort_unstable();
    let at = |percent: usize| waits[(waits.len() - 1) * percent / 100];
    if std::env::var_os(crate::SOAK).is_some() && at(99) > NEXT_SERVED {
        let late = at(99);
        return Err(format!("of 100 deaths, one has the next frontend wait for {late:?}").into());
    }
    Ok(format!(
        "{rounds} deaths and {} connections; the next frontend was served in {:.1?}, at most {:.1?}; \
         {grown} KiB grown",
        rounds * STORM,
        at(50),
        at(100)
    ))
}

/// A frontend's life and its end: how long the next one waits for its first answer.
fn death(arena: &Arena, random: &mut Random, at_work: bool) -> Result<Duration, Box<dyn Error>> {
    let mut doomed = Doomed::start(&arena.socket, arena.guest_features)?;
    // Half of them die before they are at work, some of these before they connect.
    if at_work {
        doomed.wait_for_work()?;
    }
    std::thread::sleep(Duration::from_micros(random.below(6_000)));
    doomed.kill()?;
    let since = Instant::now();
    let mut next = arena.attach(&Options::default())?;
    let bytes = next.read(0, 0, 4096)?;
    let waited = since.elapsed();
    if bytes != arena.contents[..4096] {
        return Err("the disk has changed where nobody wrote".into());
    }
    Ok(waited)
}
