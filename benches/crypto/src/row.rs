//! What is written down: rows, each a comparison with one peer, and the header that says how they came about.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// 10^9 bytes a second on one core: more is better.
    GigabytesPerSecond,
    /// Nanoseconds for each packet: less is better.
    NanosecondsPerPacket,
    /// Nanoseconds for each request: less is better.
    NanosecondsPerRequest,
    /// Requests a second of two cores: more is better.
    RequestsPerSecond,
}

impl Unit {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::GigabytesPerSecond => "GB/s",
            Self::NanosecondsPerPacket => "ns/packet",
            Self::NanosecondsPerRequest => "ns/request",
            Self::RequestsPerSecond => "requests/s",
        }
    }

    /// Whether a larger figure is the better one.
    #[must_use]
    pub const fn more_is_better(self) -> bool {
        matches!(self, Self::GigabytesPerSecond | Self::RequestsPerSecond)
    }
}

/// Where the work is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// On the core that has the request.
    Inline,
    /// Shared with a helper on another core.
    Pool,
}

impl Placement {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inline => "inline",
            Self::Pool => "pool",
        }
    }
}

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What was measured: the same for the rows of one measurement, which differ in the peer.
    pub case: String,
    /// What `ours` and `theirs` count.
    pub unit: Unit,
    /// Our figure: the median of all rounds.
    pub ours: f64,
    /// Beside what.
    pub peer: &'static str,
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
    /// How far to the right: bytes of a buffer or packet.
    pub bytes: usize,
}

impl Row {
    /// Whether the target is met; none without one.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| self.ratio >= target)
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
    /// The CPU that the measuring thread was kept on; none: wherever the system put it.
    pub pinned_to: Option<usize>,
    /// The kernel that volumes use on this CPU.
    pub kernel: String,
    /// All that it can run.
    pub kernels: Vec<String>,
    /// Peers by name, with their versions.
    pub peers: BTreeMap<&'static str, String>,
    /// When, in UTC.
    pub date: String,
    /// Whether this was the short form, whose figures mean little.
    pub quick: bool,
    /// How figures were taken.
    pub method: String,
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
        json!({
            "header": {
                "cpu": header.cpu,
                "pinned_to": header.pinned_to,
                "kernel": header.kernel,
                "kernels": header.kernels,
                "peers": header.peers,
                "date": header.date,
                "quick": header.quick,
                "method": header.method,
            },
            "rows": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ratio: f64, target: Option<f64>) -> Row {
        Row {
            case: "case".to_owned(),
            unit: Unit::GigabytesPerSecond,
            ours: 1.0,
            peer: "peer",
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
        // What could not be measured is no success.
        assert_eq!(row(f64::NAN, Some(0.9)).met(), Some(false));
    }

    #[test]
    fn a_row_without_a_target_has_neither_target_nor_met() {
        let json = row(0.5, None).to_json();
        assert!(json["target"].is_null() && json["met"].is_null());
        assert_eq!(json["unit"], "GB/s");
    }
}
