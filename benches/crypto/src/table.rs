//! Figures for people: a line for each case, with all its peers, and what was missed.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use crate::row::{Report, Row};

/// The whole report.
#[must_use]
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    let header = &report.header;
    let _ = writeln!(
        text,
        "{}, kernel {}, {}",
        header.cpu, header.kernel, header.date
    );
    for (name, version) in &header.peers {
        let _ = writeln!(text, "{name}: {version}");
    }
    let _ = writeln!(text, "{}\n", header.method);
    for case in report
        .rows
        .chunk_by(|a, b| a.case == b.case && a.placement == b.placement)
    {
        text.push_str(&line(case));
    }
    text.push_str(&missed(&report.rows));
    text
}

/// A case: our figure, then each peer's with the ratio; a missed target is marked.
fn line(rows: &[Row]) -> String {
    let Some(first) = rows.first() else {
        return String::new();
    };
    let mut text = format!(
        "{:<66} {:>8.2} {}",
        first.case,
        first.ours,
        first.unit.name()
    );
    for row in rows {
        let mark = if row.met() == Some(false) { "!" } else { "" };
        let _ = write!(
            text,
            "  {} {:.2} (x{:.2}{mark})",
            short(row.peer),
            row.theirs,
            row.ratio
        );
    }
    text.push('\n');
    text
}

/// A peer's name without what stands in brackets.
fn short(peer: &str) -> &str {
    peer.split(" (").next().unwrap_or(peer)
}

/// How many targets there are, and each that was missed.
fn missed(rows: &[Row]) -> String {
    let with_target = rows.iter().filter(|row| row.target.is_some()).count();
    let missed: Vec<_> = rows.iter().filter(|row| row.met() == Some(false)).collect();
    let met = with_target - missed.len();
    let mut text = format!("\n{met} of {with_target} targets met\n");
    for row in missed {
        let target = row.target.unwrap_or_default();
        let _ = writeln!(
            text,
            "missed: {} beside {}: {:.3}, wanted {target:.2}",
            row.case, row.peer, row.ratio
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::{Placement, Unit};

    #[test]
    fn what_is_missed_is_named() {
        let row = |peer, ratio| Row {
            case: "a case".to_owned(),
            unit: Unit::GigabytesPerSecond,
            ours: 1.0,
            peer,
            theirs: 1.0,
            ratio,
            target: Some(1.0),
            placement: Placement::Inline,
            point: None,
        };
        let text = missed(&[row("one", 0.5), row("other", 1.5)]);
        assert_eq!(
            text,
            "\n1 of 2 targets met\nmissed: a case beside one: 0.500, wanted 1.00\n"
        );
        let text = line(&[row("one (1)", 0.5), row("other", 1.5)]);
        assert!(
            text.contains("one 1.00 (x0.50!)  other 1.00 (x1.50)"),
            "{text}"
        );
    }
}
