//! The figures of a run, as text and as one line of JSON.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::engine::{Measured, OfLane};
use super::pingpong::{Distance, Placement};
use super::requests::Shape;
use super::source::Pattern;

/// The first step of a histogram that is written down.
const FIRST_STEP_NS: u64 = 128;

/// The floor beside a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Floor {
    /// Requests a second.
    pub iops: f64,
    /// Whether the CPUs were near then.
    pub placement: Option<Placement>,
}

impl Floor {
    /// Of a run against an echo.
    #[must_use]
    pub fn of(report: &Report) -> Self {
        Self {
            iops: report.iops(),
            placement: report.distance.map(|distance| distance.placement()),
        }
    }
}

/// What came out, and of what.
#[derive(Debug)]
pub struct Report {
    name: String,
    shape: Shape,
    read_percent: u8,
    pattern: Pattern,
    queues: u16,
    packed: bool,
    event_idx: bool,
    verify: bool,
    /// Whether the memory lay in huge pages.
    pub huge_pages: bool,
    /// The figures.
    pub measured: Measured,
    /// Of the two CPUs, if they were named.
    pub distance: Option<Distance>,
    /// Measured before and after, if that was asked for.
    pub floors: Vec<Floor>,
}

impl Report {
    /// For a run as the command line says, without distance and floor.
    #[must_use]
    pub fn new(
        arguments: &Arguments,
        shape: &Shape,
        event_idx: bool,
        huge_pages: bool,
        measured: Measured,
    ) -> Self {
        let sockets = arguments
            .socket
            .iter()
            .map(|socket| socket.display().to_string());
        let sockets: Vec<String> = sockets.collect();
        Self {
            name: if sockets.is_empty() {
                "ring echo".to_owned()
            } else {
                sockets.join(", ")
            },
            shape: *shape,
            read_percent: arguments.mix.read_percent(),
            pattern: arguments.pattern,
            queues: arguments.queues,
            packed: arguments.packed,
            event_idx,
            verify: arguments.verify,
            huge_pages,
            measured,
            distance: None,
            floors: Vec::new(),
        }
    }

    /// Requests a second: the median of pieces of the time, so that what else the machine did for a
    /// moment does not count; over the whole time if that was short.
    #[must_use]
    pub fn iops(&self) -> f64 {
        let mut windows = self.measured.windows.clone();
        windows.sort_by(f64::total_cmp);
        let median = windows.get(windows.len() / 2).copied();
        median.unwrap_or_else(|| self.mean_iops())
    }

    /// Requests a second over the whole time.
    #[must_use]
    pub fn mean_iops(&self) -> f64 {
        ratio(self.measured.counts.answered, 1) / self.measured.elapsed.as_secs_f64().max(1e-9)
    }

    /// Of the floors before and after the higher one: the ratio flatters nobody.
    fn floor(&self) -> Option<f64> {
        self.floors.iter().map(|floor| floor.iops).reduce(f64::max)
    }

    /// The run as one JSON object.
    #[must_use]
    pub fn json(&self) -> Value {
        let latency = &self.measured.latency;
        let at = |quantile| micros(latency.value_at_quantile(quantile));
        let counts = &self.measured.counts;
        let bytes = self.iops() * f64::from(self.shape.block_bytes);
        json!({
            "target": self.name,
            "depth": self.shape.depth,
            "block_bytes": self.shape.block_bytes,
            "read_percent": self.read_percent,
            "pattern": self.pattern_name(),
            "queues": self.queues,
            "ring": self.ring_name(),
            "event_idx": self.event_idx,
            "indirect": self.shape.indirect,
            "segments": self.shape.segments,
            "huge_pages": self.huge_pages,
            "seconds": self.measured.elapsed.as_secs_f64(),
            "requests": counts.answered,
            "reads": counts.reads,
            "iops": self.iops(),
            "mean_iops": self.mean_iops(),
            "bytes_per_second": bytes,
            "latency_us": {
                "p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "max": micros(latency.max()),
                "mean": latency.mean() / 1000.0,
                "samples": latency.len(), "one_of": self.measured.sample_every,
            },
            "requests_per_kick": per(counts.answered, counts.kicks),
            "requests_per_call": per(counts.answered, counts.calls),
            "histogram_us": self.histogram(),
            "devices": self.devices(),
            "verified_reads": self.verify.then_some(self.measured.verified_reads),
            "round_trip_ns": self.distance.map(|d| json!([d.before_ns, d.after_ns])),
            "placement": self.distance.map(|d| d.placement().to_string()),
            "floor_iops": self.floors.iter().map(|floor| floor.iops).collect::<Vec<_>>(),
            "floor_placement": self.floors.iter()
                .map(|floor| floor.placement.map(|p| p.to_string())).collect::<Vec<_>>(),
            "of_floor": self.floor().map(|floor| self.iops() / floor),
        })
    }

