//! The nightly compiler and the flags of its one flavour here: AddressSanitizer, with the coverage counters
//! that libFuzzer goes by, for fuzz targets and for tests alike, so that what they share is built once.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{TARGET, target, workspace};

/// AddressSanitizer's runtime needs a program that is linked dynamically: none of the usual flags.
const FLAGS: &str = "-Zsanitizer=address -Ctarget-cpu=x86-64-v2 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// What AddressSanitizer is told: allocations that are too large fail as everywhere, leaks are found.
pub const ASAN_OPTIONS: &str = "detect_leaks=1:allocator_may_return_null=1";

/// Why there is no nightly compiler for this; none: there is.
pub fn missing() -> Option<String> {
    let sysroot = Command::new("rustc")
        .args(["+nightly", "--print", "target-libdir", "--target", TARGET])
        .stdin(Stdio::null())
        .output();
    let install = "rustup toolchain install nightly";
    match sysroot {
        Ok(output) if output.status.success() => {
            let dir = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            let runtime = dir.join("librustc-nightly_rt.asan.a");
            (!runtime.is_file()).then(|| "the nightly compiler has no AddressSanitizer".to_owned())
        }
        _ => Some(format!("no nightly compiler: {install}")),
    }
}

/// Its target folder.
pub fn flavour() -> PathBuf {
    target().join("asan")
}

/// Its cargo, at the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new("cargo");
    command
        .arg("+nightly")
        .current_dir(workspace())
        .stdin(Stdio::null())
        .env("CARGO_TARGET_DIR", flavour())
        .env("RUSTFLAGS", FLAGS)
        .env("ASAN_OPTIONS", ASAN_OPTIONS);
    command
}
