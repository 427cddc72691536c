//! Linux guests with their disks on Bulkhead.

use std::time::Duration;

use bulkhead_integration::guest::{BOOT_PATIENCE, value_in};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use bulkhead_integration::processes::{Process, binary};
use bulkhead_integration::workload;

use crate::support::{Outcome, ensure, folder, guest};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_guest_uses_serve",
        needs: &[Need::Guest],
        run: uses_serve,
    },
    Test {
        name: "system_guest_uses_volume_512",
        needs: &[Need::Guest],
        run: || uses_volume(512),
    },
    Test {
        name: "system_guest_uses_volume_4096",
        needs: &[Need::Guest],
        run: || uses_volume(4096),
    },
];

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

/// A signed configuration attaches an encrypted volume; a guest uses it, and finds its data after a
/// second boot; the file tells nothing.
fn uses_volume(data_unit: u32) -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "128MiB", data_unit))?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    let script = workload::write_and_read_back();
    let mut first = guest(dir.path(), host.socket("disk"), 1, &script)?;
    let console = first.finish(BOOT_PATIENCE + WORK)?;
    let written = value_in(&console, "written");
    ensure(
        written.is_some() && written == value_in(&console, "read"),
        || format!("the guest read something else:\n{console}\n{}", host.log()),
    )?;
    let look = workload::look_at(&host.image("disk"))?;
    ensure(
        look.plaintext_hits == 0 && look.entropy_bits >= 7.99,
        || format!("{look:?}"),
    )?;
    let mut second = guest(dir.path(), host.socket("disk"), 1, &workload::find_again())?;
    let console = second.finish(BOOT_PATIENCE + WORK)?;
    ensure(value_in(&console, "found") == written, || {
        format!(
            "the second boot found something else:\n{console}\n{}",
            host.log()
        )
    })
}
