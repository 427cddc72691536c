//! The processes of a whole host are killed under a verified load: the data plane, whose successor goes on with the
//! frontends' connections, the others, and the data plane with one of them. No frontend connects again.

use std::path::Path;
use std::time::Duration;

use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use bulkhead_integration::random::Random;
use bulkhead_integration::survive::disk::DiskSpec;
use bulkhead_integration::survive::kills::{Child, Plan, Victim as _, kill_often};
use bulkhead_integration::survive::load::{Load, LoadSpec};
use bulkhead_integration::survive::scenarios::explained;

/// How a test ends.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A test.
pub struct Test {
    pub name: &'static str,
    pub run: fn() -> Outcome,
}

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "survive_data_plane_killed_and_no_frontend_notices",
        run: || data_plane_killed(6),
    },
    Test {
        name: "survive_each_process_killed_alone_and_with_the_data_plane",
        run: each_killed,
    },
];

/// How long a load may take to write everything once.
pub const FILL: Duration = Duration::from_secs(60);

/// A disk of a host: its data unit (none: plain), packed rings, whether its frontend keeps an in-flight region.
pub type Kind = (Option<u32>, bool, bool);

/// Encrypted and plain, split and packed, with the frontend's region and with the data plane's own.
pub const KINDS: [Kind; 3] = [
    (Some(4096), false, true),
    (None, true, true),
    (Some(4096), true, false),
];

fn host(dir: &Path, kinds: &[Kind]) -> Result<Host, Box<dyn std::error::Error>> {
    started(Host::create(dir)?, kinds)
}

/// Starts a host that has these disks.
pub fn started(mut host: Host, kinds: &[Kind]) -> Result<Host, Box<dyn std::error::Error>> {
    let names: Vec<String> = (0..kinds.len()).map(|n| format!("disk{n}")).collect();
    for (name, (data_unit, ..)) in names.iter().zip(kinds) {
        host.create_volume(&VolumeSpec {
            data_unit: *data_unit,
            queues: 2,
            ..VolumeSpec::new(name, "4MiB", 4096)
        })?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let envelope = host.sign(&BundleSpec::new(1, &names))?;
    host.start()?;
    host.apply(&envelope)?;
    Ok(host)
}

pub fn load(host: &Host, kinds: &[Kind]) -> Result<Load, Box<dyn std::error::Error>> {
    load_with(host, kinds, |_| ())
}

/// A load that does something else than usual.
pub fn load_with(
    host: &Host,
    kinds: &[Kind],
    change: impl FnOnce(&mut LoadSpec),
) -> Result<Load, Box<dyn std::error::Error>> {
    let disk = |(at, kind): (usize, &Kind)| DiskSpec {
        queues: 2,
        packed: kind.1,
        inflight: kind.2,
        ..DiskSpec::new(host.socket(&format!("disk{at}")))
    };
    let disks = kinds.iter().enumerate().map(disk).collect();
    let mut spec = LoadSpec::new(disks, 1);
    change(&mut spec);
    let mut load = Load::start(&spec)?;
    load.wait_filled(FILL)?;
    Ok(load)
}

/// Nothing is wrong, and no frontend had to connect again.
pub fn unnoticed(load: Load, host: &Host) -> Outcome {
    let report = load.finish();
    println!("{report:?}");
    let (problems, log) = (report.problems(), host.log());
    // But for the window in which nobody can know whether a reply was sent.
    if report.findings.is_empty() && report.disconnects == explained(&log) {
        return Ok(());
    }
    Err(format!(
        "{} disconnects; {problems}\n--- log:\n{log}",
        report.disconnects
    )
    .into())
}

fn data_plane_killed(kills: u32) -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path(), &KINDS)?;
    let mut load = load(&host, &KINDS)?;
    let plan = Plan {
        kills,
        pause_ms: 300,
        again: None,
    };
    let mut random = Random::named("resume");
    let times = kill_often(&mut Child::data_plane(&host), &mut load, &plan, &mut random);
    let times = times.map_err(|e| format!("{e}\n--- log:\n{}", host.log()))?;
    println!("{times:?}");
    unnoticed(load, &host)
}

/// Each alone while the data plane serves, then with the data plane: at once, before, and after it.
fn each_killed() -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path(), &KINDS)?;
    let mut load = load(&host, &KINDS)?;
    for role in ["keyd", "agent"] {
        host.kill(role)?;
        let mut data_plane = Child::data_plane(&host);
        load.killed(data_plane.kill()?);
        load.wait_back(FILL)?;
        let settled = |host: &Host| {
            let status = host.status();
            status.is_ok_and(|s| {
                (0..KINDS.len()).all(|n| s["volumes"][n]["state"]["attached"] == true)
            })
        };
        host.wait_until("all are there again and agree", settled)?;
        load.killed(Child::data_plane(&host).kill()?);
        host.kill(role)?;
        load.wait_back(FILL)?;
        host.wait_until("all are there again and agree", settled)?;
    }
    unnoticed(load, &host)
}
