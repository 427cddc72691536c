//! From a command line to figures: back-ends connected or an echo started, queues built and driven.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::LoadError;
use super::arguments::Arguments;
use super::device::{Device, Signals, Wanted};
use super::echo::Echo;
use super::engine::{self, Measured, Named, Plan};
use super::lane::{Lane, Pace};
use super::memory::Memory;
use super::pingpong::{self, Distance};
use super::report::{Floor, Report};
use super::requests::{Layout, Requests, Shape};
use super::ring::packed::Packed;
use super::ring::split::Split;
use super::ring::{Events, Ring};
use super::source::{Source, Span};
use super::verify::Verify;

/// Bytes of a disk that are verified unless the command line says more.
const VERIFY_SPAN_BYTES: u64 = 256 << 20;
/// Size of the disk that an echo claims to be.
const ECHO_BYTES: u64 = 1 << 40;
/// How long the floor beside a back-end is measured at most.
const FLOOR: Duration = Duration::from_secs(1);
/// And loaded before.
const FLOOR_WARM_UP: Duration = Duration::from_millis(200);
/// What an echo is called in messages.
const ECHO: &str = "ring echo";

/// A disk, or an echo, as the driver's side sees it.
struct Target<'m> {
    arguments: &'m Arguments,
    shape: Shape,
    name: String,
    memory: &'m Memory,
    layouts: &'m [Layout],
    signals: Option<&'m [Signals]>,
    span: Span,
    event_idx: bool,
}

/// What all queues of a run have in common.
#[derive(Clone, Copy)]
struct Common<'a> {
    arguments: &'a Arguments,
    run: u64,
    queues: usize,
}

/// Does what the command line says.
///
/// # Errors
/// See [`LoadError`].
pub fn run(arguments: &Arguments) -> Result<Report, LoadError> {
    crate::serve::cpus::check(&arguments.cpu).map_err(|e| LoadError::Options(e.to_string()))?;
    let shape = arguments.shape()?;
    let plan = Plan {
        warm_up: arguments.warm_up,
        measure: arguments.seconds,
        timeout: arguments.timeout,
        verify: arguments.verify,
        pause: arguments.pause.map(Duration::from_micros),
    };
    if arguments.ring_echo {
        return echo(arguments, shape, &plan);
    }
    let floor_plan = Plan {
        warm_up: plan.warm_up.min(FLOOR_WARM_UP),
        measure: plan.measure.min(FLOOR),
        verify: false,
        pause: None,
        ..plan
    };
    let floor = || -> Result<Option<Floor>, LoadError> {
        let wanted = arguments.floor;
        wanted
            .then(|| Ok(Floor::of(&echo(arguments, shape, &floor_plan)?)))
            .transpose()
    };
    let before = floor()?;
    let (mut report, distance) = between(arguments, || disks(arguments, shape, &plan))?;
    report.distance = distance;
    report.floors = before.into_iter().chain(floor()?).collect();
    Ok(report)
}

/// Measures the distance of the two CPUs before and after something, if the command line names them.
fn between<T>(
    arguments: &Arguments,
    measure: impl FnOnce() -> Result<T, LoadError>,
) -> Result<(T, Option<Distance>), LoadError> {
    let pair = arguments.cpu.first().copied().zip(arguments.peer_cpu);
    let round_trip = || {
        let times = pair.map(|(here, there)| pingpong::round_trip_ns(here, there));
        times.transpose()
    };
    let before = round_trip()?;
    let result = measure()?;
    let both = before.zip(round_trip()?);
    let distance = both.map(|(before_ns, after_ns)| Distance {
        before_ns,
        after_ns,
    });
    Ok((result, distance))
}

/// A disk that is connected, and what its queues are made of.
struct Opened<'a> {
    arguments: &'a Arguments,
    shape: Shape,
    layouts: Vec<Layout>,
    device: Device,
    memory: Memory,
    signals: Vec<Signals>,
}

