//! What is written down: rows, each a comparison with one peer, and the header that says how they came about.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// 10^9 bytes a second: more is better.
    GigabytesPerSecond,
    /// Nanoseconds for each packet: less is better.
    NanosecondsPerPacket,
    /// Packets a second: more is better.
    PacketsPerSecond,
    /// Nanoseconds for each request: less is better.
    NanosecondsPerRequest,
    /// Requests a second: more is better.
    RequestsPerSecond,
    /// Part of a core that is busy, in percent: less is better.
    PercentOfCore,
    /// Share of a whole, in percent: more is better.
    Percent,
    /// How often a sleeper is woken for each request: less is better.
    WakeUpsPerRequest,
    /// Milliseconds: less is better.
    Milliseconds,
}

impl Unit {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::GigabytesPerSecond => "GB/s",
            Self::NanosecondsPerPacket => "ns/packet",
            Self::PacketsPerSecond => "packets/s",
            Self::NanosecondsPerRequest => "ns/request",
            Self::RequestsPerSecond => "requests/s",
            Self::PercentOfCore => "% of a core",
            Self::Percent => "%",
            Self::WakeUpsPerRequest => "wake-ups/request",
            Self::Milliseconds => "ms",
        }
    }

    /// Whether a larger figure is the better one.
    #[must_use]
    pub const fn more_is_better(self) -> bool {
        matches!(
            self,
            Self::GigabytesPerSecond
                | Self::PacketsPerSecond
                | Self::RequestsPerSecond
                | Self::Percent
        )
    }
}

/// Where the work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On the core that has the request.
    Inline,
    /// Shared with a helper on another core.
    Pool,
    /// By two CPUs near each other.
    Near,
    /// By two CPUs that were not.
    Far,
    /// By two CPUs whose distance changed whenever it was tried: the figures say little.
    Flipped,
}

impl Placement {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inline => "inline",
            Self::Pool => "pool",
            Self::Near => "near",
            Self::Far => "far",
            Self::Flipped => "flipped",
        }
    }
}

/// One comparison. Figures that this run had no occasion to take are not a number.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What was measured: the same for the rows of one measurement, which differ in the peer.
    pub case: String,
    /// What `ours` and `theirs` count.
    pub unit: Unit,
    /// Our figure: the median of all rounds.
    pub ours: f64,
    /// Beside what.
    pub peer: Cow<'static, str>,
    /// Its figure: the median of all rounds.
    pub theirs: f64,
    /// How many times better ours is; the median over rounds, so that it is not quite the two medians divided.
    pub ratio: f64,
    /// The least ratio that we want; none where the row is for information.
    pub target: Option<f64>,
    /// Where the work was done.
    pub placement: Placement,
    /// Where its two figures stand in the picture, which is not written down; none: nowhere.
    pub point: Option<Point>,
}

/// A place in the picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// The panel's title: what all its lines share.
    pub panel: String,
    /// Our line's name; the other's is the peer's.
    pub line: String,
    /// What `at` counts.
    pub axis: &'static str,
    /// How far to the right.
    pub at: usize,
}

impl Row {
    /// Whether the target is met; none without one, or where the row was not measured.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        let target = self.target.filter(|_| self.measured())?;
        Some(self.ratio >= target)
    }

    /// Whether there are figures.
    #[must_use]
    pub fn measured(&self) -> bool {
        self.ratio.is_finite()
    }

    fn to_json(&self) -> Value {
        json!({
            "case": self.case,
            "unit": self.unit.name(),
            "ours": self.ours,
            "peer": self.peer,
            "theirs": self.theirs,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met(),
            "placement": self.placement.name(),
        })
    }
}

/// How the rows came about.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// The CPU's name.
    pub cpu: String,
    /// What pictures and tables say beside it: how it was used.
    pub how: String,
    /// Peers by name, with their versions.
    pub peers: BTreeMap<&'static str, String>,
    /// When, in UTC.
    pub date: String,
    /// Whether this was the short form, whose figures mean little.
    pub quick: bool,
    /// How figures were taken.
    pub method: String,
    /// What else there is to know, by name.
    pub more: Map<String, Value>,
}

/// All there is to write down.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// How.
    pub header: Header,
    /// What.
    pub rows: Vec<Row>,
}

impl Report {
    /// As it is stored.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let header = &self.header;
        let mut fields = header.more.clone();
        for (name, value) in [
            ("cpu", json!(header.cpu)),
            ("peers", json!(header.peers)),
            ("date", json!(header.date)),
            ("quick", json!(header.quick)),
            ("method", json!(header.method)),
        ] {
            fields.insert(name.to_owned(), value);
        }
        json!({
            "header": fields,
            "rows": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A row like any other.
    pub(crate) fn row(ratio: f64, target: Option<f64>) -> Row {
        Row {
            case: "a case".to_owned(),
            unit: Unit::GigabytesPerSecond,
            ours: 1.0,
            peer: "peer".into(),
            theirs: 2.0,
            ratio,
            target,
            placement: Placement::Inline,
            point: None,
        }
    }

    #[test]
    fn a_target_is_met_from_its_value_on() {
        assert_eq!(row(0.9, Some(0.9)).met(), Some(true));
        assert_eq!(row(0.899, Some(0.9)).met(), Some(false));
        assert_eq!(row(0.1, None).met(), None);
        // What could not be measured is neither a success nor a failure.
        assert_eq!(row(f64::NAN, Some(0.9)).met(), None);
    }

    #[test]
    fn a_row_without_a_target_has_neither_target_nor_met() {
        let json = row(0.5, None).to_json();
        assert!(json["target"].is_null() && json["met"].is_null());
        assert_eq!(json["unit"], "GB/s");
    }

    #[test]
    fn a_row_that_was_not_measured_has_no_figures() {
        let json = Row {
            ours: f64::NAN,
            theirs: f64::NAN,
            ..row(f64::NAN, Some(0.5))
        }
        .to_json();
        for name in ["ours", "theirs", "ratio", "met"] {
            assert!(json[name].is_null(), "{name}: {json}");
        }
        assert_eq!(json["target"], 0.5);
    }
}
