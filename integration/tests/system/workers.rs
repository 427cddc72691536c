//! A signed bundle says how many workers there are. They are there before the first volume is served; others
//! later come with the data plane's next start.

use bulkhead_integration::disk::{Disk, Options};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use serde_json::{Value, json};

use crate::Test;
use crate::support::{Outcome, ensure, folder};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "system_workers_are_what_the_bundle_says",
    needs: &[],
    run: workers,
}];

fn apply(host: &Host, epoch: u64, more: &str) -> Result<String, Box<dyn std::error::Error>> {
    let spec = BundleSpec {
        more,
        ..BundleSpec::new(epoch, &["disk"])
    };
    Ok(host.apply(&host.sign(&spec)?)?)
}

/// How many there are, and how many are pending.
fn counts(host: &Host) -> Result<(Value, Value), Box<dyn std::error::Error>> {
    let workers = &host.status()?["workers"];
    let count = |workers: &Value| workers["count"].clone();
    Ok((count(&workers["workers"]), count(&workers["pending"])))
}

fn have(host: &Host, expected: (Value, Value)) -> Outcome {
    let found = counts(host)?;
    ensure(found == expected, || {
        format!("workers {found:?}, not {expected:?}\n{}", host.log())
    })
}

fn workers() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "4MiB", 4096))?;
    host.start()?;
    have(&host, (json!(1), Value::Null))?;
    // Nothing is served: the data plane is started anew, and the volume attached, before this returns.
    let said = apply(&host, 1, "[workers]\ncount = 3\n")?;
    ensure(
        said.contains("workers: 3") && !said.contains("pending"),
        || said,
    )?;
    have(&host, (json!(3), Value::Null))?;
    ensure(host.process("dataplane")?.1 == 2, || host.log())?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, 0, &[0x55; 4096])?;
    disk.flush(0)?;
    // Something is served: it goes on, until the data plane starts for another reason.
    apply(&host, 2, "[workers]\ncpus = \"1023\"\n")?;
    have(&host, (json!(3), json!(1)))?;
    ensure(disk.read(0, 0, 4096)? == [0x55; 4096], || host.log())?;
    host.kill("dataplane")?;
    served(&host)?;
    have(&host, (json!(1), Value::Null))?;
    // There is no such CPU, which is said and costs nothing.
    let problem = host.status()?["workers"]["problem"].to_string();
    ensure(problem.contains("CPU 1023 is not there"), || problem)?;
    // Its successor goes on with the connection.
    ensure(disk.read(0, 0, 4096)? == [0x55; 4096], || host.log())?;
    drop(disk);
    // keyd remembers them: a host that starts has them from the first data plane on.
    host.stop();
    host.start()?;
    served(&host)?;
    have(&host, (json!(1), Value::Null))?;
    ensure(host.process("dataplane")?.1 == 1, || host.log())
}

fn served(host: &Host) -> Outcome {
    host.wait_until("the volume is not served", |host| {
        host.status()
            .is_ok_and(|status| status["volumes"][0]["state"]["attached"] == true)
    })?;
    Ok(())
}
