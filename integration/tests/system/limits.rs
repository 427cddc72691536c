//! A signed bundle limits volumes: a guest measures it, a later bundle changes it beneath the guest, and volumes
//! share what their group may do.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_integration::disk::{DATA, Disk, Options, Request};
use bulkhead_integration::driver::kind;
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};

use crate::support::{Outcome, boot, ensure, folder, guest_io};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_limits_of_a_volume_and_a_group_under_a_guest",
        needs: &[Need::Guest],
        run: under_a_guest,
    },
    Test {
        name: "system_limits_are_lifted_beneath_waiting_requests",
        needs: &[],
        run: lifted,
    },
];

/// How long it may take until a guest's rate is what it has to be; a guest on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long a rate is measured.
const WINDOW: Duration = Duration::from_secs(2);
const DISKS: [&str; 2] = ["a", "b"];

/// Sets the lines about limits of a volume's stanza.
fn limit(host: &Host, volume: &str, lines: &str) -> Outcome {
    let path = host.path(&format!("{volume}.toml"));
    let stanza = fs::read_to_string(&path)?;
    let ours = |line: &&str| !line.starts_with("limits = ") && !line.starts_with("group = ");
    let kept: Vec<&str> = stanza.lines().filter(ours).collect();
    let whole = kept.join("\n");
    // In front of the keys, which are tables of their own.
    let at = whole
        .find("\n\n[[volume.sealed_key]]")
        .unwrap_or(whole.len());
    let (fields, keys) = whole.split_at(at);
    fs::write(path, format!("{fields}\n{lines}\n{keys}\n"))?;
    Ok(())
}

fn apply(
    host: &Host,
    epoch: u64,
    volumes: &[&str],
    more: &str,
) -> Result<String, Box<dyn std::error::Error>> {
    let spec = BundleSpec {
        more,
        ..BundleSpec::new(epoch, volumes)
    };
    Ok(host.apply(&host.sign(&spec)?)?)
}

/// Requests a second that a guest's disk had.
fn rate(guest: &Guest, disk: &str) -> f64 {
    let count = || guest.value(disk).and_then(|v| v.parse::<u32>().ok());
    let (before, began) = (count(), Instant::now());
    std::thread::sleep(WINDOW);
    let passed = count().zip(before).map_or(0, |(now, then)| now - then);
    f64::from(passed) / began.elapsed().as_secs_f64()
}

/// Waits until both disks have about so many requests a second. A guest that says its count ten times a second
/// is off by a twentieth of what it is in two seconds.
fn have(host: &Host, guest: &Guest, wanted: [f64; 2]) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let rates = std::thread::scope(|scope| {
            let started = DISKS.map(|disk| scope.spawn(move || rate(guest, disk)));
            started.map(|thread| thread.join().unwrap_or_default())
        });
        eprintln!("requests a second: {rates:.0?}, wanted {wanted:.0?}");
        let near = |(rate, wanted): (&f64, &f64)| (rate / wanted - 1.0).abs() < 0.12;
        if rates.iter().zip(&wanted).all(near) {
            return Ok(());
        }
        ensure(Instant::now() < deadline, || {
            format!(
                "{rates:?} requests a second, and not {wanted:?}:\n{}\n{}",
                guest.console(),
                host.log()
            )
        })?;
    }
}

