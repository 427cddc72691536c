//! Linux guests with their disks on Bulkhead.

use std::time::Duration;

use bulkhead_integration::guest::{BOOT_PATIENCE, value_in};
use bulkhead_integration::processes::{Process, binary};
use bulkhead_integration::workload;

use crate::support::{Outcome, ensure, folder, guest};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "system_guest_uses_serve",
    needs: &[Need::Guest],
    run: uses_serve,
}];

/// How long a guest's work may take once it runs.
const WORK: Duration = Duration::from_secs(180);

/// `serve`, an encrypted file, several queues: a file system, 64 MiB, and a second boot.
fn uses_serve() -> Outcome {
    let dir = folder()?;
    let (socket, image) = (dir.path().join("a.sock"), dir.path().join("disk.img"));
    std::fs::File::create(&image)?.set_len(128 << 20)?;
    let blk = format!("file:{}", image.display());
    let path = socket.display().to_string();
    let arguments = ["--socket", &path, "--blk", &blk, "--xts", "--queues", "2"];
    let serve = Process::start(&binary("serve", "bulkhead-benches")?, &arguments)?;
    ensure(
        serve.wait_for_log("listening", Duration::from_secs(10)),
        || serve.log(),
    )?;
    let script = workload::write_and_read_back();
    let mut first = guest(dir.path(), socket.clone(), 2, &script)?;
    let console = first.finish(BOOT_PATIENCE + WORK)?;
    let written = value_in(&console, "written");
    ensure(
        written.is_some() && written == value_in(&console, "read"),
        || format!("the guest read something else:\n{console}"),
    )?;
    let look = workload::look_at(&image)?;
    ensure(
        look.plaintext_hits == 0 && look.entropy_bits >= 7.99,
        || format!("{look:?}"),
    )?;
    let mut second = guest(dir.path(), socket, 2, &workload::find_again())?;
    let console = second.finish(BOOT_PATIENCE + WORK)?;
    ensure(value_in(&console, "found") == written, || {
        format!("the second boot found something else:\n{console}")
    })
}
