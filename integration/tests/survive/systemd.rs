//! The shipped unit under a real systemd: what rot stored outlives rot, and guests notice no more than a
//! pause (T40's last part).

use std::path::Path;

use bulkhead_integration::host::{BundleSpec, Host, SYSTEMD, VolumeSpec, own_binaries, own_uid};
use bulkhead_integration::processes::installed;

use crate::resume::{FILL, KINDS, Outcome, Test, load, unnoticed};

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
    host.apply(&envelope)?;
    let mut load = load(&host, &KINDS)?;
    // rot alone, what it started, and rot after it was replaced in place.
    for (round, victim) in ["rot", "dataplane", "rot", "keyd", "rot"]
        .into_iter()
        .enumerate()
    {
        if round == 2 {
            let said = host.upgrade("rot", 1)?;
            assert_eq!(said, "upgraded rot to version 1\n");
        }
        let killed = container
            .kill(victim)
            .map_err(|e| format!("{victim}: {e}\n--- log:\n{}", host.log()))?;
        if victim != "keyd" {
            load.killed(killed);
            load.wait_back(FILL)
                .map_err(|e| format!("{victim}: {e}\n--- log:\n{}", host.log()))?;
        }
        host.wait_until("the agent is there again and all is served", |host| {
            host.status().is_ok_and(|status| {
                let attached = |n: usize| status["volumes"][n]["state"]["attached"] == true;
                (0..KINDS.len()).all(attached)
            })
        })?;
    }
    unnoticed(load, &host)
}
