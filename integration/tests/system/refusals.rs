//! `refused_*`: bundles and requests that a running host refuses, each with its own reason, and with
//! no change of what runs.

use std::fs;
use std::os::unix::fs::symlink;

use bulkhead_integration::disk::{Disk, Options};
use bulkhead_integration::host::{BundleSpec, HOST, Host, HostError, VolumeSpec};

use crate::Test;
use crate::support::{Outcome, ensure, folder};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "refused_by_host_changed_byte",
        needs: &[],
        run: || refused("was changed after it was signed", changed_byte),
    },
    Test {
        name: "refused_by_host_wrong_key",
        needs: &[],
        run: || refused("unknown key", wrong_key),
    },
    Test {
        name: "refused_by_host_other_host",
        needs: &[],
        run: || {
            refused("is for host \"host-2\"", |host| {
                let spec = BundleSpec {
                    host: "host-2",
                    ..BundleSpec::new(2, &[])
                };
                host.sign(&spec)
            })
        },
    },
    Test {
        name: "refused_by_host_epoch_not_above_floor",
        needs: &[],
        run: || {
            refused("is not above the floor", |host| {
                // The same epoch with another content.
                fs::rename(host.path("bundle-1.cose"), host.path("kept.cose"))?;
                host.sign(&BundleSpec {
                    expires: "2120-01-01T00:00:00Z",
                    ..BundleSpec::new(1, &["disk"])
                })
            })
        },
    },
    Test {
        name: "refused_by_host_expired",
        needs: &[],
        run: || {
            refused("expired", |host| {
                host.sign(&BundleSpec {
                    expires: "2026-01-02T00:00:00Z",
                    ..BundleSpec::new(2, &["disk"])
                })
            })
        },
    },
    Test {
        name: "refused_by_host_not_yet_valid",
        needs: &[],
        run: || {
            refused("not valid before", |host| {
                host.sign(&BundleSpec {
                    not_before: "2125-01-01T00:00:00Z",
                    ..BundleSpec::new(2, &["disk"])
                })
            })
        },
    },
    Test {
        name: "refused_by_host_over_size_cap",
        needs: &[],
        run: || {
            refused("size cap", |host| {
                let name = "large.cose";
                fs::write(host.path(name), vec![0; (1 << 20) + 1])?;
                Ok(name.to_owned())
            })
        },
    },
    Test {
        name: "refused_by_host_not_canonical",
        needs: &[],
        run: || {
            refused("not canonical", |host| {
                let envelope = host.sign(&BundleSpec::new(2, &["disk"]))?;
                let mut bytes = fs::read(host.path(&envelope))?;
                bytes.push(0);
                fs::write(host.path(&envelope), bytes)?;
                Ok(envelope)
            })
        },
    },
    Test {
        name: "refused_by_host_path_outside",
        needs: &[],
        run: || {
            refused("volume-dir", |host| {
                fs::write(host.path("outside.img"), vec![0; 1 << 20])?;
                let path = host.path("outside.img").display().to_string();
                with_path(host, "other", &path, |_| Ok(()))
            })
        },
    },
    Test {
        name: "refused_by_host_symlink",
        needs: &[],
        run: || {
            refused("symbolic link", |host| {
                with_path(host, "other", "link.img", |host| {
                    symlink(host.image("disk"), host.image("link"))
                })
            })
        },
    },
    Test {
        name: "refused_by_host_same_file_twice",
        needs: &[],
        run: || {
            refused("same file", |host| {
                with_path(host, "other", "hard.img", |host| {
                    fs::hard_link(host.image("disk"), host.image("hard"))
                })
            })
        },
    },
    Test {
        name: "refused_by_host_removal_in_use_and_forced",
        needs: &[],
        run: removal,
    },
    Test {
        name: "refused_by_keyd_alone_replay",
        needs: &[],
        run: replay,
    },
    Test {
        name: "refused_frontend_of_another_uid",
        needs: &[],
        run: other_uid,
    },
];

/// A host that serves one volume under epoch 1.
fn serving() -> Result<(tempfile::TempDir, Host), Box<dyn std::error::Error>> {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "4MiB", 4096))?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    Ok((dir, host))
}

/// The host refuses what `make` makes, with this reason, and everything is as it was: its status, and
/// a connected frontend's I/O.
fn refused(reason: &str, make: fn(&Host) -> Result<String, HostError>) -> Outcome {
    let (_dir, host) = serving()?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, 0, &[0x5a; 4096])?;
    let before = host.status()?;
    let envelope = make(&host)?;
    expect_refusal(&host, &envelope, reason)?;
    let after = host.status()?;
    ensure(before == after, || format!("{before}\nbecame\n{after}"))?;
    ensure(disk.read(0, 0, 4096)? == vec![0x5a; 4096], || {
        "the data changed".to_owned()
    })
}

