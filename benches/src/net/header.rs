//! What ran, where and how: the header of the figures.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::{Value, json};

use super::peers::VHOST;
use super::rings::ENTRIES;
use super::testpmd::{self, PROGRAM};
use crate::block::bench::Bench;
use crate::figures::header;
use crate::figures::row::Header;

/// Describes a run.
#[must_use]
pub fn describe(bench: &Bench) -> Header {
    let pace = bench.pace;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let huge = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    let huge: u64 = huge.trim().parse().unwrap_or(0);
    let more: [(&str, Value); 5] = [
        ("worker_cpu", json!(bench.worker_cpu)),
        ("driver_cpu", json!(bench.driver_cpu)),
        ("ring_entries", json!(ENTRIES)),
        ("linux", json!(kernel.trim().split('-').next())),
        ("huge_pages", json!(huge)),
    ];
    let peers = if testpmd::is_installed() {
        BTreeMap::from([(VHOST, version())])
    } else {
        BTreeMap::new()
    };
    Header {
        cpu: header::cpu(),
        how: format!("Linux {}, one CPU serves and one drives", kernel.trim()),
        peers,
        date: header::date(),
        quick: bench.quick,
        method: format!(
            "one CPU serves, another drives; the sides of a case take turns of {} ms, after {} ms of warm-up, {} rounds; rounds \
             in which the CPUs moved don't count; figures are medians over the rounds, ratio is the median of each round's ratio",
            pace.sample.as_millis(),
            pace.warm_up.as_millis(),
            pace.rounds
        ),
        more: more
            .map(|(name, value)| (name.to_owned(), value))
            .into_iter()
            .collect(),
    }
}

/// As the program says it: `DPDK 22.11.11`.
fn version() -> String {
    // It says so while it starts, however it goes on.
    let start = [
        "-v",
        "--no-pci",
        "--no-huge",
        "-m",
        "16",
        "--no-shconf",
        "--no-telemetry",
    ];
    let output = Command::new(PROGRAM)
        .args(start)
        .args(["--", "--version"])
        .output();
    let text = output.map(|o| {
        let both = [o.stdout, o.stderr].concat();
        String::from_utf8_lossy(&both).into_owned()
    });
    let text = text.unwrap_or_default();
    let found = text.split('\'').find(|part| part.starts_with("DPDK "));
    found.unwrap_or("DPDK").to_owned()
}
