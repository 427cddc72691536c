//! `serve` is killed, and started again; its frontends keep their in-flight regions and connect again.

use std::time::Duration;

use bulkhead_integration::random::Random;
use bulkhead_integration::survive::disk::{Base, DiskSpec};
use bulkhead_integration::survive::kills::{Plan, Serve, Victim as _, kill_often};
use bulkhead_integration::survive::load::{Load, LoadSpec};

use crate::{Outcome, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "survive_calm_split",
        run: || kills(0, false, Base::Used),
    },
    Test {
        name: "survive_calm_packed",
        run: || kills(0, true, Base::Used),
    },
];

fn kills(count: u32, packed: bool, base: Base) -> Outcome {
    let dir = tempfile::tempdir()?;
    let (socket, image) = (dir.path().join("a.sock"), dir.path().join("disk.img"));
    std::fs::File::create(&image)?.set_len(4 << 20)?;
    let blk = format!("file:{}", image.display());
    let path = socket.display().to_string();
    let mut serve = Serve::start(&["--socket", &path, "--blk", &blk, "--queues", "2"])?;
    let disk = DiskSpec {
        packed,
        base,
        queues: 2,
        ..DiskSpec::new(socket)
    };
    let mut load = Load::start(&LoadSpec::new(vec![disk], 1))?;
    load.wait_filled(Duration::from_secs(60))?;
    let plan = Plan {
        kills: count,
        pause_ms: 20,
        again: None,
    };
    let times = kill_often(&mut serve, &mut load, &plan, &mut Random::named("kills"))?;
    std::thread::sleep(Duration::from_secs(1));
    let report = load.finish();
    println!("{times}, {report:?}");
    if report.findings.is_empty() {
        return Ok(());
    }
    Err(format!("{}\n--- log:\n{}", report.problems(), serve.log()).into())
}
