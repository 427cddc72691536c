//! What `load` says of back-ends that fail, refuse, hang, die, or lose what was written.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use bulkhead_integration::processes::Process;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::support::{FILE_BYTES, PATIENCE, failure, folder, qemu, serve, start, wait_until};

/// Names and tests.
pub const TESTS: &[(&str, fn())] = &[
    ("load_says_what_is_not_there", says_what_is_not_there),
    (
        "load_says_what_qemu_does_not_offer",
        says_what_qemu_does_not_offer,
    ),
    (
        "load_says_what_a_disk_is_not_fit_for",
        says_what_a_disk_is_not_fit_for,
    ),
    ("load_finds_lost_writes", finds_lost_writes),
    ("load_finds_exchanged_blocks", finds_exchanged_blocks),
    ("load_finds_a_flipped_bit", finds_a_flipped_bit),
    ("load_says_which_request_failed", says_which_request_failed),
    (
        "load_notices_that_a_back_end_died",
        notices_that_a_back_end_died,
    ),
    (
        "load_notices_that_a_back_end_hangs",
        notices_that_a_back_end_hangs,
    ),
];

const BLOCK: u64 = 4096;

fn says_what_is_not_there() {
    let dir = folder();
    let said = failure(dir.path(), "--socket nowhere");
    assert!(
        said.contains("nowhere: can't connect") && said.contains("start the back-end"),
        "{said}"
    );
    let said = failure(dir.path(), "--ring-echo --cpu 100000");
    assert!(said.contains("choose one of them"), "{said}");
}

fn says_what_qemu_does_not_offer() {
    let dir = folder();
    let _qemu = qemu(dir.path(), 1);
    wait_until("it listens", || dir.path().join("s").exists());
    let said = failure(dir.path(), "--socket s --packed");
    assert!(
        said.contains("does not offer packed rings; leave --packed out"),
        "{said}"
    );
    let said = failure(dir.path(), "--socket s --queues 2");
    assert!(said.contains("it has 1 queues"), "{said}");
}

fn says_what_a_disk_is_not_fit_for() {
    let dir = folder();
    let _serve = serve(
        dir.path(),
        "--blk file:disk --read-only --logical-block 4096",
    );
    for (options, expected) in [
        ("--mix write", "read-only: use --mix read"),
        ("--verify", "read-only: use --mix read"),
        ("--block-size 512", "logical block has 4096 bytes"),
        ("--block-size 8MiB", "less than one request"),
        ("--queues 2", "it has 1 queues"),
        ("--span 1KiB", "make --span larger"),
        ("--cpu 0 --cpu 0", "2 --cpu for 1 queues"),
    ] {
        let said = failure(dir.path(), &format!("--socket s {options}"));
        assert!(said.contains(expected), "{options}: {said}");
    }
}

fn finds_lost_writes() {
    let dir = folder();
    // Forgets writes, and leaves what is read as it is in memory.
    let _serve = serve(dir.path(), "--blk null:4MiB");
    let said = failure(dir.path(), "--socket s --verify --mix write --depth 4");
    assert!(
        said.contains("s, queue 0: corrupt data at offset"),
        "{said}"
    );
}

/// Begins to read a file that `load` has filled, and waits until it has.
fn filled(dir: &Path) -> (Process, Process, File) {
    let serve = serve(dir, "--blk file:disk");
    let line = "--socket s --verify --mix read --depth 4 --seconds 60";
    let load = start(dir, line);
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("disk"));
    let disk = disk.expect("opens");
    let mut block = 0;
    wait_until("the disk is filled", || {
        let mut bytes = [0; 16];
        while block < FILE_BYTES / BLOCK {
            disk.read_exact_at(&mut bytes, block * BLOCK)
                .expect("reads");
            if bytes == [0; 16] {
                return false;
            }
            block += 1;
        }
        true
    });
    (serve, load, disk)
}

