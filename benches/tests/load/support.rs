//! A back-end in a folder of its own, and `load` run against it.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_integration::processes::Process;
use serde_json::Value;
use tempfile::TempDir;

/// How long anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of the file `disk`.
pub const FILE_BYTES: u64 = 4 << 20;

/// A folder with the empty file `disk`.
pub fn folder() -> TempDir {
    let dir = tempfile::tempdir().expect("folder");
    let file = std::fs::File::create(dir.path().join("disk")).expect("file");
    file.set_len(FILE_BYTES).expect("size");
    dir
}

/// `serve` at the socket `s` of a folder.
pub fn serve(dir: &Path, line: &str) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serve"));
    command
        .current_dir(dir)
        .args(["--socket", "s"])
        .args(line.split_whitespace());
    let process = Process::start_command(command).expect("starts");
    assert!(
        process.wait_for_log("listening on s", PATIENCE),
        "{line}: {}",
        process.log()
    );
    process
}

/// `qemu-storage-daemon` at the socket `s`, with the file `disk`.
pub fn qemu(dir: &Path, queues: u16) -> Process {
    let mut command = Command::new("qemu-storage-daemon");
    command.current_dir(dir).args([
        "--blockdev",
        "driver=file,filename=disk,node-name=a",
        "--export",
        &format!(
            "type=vhost-user-blk,id=e,addr.type=unix,addr.path=s,node-name=a,writable=on,num-queues={queues}"
        ),
    ]);
    Process::start_command(command).expect("starts")
}

/// `load` with these options, not yet at its end.
pub fn start(dir: &Path, line: &str) -> Process {
    Process::start_command(command(dir, line)).expect("starts")
}

/// `load` with these options, at its end.
pub fn load(dir: &Path, line: &str) -> Output {
    command(dir, line).output().expect("starts")
}

fn command(dir: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
    command.current_dir(dir).arg("--json");
    for (option, value) in [("--seconds", "0.06"), ("--warm-up", "0.02")] {
        if !line.contains(option) {
            command.args([option, value]);
        }
    }
    command.args(line.split_whitespace());
    command
}

/// The figures of a run that must succeed.
pub fn figures(dir: &Path, line: &str) -> Value {
    let output = load(dir, line);
    assert!(output.status.success(), "{line}: {}", said(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// What a run that must fail says.
pub fn failure(dir: &Path, line: &str) -> String {
    let output = load(dir, line);
    assert_eq!(output.status.code(), Some(1), "{line}: {}", said(&output));
    said(&output)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until something holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