    /// Latencies by powers of two: up to so many microseconds, and how many were.
    fn histogram(&self) -> Vec<(f64, u64)> {
        let steps = self.measured.latency.iter_log(FIRST_STEP_NS, 2.0);
        let steps = steps.map(|step| (step.value_iterated_to(), step.count_since_last_iteration()));
        steps
            .filter(|(_, count)| *count > 0)
            .map(|(upto, count)| (micros(upto), count))
            .collect()
    }

    /// Figures of each disk, all its queues together: what each had of the whole.
    #[must_use]
    pub fn devices(&self) -> Vec<Value> {
        let lanes = &self.measured.lanes;
        let devices = lanes.chunk_by(|a, b| a.device == b.device);
        let of = |lanes: &[OfLane]| {
            let iops: f64 = lanes.iter().map(|lane| lane.mean_iops).sum();
            let longest = |at: fn(&OfLane) -> u64| lanes.iter().map(at).max().unwrap_or_default();
            json!({
                "target": lanes.first().map(|lane| lane.device.as_str()),
                "requests": lanes.iter().map(|lane| lane.counts.answered).sum::<u64>(),
                "mean_iops": iops,
                "share": iops / self.mean_iops(),
                "p50_us": micros(longest(|lane| lane.latency_ns[0])),
                "p99_us": micros(longest(|lane| lane.latency_ns[1])),
            })
        };
        devices.map(of).collect()
    }

