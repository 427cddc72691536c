//! The data plane goes from one format of stored state to the other and back, live and by death, under a verified
//! load: what one has written the other goes on with.

use std::path::PathBuf;

use bulkhead_integration::host::{Host, own_binaries};
use bulkhead_integration::processes::binary_dir;
use bulkhead_integration::survive::kills::kill_pid;

use crate::resume::{FILL, KINDS, Outcome, Test, load, started, unnoticed};
use crate::upgrades::{data_plane, settled};

/// The table; empty without the version before.
pub const TESTS: &[Test] = &[Test {
    name: "survive_state_formats_both_ways",
    run: both_ways,
}];

/// The data plane with the state format before this one.
fn previous() -> PathBuf {
    binary_dir().join("previous/bulkhead-dataplane")
}

/// Why the tests can't run.
pub fn missing() -> Option<String> {
    let there = previous().is_file();
    (!there).then(|| "the version before is not built: `cargo xtask test` does it".to_owned())
}

/// By number each is a later release: which format it has is its own affair.
fn both_ways() -> Outcome {
    let dir = crate::folder()?;
    let bin_dir = own_binaries(dir.path())?;
    let host = started(Host::create_with(dir.path(), &bin_dir)?, &KINDS)?;
    let mut load = load(&host, &KINDS)?;
    let this = binary_dir().join("bulkhead-dataplane");
    for (version, program) in (1..).zip([previous(), this.clone(), previous(), this]) {
        let before = data_plane(&host)?;
        host.install_from("dataplane", &program, version)?;
        let statement = host.release("dataplane", version)?;
        host.upgrade_to(&statement)
            .map_err(|e| format!("{e}\n--- log:\n{}", host.log()))?;
        assert_ne!(data_plane(&host)?, before, "another process serves");
        host.wait_until("all agree again", settled)?;
        // One of the same format goes on with what it wrote.
        load.killed(kill_pid(data_plane(&host)?)?);
        load.wait_back(FILL)?;
        host.wait_until("all agree again", settled)?;
    }
    unnoticed(load, &host)
}