fn under_a_guest() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    for name in DISKS {
        host.create_volume(&VolumeSpec::new(name, "16MiB", 4096))?;
    }
    limit(
        &host,
        "a",
        "limits = { requests = 100, requests_burst = 10 }",
    )?;
    limit(
        &host,
        "b",
        "limits = { bandwidth = \"256KiB\", bandwidth_burst = \"16KiB\" }",
    )?;
    host.start()?;
    apply(&host, 1, &DISKS, "")?;
    let disk = |name| GuestDisk::VhostUser {
        socket: host.socket(name),
        queues: 1,
        packed: false,
        platform: false,
    };
    let guest = Guest::start(
        &boot()?,
        &GuestSpec {
            dir: dir.path(),
            disks: &DISKS.map(disk),
            script: "guest-io reads /dev/vda a &\nguest-io reads /dev/vdb b",
            programs: &[],
            files: &[guest_io()?],
            modules: &[],
            uid: None,
            machine: Machine::default(),
        },
    )?;
    let mut guest = guest;
    guest.wait_for("b=", BOOT_PATIENCE)?;
    // 256 KiB are 64 blocks.
    have(&host, &guest, [100.0, 64.0])?;
    limit(
        &host,
        "a",
        "limits = { requests = 220, requests_burst = 10 }",
    )?;
    let said = apply(&host, 2, &DISKS, "")?;
    ensure(
        said.contains("volume a: limits 220 requests/s (burst 10); its frontend stays"),
        || said,
    )?;
    have(&host, &guest, [220.0, 64.0])?;
    // Together they may do less than either wants.
    limit(&host, "a", "group = \"both\"")?;
    limit(&host, "b", "group = \"both\"")?;
    let group = "[[group]]\nname = \"both\"\nlimits = { requests = 160, requests_burst = 10 }\n";
    apply(&host, 3, &DISKS, group)?;
    have(&host, &guest, [80.0, 80.0])?;
    // And one of them by itself no more than this: the other has the rest.
    limit(
        &host,
        "b",
        "limits = { requests = 30, requests_burst = 5 }\ngroup = \"both\"",
    )?;
    apply(&host, 4, &DISKS, group)?;
    have(&host, &guest, [130.0, 30.0])?;
    undisturbed(&host)
}

/// Nobody was detached, and the status says what is limited.
fn undisturbed(host: &Host) -> Outcome {
    let status = host.status()?;
    for volume in 0..2 {
        ensure(
            status["volumes"][volume]["state"]["connected"] == true,
            || format!("{status}"),
        )?;
        ensure(status["volumes"][volume]["group"] == "both", || {
            format!("{status}")
        })?;
    }
    let limited = &status["volumes"][1]["limits"]["requests"]["per_second"];
    ensure(limited == 30, || format!("{status}"))?;
    let of_group = &status["groups"][0]["limits"]["requests"]["burst"];
    ensure(of_group == 10, || format!("{status}"))?;
    ensure(!host.log().contains("volume detached"), || host.log())
}

/// Requests of a volume that would take two minutes, and a bundle that lets them go.
fn lifted() -> Outcome {
    const REQUESTS: u16 = 8;
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    let mut spec = VolumeSpec::new("disk", "4MiB", 4096);
    spec.more = ["--bandwidth", "64KiB", "--bandwidth-burst", "1"]
        .map(str::to_owned)
        .to_vec();
    host.create_volume(&spec)?;
    host.start()?;
    apply(&host, 1, &["disk"], "")?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    let read = Request {
        kind: kind::IN,
        sector: 0,
        segments: vec![(DATA, 1 << 20)],
    };
    for slot in 0..REQUESTS {
        disk.push(0, slot, &read)?;
    }
    disk.publish(0)?;
    std::thread::sleep(Duration::from_millis(500));
    let mut done = 0;
    while disk.rings[0].poll_used(&disk.memory)?.is_some() {
        done += 1;
    }
    ensure(done < REQUESTS / 2, || format!("{done} requests at once"))?;
    limit(&host, "disk", "")?;
    apply(&host, 2, &["disk"], "")?;
    let lifted = Instant::now();
    while done < REQUESTS {
        disk.rings[0].wait_used(&disk.memory, Duration::from_secs(20))?;
        done += 1;
    }
    let took = lifted.elapsed();
    eprintln!("the requests that waited ended {took:?} after the limit was lifted");
    ensure(took < Duration::from_secs(30), || {
        format!("the limit was lifted, and it took {took:?}\n{}", host.log())
    })
}
