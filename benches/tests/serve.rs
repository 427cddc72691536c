//! The `serve` binary, with the data plane and with `--reference`: what its options do, and its sockets.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_integration::disk::{Disk, DiskError, Options, feature};
use bulkhead_integration::driver::{DriverError, status};
use bulkhead_integration::processes::Process;
use bulkhead_integration::random::Random;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const FILE_BYTES: usize = 1 << 20;
const MODES: [&str; 2] = ["", "--reference"];
const PATIENCE: Duration = Duration::from_secs(10);

fn folder() -> TempDir {
    let dir = tempfile::tempdir().expect("folder");
    std::fs::write(dir.path().join("disk"), vec![0x5a; FILE_BYTES]).expect("write");
    let key: Vec<u8> = (0..64).collect();
    std::fs::write(dir.path().join("key"), key).expect("write");
    dir
}

fn spawn(dir: &Path, line: &str) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve"));
    command.current_dir(dir).args(line.split_whitespace());
    Process::start_command(command).expect("starts")
}

fn serve(dir: &Path, line: &str) -> Process {
    let mut process = spawn(dir, line);
    assert!(
        process.wait_for_log("listening on s", PATIENCE),
        "{line}: {:?}\n{}",
        process.ended(),
        process.log()
    );
    process
}

fn attach(dir: &Path) -> Disk {
    Disk::attach(&dir.join("s"), &Options::default()).expect("attaches")
}

#[test]
fn a_key_file_says_what_lies_in_the_file() {
    let key: [u8; 64] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
    let arena = SecretArena::new(1).expect("arena");
    let oracle = XtsKey::new(&arena, &key).expect("key");
    let plain = Random::named("a key file").bytes(FILE_BYTES);
    for mode in MODES {
        for unit in [DataUnit::B512, DataUnit::B4096] {
            let dir = folder();
            let unit_bytes = unit.bytes();
            let line = format!(
                "--socket s --blk file:disk --xts --data-unit {unit_bytes} --key-file key {mode}"
            );
            let process = serve(dir.path(), &line);
            let mut disk = attach(dir.path());
            let block = disk.frontend.get_config(20, 4).expect("blk_size");
            assert_eq!(block, unit_bytes.to_le_bytes(), "{line}");
            disk.write(0, 0, &plain).expect("writes");
            disk.flush(0).expect("flushes");
            assert!(disk.read_all(2048).expect("reads") == plain, "{line}");
            drop((disk, process));
            let mut cipher = vec![0; FILE_BYTES];
            oracle.encrypt(unit, 0, &plain, &mut cipher).expect("units");
            let file = std::fs::read(dir.path().join("disk")).expect("read");
            assert!(file == cipher, "{line}: the file holds something else");
        }
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    for mode in MODES {
        let dir = folder();
        let line = format!("--socket s --blk file:disk --read-only {mode}");
        let _process = serve(dir.path(), &line);
        let mut options = Options::default();
        options.features |= feature::BLK_RO;
        let mut disk = Disk::attach(&dir.path().join("s"), &options).expect("attaches");
        assert_ne!(disk.features & feature::BLK_RO, 0, "{line}");
        let refused = disk.write(0, 0, &[0; 4096]);
        assert!(
            matches!(
                refused,
                Err(DiskError::Driver(DriverError::Status(status::IOERR)))
            ),
            "{line}: {refused:?}"
        );
        assert_eq!(disk.read(0, 0, 4096).expect("reads"), [0x5a; 4096]);
    }
}

#[test]
fn each_disk_has_its_serial() {
    for mode in MODES {
        let dir = folder();
        let line = format!("--socket other --blk null:1MiB --socket s --blk null:1MiB {mode}");
        let _process = serve(dir.path(), &line);
        let id = attach(dir.path()).id(0).expect("a serial");
        assert_eq!(id, b"serve-1\0\0\0\0\0\0\0\0\0\0\0\0\0", "{line}");
    }
}

#[test]
fn a_signal_ends_it_and_the_next_start_replaces_its_socket() {
    for mode in MODES {
        let dir = folder();
        let line = format!("--socket s --blk file:disk {mode}");
        let mut first = serve(dir.path(), &line);
        let mut second = spawn(dir.path(), &format!("--socket s --blk null:1MiB {mode}"));
        let status = second.wait(PATIENCE).expect("is refused");
        assert_eq!(status.code(), Some(1), "{line}");
        assert!(second.wait_for_log("another process serves there", PATIENCE));
        attach(dir.path()).read(0, 0, 4096).expect("still serves");
        let pid = Pid::from_raw(i32::try_from(first.pid()).expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("signal");
        assert!(first.wait(PATIENCE).is_some(), "{line}: still there");
        // The file's lock is gone with it, too.
        let _third = serve(dir.path(), &line);
        attach(dir.path()).read(0, 0, 4096).expect("serves");
    }
}

#[test]
fn what_can_not_be_served_is_said() {
    let dir = folder();
    std::fs::write(dir.path().join("equal"), [7; 64]).expect("write");
    let cases = [
        ("--blk file:missing", "missing: can't be opened"),
        ("--blk null:1MiB --socket t", "one --blk for each --socket"),
        ("--blk null:1MiB --cpu 100000", "choose one of them"),
    ];
    for mode in MODES {
        for (rest, expected) in cases {
            let line = format!("--socket s {rest} {mode}");
            let mut process = spawn(dir.path(), &line);
            let status = process.wait(PATIENCE).expect("is refused");
            assert_eq!(status.code(), Some(1), "{line}");
            assert!(
                process.wait_for_log(expected, PATIENCE),
                "{line}: {}",
                process.log()
            );
        }
        let line = format!("--socket s --blk null:1MiB --xts --key-file equal {mode}");
        let process = spawn(dir.path(), &line);
        let said = process.wait_for_log("two halves of the XTS key are equal", PATIENCE);
        assert!(said, "{line}: {}", process.log());
    }
}

/// Requests one after the other take as long as their limit says, whoever asks.
#[test]
fn limits_and_a_group_hold() {
    for (line, least) in [
        ("--limit requests=200/1", Duration::from_millis(290)),
        ("--limit bytes=1MiB/4096", Duration::from_millis(200)),
        ("--group requests=200/1", Duration::from_millis(290)),
        (
            "--limit bytes=1GiB --group bytes=1MiB/4096",
            Duration::from_millis(200),
        ),
    ] {
        let dir = folder();
        let _process = serve(dir.path(), &format!("--socket s --blk null:1MiB {line}"));
        let mut disk = attach(dir.path());
        let start = std::time::Instant::now();
        for _ in 0..60 {
            disk.read(0, 0, 4096).expect("reads");
        }
        assert!(start.elapsed() >= least, "{line}: {:?}", start.elapsed());
    }
}