impl<'a> Opened<'a> {
    /// All disks of a command line but for its neighbours.
    fn all(arguments: &'a Arguments) -> Result<Vec<Self>, LoadError> {
        let shape = arguments.shape()?;
        let wanted = Wanted {
            packed: arguments.packed,
            indirect: arguments.indirect,
            event_idx: !arguments.no_event_idx,
            queues: arguments.queues,
            block_bytes: arguments.block_size,
            writes: arguments.mix.writes() || arguments.verify,
        };
        let devices = arguments.socket.iter();
        let devices: Result<Vec<_>, _> = devices.map(|s| Device::open(s, &wanted)).collect();
        let start = |device: Device| {
            let layouts = layouts(&shape, arguments.queues);
            let memory = Memory::new(layouts.last().map_or(0, |layout| layout.end))?;
            Ok(Self {
                arguments,
                shape,
                signals: device.start(&memory, &layouts, &shape)?,
                layouts,
                device,
                memory,
            })
        };
        devices?.into_iter().map(start).collect()
    }

    fn target(&self) -> Result<Target<'_>, LoadError> {
        Ok(Target {
            arguments: self.arguments,
            shape: self.shape,
            name: self.device.path().display().to_string(),
            memory: &self.memory,
            layouts: &self.layouts,
            signals: Some(&self.signals),
            span: span(self.arguments, self.device.capacity_bytes())?,
            event_idx: self.device.event_idx(),
        })
    }
}

fn disks(arguments: &Arguments, shape: Shape, plan: &Plan) -> Result<Report, LoadError> {
    let neighbours = arguments.of_neighbours();
    let mut opened = Opened::all(arguments)?;
    opened.extend(Opened::all(&neighbours)?);
    let targets = opened.iter().map(Opened::target);
    let targets = targets.collect::<Result<Vec<_>, _>>()?;
    let watch = || {
        let mut all = opened.iter();
        all.try_for_each(|opened| opened.device.watch(&opened.signals))
    };
    let measured = drive(arguments, plan, &targets, watch)?;
    for opened in &opened {
        opened.device.stop(arguments.queues)?;
    }
    Ok(Report::new(
        arguments,
        &shape,
        targets.iter().all(|target| target.event_idx),
        opened.iter().all(|opened| opened.memory.is_huge()),
        measured,
    ))
}

/// The floor: the same queues against threads of this process that do nothing.
fn echo(arguments: &Arguments, shape: Shape, plan: &Plan) -> Result<Report, LoadError> {
    let layouts = layouts(&shape, arguments.queues);
    let memory = Memory::new(layouts.last().map_or(0, |layout| layout.end))?;
    let mut echoes = Vec::new();
    for layout in &layouts {
        let packed = arguments.packed;
        echoes.push(Echo::new(&memory, layout, &shape, packed, ECHO_BYTES)?);
    }
    let target = Target {
        arguments,
        shape,
        name: ECHO.to_owned(),
        memory: &memory,
        layouts: &layouts,
        signals: None,
        span: span(arguments, ECHO_BYTES)?,
        event_idx: false,
    };
    let (measured, distance) = between(arguments, || {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (peer, ended) = (arguments.peer_cpu, &stop);
            let echo = scope.spawn(move || answer(echoes, peer, ended));
            let measured = drive(arguments, plan, &[target], || {
                if echo.is_finished() {
                    Err(LoadError::Abandoned)
                } else {
                    Ok(())
                }
            });
            stop.store(true, Relaxed);
            echo.join().map_err(|_| LoadError::Panicked)??;
            measured
        })
    })?;
    let mut report = Report::new(arguments, &shape, false, memory.is_huge(), measured);
    report.distance = distance;
    Ok(report)
}

fn answer(
    mut echoes: Vec<Echo<'_>>,
    cpu: Option<usize>,
    stop: &AtomicBool,
) -> Result<(), LoadError> {
    cpu.map_or(Ok(()), pingpong::pin)?;
    let mut idle = 0u32;
    while !stop.load(Relaxed) {
        let mut any = false;
        for (queue, echo) in (0u16..).zip(&mut echoes) {
            any |= echo.step().map_err(|source| LoadError::Queue {
                device: ECHO.to_owned(),
                queue,
                source,
            })?;
        }
        idle = if any { 0 } else { idle + 1 };
        if idle == engine::YIELD_AFTER {
            idle = 0;
            std::thread::yield_now();
        }
    }
    Ok(())
}

fn layouts(shape: &Shape, queues: u16) -> Vec<Layout> {
    let mut start = 0;
    let mut all = Vec::new();
    for _ in 0..queues {
        let layout = Layout::new(start, shape);
        start = layout.end;
        all.push(layout);
    }
    all
}

