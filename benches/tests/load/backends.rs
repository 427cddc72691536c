//! What `load` must be able to drive: `serve` with each storage, its reference, `qemu-storage-daemon`
//! and the echo; each with what it has of rings.

use std::path::Path;

use serde_json::Value;

use super::support::{FILE_BYTES, figures, folder, qemu, serve, wait_until};

/// Names and tests.
pub const TESTS: &[(&str, fn())] = &[
    ("load_verifies_plain_disks", verifies_plain_disks),
    ("load_verifies_encrypted_disks", verifies_encrypted_disks),
    ("load_verifies_disks_in_memory", verifies_disks_in_memory),
    ("load_verifies_moving_queues", verifies_moving_queues),
    ("load_verifies_the_reference", verifies_the_reference),
    ("load_verifies_qemu", verifies_qemu),
    (
        "load_verifies_reordered_answers",
        verifies_reordered_answers,
    ),
    (
        "load_several_queues_and_threads",
        several_queues_and_threads,
    ),
    ("load_several_disks", several_disks),
    ("load_counts_kicks_and_calls", counts_kicks_and_calls),
    ("load_null_and_the_echo", null_and_the_echo),
    ("load_at_a_rate", at_a_rate),
    ("load_beside_a_neighbour", beside_a_neighbour),
];

/// Each of the rings of a split-only back-end, then those that only ours has.
const SPLIT: &[&str] = &[
    "",
    "--no-event-idx --calls",
    "--calls --depth 4 --segments 2",
    "--indirect --segments 8",
];
const PACKED: &[&str] = &[
    "--packed",
    "--packed --no-event-idx",
    "--packed --indirect --calls --segments 4",
];

/// Verified load over each ring. The fill and the last look read and write each block at least once.
fn verified(dir: &Path, rings: &[&[&str]]) {
    for options in rings.iter().copied().flatten() {
        let line = format!("--socket s --verify --mix 50 --depth 16 --span 1MiB {options}");
        let line = if options.contains("--depth") {
            line.replace("--depth 16 ", "")
        } else {
            line
        };
        let figures = figures(dir, &line);
        let reads = figures["verified_reads"].as_u64().expect("a count");
        assert!(reads >= 256, "{line}: {figures}");
        let ring = if options.contains("--packed") {
            "packed"
        } else {
            "split"
        };
        assert_eq!(figures["ring"], ring, "{line}");
        assert_eq!(
            figures["indirect"],
            options.contains("--indirect"),
            "{line}"
        );
    }
}

fn verifies_plain_disks() {
    let dir = folder();
    for disk in ["ram:4MiB", "file:disk"] {
        let _serve = serve(dir.path(), &format!("--blk {disk}"));
        verified(dir.path(), &[SPLIT, PACKED]);
    }
}

fn verifies_encrypted_disks() {
    let dir = folder();
    for unit in [512, 4096] {
        let _serve = serve(
            dir.path(),
            &format!("--blk file:disk --xts --data-unit {unit}"),
        );
        verified(dir.path(), &[&SPLIT[..1], &PACKED[2..]]);
    }
}

/// Files on tmpfs, which a worker reads and writes itself.
fn verifies_disks_in_memory() {
    let dir = folder();
    let file = match tempfile::NamedTempFile::new_in("/dev/shm") {
        Ok(file) => file,
        Err(error) => return println!("skipped: disks on tmpfs: no file in /dev/shm: {error}"),
    };
    file.as_file().set_len(FILE_BYTES).expect("length");
    let path = file.path().display();
    for encryption in ["", "--xts"] {
        let _serve = serve(dir.path(), &format!("--blk file:{path} {encryption}"));
        verified(dir.path(), &[SPLIT, &PACKED[2..]]);
    }
}

fn verifies_moving_queues() {
    let dir = folder();
    let _serve = serve(
        dir.path(),
        "--blk ram:4MiB --xts --queues 3 --workers 2 --shuffle 1",
    );
    for options in ["--depth 1", "--depth 16 --packed"] {
        let line = format!("--socket s --verify --mix 50 --queues 3 {options}");
        let figures = figures(dir.path(), &line);
        let reads = figures["verified_reads"].as_u64().expect("a count");
        assert!(reads >= FILE_BYTES / 4096 - 1, "{line}: {figures}");
    }
}

fn verifies_the_reference() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk ram:4MiB --reference");
    verified(dir.path(), &[SPLIT]);
}

