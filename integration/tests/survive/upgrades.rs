//! Every program of a host is upgraded under a verified load: no frontend notices, whatever fails is undone,
//! and nothing older or tampered with ever runs.

use std::time::{Duration, Instant};

use bulkhead_integration::host::{Host, HostError, own_binaries};
use bulkhead_integration::random::Random;
use bulkhead_integration::survive::kills::{Child, Victim as _, kill_pid};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::resume::{FILL, KINDS, Outcome, Test, load, started, unnoticed};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "survive_upgrades_of_keyd_agent_and_rot",
        run: beside_the_data_plane,
    },
    Test {
        name: "survive_upgrades_of_the_data_plane",
        run: of_the_data_plane,
    },
    Test {
        name: "survive_upgrades_that_come_to_nothing",
        run: aborted,
    },
    Test {
        name: "survive_upgrade_of_a_data_plane_that_stands_still",
        run: stopped,
    },
    Test {
        name: "survive_refused_releases",
        run: refused,
    },
];

fn host(dir: &std::path::Path) -> Result<Host, Box<dyn std::error::Error>> {
    let bin_dir = own_binaries(dir)?;
    started(Host::create_with(dir, &bin_dir)?, &KINDS)
}

/// What the status says of a program.
fn runs(host: &Host, program: &str) -> Result<serde_json::Value, HostError> {
    let status = host.status()?;
    let programs = status["programs"].as_array().cloned().unwrap_or_default();
    let found = programs.into_iter().find(|p| p["program"] == program);
    Ok(found.unwrap_or_default())
}

/// Whether every volume is served, and nothing is left to do.
pub fn settled(host: &Host) -> bool {
    let status = host.status();
    status.is_ok_and(|status| {
        let attached = |n: usize| status["volumes"][n]["state"]["attached"] == true;
        (0..KINDS.len()).all(attached) && status["pending"] == serde_json::json!([])
    })
}

fn beside_the_data_plane() -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path())?;
    let mut load = load(&host, &KINDS)?;
    let (data_plane, rot) = (host.process("dataplane")?, host.rot_pid());
    for version in 1..=2 {
        for program in ["keyd", "agent", "rot"] {
            let said = host
                .upgrade(program, version)
                .map_err(|e| format!("{program}: {e}\n--- log:\n{}", host.log()))?;
            assert_eq!(said, format!("upgraded {program} to version {version}\n"));
            let runs = runs(&host, program)?;
            assert_eq!(runs["release"], version, "{runs}");
            host.wait_until("all agree again", settled)?;
        }
    }
    assert_eq!(host.process("dataplane")?, data_plane, "nobody touched it");
    assert_eq!(host.rot_pid(), rot, "in place");
    // A data plane that dies now is followed by the upgraded rot, with all that was stored.
    load.killed(Child::data_plane(&host).kill()?);
    load.wait_back(FILL)?;
    host.wait_until("all agree again", settled)?;
    unnoticed(load, &host)
}

/// The process id of the data plane.
pub fn data_plane(host: &Host) -> Result<u32, Box<dyn std::error::Error>> {
    let status = host.status()?;
    let processes = status["processes"].as_array().cloned();
    let mut processes = processes.into_iter().flatten();
    let found = processes.find(|process| process["role"] == "dataplane");
    let pid = found.and_then(|process| u32::try_from(process["pid"].as_u64()?).ok());
    Ok(pid.ok_or("the status has no data plane")?)
}

/// Live, under load: each time another process serves, and then one that died is followed as ever.
fn of_the_data_plane() -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path())?;
    let mut load = load(&host, &KINDS)?;
    for version in 1..=5 {
        let before = data_plane(&host)?;
        let said = host
            .upgrade("dataplane", version)
            .map_err(|e| format!("{e}\n--- log:\n{}", host.log()))?;
        assert_eq!(said, format!("upgraded dataplane to version {version}\n"));
        assert_eq!(runs(&host, "dataplane")?["release"], version);
        assert_ne!(data_plane(&host)?, before, "another process serves");
        host.wait_until("all agree again", settled)?;
    }
    load.killed(kill_pid(data_plane(&host)?)?);
    load.wait_back(FILL)?;
    host.wait_until("all agree again", settled)?;
    unnoticed(load, &host)
}

/// The process that rot has started beside the data plane.
fn candidate(host: &Host, data_plane: u32) -> Option<Pid> {
    let rot = host.rot_pid();
    let children = std::fs::read_to_string(format!("/proc/{rot}/task/{rot}/children")).ok()?;
    let is_it = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(b"bulkhead-dataplane\0") && u32::try_from(*pid) != Ok(data_plane)
    };
    let mut children = children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok());
    children.find(is_it).map(Pid::from_raw)
}

