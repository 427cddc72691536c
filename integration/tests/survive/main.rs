//! `survive_*`: processes die under a verified load, and nothing is lost, done twice or disconnected. Each a few
//! times; `cargo xtask soak survive` does the same hundreds of times.

use bulkhead_integration::survive::disk::Base;
use bulkhead_integration::survive::scenarios::{Reconnect, Row, reconnects};
use libtest_mimic::{Arguments, Failed, Trial};

/// A test.
struct Test {
    name: &'static str,
    run: fn(&str) -> Row,
}

/// What a frontend does whose back-end was lost together with the connection (T35).
const RECONNECTS: &[Test] = &[
    Test {
        name: "survive_reconnect_qemu",
        run: |name| reconnects(name, reconnect(false, false, Base::Used), 12),
    },
    Test {
        name: "survive_reconnect_qemu_packed",
        run: |name| reconnects(name, reconnect(true, false, Base::Used), 12),
    },
    Test {
        name: "survive_reconnect_cloud_hypervisor",
        run: |name| reconnects(name, reconnect(false, false, Base::Avail), 12),
    },
    Test {
        name: "survive_reconnect_cloud_hypervisor_in_order",
        run: |name| reconnects(name, reconnect(false, true, Base::InOrder), 12),
    },
];

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
    let tables = [RECONNECTS];
    let trials = tables.into_iter().flatten().map(|test| {
        let (name, run) = (test.name, test.run);
        Trial::test(name, move || judge(&run(name)))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
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
