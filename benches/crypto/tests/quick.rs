//! The quick form writes what `cargo xtask bench crypto` promises: every field, a row for each case and
//! peer, a picture. Nothing is said of speed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use bulkhead_crypto_bench::ceiling::Ceiling;
use bulkhead_crypto_bench::gcm;
use bulkhead_crypto_bench::peers::LIBRARIES;
use serde_json::Value;

/// Runs the program; what it wrote, and what it said.
fn quick(out: &Path) -> (Value, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_crypto-bench"))
        .args(["--quick", "--out"])
        .arg(out)
        .output()
        .expect("crypto-bench starts");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let read = |name| std::fs::read_to_string(out.join(name)).expect(name);
    let json = serde_json::from_str(&read("crypto.json")).expect("JSON");
    let said = String::from_utf8(output.stdout).expect("text");
    (json, read("crypto.svg"), said)
}

#[test]
fn the_quick_form_writes_every_row() {
    let folder = tempfile::tempdir().expect("a folder");
    let (json, svg, said) = quick(folder.path());
    header(&json["header"]);
    let rows = json["rows"].as_array().expect("rows");
    rows.iter().for_each(row);
    let pairs: BTreeSet<(&str, &str)> = rows
        .iter()
        .map(|row| {
            let text = |name: &str| row[name].as_str().unwrap_or_default();
            (text("case"), text("peer"))
        })
        .collect();
    assert_eq!(pairs.len(), rows.len(), "a case has a row for each peer");
    xts(&pairs);
    gcm(&pairs);
    placement(rows);
    assert!(svg.starts_with("<svg") && svg.contains("AWS-LC"), "{svg}");
    assert!(said.contains("targets met"), "{said}");
    if !LIBRARIES.iter().any(|library| library.name == "OpenSSL") {
        println!("skipped: beside_openssl: libssl-dev was not installed when this was built");
    }
}

fn header(header: &Value) {
    for text in ["cpu", "kernel", "date", "method"] {
        assert!(
            header[text].as_str().is_some_and(|t| !t.is_empty()),
            "{text}: {header}"
        );
    }
    assert_eq!(header["quick"], true);
    assert!(
        header["kernels"]
            .as_array()
            .is_some_and(|k| k.contains(&header["kernel"]))
    );
    for library in LIBRARIES {
        assert!(header["peers"][library.name].is_string(), "{header}");
    }
}

fn row(row: &Value) {
    for text in ["case", "unit", "peer"] {
        assert!(row[text].is_string(), "{text}: {row}");
    }
    for figure in ["ours", "theirs", "ratio"] {
        assert!(
            row[figure].as_f64().is_some_and(|f| f > 0.0),
            "{figure}: {row}"
        );
    }
    assert!(
        ["inline", "pool"].iter().any(|p| row["placement"] == *p),
        "{row}"
    );
    let (target, met) = (&row["target"], &row["met"]);
    assert!(
        (target.is_null() && met.is_null()) || (target.is_f64() && met.is_boolean()),
        "{row}"
    );
}

/// Sizes, units, directions, places and units a call, beside each library and the ceiling.
fn xts(pairs: &BTreeSet<(&str, &str)>) {
    let mut peers: Vec<&str> = LIBRARIES.iter().map(|library| library.name).collect();
    peers.extend(Ceiling::of_this_cpu().map(Ceiling::name));
    for (unit, size, units) in [
        (512, "512 B", 1),
        (512, "4 KiB", 1),
        (512, "64 KiB", 1),
        (512, "64 KiB", 16),
        (512, "1 MiB", 1),
        (512, "1 MiB", 16),
        (4096, "4 KiB", 1),
        (4096, "64 KiB", 1),
        (4096, "64 KiB", 16),
        (4096, "1 MiB", 1),
        (4096, "1 MiB", 16),
    ] {
        for direction in ["encrypt", "decrypt"] {
            for place in ["in place", "between buffers"] {
                let case =
                    format!("xts {direction} {size}, {unit}-byte units, {units} a call, {place}");
                for peer in &peers {
                    assert!(
                        pairs.contains(&(case.as_str(), *peer)),
                        "{case} beside {peer}"
                    );
                }
            }
        }
    }
}

/// Packet sizes, directions, alone and in batches, beside each library.
fn gcm(pairs: &BTreeSet<(&str, &str)>) {
    for size in gcm::SIZES {
        for direction in ["seal", "open"] {
            for batch in ["alone", "32 a batch"] {
                let case = format!("gcm {direction}, {size} B, {batch}");
                for peer in gcm::PEERS {
                    assert!(
                        pairs.contains(&(case.as_str(), peer)),
                        "{case} beside {peer}"
                    );
                }
            }
        }
    }
}

/// Both placements, unless there is one CPU only.
fn placement(rows: &[Value]) {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let pools = rows.iter().filter(|row| row["placement"] == "pool").count();
    // Five sizes, two ways to wait, latency and throughput.
    assert_eq!(pools, if cpus < 2 { 0 } else { 5 * 2 * 2 });
}
