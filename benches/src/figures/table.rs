//! Figures for people: a line for each case, with all its peers, and what was missed.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use super::row::{Placement, Report, Row};

/// The whole report.
#[must_use]
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    let header = &report.header;
    let _ = writeln!(text, "{}, {}, {}", header.cpu, header.how, header.date);
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
        "{:<66} {:>8} {}",
        named(first),
        figure(first.ours),
        first.unit.name()
    );
    for row in rows {
        let mark = if row.met() == Some(false) { "!" } else { "" };
        let peer = short(&row.peer);
        if row.measured() {
            let theirs = figure(row.theirs);
            let _ = write!(text, "  {peer} {theirs} (x{:.2}{mark})", row.ratio);
        } else {
            let _ = write!(text, "  {peer} not measured");
        }
    }
    text.push('\n');
    text
}

/// A case with what is special about its place.
fn named(row: &Row) -> String {
    match row.placement {
        Placement::Inline | Placement::Pool => row.case.clone(),
        place => format!("{} ({})", row.case, place.name()),
    }
}

/// A figure in three or more digits, thousands and millions shortened; nothing where it was not taken.
pub(super) fn figure(value: f64) -> String {
    match value {
        v if !v.is_finite() => String::new(),
        v if v >= 999_500.0 => format!("{:.2} M", v / 1e6),
        v if v >= 9_995.0 => format!("{:.1} k", v / 1e3),
        v if v >= 999.5 => format!("{:.2} k", v / 1e3),
        v if v >= 99.95 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// A peer's name without what stands in brackets.
fn short(peer: &str) -> &str {
    peer.split(" (").next().unwrap_or(peer)
}

/// How many targets there are, and each that was missed.
fn missed(rows: &[Row]) -> String {
    let with_target = rows.iter().filter(|row| row.target.is_some()).count();
    let missed: Vec<_> = rows.iter().filter(|row| row.met() == Some(false)).collect();
    let met = rows.iter().filter(|row| row.met() == Some(true)).count();
    let mut text = format!("\n{met} of {with_target} targets met\n");
    let open = with_target - met - missed.len();
    if open > 0 {
        let _ = writeln!(text, "not measured in this run: {open}");
    }
    for row in missed {
        let target = row.target.unwrap_or_default();
        let _ = writeln!(
            text,
            "missed: {} beside {}: {:.3}, wanted {target:.2}",
            named(row),
            row.peer,
            row.ratio
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::row::tests::row;
    use super::*;

    #[test]
    fn what_is_missed_is_named() {
        let row = |peer: &'static str, ratio| Row {
            peer: peer.into(),
            theirs: 1.0,
            ..row(ratio, Some(1.0))
        };
        let text = missed(&[row("one", 0.5), row("other", 1.5), row("none", f64::NAN)]);
        assert_eq!(
            text,
            "\n1 of 3 targets met\nnot measured in this run: 1\nmissed: a case beside one: 0.500, wanted 1.00\n"
        );
        let text = line(&[
            row("one (1)", 0.5),
            row("other", 1.5),
            row("none", f64::NAN),
        ]);
        assert!(
            text.contains("one 1.00 (x0.50!)  other 1.00 (x1.50)  none not measured"),
            "{text}"
        );
    }

    #[test]
    fn figures_are_short() {
        let all = [9.994, 99.96, 1234.0, 56_789.0, 12_345_678.0, f64::NAN].map(figure);
        assert_eq!(all, ["9.99", "100.0", "1.23 k", "56.8 k", "12.35 M", ""]);
    }
}