fn finds_exchanged_blocks() {
    let dir = folder();
    let (_serve, mut load, disk) = filled(dir.path());
    let [mut third, mut ninth] = [[0; 4096]; 2];
    disk.read_exact_at(&mut third, 3 * BLOCK).expect("reads");
    disk.read_exact_at(&mut ninth, 9 * BLOCK).expect("reads");
    disk.write_all_at(&ninth, 3 * BLOCK).expect("writes");
    disk.write_all_at(&third, 9 * BLOCK).expect("writes");
    let status = load.wait(PATIENCE).expect("ends");
    assert_eq!(status.code(), Some(1), "{}", load.log());
    let (third, ninth) = (3 * BLOCK, 9 * BLOCK);
    let found = [(third, ninth), (ninth, third)].iter().any(|(at, from)| {
        let expected = format!("corrupt data at offset {at} ");
        let there = format!("it holds what was written to offset {from} (its write 1)");
        load.log().contains(&expected) && load.log().contains(&there)
    });
    assert!(found, "{}", load.log());
}

fn finds_a_flipped_bit() {
    let dir = folder();
    let (_serve, mut load, disk) = filled(dir.path());
    let at = 100 * BLOCK + 512 * 5 + 100;
    let mut byte = [0];
    disk.read_exact_at(&mut byte, at).expect("reads");
    disk.write_all_at(&[byte[0] ^ 4], at).expect("writes");
    assert!(load.wait(PATIENCE).is_some(), "it goes on");
    let expected = format!(
        "corrupt data at offset {} (found by the read of the 4096 bytes at {}): the stamp is right, byte 96 after it is not",
        100 * BLOCK + 512 * 5,
        100 * BLOCK
    );
    assert!(load.wait_for_log(&expected, PATIENCE), "{}", load.log());
}

fn says_which_request_failed() {
    let dir = folder();
    for (fault, mix) in [
        ("read/EIO/100", "read"),
        ("write/ENOSPC/100", "write"),
        ("read/short/7", "50"),
    ] {
        let _serve = serve(dir.path(), &format!("--blk error={fault}:file:disk"));
        let said = failure(dir.path(), &format!("--socket s --mix {mix} --seconds 60"));
        let kind = if mix == "write" { "write" } else { "read" };
        let expected = format!("s, queue 0: the {kind} of 4096 bytes at offset ");
        assert!(said.contains(&expected), "{fault}: {said}");
        assert!(
            said.contains("ended with status 1 (I/O error)"),
            "{fault}: {said}"
        );
    }
}

fn notices_that_a_back_end_died() {
    let dir = folder();
    let (mut serve, mut load, _) = filled(dir.path());
    serve.kill();
    let status = load.wait(PATIENCE).expect("ends");
    assert_eq!(status.code(), Some(1), "{}", load.log());
    assert!(
        load.wait_for_log("s: the back-end closed the connection", PATIENCE),
        "{}",
        load.log()
    );
}

fn notices_that_a_back_end_hangs() {
    let dir = folder();
    let serve = serve(dir.path(), "--blk file:disk");
    let mut load = start(
        dir.path(),
        "--socket s --seconds 60 --timeout 1 --depth 3 --mix write",
    );
    let disk = File::open(dir.path().join("disk")).expect("opens");
    wait_until("it writes", || {
        let mut bytes = vec![0; 4 << 20];
        disk.read_exact_at(&mut bytes, 0).expect("reads");
        bytes.iter().any(|byte| *byte != 0)
    });
    let pid = Pid::from_raw(i32::try_from(serve.pid()).expect("a pid"));
    kill(pid, Signal::SIGSTOP).expect("stops");
    let status = load.wait(PATIENCE).expect("ends");
    kill(pid, Signal::SIGCONT).expect("goes on");
    assert_eq!(status.code(), Some(1), "{}", load.log());
    let expected = "no request was answered for 1s (in flight: 3)";
    assert!(load.wait_for_log(expected, PATIENCE), "{}", load.log());
}
