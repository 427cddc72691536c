//! What ran, where and how: the header of the figures.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::{Value, json};

use super::bench::Bench;
use super::storages::{FIO, QEMU, REFERENCE};
use crate::figures::header;
use crate::figures::row::Header;

/// Describes a run.
#[must_use]
pub fn describe(bench: &Bench) -> Header {
    let pace = bench.pace;
    let mut peers = BTreeMap::from([(
        REFERENCE,
        "vhost-user-backend 0.24, virtio-queue 0.18".to_owned(),
    )]);
    for (is_there, name, option) in [
        (bench.has_qemu, QEMU, "--version"),
        (bench.has_fio, FIO, "--version"),
    ] {
        if is_there {
            peers.insert(name, version(name, option));
        }
    }
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let huge = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").unwrap_or_default();
    let huge: u64 = huge.trim().parse().unwrap_or(0);
    let more: [(&str, Value); 4] = [
        ("worker_cpu", json!(bench.worker_cpu)),
        ("driver_cpu", json!(bench.driver_cpu)),
        // The version: what a distribution puts behind it says nothing about speed.
        ("linux", json!(kernel.trim().split('-').next())),
        ("huge_pages", json!(huge)),
    ];
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

/// The first line that a program says of its version.
fn version(program: &str, option: &str) -> String {
    let output = Command::new(program).arg(option).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let text = text.unwrap_or_default();
    let line = text.lines().next().unwrap_or("unknown");
    line.trim_start_matches(program)
        .trim_start_matches(['-', ' '])
        .trim_start_matches("version ")
        .to_owned()
}
