//! A volume's key takes the place of another under a verified load, while the data plane is killed and upgraded again and
//! again: each successor goes on with the re-key and with the frontend's connection.

use std::time::{Duration, Instant};

use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec, own_binaries};
use bulkhead_integration::survive::disk::DiskSpec;
use bulkhead_integration::survive::kills::kill_pid;
use bulkhead_integration::survive::load::{Load, LoadSpec};

use crate::resume::{FILL, Outcome, Test, unnoticed};
use crate::upgrades::data_plane;

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "survive_kills_and_upgrades_in_a_rekey",
    run: in_a_rekey,
}];

/// How long a re-key that is interrupted all the time may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The stanzas of the volume while it is re-keyed and when it was.
fn make_stanzas(host: &Host) -> Outcome {
    let image = host.image("disk").display().to_string();
    host.cli(&[
        "volume",
        "rekey",
        "--volume",
        "disk.toml",
        "--host",
        "state/host.pub",
        "--recovery",
        "keys/recovery.key.pub",
        "--file",
        &image,
        "--out",
        "rekeyed.toml",
    ])?;
    host.cli(&[
        "volume",
        "rekey",
        "--finish",
        "--volume",
        "rekeyed.toml",
        "--out",
        "finished.toml",
    ])?;
    Ok(())
}

fn apply(host: &Host, epoch: u64, stanza: &str) -> Outcome {
    let envelope = host.sign(&BundleSpec::new(epoch, &[stanza]))?;
    host.apply(&envelope)?;
    Ok(())
}

/// What the host says of the re-key, once all agree again.
fn progress(host: &Host) -> Result<serde_json::Value, Box<dyn std::error::Error>> {
    host.wait_until("all agree again", |host| {
        let status = host.status();
        status.is_ok_and(|status| {
            status["volumes"][0]["state"]["attached"] == true
                && status["pending"] == serde_json::json!([])
        })
    })?;
    Ok(host.status()?["volumes"][0]["state"]["rekey"].clone())
}

fn in_a_rekey() -> Outcome {
    let dir = crate::folder()?;
    let mut host = Host::create_with(dir.path(), &own_binaries(dir.path())?)?;
    host.create_volume(&VolumeSpec {
        queues: 2,
        ..VolumeSpec::new("disk", "24MiB", 4096)
    })?;
    host.start()?;
    apply(&host, 1, "disk")?;
    let disk = DiskSpec {
        queues: 2,
        ..DiskSpec::new(host.socket("disk"))
    };
    let mut load = Load::start(&LoadSpec::new(vec![disk], 1))?;
    load.wait_filled(FILL)?;
    make_stanzas(&host)?;
    apply(&host, 2, "rekeyed")?;
    let (deadline, mut version) = (Instant::now() + PATIENCE, 0);
    loop {
        load.killed(kill_pid(data_plane(&host)?)?);
        load.wait_back(FILL)?;
        let rekey = progress(&host)?;
        println!("after a kill: {rekey}");
        if rekey["state"] == "done" {
            break;
        }
        version += 1;
        host.upgrade("dataplane", version)
            .map_err(|e| format!("{e}\n--- log:\n{}", host.log()))?;
        let rekey = progress(&host)?;
        println!("after an upgrade: {rekey}");
        if Instant::now() > deadline {
            return Err(format!("it is never done: {rekey}\n{}", host.log()).into());
        }
    }
    apply(&host, 3, "finished")?;
    load.killed(kill_pid(data_plane(&host)?)?);
    load.wait_back(FILL)?;
    if !progress(&host)?.is_null() {
        return Err("it still has a re-key".into());
    }
    unnoticed(load, &host)
}
