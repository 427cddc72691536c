//! The shipped unit under a real systemd: what rot stored outlives rot, and guests notice no more than a
//! pause (T40's last part).

use std::path::Path;
use std::time::Duration;

use bulkhead_integration::host::{BundleSpec, Host, SYSTEMD, VolumeSpec, own_binaries, own_uid};
use bulkhead_integration::processes::installed;

use crate::resume::{FILL, KINDS, Outcome, Test, load_with, unnoticed};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "survive_rot_killed_under_systemd",
    run: rot_killed,
}];

/// Why they can't run on this machine.
pub fn missing() -> Option<&'static str> {
    if own_uid() != 0 {
        return Some("a container needs root");
    }
    if installed("unshare").is_none() || !Path::new(SYSTEMD).is_file() {
        return Some("systemd or unshare is not installed");
    }
    None
}

/// How long descriptors may be on their way from the data plane through rot to systemd.
const STORED_WITHIN: Duration = Duration::from_millis(200);
/// What a data plane says of a volume whose descriptors were on that way when rot died.
const NOT_STORED: &str = "is not stored";

/// What is on its way to systemd when rot dies is lost, with its connection: no finding on a machine that is
/// as slow as that.
fn too_early(host: &Host, problem: &str) -> Outcome {
    if host.log().contains(NOT_STORED) {
        eprintln!("rot was killed before systemd had everything: {problem}");
        return Ok(());
    }
    Err(format!("{problem}\n--- log:\n{}", host.log()).into())
}

fn rot_killed() -> Outcome {
    let dir = crate::folder()?;
    let bin_dir = own_binaries(dir.path())?;
    let mut host = Host::create_with(dir.path(), &bin_dir)?;
    let names: Vec<String> = (0..KINDS.len()).map(|n| format!("disk{n}")).collect();
    for (name, (data_unit, ..)) in names.iter().zip(KINDS) {
        host.create_volume(&VolumeSpec {
            data_unit,
            queues: 2,
            ..VolumeSpec::new(name, "4MiB", 4096)
        })?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let envelope = host.sign(&BundleSpec::new(1, &names))?;
    let container = host.start_under_systemd()?;
    host.apply(&envelope)
        .map_err(|e| format!("{e}\n--- log:\n{}", host.log()))?;
    // No messages: a descriptor that is on its way to systemd when rot dies is lost with its connection.
    let mut load = load_with(&host, &KINDS, |spec| spec.habits.message_every = 0)?;
    // rot alone, what it started, and rot after everything was upgraded.
    for (round, victim) in ["rot", "dataplane", "rot", "keyd", "rot"]
        .into_iter()
        .enumerate()
    {
        if round == 2 {
            for program in ["rot", "dataplane", "keyd", "agent"] {
                let said = host
                    .upgrade(program, 1)
                    .map_err(|e| format!("{e}\n--- log:\n{}", host.log()))?;
                assert_eq!(said, format!("upgraded {program} to version 1\n"));
            }
        }
        let answered = |host: &Host| host.log().matches("grants answered").count();
        let before = answered(&host);
        let killed = container
            .kill(victim)
            .map_err(|e| format!("{victim}: {e}\n--- log:\n{}", host.log()))?;
        if victim != "keyd" {
            load.killed(killed);
            if let Err(error) = load.wait_back(FILL) {
                return too_early(&host, &format!("{victim}: {error}"));
            }
        }
        // Each volume's key is stored anew then.
        host.wait_until("keyd has granted again", |host| answered(host) > before)?;
        std::thread::sleep(STORED_WITHIN);
    }
    if host.log().contains(NOT_STORED) {
        return too_early(&host, "a connection is lost");
    }
    unnoticed(load, &host)
}