fn verifies_qemu() {
    let dir = folder();
    let _qemu = qemu(dir.path(), 2);
    wait_until("it listens", || dir.path().join("s").exists());
    verified(dir.path(), &[SPLIT]);
    let figures = figures(dir.path(), "--socket s --queues 2 --depth 8");
    assert!(figures["requests"].as_u64() > Some(0), "{figures}");
}

fn verifies_reordered_answers() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk delay=300:file:disk");
    verified(dir.path(), &[&SPLIT[..1], &PACKED[..1]]);
}

fn several_queues_and_threads() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk file:disk --queues 3");
    for options in ["", "--cpu 0 --cpu 0", "--packed"] {
        let line = format!("--socket s --verify --mix 30 --queues 3 --depth 4 {options}");
        let figures = figures(dir.path(), &line);
        // Three parts of whole blocks: one block is left over.
        assert!(
            figures["verified_reads"].as_u64() >= Some(FILE_BYTES / 4096 - 1),
            "{figures}"
        );
        assert_eq!(figures["queues"], 3);
    }
}

fn several_disks() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk file:disk --socket t --blk ram:2MiB");
    let line =
        "--socket s --socket t --verify --mix 30 --depth 4 --pattern sequential --block-size 64KiB";
    let figures = figures(dir.path(), line);
    assert!(
        figures["verified_reads"].as_u64() >= Some(64 + 32),
        "{figures}"
    );
}

fn counts_kicks_and_calls() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk ram:1MiB");
    let quiet = figures(dir.path(), "--socket s");
    assert_eq!(quiet["requests_per_call"], Value::Null, "{quiet}");
    // Slow enough that the worker sleeps in between: each request needs a kick.
    let paced = figures(dir.path(), "--socket s --calls --rate 50 --seconds 0.5");
    let per_kick = paced["requests_per_kick"].as_f64().expect("kicks");
    assert!((0.5..2.0).contains(&per_kick), "{paced}");
    assert!(paced["requests_per_call"].as_f64().is_some(), "{paced}");
}

fn null_and_the_echo() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk null:1GiB");
    let echo = [
        "--ring-echo",
        "--ring-echo --packed",
        "--ring-echo --indirect --queues 2",
    ];
    for target in ["--socket s", "--socket s --packed"].iter().chain(&echo) {
        let line = format!("{target} --depth 32 --mix 70");
        let figures = figures(dir.path(), &line);
        let number = |name: &str| figures[name].as_f64().expect("a number");
        assert!(
            number("requests") > 0.0 && number("iops") > 0.0,
            "{line}: {figures}"
        );
        let share = number("reads") / number("requests");
        assert!((0.0..=1.0).contains(&share), "{line}: {figures}");
        let latency = &figures["latency_us"];
        let [p50, p99, max] = ["p50", "p99", "max"].map(|name| latency[name].as_f64());
        assert!(
            p50 > Some(0.0) && p50 <= p99 && p99 <= max,
            "{line}: {figures}"
        );
        let bytes = number("bytes_per_second");
        assert!(
            (bytes - number("iops") * 4096.0).abs() < 1.0,
            "{line}: {figures}"
        );
    }
}

fn at_a_rate() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk null:1GiB");
    let figures = figures(
        dir.path(),
        "--socket s --rate 500 --depth 8 --warm-up 0 --seconds 0.5",
    );
    let [requests, seconds] = ["requests", "seconds"].map(|name| figures[name].as_f64());
    let due = 500.0 * seconds.expect("a number");
    // What was due while the queues were being made counts as well.
    assert!(
        requests > Some(0.0) && requests < Some(due + 500.0),
        "{figures}"
    );
    assert_eq!(figures["latency_us"]["one_of"], 1, "all of them");
}

/// Both are loaded, each with its own requests; for longer where the machine is slow.
fn beside_a_neighbour() {
    let dir = folder();
    let _serve = serve(dir.path(), "--blk null:64MiB --socket t --blk null:64MiB");
    for seconds in [0.1, 1.0, 10.0] {
        let line = format!("--socket s --depth 8 --neighbour t --seconds {seconds}");
        let figures = figures(dir.path(), &line);
        let devices = figures["devices"].as_array().expect("a list");
        let requests = devices.iter().map(|device| device["requests"].as_u64());
        let requests: Vec<u64> = requests.map(|count| count.expect("a count")).collect();
        assert_eq!(requests.len(), 2, "{figures}");
        // The neighbour's write.
        assert_eq!(figures["reads"], requests[0], "{figures}");
        assert_eq!(figures["requests"], requests[0] + requests[1], "{figures}");
        if requests.iter().all(|count| *count > 0) {
            return;
        }
    }
    panic!("one of them is not loaded");
}
