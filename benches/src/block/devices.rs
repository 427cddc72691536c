//! One worker with many devices: the same requests in flight shared out among ever more of them; and devices that
//! nobody uses.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::backend::{self, Backend};
use super::bench::Bench;
use super::rounds;
use super::shape::{SMALL, Shape};
use super::side::{self, Side};
use super::storages::FLOOR;
use super::{BlockError, thread};
use crate::figures::row::{Point, Row, Unit};

mod usage;

use usage::Usage;

/// Requests in flight, all devices together.
const DEPTH: u16 = 256;
/// How many devices share them.
const COUNTS: [u16; 5] = [1, 4, 16, 64, 256];
/// Devices that nobody uses.
const IDLE: usize = 100;
/// Requests a second at which every one finds its worker asleep.
const SELDOM: u32 = 200;

fn null(count: usize) -> Vec<&'static str> {
    vec!["null:1GiB"; count]
}

/// The curve over the number of devices, each point beside the echo with as many rings.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let mut rows = Vec::new();
    for count in COUNTS {
        eprintln!("{count} devices ..");
        let served = backend::ours(bench, "devices", &null(count.into()), &[])?;
        let shape = Shape {
            writes: false,
            bytes: SMALL,
            depth: DEPTH / count,
            sequential: false,
        };
        let rounds = rounds::take(
            bench,
            &mut [
                Side::backends(bench, &served.sockets, shape),
                Side::echo(bench, shape, count.into()),
            ],
        )?;
        let ns = |side: usize| rounds.median(|round| at(round, side));
        let count = usize::from(count);
        rows.push(Row {
            case: format!(
                "devices, 4 KiB random read, {count} on one worker, {DEPTH} in flight in all"
            ),
            unit: Unit::RequestsPerSecond,
            ours: 1e9 / ns(0),
            peer: FLOOR.into(),
            theirs: 1e9 / ns(1),
            ratio: rounds.median(|round| at(round, 1) / at(round, 0)),
            target: None,
            placement: rounds.placement,
            point: Some(Point {
                panel: format!("one worker, null, 4 KiB random read, {DEPTH} in flight in all"),
                line: "Bulkhead".to_owned(),
                axis: "devices",
                at: count,
            }),
        });
    }
    Ok(rows)
}

fn at(round: &[f64], side: usize) -> f64 {
    round.get(side).copied().unwrap_or(f64::NAN)
}

/// What a hundred devices cost that nobody uses, and what the first request after idleness does.
///
/// # Errors
/// See [`BlockError`].
pub fn idle(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    eprintln!("{IDLE} idle devices ..");
    let served = backend::ours(bench, "idle", &null(IDLE), &[])?;
    let placement = rounds::placement(bench)?;
    // One request of each device at the start, then nothing for hours.
    let idle = watched(bench, &served, "0.1")?;
    let seldom = watched(bench, &served, &SELDOM.to_string())?;
    let background = idle.sleeps_per_second * seldom.seconds;
    let per_request = (seldom.sleeps - background).max(0.0) / seldom.requests.max(1.0);
    let percent = 100.0 * idle.busy;
    let row = |case: &str, unit, ours, peer: &'static str, theirs: f64, ratio| Row {
        case: format!("idle, {IDLE} devices, {case}"),
        unit,
        ours,
        peer: peer.into(),
        theirs,
        ratio,
        // A sleep that happened to end by itself is no wake-up for a request.
        target: Some(if unit == Unit::WakeUpsPerRequest {
            0.98
        } else {
            1.0
        }),
        placement,
        point: None,
    };
    // Nothing at all would be endlessly better.
    let better = |ours: f64, theirs: f64| theirs / ours.max(theirs / 1000.0);
    Ok(vec![
        row(
            "nothing to do",
            Unit::PercentOfCore,
            percent,
            "1 % of a core",
            1.0,
            better(percent, 1.0),
        ),
        row(
            &format!("{SELDOM} requests a second"),
            Unit::WakeUpsPerRequest,
            per_request,
            "one wake-up",
            1.0,
            better(per_request, 1.0),
        ),
    ])
}

/// Longest time that connecting all devices may take.
fn connecting(bench: &Bench) -> Duration {
    Duration::from_millis(if bench.quick { 500 } else { 1500 })
}

/// Waits until all devices are connected: nothing is opened any more.
fn wait_for_queues(served: &Backend, longest: Duration) {
    let deadline = Instant::now() + longest;
    let mut last = 0;
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let open = usage::descriptors(served.pid());
        // Each has a connection, a kick and a call at least, beside its listener.
        let ready = open == last && open > 4 * served.sockets.len();
        if ready || Instant::now() > deadline {
            return;
        }
        last = open;
    }
}

/// What a back-end used while it had a rate of requests.
struct Watched {
    seconds: f64,
    busy: f64,
    sleeps: f64,
    sleeps_per_second: f64,
    requests: f64,
}

fn watched(bench: &Bench, served: &Backend, rate: &str) -> Result<Watched, BlockError> {
    let time = (bench.pace.sample * bench.pace.long).max(Duration::from_millis(300));
    let settle = Duration::from_millis(200);
    let mut options: Vec<String> = ["--rate", rate, "--warm-up"].map(str::to_owned).to_vec();
    options.push((settle / 2).as_secs_f64().to_string());
    options.extend([
        "--seconds".to_owned(),
        (time + connecting(bench)).as_secs_f64().to_string(),
    ]);
    for socket in &served.sockets {
        options.extend(["--socket".to_owned(), socket.display().to_string()]);
    }
    std::thread::scope(|scope| {
        let options = &options;
        let load = scope.spawn(move || side::load(bench, options, 1));
        // Connections, and the requests at the start.
        wait_for_queues(served, connecting(bench));
        std::thread::sleep(settle);
        let (before, since) = (Usage::of(served.pid()), Instant::now());
        std::thread::sleep(time);
        let (after, seconds) = (Usage::of(served.pid()), since.elapsed().as_secs_f64());
        let report = thread::joined(load)?;
        let used = after - before;
        Ok(Watched {
            seconds,
            busy: used.busy_seconds / seconds,
            sleeps: used.sleeps,
            sleeps_per_second: used.sleeps / seconds,
            requests: report.mean_iops() * seconds,
        })
    })
}