/// The blocks of a disk that are used.
fn span(arguments: &Arguments, capacity_bytes: u64) -> Result<Span, LoadError> {
    let default = if arguments.verify {
        VERIFY_SPAN_BYTES
    } else {
        u64::MAX
    };
    let bytes = arguments.span.unwrap_or(default).min(capacity_bytes);
    let blocks = bytes / u64::from(arguments.block_size);
    let each = blocks / u64::from(arguments.queues);
    let needed = if arguments.verify {
        2 * u64::from(arguments.depth)
    } else {
        1
    };
    if each < needed {
        let what = format!(
            "each queue has {each} blocks of {bytes} bytes for itself and needs {needed}: make --span larger, \
             or --block-size, --queues or --depth smaller"
        );
        return Err(LoadError::Options(what));
    }
    Ok(Span { first: 0, blocks })
}

fn drive(
    arguments: &Arguments,
    plan: &Plan,
    targets: &[Target<'_>],
    watch: impl FnMut() -> Result<(), LoadError>,
) -> Result<Measured, LoadError> {
    let run = getrandom::u64().map_err(|e| LoadError::System {
        what: "random numbers",
        source: e.into(),
    })?;
    let common = Common {
        arguments,
        run,
        queues: targets.iter().map(|target| target.layouts.len()).sum(),
    };
    if arguments.packed {
        engine::run(
            threads(&common, targets, |m, l, r, e| Packed::new(m, l, r, e))?,
            plan,
            watch,
        )
    } else {
        engine::run(
            threads(&common, targets, |m, l, r, e| Split::new(m, l, r, e))?,
            plan,
            watch,
        )
    }
}

type Threads<'m, R> = Vec<(Option<usize>, Vec<Named<'m, R>>)>;

/// The queues of all targets, shared out among threads.
fn threads<'m, R: Ring>(
    common: &Common<'_>,
    targets: &[Target<'m>],
    ring: impl Fn(&'m Memory, &Layout, &Requests<'_>, Events) -> Result<R, LoadError>,
) -> Result<Threads<'m, R>, LoadError> {
    let cpus = &common.arguments.cpu;
    if cpus.len() > common.queues {
        let what = format!(
            "{} --cpu for {} queues: leave some out",
            cpus.len(),
            common.queues
        );
        return Err(LoadError::Options(what));
    }
    let mut threads: Threads<'m, R> = match cpus.as_slice() {
        [] => vec![(None, Vec::new())],
        cpus => cpus.iter().map(|cpu| (Some(*cpu), Vec::new())).collect(),
    };
    let count = threads.len();
    let mut number = 0;
    for target in targets {
        for (queue, layout) in (0u16..).zip(target.layouts) {
            let lane = lane(common, target, queue, layout, number, &ring)?;
            if let Some((_, lanes)) = threads.get_mut(number % count) {
                lanes.push(Named {
                    device: target.name.clone(),
                    queue,
                    number,
                    lane,
                });
            }
            number += 1;
        }
    }
    Ok(threads)
}

fn lane<'m, R: Ring>(
    common: &Common<'_>,
    target: &Target<'m>,
    queue: u16,
    layout: &Layout,
    number: usize,
    ring: &impl Fn(&'m Memory, &Layout, &Requests<'_>, Events) -> Result<R, LoadError>,
) -> Result<Lane<'m, R>, LoadError> {
    let arguments = target.arguments;
    let requests = Requests::new(target.memory, *layout, target.shape)?;
    requests.fill(common.run ^ number as u64);
    let events = Events {
        event_idx: target.event_idx,
        calls: arguments.calls,
    };
    let ring = ring(target.memory, layout, &requests, events)?;
    let part = target
        .span
        .part(u64::from(queue), u64::from(arguments.queues));
    let source = Source::new(part, arguments.pattern, arguments.mix, number as u64);
    let verify = arguments
        .verify
        .then(|| Verify::new(part, arguments.block_size, common.run));
    let signals = target.signals.and_then(|all| all.get(usize::from(queue)));
    let mut lane = Lane::new(ring, requests, signals, source, verify.transpose()?)?;
    lane.set_pace(arguments.rate.map(|rate| pace(rate, number, common.queues)));
    Ok(lane)
}

/// One queue's part of a rate of all: they take turns, so that requests come at even distances.
fn pace(rate: f64, number: usize, queues: usize) -> Pace {
    // Queues are few: their number is exact.
    let exact = |count| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    Pace::new(rate / exact(queues), exact(number) / exact(queues))
}