/// The candidate is killed at any moment: the old one goes on, or the old binary does, and an upgrade
/// that got through stays (T38).
fn aborted() -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path())?;
    let mut load = load(&host, &KINDS)?;
    let mut random = Random::named("aborted upgrades");
    let wanted = match std::env::var_os("BULKHEAD_SOAK") {
        Some(_) => 200,
        None => 6,
    };
    // Those that ended the candidate before it took over, and after.
    let (mut before, mut after, mut version) = (0, 0, 0);
    while before + after < wanted {
        version += 1;
        if version == 10 * wanted {
            return Err("hardly one candidate was hit".into());
        }
        host.install("dataplane", version)?;
        let statement = host.release("dataplane", version)?;
        let (data_plane, _) = host.process("dataplane")?;
        let upgraded = std::thread::scope(|scope| -> Result<_, Box<dyn std::error::Error>> {
            let upgrade = scope.spawn(|| host.upgrade_to(&statement));
            let candidate = loop {
                match candidate(&host, data_plane) {
                    Some(pid) => break Some(pid),
                    None if upgrade.is_finished() => break None,
                    None => std::thread::yield_now(),
                }
            };
            std::thread::sleep(Duration::from_micros(random.below(70_000)));
            if let Some(pid) = candidate {
                let at = Instant::now();
                // It may have ended already.
                if kill(pid, Signal::SIGKILL).is_ok() {
                    load.killed(at);
                }
            }
            Ok(upgrade.join().map_err(|_| "the upgrade panicked")?)
        })?;
        if let Err(HostError::Command { reason, .. }) = &upgraded {
            let took_over = reason.contains("the old one is started");
            *(if took_over { &mut after } else { &mut before }) += 1;
        }
        load.wait_back(FILL)
            .map_err(|e| format!("{upgraded:?} {e}\n--- log:\n{}", host.log()))?;
        host.wait_until("all agree again", settled)?;
    }
    println!("{version} upgrades: {before} ended before Go, {after} after it");
    host.upgrade("dataplane", version + 1)?;
    unnoticed(load, &host)
}

/// A data plane that does not freeze in time is left to itself, and serves as soon as it can.
fn stopped() -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path())?;
    let load = load(&host, &KINDS)?;
    host.install("dataplane", 1)?;
    let statement = host.release("dataplane", 1)?;
    let pid = Pid::from_raw(i32::try_from(data_plane(&host)?)?);
    kill(pid, Signal::SIGSTOP)?;
    let refused = host.upgrade_to(&statement);
    kill(pid, Signal::SIGCONT)?;
    is_refused(refused, "did not freeze in time");
    host.wait_until("all agree again", settled)?;
    assert_eq!(data_plane(&host)?, u32::try_from(pid.as_raw())?);
    host.upgrade_to(&statement)?;
    assert_ne!(data_plane(&host)?, u32::try_from(pid.as_raw())?);
    unnoticed(load, &host)
}

#[track_caller]
fn is_refused(upgraded: Result<String, HostError>, why: &str) {
    match upgraded {
        Err(HostError::Command { reason, .. }) => assert!(reason.contains(why), "{reason}"),
        other => panic!("not refused: {other:?}"),
    }
}

fn refused() -> Outcome {
    let dir = crate::folder()?;
    let host = host(dir.path())?;
    for program in ["keyd", "agent", "rot", "dataplane"] {
        host.install(program, 1)?;
        let first = host.release(program, 1)?;
        let processes = host.status()?["processes"].clone();
        // Something else was installed than was signed.
        host.install(program, 2)?;
        is_refused(host.upgrade_to(&first), "is not what was released");
        // The statement was changed.
        let mut bytes = std::fs::read(host.path(&first))?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(host.path("changed.release"), bytes)?;
        is_refused(host.upgrade_to("changed.release"), "signature");
        assert_eq!(host.status()?["processes"], processes);
    }
    // Older than what runs.
    host.upgrade("keyd", 7)?;
    host.install("keyd", 6)?;
    let older = host.release("keyd", 6)?;
    is_refused(host.upgrade_to(&older), "older than 7");
    host.kill("keyd")?;
    host.wait_until("all agree again", settled)?;
    is_refused(host.upgrade_to(&older), "older than 7");
    assert_eq!(runs(&host, "keyd")?["release"], 7);
    Ok(())
}
