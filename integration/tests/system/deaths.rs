//! T39 on a whole host, where every connection is stored in rot: frontends that are killed and storms of connections
//! leave nothing behind, in the data plane or in rot.

use std::error::Error;
use std::fs;
use std::time::{Duration, Instant};

use bulkhead_integration::disk::{Disk, Options, feature};
use bulkhead_integration::doomed::{Doomed, storm};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use bulkhead_integration::processes::own_kib;
use bulkhead_integration::random::Random;

use crate::Test;
use crate::support::{Outcome, ensure, folder};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "system_frontend_deaths_leave_nothing_behind",
    needs: &[],
    run: leave_nothing,
}];

/// Deaths in every run, and in full.
const DEATHS: (u32, u32) = (60, 500);
/// Connections for each.
const STORM: u64 = 20;
/// What a process may grow by, after a tenth of them.
const GROWTH_KIB: u64 = 1024;
/// How long descriptors may take to be closed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Descriptors and KiB that a process has.
#[derive(Debug, Clone, Copy)]
struct Holds {
    descriptors: usize,
    kib: u64,
}

fn holds(pid: u32) -> Result<Holds, Box<dyn Error>> {
    Ok(Holds {
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        kib: own_kib(pid)?,
    })
}

/// What both hold, once no frontend is connected and nothing is being closed.
fn settled(host: &Host, wanted: Option<[Holds; 2]>) -> Result<[Holds; 2], Box<dyn Error>> {
    host.wait_until("a frontend is connected still", |host| {
        let connected =
            |status: &serde_json::Value| status["volumes"][0]["state"]["connected"] == true;
        host.status().is_ok_and(|status| !connected(&status))
    })?;
    let pids = [host.rot_pid(), host.process("dataplane")?.0];
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = [holds(pids[0])?, holds(pids[1])?];
        let more = |(now, wanted): (&Holds, &Holds)| now.descriptors > wanted.descriptors;
        let is_over = wanted.is_none_or(|wanted| !now.iter().zip(&wanted).any(more));
        if is_over || Instant::now() > deadline {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn leave_nothing() -> Outcome {
    let soak = std::env::var_os("BULKHEAD_SOAK").is_some_and(|value| value != "0");
    let deaths = if soak { DEATHS.1 } else { DEATHS.0 };
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "4MiB", 4096))?;
    host.start()?;
    host.apply(&host.sign(&BundleSpec::new(1, &["disk"]))?)?;
    let socket = host.socket("disk");
    let mut random = Random::named("leave_nothing");
    let mut before = None;
    let (_, generation) = host.process("dataplane")?;
    for round in 0..deaths {
        storm(&socket, &mut random, STORM)?;
        let features = [0, feature::RING_PACKED][random.index(2)];
        let mut doomed = Doomed::start(&socket, features)?;
        if round % 2 == 0 {
            doomed.wait_for_work()?;
        }
        std::thread::sleep(Duration::from_micros(random.below(4_000)));
        doomed.kill()?;
        let mut next = Disk::attach(&socket, &Options::default())?;
        next.write(0, 0, &[7; 4096])?;
        drop(next);
        if round == deaths / 10 {
            before = Some(settled(&host, None)?);
        }
    }
    let before = before.ok_or("too few deaths")?;
    let after = settled(&host, Some(before))?;
    println!("{deaths} deaths: {before:?}, {after:?}");
    ensure(host.process("dataplane")?.1 == generation, || {
        format!("the data plane has died:\n{}", host.log())
    })?;
    for (now, then) in after.iter().zip(&before) {
        ensure(
            now.descriptors <= then.descriptors && now.kib <= then.kib + GROWTH_KIB,
            || format!("{before:?} before, {after:?} after"),
        )?;
    }
    Ok(())
}
