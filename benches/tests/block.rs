//! The quick form writes what `cargo xtask bench block` promises: every field, a row for each case and peer, a
//! picture, and tables in a page. Nothing is said of speed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use bulkhead_benches::figures::header::cpus;
use bulkhead_benches::figures::markdown;
use bulkhead_integration::processes::installed;
use serde_json::Value;

fn bench(out: &Path, options: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_block-bench"))
        .args(["--quick", "--out"])
        .arg(out)
        .args(options)
        .output()
        .expect("block-bench starts");
    assert!(
        output.status.success(),
        "{options:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn report(out: &Path, name: &str) -> Value {
    let text = std::fs::read_to_string(out.join(name)).expect(name);
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn the_quick_form_writes_every_row() {
    if cpus().len() < 2 {
        println!("skipped: the_quick_form_writes_every_row: it needs two CPUs");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let output = bench(folder.path(), &[]);
    let json = report(folder.path(), "block.json");
    header(&json["header"]);
    let rows = json["rows"].as_array().expect("rows");
    rows.iter().for_each(row);
    let text = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
    let all: BTreeSet<_> = rows
        .iter()
        .map(|row| (text(row, "case"), text(row, "peer"), text(row, "placement")))
        .collect();
    assert_eq!(all.len(), rows.len(), "a case has a row for each peer");
    storages(&all);
    for part in ["devices, ", "idle, ", "workers, ", "limits, "] {
        assert!(
            all.iter().any(|(case, ..)| case.starts_with(part)),
            "{part}"
        );
    }
    let svg = std::fs::read_to_string(folder.path().join("block.svg")).expect("a picture");
    assert!(svg.starts_with("<svg") && svg.contains("ring-echo floor"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("targets met"), "{said}");
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("a folder")
        .collect();
    assert_eq!(left.len(), 2, "files that were measured are gone: {left:?}");
    page(folder.path());
}

fn header(header: &Value) {
    for name in ["cpu", "date", "method", "linux"] {
        let text = header[name].as_str();
        assert!(
            text.is_some_and(|text| !text.is_empty()),
            "{name}: {header}"
        );
    }
    assert_eq!(header["quick"], true);
    for peer in ["qemu-storage-daemon", "fio"] {
        let there = header["peers"][peer].is_string();
        assert_eq!(there, installed(peer).is_some(), "{header}");
        if !there {
            println!("skipped: beside {peer}: it is not installed");
        }
    }
}

fn row(row: &Value) {
    for name in ["case", "unit", "peer"] {
        assert!(row[name].is_string(), "{name}: {row}");
    }
    let measured = row["ratio"].is_f64();
    for name in ["ours", "theirs", "ratio"] {
        let figure = row[name].as_f64();
        assert!(
            !measured || figure.is_some_and(|f| f >= 0.0),
            "{name}: {row}"
        );
    }
    assert!(
        ["near", "far", "flipped"]
            .iter()
            .any(|p| row["placement"] == *p),
        "{row}"
    );
    assert_eq!(
        row["met"].is_boolean(),
        measured && row["target"].is_f64(),
        "{row}"
    );
}

/// Each storage, plain and encrypted, beside what it must be compared with.
fn storages(all: &BTreeSet<(String, String, String)>) {
    let beside = |group: &str, peer: &str| {
        let found = |(case, p, _): &(String, String, String)| {
            case.starts_with(&format!("{group}, ")) && p == peer
        };
        assert!(all.iter().any(found), "{group} beside {peer}");
    };
    beside("null", "ring-echo floor");
    beside("null XTS", "null + the cipher alone");
    beside("null XTS", "the cipher alone");
    beside("ram", "null + a copy over the same memory");
    beside("ram XTS", "null + the cipher over the same memory");
    for group in [
        "null",
        "null XTS",
        "ram",
        "ram XTS",
        "file",
        "file XTS",
        "tmpfs",
        "tmpfs XTS",
    ] {
        beside(group, "serve --reference");
    }
    if installed("qemu-storage-daemon").is_some() {
        for group in ["null", "file", "tmpfs"] {
            beside(group, "qemu-storage-daemon");
        }
    }
    if installed("fio").is_some() {
        for group in ["file", "tmpfs"] {
            beside(group, "fio + 3 us");
            beside(&format!("{group} XTS"), "fio + the cipher alone");
        }
    }
}

/// The tables of the run go into a page.
fn page(out: &Path) {
    let page = out.join("page.md");
    let text = format!(
        "# Page\n{}\n{}\n",
        markdown::begin("block"),
        markdown::end("block")
    );
    std::fs::write(&page, text).expect("a page");
    bench(out, &["--table", page.to_str().expect("a name")]);
    let text = std::fs::read_to_string(&page).expect("a page");
    assert!(
        text.contains("### null XTS\n") && text.contains("ring-echo floor"),
        "{text}"
    );
    assert!(out.join("performance.svg").exists());
}

#[test]
fn another_serve_is_measured_in_turns() {
    if cpus().len() < 2 {
        println!("skipped: another_serve_is_measured_in_turns: it needs two CPUs");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let serve = Path::new(env!("CARGO_BIN_EXE_serve"));
    let bin = serve.parent().and_then(Path::to_str).expect("a folder");
    bench(folder.path(), &["--against", bin, "--only", "null XTS"]);
    let json = report(folder.path(), "against.json");
    let rows = json["rows"].as_array().expect("rows");
    assert!(!rows.is_empty());
    for row in rows {
        assert_eq!(row["peer"], "the other serve");
        assert!(
            row["case"]
                .as_str()
                .is_some_and(|c| c.starts_with("null XTS, ")),
            "{row}"
        );
    }
}
