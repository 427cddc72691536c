//! `survive_*`: processes die under a verified load, and nothing is lost, done twice or disconnected. Each a few
//! times; `cargo xtask soak survive` does the same hundreds of times.

mod formats;
mod nics;
mod outside;
mod rekey;
mod resume;
mod systemd;
mod upgrades;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use bulkhead_integration::host::own_uid;
use bulkhead_integration::survive::aside::a_volume_that_kills;
use bulkhead_integration::survive::disk::Base;
use bulkhead_integration::survive::fleet::Scene;
use bulkhead_integration::survive::guest;
use bulkhead_integration::survive::mixed::mixed;
use bulkhead_integration::survive::scenarios::{
    Reconnect, Row, deaths_of_rot, kills, kills_in_recovery, message_points, other_deaths,
    reconnects, request_points, slow_writes, successor_points,
};
use libtest_mimic::{Arguments, Failed, Trial};

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Nothing,
    /// To be root: it reaches into another process's memory.
    Root,
    /// QEMU, busybox and a kernel.
    Guest,
}

impl Need {
    /// Why it is not met, if it is not.
    fn missing(self) -> Option<String> {
        match self {
            Self::Nothing => None,
            Self::Root => (own_uid() != 0).then(|| "it needs root".to_owned()),
            Self::Guest => guest::missing(),
        }
    }
}

/// A test.
struct Test {
    name: &'static str,
    needs: Need,
    run: fn(&str) -> Row,
}

/// The data plane of a whole host dies; the connections of its frontends stay (T30 to T33).
const HOST: &[Test] = &[
    Test {
        name: "survive_kills_split",
        needs: Need::Nothing,
        run: |name| kills(name, &scene(false, true), 15),
    },
    Test {
        name: "survive_kills_packed",
        needs: Need::Nothing,
        run: |name| kills(name, &scene(true, false), 15),
    },
    Test {
        name: "survive_kills_in_recovery",
        needs: Need::Nothing,
        run: |name| kills_in_recovery(name, &scene(true, true), 10),
    },
    Test {
        name: "survive_points_of_a_request_split",
        needs: Need::Root,
        run: |name| request_points(name, &scene(false, false), 1),
    },
    Test {
        name: "survive_points_of_a_request_packed",
        needs: Need::Root,
        run: |name| request_points(name, &scene(true, true), 1),
    },
    Test {
        name: "survive_points_of_a_message",
        needs: Need::Root,
        run: |name| message_points(name, &scene(false, true), 1),
    },
    Test {
        name: "survive_points_of_a_successor",
        needs: Need::Root,
        run: |name| successor_points(name, &scene(true, true), 1),
    },
];

/// Others die, too.
const OTHERS: &[Test] = &[
    Test {
        name: "survive_no_in_flight_region",
        needs: Need::Nothing,
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
        needs: Need::Nothing,
        run: |name| other_deaths(name, &scene(false, true), 6),
    },
    Test {
        name: "survive_deaths_of_rot",
        needs: Need::Nothing,
        run: |name| deaths_of_rot(name, &scene(false, true), 2),
    },
    Test {
        name: "survive_everything_at_once",
        needs: Need::Nothing,
        run: |name| mixed(name, true, Duration::from_secs(20), 1),
    },
    Test {
        name: "survive_a_volume_that_kills",
        needs: Need::Root,
        run: a_volume_that_kills,
    },
    Test {
        name: "survive_slow_writes",
        needs: Need::Nothing,
        run: |name| slow_writes(name, 4),
    },
];

/// A Linux guest works on its disk meanwhile (T40).
const GUESTS: &[Test] = &[
    Test {
        name: "survive_guest",
        needs: Need::Guest,
        run: |name| guest::guest_on_host(name, false, 3, 2),
    },
    Test {
        name: "survive_guest_connects_again",
        needs: Need::Guest,
        run: |name| guest::guest_on_serve(name, true, 3),
    },
];

/// What a frontend does whose back-end was lost together with the connection (T35).
const RECONNECTS: &[Test] = &[
    Test {
        name: "survive_reconnect_qemu",
        needs: Need::Nothing,
        run: |name| reconnects(name, reconnect(false, false, Base::Used), 10),
    },
    Test {
        name: "survive_reconnect_qemu_packed",
        needs: Need::Nothing,
        run: |name| reconnects(name, reconnect(true, false, Base::Used), 10),
    },
    Test {
        name: "survive_reconnect_cloud_hypervisor",
        needs: Need::Nothing,
        run: |name| reconnects(name, reconnect(false, false, Base::Avail), 10),
    },
    Test {
        name: "survive_reconnect_cloud_hypervisor_in_order",
        needs: Need::Nothing,
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
    for test in [HOST, OTHERS, GUESTS, RECONNECTS].into_iter().flatten() {
        let (name, run) = (test.name, test.run);
        let missing = test.needs.missing();
        if let Some(reason) = &missing {
            eprintln!("skipped: {name}: {reason}");
        }
        let trial = Trial::test(name, move || judge(&run(name)));
        trials.push(trial.with_ignored_flag(missing.is_some()));
    }
    let tables = [
        resume::TESTS,
        upgrades::TESTS,
        rekey::TESTS,
        nics::TESTS,
        outside::TESTS,
    ];
    for test in tables.into_iter().flatten() {
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
