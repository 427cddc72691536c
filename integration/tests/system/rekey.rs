//! A volume's key takes the place of another while it is served: a guest verifies its data all the while,
//! the data plane is killed in the middle, and afterwards the new key reads the file and the old one does
//! not; and two hosts share the work.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_integration::disk::{Disk, Options};
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::host::{BundleSpec, Host, HostError, VolumeSpec};
use bulkhead_integration::random::{STAMP_BLOCK, stamp};
use serde_json::Value;

use crate::migration::Pair;
use crate::rekey_dmcrypt::begin;
use crate::support::{Outcome, boot, ensure, folder, guest_io};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_rekey_under_a_guest_512",
        needs: &[Need::Guest],
        run: || under_a_guest(512),
    },
    Test {
        name: "system_rekey_under_a_guest_4096",
        needs: &[Need::Guest],
        run: || under_a_guest(4096),
    },
    Test {
        name: "system_rekey_by_two_hosts",
        needs: &[],
        run: by_two_hosts,
    },
];

const MIB: usize = 1 << 20;
/// Of the volume under a guest.
const SIZE: usize = 64 * MIB;
/// Where the pattern begins: below it `guest-io rounds` reads and writes.
const PATTERN_AT: usize = 8 * MIB;
const SEED: u64 = 77;
/// How long a re-key, or some rounds of a guest's work, may take.
const PATIENCE: Duration = Duration::from_secs(150);

fn under_a_guest(data_unit: u32) -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    let mut spec = VolumeSpec::new("disk", &format!("{}MiB", SIZE / MIB), data_unit);
    spec.more = vec!["--discard".to_owned(), "pass".to_owned()];
    host.create_volume(&spec)?;
    host.start()?;
    apply(&host, &BundleSpec::new(1, &["disk"]))?;
    let length = SIZE - PATTERN_AT;
    let fill = format!(
        "guest-io fill /dev/vda {PATTERN_AT} {length} {SEED}\necho filled=yes\nguest-io rounds /dev/vda"
    );
    let mut first = guest(&host, &fill)?;
    first.wait_for("round=1", BOOT_PATIENCE + PATIENCE)?;
    begin(&host, &host, "state/host.pub")?;
    apply(&host, &BundleSpec::new(2, &["rekeyed"]))?;
    let so_far = advances_beyond(&host, 0)?;
    let finished = BundleSpec::new(3, &["finished"]);
    refused(&host, &host.sign(&finished)?, "is not done")?;
    // The guest is gone, and then its data plane: the next ones go on where it was.
    drop(first);
    host.kill("dataplane")?;
    settled(&host)?;
    let expect = format!(
        "guest-io expect /dev/vda {PATTERN_AT} {length} {SEED}\necho expected=yes\nguest-io rounds /dev/vda"
    );
    let mut second = guest(&host, &expect)?;
    second.wait_for("expected=yes", BOOT_PATIENCE + PATIENCE)?;
    done(&host, so_far)?;
    goes_on(&mut second, &host)?;
    // Done, and not finished: the key of before is of no use any more.
    reads(&host, "rekeyed", true)?;
    apply(&host, &finished)?;
    ensure(rekey_of(&host)?.is_null(), || {
        "it still has a re-key".to_owned()
    })?;
    goes_on(&mut second, &host)?;
    drop(second);
    reads(&host, "finished", true)?;
    reads(&host, "disk", false)
}

/// A re-key begins on one host and is done on the other; each takes it up from the record in the file.
fn by_two_hosts() -> Outcome {
    let pair = Pair::start()?;
    let options = Options::default();
    let mut source = Disk::attach(&pair.source.socket("disk"), &options)?;
    let sectors = source.capacity_sectors()?;
    let mut bytes = vec![0; usize::try_from(sectors * 512)?];
    stamp(&mut bytes, 0, SEED);
    for (at, part) in (0..).step_by(2048).zip(bytes.chunks(MIB)) {
        source.write(0, at, part)?;
    }
    fs::copy(pair.source.path("both.toml"), pair.source.path("disk.toml"))?;
    let other = pair.target.path("state/host.pub").display().to_string();
    begin(&pair.source, &pair.source, &other)?;
    for (host, name) in [(&pair.source, "host-1"), (&pair.target, "host-2")] {
        for stanza in ["rekeyed.toml", "finished.toml"] {
            if name == "host-2" {
                fs::copy(pair.source.path(stanza), host.path(stanza))?;
            }
        }
        let rekeyed = BundleSpec::new(2, &["rekeyed"]);
        apply(
            host,
            &BundleSpec {
                host: name,
                ..rekeyed
            },
        )?;
    }
    // Only where it is held does it advance.
    let so_far = advances_beyond(&pair.source, 0)?;
    drop(source);
    pair.held_by(false, false)?;
    let mut target = Disk::attach(&pair.target.socket("disk"), &options)?;
    done(&pair.target, so_far)?;
    ensure(target.read_all(sectors)? == bytes, || {
        "the target reads something else".to_owned()
    })?;
    // What the source knows is old; its bundle is held against the file.
    for (host, name) in [(&pair.target, "host-2"), (&pair.source, "host-1")] {
        let finished = BundleSpec::new(3, &["finished"]);
        apply(
            host,
            &BundleSpec {
                host: name,
                ..finished
            },
        )?;
    }
    ensure(target.read_all(sectors)? == bytes, || {
        "the target reads something else when it is finished".to_owned()
    })?;
    drop(target);
    let mut source = Disk::attach(&pair.source.socket("disk"), &options)?;
    ensure(source.read_all(sectors)? == bytes, || {
        "the source reads something else when it is finished".to_owned()
    })
}

