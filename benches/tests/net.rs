//! The quick form writes what `cargo xtask bench net` promises: a row for each case, a picture, and tables in a page.
//! Nothing is said of speed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use bulkhead_benches::figures::header::cpus;
use bulkhead_benches::figures::markdown;
use bulkhead_benches::net::testpmd;
use serde_json::Value;

fn bench(out: &Path, options: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_net-bench"))
        .args(["--quick", "--out"])
        .arg(out)
        .args(options)
        .output()
        .expect("net-bench starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{options:?}: {said}");
}

fn cases(out: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(out.join("net.json")).expect("figures");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(json["header"]["quick"], true);
    let rows = json["rows"].as_array().expect("rows");
    for row in rows {
        // On a busy machine a piece of a turn may be too short for a single frame; that none at all comes through is an
        // error of the bench.
        let measured = row["ratio"].is_f64();
        for name in ["ours", "theirs"] {
            let figure = row[name].as_f64();
            assert!(
                !measured || figure.is_some_and(|f| f >= 0.0),
                "{name}: {row}"
            );
        }
    }
    let case = |row: &Value| row["case"].as_str().unwrap_or_default().to_owned();
    rows.iter().map(case).collect()
}

#[test]
fn the_quick_form_writes_every_row() {
    if cpus().len() < 2 {
        println!("skipped: the_quick_form_writes_every_row: it needs two CPUs");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path();
    bench(out, &[]);
    let cases = cases(out);
    let mut parts = vec![
        "segments, 64 KiB",
        "fairness, 64 B beside a flood to everybody",
    ];
    if testpmd::is_installed() {
        parts.extend([
            "guest, tx 64 B, split",
            "guest, rx 64 B, packed",
            "switch, 64 B",
        ]);
    } else {
        println!("skipped: beside testpmd: it is not installed");
    }
    for part in parts {
        assert!(
            cases.iter().any(|case| case.starts_with(part)),
            "{part}: {cases:?}"
        );
    }
    let page = out.join("page.md");
    let text = format!("{}\n{}\n", markdown::begin("net"), markdown::end("net"));
    std::fs::write(&page, text).expect("a page");
    bench(out, &["--table", page.to_str().expect("a name")]);
    let text = std::fs::read_to_string(&page).expect("a page");
    assert!(text.contains("### fairness\n"), "{text}");
    assert!(out.join("performance-net.svg").exists());
}
