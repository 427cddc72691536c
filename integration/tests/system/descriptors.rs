//! A data plane without a free descriptor, on a whole host: who is served is served, keyd and the agent are heard and may
//! be started again, and who had to wait is served when there are some again.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use bulkhead_integration::disk::{Disk, Options, PATIENCE};
use bulkhead_integration::frontend::Frontend;
use bulkhead_integration::frontend::message::{VERSION, encode, request};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec, uid_of};

use crate::support::{Outcome, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "system_without_descriptors",
    needs: &[Need::Root],
    run: without_descriptors,
}];

const BLOCK: usize = 4096;

fn works(disk: &mut Disk, byte: u8) -> Outcome {
    disk.write(0, 8, &[byte; BLOCK])?;
    ensure(disk.read(0, 8, 4096)? == [byte; BLOCK], || {
        "another byte was read than was written".to_owned()
    })
}

/// Gives a process so many descriptors; none: as many as there are numbers below its first free one.
fn limit(pid: u32, count: Option<u64>) -> Outcome {
    let mut open = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        open.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<u64>().ok()),
        );
    }
    let first_free = (0..).find(|number| !open.contains(number));
    let count = count.or(first_free).unwrap_or_default();
    // As its own user, who alone may everywhere.
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let gid = status.lines().find_map(|line| line.strip_prefix("Gid:"));
    let gid = gid.and_then(|gids| gids.split_whitespace().next());
    let mut prlimit = Command::new("prlimit");
    prlimit
        .uid(uid_of("dataplane"))
        .gid(gid.ok_or("no gid")?.parse()?);
    prlimit.args(["--pid", &pid.to_string(), &format!("--nofile={count}:")]);
    let output = prlimit.output()?;
    ensure(output.status.success(), || format!("{output:?}"))
}

fn without_descriptors() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    for name in ["a", "b"] {
        host.create_volume(&VolumeSpec::new(name, "4MiB", 4096))?;
    }
    host.start()?;
    host.apply(&host.sign(&BundleSpec::new(1, &["a", "b"]))?)?;
    let mut disk = Disk::attach(&host.socket("a"), &Options::default())?;
    works(&mut disk, 1)?;
    let pid = host.process("dataplane")?.0;
    limit(pid, None)?;
    let waits = Frontend::connect(&host.socket("b"), PATIENCE)?;
    waits.send_raw(&encode(request::GET_FEATURES, VERSION, &[]), &[])?;
    ensure(!waits.closes_within(Duration::from_millis(200)), || {
        "who has to wait was sent away".to_owned()
    })?;
    works(&mut disk, 2)?;
    for role in ["agent", "keyd"] {
        host.kill(role)?;
        host.wait_until(&format!("{role} is of no use"), |host| {
            host.status().is_ok_and(|status| {
                status["volumes"][0]["state"]["connected"] == true
                    && status["pending"] == serde_json::json!([])
                    && status["processes"]
                        .as_array()
                        .is_some_and(|all| all.len() == 2)
            })
        })?;
        works(&mut disk, 3)?;
    }
    limit(pid, Some(4096))?;
    waits.answer(request::GET_FEATURES)?;
    drop(waits);
    let mut other = Disk::attach(&host.socket("b"), &Options::default())?;
    works(&mut other, 4)?;
    works(&mut disk, 5)?;
    // What was stored meanwhile is what a successor goes on with.
    host.kill("dataplane")?;
    works(&mut disk, 6)?;
    works(&mut other, 6)?;
    Ok(())
}
