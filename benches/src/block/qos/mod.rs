//! Quality of service: a limit that is kept, and changed while it is; a group that two volumes share; and a volume
//! beside a hostile neighbour.
//!
//! The data plane runs in this process, so that limits can be changed as the control thread of a host does.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use bulkhead_dataplane::blk::BlkDevice;
use bulkhead_dataplane::qos::Group;
use bulkhead_protocol::limits::{Limits, Rate};

use super::bench::Bench;
use super::rounds;
use super::shape::{SMALL, Shape};
use super::side::{self, Side};
use super::{BlockError, thread};
use crate::figures::row::{Placement, Row, Unit};

mod served;

use served::{Disk, Served};

/// The limit that is kept, in requests a second; and what a full bucket lets pass beyond it.
const LIMIT: Rate = Rate {
    per_second: 10_000,
    burst: 1000,
};
/// What it is changed to.
const RAISED: u64 = 40_000;
/// A share may be so much of its half away from it.
const SHARE: f64 = 0.95;
/// The limit is met to so much of it.
const EXACT: f64 = 0.99;
/// A change must act within so many milliseconds.
const WITHIN_MS: f64 = 100.0;
/// What a victim must keep.
const KEPT_PERCENT: f64 = 45.0;
/// Microseconds that drivers sleep between looks where they must leave their CPU to others.
const PAUSE: [&str; 2] = ["--pause", "100"];

/// All of it.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    eprintln!("limits ..");
    let placement = rounds::placement(bench)?;
    let mut rows = vec![limit(bench)?, group(bench)?, change(bench)?];
    for row in &mut rows {
        row.placement = placement;
    }
    eprintln!("neighbours ..");
    rows.push(neighbour(bench)?);
    Ok(rows)
}

fn row(case: &str, unit: Unit, ours: f64, peer: &'static str, theirs: f64, ratio: f64) -> Row {
    Row {
        case: format!("limits, {case}"),
        unit,
        ours,
        peer: peer.into(),
        theirs,
        ratio,
        target: None,
        placement: Placement::Flipped,
        point: None,
    }
}

fn limits(requests: Rate) -> Limits {
    Limits {
        requests: Some(requests),
        bytes: None,
    }
}

/// Small reads with 32 in flight.
fn busy() -> Shape {
    Shape {
        writes: false,
        bytes: SMALL,
        depth: 32,
        sequential: false,
    }
}

/// Options of a load on these disks for so long, after the burst.
fn options(sockets: &[String], shape: Shape, warm_up: Duration, seconds: Duration) -> Vec<String> {
    let mut options = shape.options();
    for socket in sockets {
        options.extend(["--socket".to_owned(), socket.clone()]);
    }
    for (name, time) in [("--warm-up", warm_up), ("--seconds", seconds)] {
        options.extend([name.to_owned(), time.as_secs_f64().to_string()]);
    }
    options
}

/// Ten seconds, but for the short form.
fn long(bench: &Bench) -> Duration {
    Duration::from_millis(if bench.quick { 400 } else { 10_000 })
}

/// A bucket is empty by then.
fn after_burst(bench: &Bench) -> Duration {
    Duration::from_millis(if bench.quick { 150 } else { 500 })
}

/// A limit of requests a second over ten seconds, after the burst.
fn limit(bench: &Bench) -> Result<Row, BlockError> {
    let served = Served::start(bench, "limit", &[bench.worker_cpu], &[Disk::Null])?;
    for device in &served.devices {
        device.qos().set(&limits(LIMIT), None);
    }
    let options = options(&served.sockets, busy(), after_burst(bench), long(bench));
    let ours = side::load(bench, &options, 1)?.mean_iops();
    let theirs = f64::from(u32::try_from(LIMIT.per_second).unwrap_or(u32::MAX));
    Ok(Row {
        target: Some(EXACT),
        ..row(
            &format!(
                "{} requests a second over {} s",
                LIMIT.per_second,
                long(bench).as_secs_f64()
            ),
            Unit::RequestsPerSecond,
            ours,
            "the limit",
            theirs,
            (ours / theirs).min(theirs / ours),
        )
    })
}

