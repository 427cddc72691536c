//! A stored report as tables in Markdown: for a page of documentation, which quotes a real run.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use serde_json::Value;

use super::table::figure;

/// The line of a page from which on the tables of that name stand.
#[must_use]
pub fn begin(name: &str) -> String {
    format!("<!-- {name} figures: begin -->")
}

/// The line up to which they stand.
#[must_use]
pub fn end(name: &str) -> String {
    format!("<!-- {name} figures: end -->")
}

/// The page with the tables of `report` in place of those of that name that it has; none if it has no place for them.
#[must_use]
pub fn refresh(page: &str, name: &str, report: &Value) -> Option<String> {
    let (begin, end) = (begin(name), end(name));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{}{end}{after}", text(report)))
}

/// Header, a table for each group of cases (what stands before a case's first comma), what was missed, and where a
/// peer is ahead.
#[must_use]
pub fn text(report: &Value) -> String {
    let header = &report["header"];
    let mut text = format!(
        "\nRun of {} on {}; {}.\n",
        said(header, "date"),
        said(header, "cpu"),
        said(header, "method")
    );
    if let Some(peers) = header["peers"].as_object() {
        for (name, version) in peers {
            let _ = writeln!(text, "- {name}: {}", version.as_str().unwrap_or("?"));
        }
    }
    let none = Vec::new();
    let rows = report["rows"].as_array().unwrap_or(&none);
    for group in rows.chunk_by(|a, b| group_of(a) == group_of(b)) {
        table(&mut text, group);
    }
    let missed = |row: &Value| row["met"] == false;
    list(&mut text, "Targets that were missed", rows, missed);
    let open = |row: &Value| row["target"].is_f64() && row["met"].is_null();
    list(&mut text, "Not measured in this run", rows, open);
    let peers = &header["peers"];
    let ahead = |row: &Value| {
        peers[said(row, "peer")].is_string() && row["ratio"].as_f64().is_some_and(|r| r < 1.0)
    };
    list(&mut text, "Rows where a peer is ahead", rows, ahead);
    text.push('\n');
    text
}

fn group_of(row: &Value) -> &str {
    said(row, "case").split(", ").next().unwrap_or_default()
}

fn said<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_default()
}

fn table(text: &mut String, rows: &[Value]) {
    let Some(first) = rows.first() else { return };
    let group = group_of(first);
    let _ = write!(
        text,
        "\n### {group}\n\n| case | CPUs | unit | Bulkhead | beside | | ratio | target |\n\
         | --- | --- | --- | ---: | --- | ---: | ---: | ---: |\n"
    );
    let mut last = String::new();
    for row in rows {
        let case = said(row, "case");
        let case = case
            .strip_prefix(group)
            .unwrap_or(case)
            .trim_start_matches(", ");
        let case = if case.is_empty() { group } else { case };
        let shown = format!("{case} | {}", said(row, "placement"));
        let cells = if shown == last {
            "  |".to_owned()
        } else {
            shown.clone()
        };
        last = shown;
        let _ = writeln!(
            text,
            "| {cells} | {} | {} | {} | {} | {} | {} |",
            said(row, "unit"),
            number(&row["ours"]),
            said(row, "peer"),
            number(&row["theirs"]),
            ratio(row),
            target(row)
        );
    }
}

fn number(value: &Value) -> String {
    figure(value.as_f64().unwrap_or(f64::NAN))
}

fn ratio(row: &Value) -> String {
    row["ratio"]
        .as_f64()
        .map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
}

/// The target with how it went.
fn target(row: &Value) -> String {
    let Some(target) = row["target"].as_f64() else {
        return String::new();
    };
    let mark = match row["met"].as_bool() {
        Some(true) => "met",
        Some(false) => "**missed**",
        None => "not measured",
    };
    format!("{target:.2} {mark}")
}

fn list(text: &mut String, title: &str, rows: &[Value], belongs: impl Fn(&Value) -> bool) {
    let _ = writeln!(text, "\n### {title}\n");
    let mut any = false;
    for row in rows.iter().filter(|row| belongs(row)) {
        any = true;
        let _ = writeln!(
            text,
            "- {} ({}), beside {}: {}{}",
            said(row, "case"),
            said(row, "placement"),
            said(row, "peer"),
            ratio(row),
            row["target"]
                .as_f64()
                .map_or_else(String::new, |target| format!(", wanted {target:.2}"))
        );
    }
    if !any {
        let _ = writeln!(text, "None.");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Value {
        let row = |case: &str, peer: &str, ratio: Value, met: Value| {
            json!({"case": case, "unit": "requests/s", "ours": 2e6, "peer": peer, "theirs": 1e6,
                   "ratio": ratio, "target": 0.9, "met": met, "placement": "near"})
        };
        json!({
            "header": {"cpu": "a CPU", "date": "today", "method": "in turns", "peers": {"fio": "3.33"}},
            "rows": [
                row("null, read", "floor", json!(0.95), json!(true)),
                row("null, read", "fio", json!(0.5), json!(false)),
                row("ram, read", "copy", Value::Null, Value::Null),
            ],
        })
    }

    #[test]
    fn a_page_keeps_what_stands_around_its_tables() {
        let other = format!("{}\nkept\n{}", begin("net"), end("net"));
        let page = format!(
            "before\n{other}\n{}\nold\n{}\nafter\n",
            begin("block"),
            end("block")
        );
        let new = refresh(&page, "block", &report()).expect("it has a place");
        assert!(
            new.starts_with(&format!("before\n{other}\n")) && new.ends_with("\nafter\n"),
            "{new}"
        );
        assert!(!new.contains("old") && new.contains("a CPU"), "{new}");
        let again = refresh(&new, "block", &report()).expect("it still has one");
        assert_eq!(again, new);
        assert_eq!(refresh("no place", "block", &report()), None);
    }

    #[test]
    fn what_was_missed_and_who_is_ahead_is_listed() {
        let text = text(&report());
        let after = |title: &str| text.split(title).nth(1).expect("a list").to_owned();
        let entry = "\n\n- null, read (near), beside fio: 0.50, wanted 0.90\n";
        assert!(
            after("Targets that were missed").starts_with(entry),
            "{text}"
        );
        assert!(after("a peer is ahead").starts_with(entry), "{text}");
        assert!(after("Not measured in this run").starts_with("\n\n- ram, read"));
        assert!(text.contains("### null\n") && text.contains("### ram\n"));
        assert!(
            text.contains(
                "| read | near | requests/s | 2.00 M | floor | 1.00 M | 0.95 | 0.90 met |"
            ),
            "{text}"
        );
    }
}