fn expect_refusal(host: &Host, envelope: &str, reason: &str) -> Outcome {
    match host.apply(envelope) {
        Err(HostError::Command { reason: given, .. }) if given.contains(reason) => Ok(()),
        Err(error) => Err(format!("refused, and not because {reason:?}: {error}").into()),
        Ok(text) => Err(format!("it was taken: {text}").into()),
    }
}

fn changed_byte(host: &Host) -> Result<String, HostError> {
    let envelope = host.sign(&BundleSpec::new(2, &["disk"]))?;
    let mut bytes = fs::read(host.path(&envelope))?;
    // In the payload: the host's name becomes another of the same length.
    let at = bytes
        .windows(HOST.len())
        .position(|w| w == HOST.as_bytes())
        .unwrap_or(0);
    bytes[at] ^= 1;
    fs::write(host.path(&envelope), bytes)?;
    Ok(envelope)
}

fn wrong_key(host: &Host) -> Result<String, HostError> {
    host.cli(&[
        "operator",
        "new",
        "--name",
        "mallory",
        "--out",
        "mallory.key",
    ])?;
    host.sign(&BundleSpec::new(2, &["disk"]))?;
    let out = "mallory.cose";
    host.cli(&[
        "sign",
        "--bundle",
        "bundle-2.toml",
        "--key",
        "mallory.key",
        "--out",
        out,
    ])?;
    Ok(out.to_owned())
}

/// A bundle with one volume more, whose path is `path` and whose file `make` makes.
fn with_path(
    host: &Host,
    name: &str,
    path: &str,
    make: fn(&Host) -> std::io::Result<()>,
) -> Result<String, HostError> {
    host.create_volume(&VolumeSpec::new(name, "1MiB", 4096))?;
    make(host)?;
    let stanza = host.path(&format!("{name}.toml"));
    let text = fs::read_to_string(&stanza)?;
    fs::write(
        &stanza,
        text.replace(&format!("\"{name}.img\""), &format!("{path:?}")),
    )?;
    host.sign(&BundleSpec::new(2, &["disk", name]))
}

/// A volume in use is not removed unless the bundle says so.
fn removal() -> Outcome {
    let (_dir, host) = serving()?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    let envelope = host.sign(&BundleSpec::new(2, &[]))?;
    let before = host.status()?;
    expect_refusal(&host, &envelope, "in use")?;
    ensure(host.status()? == before, || "the status changed".to_owned())?;
    disk.write(0, 0, &[1; 4096])?;
    let id = before["volumes"][0]["id"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    ensure(!id.is_empty(), || format!("no id in {before}"))?;
    let forced = host.sign(&BundleSpec {
        more: &format!("force_remove = [{id:?}]\n"),
        ..BundleSpec::new(3, &[])
    })?;
    host.apply(&forced)?;
    ensure(!host.socket("disk").exists(), || {
        "the socket is still there".to_owned()
    })?;
    ensure(disk.write(0, 0, &[2; 4096]).is_err(), || {
        "the frontend still writes".to_owned()
    })
}

/// An agent that was set back to an earlier bundle (files and floor) gets nothing from keyd for it.
fn replay() -> Outcome {
    let (_dir, mut host) = serving()?;
    let state = host.path("state/agent");
    let kept = host.path("kept");
    copy_folder(&state, &kept)?;
    let newer = host.sign(&BundleSpec::new(2, &["disk"]))?;
    host.apply(&newer)?;
    host.stop();
    fs::remove_dir_all(&state)?;
    fs::rename(&kept, &state)?;
    host.start()?;
    host.wait_until("keyd did not refuse the old bundle", |host| {
        host.log().contains("not above the floor")
    })?;
    let served = Disk::negotiate(&host.socket("disk"), &Options::default());
    ensure(served.is_err(), || "the old bundle is served".to_owned())?;
    // The newest is taken as before.
    host.apply(&newer)?;
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    disk.write(0, 0, &[7; 4096])?;
    Ok(())
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) -> Outcome {
    let status = std::process::Command::new("cp")
        .arg("-a")
        .arg(from)
        .arg(to)
        .status()?;
    ensure(status.success(), || "cp failed".to_owned())
}

/// The socket's permissions let us in, the bundle does not.
fn other_uid() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    let mut spec = VolumeSpec::new("disk", "1MiB", 4096);
    spec.allowed_uid += 4242;
    spec.more = vec!["--socket-mode".to_owned(), "0666".to_owned()];
    host.create_volume(&spec)?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    let served = Disk::negotiate(&host.socket("disk"), &Options::default());
    ensure(served.is_err(), || {
        "a frontend of another uid was served".to_owned()
    })?;
    host.wait_until("the refusal is not in the log", |host| {
        host.log().contains("is refused: only uid")
    })?;
    Ok(())
}