    fn pattern_name(&self) -> &'static str {
        match self.pattern {
            Pattern::Random => "random",
            Pattern::Sequential => "sequential",
        }
    }

    fn ring_name(&self) -> &'static str {
        if self.packed { "packed" } else { "split" }
    }

    /// A line for each disk, where there are several.
    fn write_devices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = self.devices();
        for device in devices.iter().filter(|_| devices.len() > 1) {
            let number = |name: &str| device[name].as_f64().unwrap_or(f64::NAN);
            writeln!(
                f,
                "  {}: {:.0} IOPS, {:.1} % of all; latency: 50 % {:.2} us, 99 % {:.2} us",
                device["target"].as_str().unwrap_or_default(),
                number("mean_iops"),
                100.0 * number("share"),
                number("p50_us"),
                number("p99_us"),
            )?;
        }
        Ok(())
    }

    fn write_head(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape = &self.shape;
        write!(
            f,
            "{}: {} B {}, {} % reads, depth {}, {} queue(s), {} ring",
            self.name,
            shape.block_bytes,
            self.pattern_name(),
            self.read_percent,
            shape.depth,
            self.queues,
            self.ring_name(),
        )?;
        for (said, name) in [(self.event_idx, "EVENT_IDX"), (shape.indirect, "indirect")] {
            if said {
                write!(f, ", {name}")?;
            }
        }
        if shape.segments > 1 {
            write!(f, ", {} segments", shape.segments)?;
        }
        writeln!(f)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_head(f)?;
        let Measured {
            counts,
            latency,
            sample_every,
            verified_reads,
            ..
        } = &self.measured;
        let gib = self.iops() * f64::from(self.shape.block_bytes) / f64::from(1u32 << 30);
        let mean = self.mean_iops();
        writeln!(
            f,
            "  {:.0} IOPS, {gib:.2} GiB/s (over all of the time {mean:.0} IOPS)",
            self.iops()
        )?;
        let at = |quantile| micros(latency.value_at_quantile(quantile));
        writeln!(
            f,
            "  latency: 50 % {:.2} us, 99 % {:.2} us, 99.9 % {:.2} us, max {:.2} us (of one request in {sample_every})",
            at(0.5),
            at(0.99),
            at(0.999),
            micros(latency.max()),
        )?;
        for (name, count) in [("kick", counts.kicks), ("call", counts.calls)] {
            match per(counts.answered, count) {
                Some(requests) => writeln!(f, "  {requests:.1} requests a {name}")?,
                None => writeln!(f, "  no {name}s")?,
            }
        }
        self.write_devices(f)?;
        if self.verify {
            writeln!(f, "  {verified_reads} reads checked, all as written")?;
        }
        if let Some(distance) = self.distance {
            let Distance {
                before_ns,
                after_ns,
            } = distance;
            let placement = distance.placement();
            writeln!(
                f,
                "  CPUs {placement}: round trip {before_ns:.0} ns before, {after_ns:.0} ns after"
            )?;
        }
        if let Some(floor) = self.floor() {
            let floors: Vec<String> = self.floors.iter().map(Floor::to_string).collect();
            let of_it = self.iops() / floor;
            writeln!(
                f,
                "  floor {}: {of_it:.3} of it",
                floors.join(" before, ") + " after"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Floor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} IOPS", self.iops)?;
        match self.placement {
            Some(placement) => write!(f, " ({placement})"),
            None => Ok(()),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of a run are far below 2^53"
)]
fn ratio(count: u64, by: u64) -> f64 {
    count as f64 / by as f64
}

fn per(count: u64, by: u64) -> Option<f64> {
    (by > 0).then(|| ratio(count, by))
}

fn micros(nanos: u64) -> f64 {
    ratio(nanos, 1000)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser as _;
    use hdrhistogram::Histogram;

    use super::*;
    use crate::load::lane::Counts;

    fn report(windows: &[f64]) -> Report {
        let arguments = Arguments::parse_from(["load", "--ring-echo", "--depth", "8"]);
        let measured = Measured {
            counts: Counts {
                answered: 3000,
                reads: 3000,
                kicks: 100,
                calls: 0,
            },
            elapsed: Duration::from_secs(2),
            latency: Histogram::new(3).expect("constants"),
            sample_every: 4,
            verified_reads: 0,
            windows: windows.to_vec(),
            lanes: Vec::new(),
        };
        let shape = arguments.shape().expect("fits");
        Report::new(&arguments, &shape, false, true, measured)
    }

    #[test]
    fn a_disturbed_piece_does_not_count() {
        let undisturbed = report(&[2000.0, 10.0, 2002.0, 2001.0, 2003.0]);
        assert_eq!(
            (undisturbed.iops(), undisturbed.mean_iops()),
            (2001.0, 1500.0)
        );
        assert_eq!(report(&[]).iops(), 1500.0, "too short for pieces");
        let json = undisturbed.json();
        assert_eq!(json["bytes_per_second"], 2001.0 * 4096.0);
        assert_eq!(json["requests_per_kick"], 30.0);
        assert_eq!(json["requests_per_call"], Value::Null);
        assert_eq!(json["of_floor"], Value::Null);
    }

    #[test]
    fn the_ratio_is_to_the_higher_floor() {
        let mut report = report(&[2000.0]);
        let placement = Some(Placement::Near);
        report.floors = [4000.0, 5000.0]
            .map(|iops| Floor { iops, placement })
            .to_vec();
        assert_eq!(report.json()["of_floor"], 0.4);
        let text = report.to_string();
        assert!(
            text.contains("floor 4000 IOPS (near) before, 5000 IOPS (near) after: 0.400 of it")
        );
        assert!(
            text.contains("30.0 requests a kick") && text.contains("no calls"),
            "{text}"
        );
    }

    #[test]
    fn each_disk_has_its_share() {
        let mut report = report(&[]);
        let lane = |number, device: &str, answered: u32, ns| OfLane {
            number,
            device: device.to_owned(),
            counts: Counts {
                answered: u64::from(answered),
                ..Counts::default()
            },
            mean_iops: f64::from(answered) / 2.0,
            latency_ns: [ns, 2 * ns],
        };
        report.measured.lanes = vec![
            lane(0, "a", 500, 1000),
            lane(1, "a", 1000, 3000),
            lane(2, "b", 1500, 2000),
        ];
        for ns in [100, 1000, 1001] {
            report.measured.latency.saturating_record(ns);
        }
        let json = report.json();
        let devices = json["devices"].as_array().expect("a list");
        assert_eq!(devices.len(), 2);
        assert_eq!(devices[0]["requests"], 1500);
        assert_eq!(
            (&devices[0]["share"], &devices[1]["share"]),
            (&json!(0.5), &json!(0.5))
        );
        assert_eq!(
            (&devices[0]["p50_us"], &devices[0]["p99_us"]),
            (&json!(3.0), &json!(6.0))
        );
        let histogram = json["histogram_us"].as_array().expect("a list");
        let counts: Vec<_> = histogram.iter().map(|step| step[1].as_u64()).collect();
        assert_eq!(counts, [Some(1), Some(2)], "{histogram:?}");
        let text = report.to_string();
        assert!(text.contains("b: 750 IOPS, 50.0 % of all"), "{text}");
    }
}
