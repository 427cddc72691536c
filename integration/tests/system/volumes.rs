//! What becomes of a volume while frontends use it: it grows through the restart of every process, and
//! it is one host's at a time.

use std::fs::OpenOptions;
use std::time::Duration;

use bulkhead_integration::disk::{Disk, Options, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::host::{BundleSpec, Host, HostError, VolumeSpec};

use crate::Test;
use crate::migration::Pair;
use crate::support::{Outcome, ensure, folder};
use crate::whole_disk::reseal;

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_volume_grows_through_restarts",
        needs: &[],
        run: grows,
    },
    Test {
        name: "system_volume_is_one_hosts_at_a_time",
        needs: &[],
        run: one_at_a_time,
    },
];

/// Sectors of the volume, at first and grown.
const SECTORS: [u64; 2] = [8192, 16384];

fn grows() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "4MiB", 4096))?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, SECTORS[0] - 8, &[0x11; 4096])?;
    reseal(&host, "8MiB", &[])?;
    let grown = host.sign(&BundleSpec::new(2, &["grown"]))?;
    too_short(&host, &grown)?;
    let image = OpenOptions::new().write(true).open(host.image("disk"))?;
    image.set_len(SECTORS[1] * 512)?;
    host.apply(&grown)?;
    is_grown(&host, &mut disk, "at once")?;
    disk.write(0, SECTORS[1] - 8, &[0x22; 4096])?;
    disk.flush(0)?;
    for role in ["agent", "keyd"] {
        host.kill(role)?;
        settled(&host)?;
        is_grown(&host, &mut disk, role)?;
    }
    host.kill("dataplane")?;
    settled(&host)?;
    // Its successor goes on with the connection.
    is_grown(&host, &mut disk, "dataplane")?;
    for (sector, byte) in [(SECTORS[0] - 8, 0x11), (SECTORS[1] - 8, 0x22)] {
        ensure(disk.read(0, sector, 4096)? == vec![byte; 4096], || {
            format!("sector {sector} has something else")
        })?;
    }
    // The size that it had is refused, and nothing changes.
    let small = host.sign(&BundleSpec::new(3, &["disk"]))?;
    refused(&host, &small, "never shrinks")?;
    is_grown(&host, &mut disk, "a refusal")
}

/// The file is to grow before the bundle that says so.
fn too_short(host: &Host, envelope: &str) -> Outcome {
    let before = host.status()?;
    refused(host, envelope, "enlarge the file")?;
    ensure(host.status()? == before, || "the status changed".to_owned())
}

fn refused(host: &Host, envelope: &str, because: &str) -> Outcome {
    match host.apply(envelope) {
        Err(HostError::Command { reason, .. }) if reason.contains(because) => Ok(()),
        other => Err(format!("not refused because {because:?}: {other:?}").into()),
    }
}

fn settled(host: &Host) -> Result<(), HostError> {
    host.wait_until("the host is not what its bundle says", |host| {
        host.status().is_ok_and(|status| {
            status["pending"] == serde_json::json!([])
                && status["volumes"][0]["state"]["attached"] == true
        })
    })
}

/// The frontend is still there, sees the new end, and can read up to it and no further.
fn is_grown(host: &Host, disk: &mut Disk, after: &str) -> Outcome {
    let context = |what: String| format!("after {after}: {what}\n{}", host.log());
    let sectors = disk.capacity_sectors()?;
    ensure(sectors == SECTORS[1], || {
        context(format!("{sectors} sectors"))
    })?;
    disk.read(0, SECTORS[1] - 8, 4096)
        .map_err(|error| context(error.to_string()))?;
    ensure(disk.read(0, SECTORS[1], 4096).is_err(), || {
        context("it reads behind its end".to_owned())
    })
}

fn one_at_a_time() -> Outcome {
    let pair = Pair::start()?;
    let options = Options::default();
    pair.held_by(false, false)?;
    let mut source = Disk::attach(&pair.source.socket("disk"), &options)?;
    source.write(0, 0, &[0x33; 4096])?;
    pair.held_by(true, false)?;
    // The other host's frontend starts its queue, and nothing of it is served.
    let mut target = Disk::attach(&pair.target.socket("disk"), &options)?;
    waits(&pair.target, true)?;
    let write = Request {
        kind: kind::OUT,
        sector: 0,
        segments: vec![(bulkhead_integration::disk::DATA, 4096)],
    };
    target
        .memory
        .fill(bulkhead_integration::disk::DATA, 4096, 0x44)?;
    target.push(0, 0, &write)?;
    target.publish(0)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure(target.rings[0].poll_used(&target.memory)?.is_none(), || {
        "two hosts serve one volume".to_owned()
    })?;
    ensure(source.read(0, 0, 4096)? == vec![0x33; 4096], || {
        "the other host has written".to_owned()
    })?;
    // A frontend that ends takes its host's hold along.
    drop(source);
    let used = target.rings[0].wait_used(&target.memory, Duration::from_secs(20))?;
    target.check(0, &write, used.len)?;
    pair.held_by(false, true)?;
    let mut source = Disk::attach(&pair.source.socket("disk"), &options)?;
    waits(&pair.source, true)?;
    // A data plane that dies does not: its successor goes on with it.
    pair.target.kill("dataplane")?;
    ensure(target.read(0, 0, 4096)? == vec![0x44; 4096], || {
        "the successor reads something else".to_owned()
    })?;
    waits(&pair.target, false)?;
    waits(&pair.source, true)?;
    drop(target);
    waits(&pair.source, false)?;
    ensure(source.read(0, 0, 4096)? == vec![0x44; 4096], || {
        "what the other host wrote is gone".to_owned()
    })?;
    Ok(())
}

fn waits(host: &Host, waits: bool) -> Result<(), HostError> {
    host.wait_until(&format!("it does not become so: waits {waits}"), |host| {
        host.status()
            .is_ok_and(|s| s["volumes"][0]["state"]["waits_for_volume"] == waits)
    })
}
