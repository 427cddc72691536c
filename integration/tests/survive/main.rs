//! `survive_*`: processes die under a verified load, and nothing is lost, done twice or disconnected. Each a few
//! times; `cargo xtask soak survive` does the same hundreds of times.

mod formats;
mod resume;
mod systemd;
mod upgrades;

use std::os::unix::fs::PermissionsExt as _;

use bulkhead_integration::host::own_uid;
use bulkhead_integration::survive::disk::Base;
use bulkhead_integration::survive::fleet::Scene;
use bulkhead_integration::survive::scenarios::{
    Reconnect, Row, deaths_of_rot, kills, kills_in_recovery, message_points, other_deaths,
    reconnects, request_points, slow_writes, successor_points,
};
use libtest_mimic::{Arguments, Failed, Trial};

/// A test.
struct Test {
    name: &'static str,
    /// It reaches into another process's memory.
    needs_root: bool,
    run: fn(&str) -> Row,
}

/// The data plane of a whole host dies; the connections of its frontends stay (T30 to T33).
const HOST: &[Test] = &[
    Test {
        name: "survive_kills_split",
        needs_root: false,
        run: |name| kills(name, &scene(false, true), 15),
    },
    Test {
        name: "survive_kills_packed",
        needs_root: false,
        run: |name| kills(name, &scene(true, false), 15),
    },
    Test {
        name: "survive_kills_in_recovery",
        needs_root: false,
        run: |name| kills_in_recovery(name, &scene(true, true), 10),
    },
    Test {
        name: "survive_points_of_a_request_split",
        needs_root: true,
        run: |name| request_points(name, &scene(false, false), 1),
    },
    Test {
        name: "survive_points_of_a_request_packed",
        needs_root: true,
        run: |name| request_points(name, &scene(true, true), 1),
    },
    Test {
        name: "survive_points_of_a_message",
        needs_root: true,
        run: |name| message_points(name, &scene(false, true), 1),
    },
    Test {
        name: "survive_points_of_a_successor",
        needs_root: true,
        run: |name| successor_points(name, &scene(true, true), 1),
    },
];

/// Others die, too.
const OTHERS: &[Test] = &[
    Test {
        name: "survive_no_in_flight_region",
        needs_root: false,
        run: |name| {
            let scene = Scene {
                inflight: false,
                message_every: 0,
                ..scene(false, true)
            };
            kills(name, &scene, 10)
        },
    },
    Test {
        name: "survive_deaths_of_keyd_agent_and_pairs",
        needs_root: false,
        run: |name| other_deaths(name, &scene(false, true), 6),
    },
    Test {
        name: "survive_deaths_of_rot",
        needs_root: false,
        run: |name| deaths_of_rot(name, &scene(false, true), 2),
    },
    Test {
        name: "survive_slow_writes",
        needs_root: false,
        run: |name| slow_writes(name, 4),
    },
];

/// What a frontend does whose back-end was lost together with the connection (T35).
const RECONNECTS: &[Test] = &[
    Test {
        name: "survive_reconnect_qemu",
        needs_root: false,
        run: |name| reconnects(name, reconnect(false, false, Base::Used), 10),
    },
    Test {
        name: "survive_reconnect_qemu_packed",
        needs_root: false,
        run: |name| reconnects(name, reconnect(true, false, Base::Used), 10),
    },
    Test {
        name: "survive_reconnect_cloud_hypervisor",
        needs_root: false,
        run: |name| reconnects(name, reconnect(false, false, Base::Avail), 10),
    },
    Test {
        name: "survive_reconnect_cloud_hypervisor_in_order",
        needs_root: false,
        run: |name| reconnects(name, reconnect(false, true, Base::InOrder), 10),
    },
];

fn scene(packed: bool, is_encrypted: bool) -> Scene {
    Scene {
        packed,
        data_unit: is_encrypted.then_some(4096),
        size: "2MiB",
        ..Scene::default()
    }
}

const fn reconnect(packed: bool, in_order: bool, base: Base) -> Reconnect {
    Reconnect {
        packed,
        in_order,
        base,
        is_encrypted: !packed,
    }
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    for test in [HOST, OTHERS, RECONNECTS].into_iter().flatten() {
        let (name, run) = (test.name, test.run);
        let skipped = test.needs_root && own_uid() != 0;
        if skipped {
            eprintln!("skipped: {name}: it needs root");
        }
        let trial = Trial::test(name, move || judge(&run(name)));
        trials.push(trial.with_ignored_flag(skipped));
    }
    for test in resume::TESTS.iter().chain(upgrades::TESTS) {
        let run = test.run;
        let trial = Trial::test(test.name, move || run().map_err(|e| e.to_string().into()));
        trials.push(trial);
    }
    let missing = formats::missing();
    for test in formats::TESTS {
        if let Some(reason) = &missing {
            eprintln!("skipped: {}: {reason}", test.name);
        }
        let run = test.run;
        let trial = Trial::test(test.name, move || run().map_err(|e| e.to_string().into()));
        trials.push(trial.with_ignored_flag(missing.is_some()));
    }
    let missing = systemd::missing();
    for test in systemd::TESTS {
        if let Some(reason) = missing {
            eprintln!("skipped: {}: {reason}", test.name);
        }
        let run = test.run;
        let trial = Trial::test(test.name, move || run().map_err(|e| e.to_string().into()));
        trials.push(trial.with_ignored_flag(missing.is_some()));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

fn judge(row: &Row) -> Result<(), Failed> {
    println!("{row}");
    if row.away.kills == 0 && row.is_good() {
        return Err("nothing died".into());
    }
    if row.is_good() {
        return Ok(());
    }
    Err(row.problems().into())
}

/// A folder that other users can come through.
fn folder() -> std::io::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}