/// Two busy volumes of a group on two workers: what each has.
fn group(bench: &Bench) -> Result<Row, BlockError> {
    let cpus = [bench.worker_cpu, bench.driver_cpu];
    let served = Served::start(bench, "group", &cpus, &[Disk::Null; 2])?;
    let group = Group::new(&limits(Rate {
        per_second: 2 * LIMIT.per_second,
        ..LIMIT
    }));
    for device in &served.devices {
        device
            .qos()
            .set(&Limits::default(), Some(std::sync::Arc::clone(&group)));
    }
    let time = long(bench) / 3;
    let mut options = options(&served.sockets, busy(), after_burst(bench), time);
    options.extend(PAUSE.map(str::to_owned));
    let report = side::load(bench, &options, 1)?;
    let shares = report.devices();
    let shares = shares.iter().filter_map(|device| device["share"].as_f64());
    let smaller = 100.0 * shares.fold(f64::INFINITY, f64::min);
    Ok(Row {
        target: Some(SHARE),
        ..row(
            "a group of two busy volumes on two workers, the smaller share",
            Unit::Percent,
            smaller,
            "half",
            50.0,
            smaller / 50.0,
        )
    })
}

/// How long it takes until a raised limit is seen in what is answered.
fn change(bench: &Bench) -> Result<Row, BlockError> {
    let served = Served::start(bench, "change", &[bench.worker_cpu], &[Disk::Null])?;
    let [device] = &served.devices[..] else {
        return Err(BlockError::Cpus(0));
    };
    device.qos().set(&limits(LIMIT), None);
    let time = Duration::from_millis(1200);
    let options = options(&served.sockets, busy(), Duration::ZERO, time);
    let took = std::thread::scope(|scope| {
        let load = scope.spawn(|| side::load(bench, &options, 1));
        std::thread::sleep(Duration::from_millis(600));
        let raised = Rate {
            per_second: RAISED,
            ..LIMIT
        };
        let since = Instant::now();
        device.qos().set(&limits(raised), None);
        let took = until_rate(device, since);
        thread::joined(load).map(|_| took)
    })?;
    let ms = took.map_or(f64::NAN, |took| took.as_secs_f64() * 1e3);
    Ok(Row {
        target: Some(1.0),
        ..row(
            &format!(
                "a change from {} to {RAISED} requests a second acts",
                LIMIT.per_second
            ),
            Unit::Milliseconds,
            ms,
            "100 ms",
            WITHIN_MS,
            WITHIN_MS / ms,
        )
    })
}

/// Time until a piece of 10 ms has the raised rate, or most of it; none if none has in half a second.
fn until_rate(device: &BlkDevice, since: Instant) -> Option<Duration> {
    let piece = Duration::from_millis(10);
    // Nine tenths of what the piece would have.
    let wanted = RAISED * 9 / 10 / 100;
    let answered = || device.metrics.totals().requests_ok;
    while since.elapsed() < Duration::from_millis(500) {
        let (before, start) = (answered(), Instant::now());
        std::thread::sleep(piece);
        let late = start.elapsed().as_secs_f64() / piece.as_secs_f64();
        let more = u32::try_from(answered() - before).unwrap_or(u32::MAX);
        if f64::from(more) >= late * f64::from(u32::try_from(wanted).unwrap_or(u32::MAX)) {
            return Some(since.elapsed());
        }
    }
    None
}

/// What a volume keeps beside a neighbour on the same worker, that has as many of the most expensive requests in
/// flight as its ring takes. One thread drives both: on two CPUs a second one would take the victim's driver away.
fn neighbour(bench: &Bench) -> Result<Row, BlockError> {
    let cpu = [bench.worker_cpu];
    let served = Served::start(bench, "neighbour", &cpu, &[Disk::Encrypted; 2])?;
    let [victim, hostile] = &served.sockets[..] else {
        return Err(BlockError::Cpus(0));
    };
    let pace = bench.pace;
    let alone = options(
        std::slice::from_ref(victim),
        busy(),
        pace.warm_up,
        pace.sample,
    );
    let mut beside = alone.clone();
    beside.extend(["--neighbour".to_owned(), hostile.clone()]);
    let mut sides = [beside, alone].map(|options| Side::new(move || first_ns(bench, &options)));
    let rounds = rounds::take(bench, &mut sides)?;
    let at = |round: &[f64], side: usize| round.get(side).copied().unwrap_or(f64::NAN);
    let percent = 100.0 * rounds.median(|round| at(round, 1) / at(round, 0));
    Ok(Row {
        placement: rounds.placement,
        target: Some(1.0),
        ..row(
            "encrypted 4 KiB reads beside a neighbour's 128 encrypted writes of 128 KiB, of what they have alone",
            Unit::Percent,
            percent,
            "45 %",
            KEPT_PERCENT,
            percent / KEPT_PERCENT,
        )
    })
}

/// Nanoseconds for a request of the first disk over all of a turn.
fn first_ns(bench: &Bench, options: &[String]) -> Result<f64, BlockError> {
    let report = side::load(bench, options, 1)?;
    let first = report.devices().into_iter().next();
    let iops = first.and_then(|device| device["mean_iops"].as_f64());
    Ok(1e9 / iops.unwrap_or(f64::NAN))
}