fn guest(host: &Host, script: &str) -> Result<Guest, Box<dyn std::error::Error>> {
    let disks = [GuestDisk::VhostUser {
        socket: host.socket("disk"),
        queues: 1,
        packed: false,
        platform: false,
    }];
    let spec = GuestSpec {
        dir: host.dir(),
        disks: &disks,
        script,
        programs: &[],
        files: &[guest_io()?],
        modules: &[],
        uid: None,
        machine: Machine::default(),
    };
    Ok(Guest::start(&boot()?, &spec)?)
}

/// Applies a bundle, of which nothing may be left to do.
fn apply(host: &Host, bundle: &BundleSpec<'_>) -> Outcome {
    let envelope = host.sign(bundle)?;
    let applied = host.apply(&envelope).map(drop);
    let pending = |error| {
        let status = host.status().unwrap_or_default();
        format!("{error}\n{}\n{}", status["pending"], host.log())
    };
    Ok(applied.map_err(pending)?)
}

/// What the status says of the volume's re-key.
fn rekey_of(host: &Host) -> Result<Value, HostError> {
    Ok(host.status()?["volumes"][0]["state"]["rekey"].clone())
}

fn done_bytes(rekey: &Value) -> u64 {
    rekey["done_bytes"].as_u64().unwrap_or(0)
}

/// Waits until the re-key has come further than this, and not to its end.
fn advances_beyond(host: &Host, bytes: u64) -> Result<u64, Box<dyn std::error::Error>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let rekey = rekey_of(host)?;
        if done_bytes(&rekey) > bytes {
            ensure(rekey["state"] == "running", || {
                format!("it is not under way: {rekey}\n{}", host.log())
            })?;
            return Ok(done_bytes(&rekey));
        }
        ensure(Instant::now() < deadline, || {
            format!("it does not advance: {rekey}\n{}", host.log())
        })?;
    }
}

/// Waits until it is done; it never falls back behind what was seen before.
fn done(host: &Host, so_far: u64) -> Outcome {
    let (deadline, mut so_far) = (Instant::now() + PATIENCE, so_far);
    loop {
        let rekey = rekey_of(host)?;
        if rekey["state"] == "done" {
            return Ok(());
        }
        if rekey["state"] == "running" {
            let now = done_bytes(&rekey);
            ensure(now >= so_far, || {
                format!("it fell back from {so_far}: {rekey}")
            })?;
            so_far = now;
        }
        ensure(Instant::now() < deadline, || {
            format!("it is never done: {rekey}\n{}", host.log())
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The bundle is refused, by a dry run as well.
fn refused(host: &Host, envelope: &str, because: &str) -> Outcome {
    for arguments in [
        vec!["apply", envelope, "--admin", "run/admin.sock", "--dry-run"],
        vec!["apply", envelope, "--admin", "run/admin.sock"],
    ] {
        match host.cli(&arguments) {
            Err(HostError::Command { reason, .. }) if reason.contains(because) => {}
            other => return Err(format!("not refused because {because:?}: {other:?}").into()),
        }
    }
    Ok(())
}

fn settled(host: &Host) -> Result<(), HostError> {
    host.wait_until("the host is not what its bundle says", |host| {
        host.status().is_ok_and(|status| {
            status["pending"] == serde_json::json!([])
                && status["volumes"][0]["state"]["attached"] == true
        })
    })
}

/// Some more rounds of verified I/O.
fn goes_on(guest: &mut Guest, host: &Host) -> Outcome {
    let rounds = |guest: &Guest| {
        let round = guest.value("round").and_then(|round| round.parse().ok());
        round.unwrap_or(0_u64)
    };
    let (first, deadline) = (rounds(guest), Instant::now() + PATIENCE);
    while rounds(guest) < first + 3 {
        let failed = guest.console().contains("guest-io-failed=");
        ensure(!failed && Instant::now() < deadline, || {
            format!(
                "the guest does not go on: {}\n{}",
                guest.console(),
                host.log()
            )
        })?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Whether an export with this stanza's keys has the pattern.
fn reads(host: &Host, stanza: &str, right: bool) -> Outcome {
    let image = host.image("disk").display().to_string();
    let bundle = format!("{stanza}.toml");
    host.cli(&[
        "volume",
        "export",
        "--bundle",
        &bundle,
        "--volume",
        "disk",
        "--recovery",
        "keys/recovery.key",
        "--file",
        &image,
        "--out",
        "raw",
        "--force",
    ])?;
    let raw = fs::read(host.path("raw"))?;
    let mut expected = vec![0; SIZE - PATTERN_AT];
    stamp(&mut expected, PATTERN_AT / STAMP_BLOCK, SEED);
    let blocks = raw[PATTERN_AT..].chunks(STAMP_BLOCK);
    let same = blocks
        .zip(expected.chunks(STAMP_BLOCK))
        .filter(|(a, b)| a == b);
    let wanted = if right {
        expected.len() / STAMP_BLOCK
    } else {
        0
    };
    let same = same.count();
    ensure(raw.len() == SIZE && same == wanted, || {
        format!("{same} blocks are right with {stanza}, and not {wanted}")
    })
}
