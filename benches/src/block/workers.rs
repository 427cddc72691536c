//! Two workers beside one. With two CPUs the driving thread shares one of them: so requests are heavy (128 KiB,
//! encrypted), and the driver sleeps between its looks, so that it takes next to nothing of that CPU.
#![forbid(unsafe_code)]

use super::BlockError;
use super::backend;
use super::bench::Bench;
use super::rounds;
use super::shape::{LARGE, Shape};
use super::side::Side;
use crate::figures::row::{Row, Unit};

/// Microseconds that the driver sleeps between looks: a fraction of what a queue's requests take.
const PAUSE_US: &str = "60";

/// Throughput of two workers with two disks beside one worker with both.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    eprintln!("two workers ..");
    let cpus = [bench.worker_cpu, bench.driver_cpu].map(|cpu| cpu.to_string());
    let disks = ["null:1GiB"; 2];
    let [first, second] = &cpus;
    let options = ["--xts", "--cpu", first, "--cpu", second];
    let two = backend::serve(bench, &bench.bin, "two", &disks, &options)?;
    let one = backend::serve(bench, &bench.bin, "one", &disks, &["--xts", "--cpu", first])?;
    let shape = Shape {
        writes: false,
        bytes: LARGE,
        depth: 32,
        sequential: true,
    };
    let mut sides = [&two, &one].map(|served| {
        let pause = ["--pause", PAUSE_US];
        Side::backends_with(bench, &served.sockets, shape, &pause)
    });
    let rounds = rounds::take(bench, &mut sides)?;
    let at = |round: &[f64], side: usize| round.get(side).copied().unwrap_or(f64::NAN);
    let rate = |side| f64::from(LARGE) / rounds.median(|round| at(round, side));
    Ok(vec![Row {
        case: "workers, 128 KiB sequential read, XTS, 2 disks with 32 in flight each, 2 workers"
            .to_owned(),
        unit: Unit::GigabytesPerSecond,
        ours: rate(0),
        peer: "1 worker".into(),
        theirs: rate(1),
        ratio: rounds.median(|round| at(round, 1) / at(round, 0)),
        target: None,
        placement: rounds.placement,
        point: None,
    }])
}
