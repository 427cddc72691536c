//! A volume that is shredded while a guest could use it: afterwards nothing that the host keeps opens
//! it, with any envelope that ever named it, and the host serves its other volumes as if nothing
//! had been, over the restart of every process and of the whole host.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_integration::disk::{Disk, Options};
use bulkhead_integration::host::{BundleSpec, Host, HostError, VolumeSpec};

use crate::isolation::{search_memory, secrets};
use crate::support::{Outcome, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_shredded_volume_opens_for_nobody_and_the_others_go_on",
        needs: &[],
        run: shredded,
    },
    Test {
        name: "system_shredded_key_is_in_no_memory",
        needs: &[Need::Root],
        run: gone_from_memory,
    },
    Test {
        name: "system_volumes_are_sealed_to_the_new_key_after_a_shred",
        needs: &[],
        run: sealed_after,
    },
];

/// A host that serves `disk` and `other`, and the line that shreds the first.
fn serving(dir: &Path) -> Result<(Host, String), Box<dyn Error>> {
    let mut host = Host::create(dir)?;
    for name in ["disk", "other"] {
        host.create_volume(&VolumeSpec::new(name, "4MiB", 4096))?;
    }
    let envelope = host.sign(&BundleSpec::new(1, &["disk", "other"]))?;
    host.start()?;
    host.apply(&envelope)?;
    let printed = host.cli(&["volume", "shred", "--volume", "disk.toml"])?;
    let order = printed.lines().find(|line| line.starts_with("shred = "));
    let order = format!("{}\n", order.ok_or("no order was printed")?);
    Ok((host, order))
}

/// Applies the bundle that shreds, as the next one of a host.
fn shred(host: &Host, order: &str) -> Result<String, HostError> {
    let mut spec = BundleSpec::new(2, &["other"]);
    spec.more = order;
    let envelope = host.sign(&spec)?;
    host.apply(&envelope)
}

fn attach(host: &Host, volume: &str) -> Result<Disk, Box<dyn Error>> {
    Ok(Disk::attach(&host.socket(volume), &Options::default())?)
}

/// Every file below a folder.
fn files_in(folder: &Path, found: &mut Vec<PathBuf>) -> Outcome {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            files_in(&path, found)?;
        } else if kind.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

/// Stanzas of a volume with each sealed key that keyd has in its store: whoever has the host's files
/// can write them.
fn forged_stanzas(host: &Host, volume: &str) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let stanza = fs::read_to_string(host.path(&format!("{volume}.toml")))?;
    let (head, _) = stanza
        .split_once("\n[[volume.sealed_key]]")
        .ok_or("no sealed key")?;
    let store = fs::read_to_string(host.path("state/keyd/resealed")).unwrap_or_default();
    let fingerprint = store.lines().find_map(|l| l.strip_prefix("host-key "));
    let mut stanzas = Vec::new();
    for line in store.lines().filter_map(|l| l.strip_prefix("key ")) {
        let words: Vec<_> = line.split(' ').collect();
        let [_, _, enc, ciphertext] = words[..] else {
            return Err(format!("not a line of the store: {line}").into());
        };
        let sealed = format!(
            "\n[[volume.sealed_key]]\nrecipient = \"host-1\"\nfingerprint = {:?}\nenc = {enc:?}\n\
             ciphertext = {ciphertext:?}\n",
            fingerprint.unwrap_or_default()
        );
        let path = host.path(&format!("forged-{volume}-{}.toml", stanzas.len()));
        fs::write(&path, format!("{head}{sealed}"))?;
        stanzas.push(path);
    }
    Ok(stanzas)
}

/// Which files of the host's state open a volume, with what is sealed in its first envelope or in
/// keyd's store.
fn openers(host: &Host, volume: &str) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut files = Vec::new();
    files_in(&host.path("state"), &mut files)?;
    let mut bundles = forged_stanzas(host, volume)?;
    bundles.push(host.path("bundle-1.cose"));
    let out = host.path("found.key");
    let mut openers = Vec::new();
    for key in files {
        for bundle in &bundles {
            let (bundle, key_file) = (bundle.display().to_string(), key.display().to_string());
            let arguments = ["volume", "recover", "--bundle", &bundle, "--volume", volume];
            let with = ["--recovery", &key_file, "--out", "found.key"];
            if host
                .try_cli(&[&arguments[..], &with[..]].concat())?
                .status
                .success()
            {
                openers.push(key.clone());
                fs::remove_file(&out)?;
            }
        }
    }
    Ok(openers)
}

fn shredded() -> Outcome {
    let dir = folder()?;
    let (mut host, order) = serving(dir.path())?;
    let key = host.path("state/keyd/host.key");
    for volume in ["disk", "other"] {
        let found = openers(&host, volume)?;
        ensure(found == [key.clone()], || {
            format!("before, {volume} is opened by {found:?}")
        })?;
    }
    let (mut disk, mut other) = (attach(&host, "disk")?, attach(&host, "other")?);
    disk.write(0, 0, &[0x11; 4096])?;
    other.write(0, 0, &[0x22; 4096])?;
    other.flush(0)?;
    let printed = shred(&host, &order)?;
    for part in ["SHREDDED", "host key "] {
        ensure(printed.contains(part), || format!("no {part:?}: {printed}"))?;
    }
    is_proven(&host, &order)?;
    ensure(disk.read(0, 0, 4096).is_err(), || {
        "what was shredded is still served".to_owned()
    })?;
    ensure(!host.socket("disk").exists(), || {
        "its listener is still there".to_owned()
    })?;
    nothing_opens(&host, &key)?;
    goes_on(&mut host, other)?;
    is_proven(&host, &order)?;
    nothing_opens(&host, &key)?;
    // A bundle that names the volume again changes nothing.
    let back = host.sign(&BundleSpec::new(3, &["disk", "other"]))?;
    match host.apply(&back) {
        Err(HostError::Command { reason, .. }) if reason.contains("shredded by epoch 2") => {}
        other => return Err(format!("it came back: {other:?}").into()),
    }
    copies_end(&host)
}

/// The status says what was destroyed, and with which key of the host.
fn is_proven(host: &Host, order: &str) -> Outcome {
    settled(host)?;
    let status = host.status()?;
    let keys = &status["keys"];
    let shred = &keys["shreds"][0];
    let is_it = shred["volume"]
        .as_str()
        .is_some_and(|id| order.contains(id))
        && shred["state"] == "destroyed"
        && shred["epoch"] == 2
        && shred["new_key"] == keys["fingerprint"]
        && shred["destroyed_key"] != keys["fingerprint"]
        && keys["shreds_total"] == 1
        && keys["unfinished"].is_null();
    ensure(is_it, || format!("not proven: {keys}\n{}", host.log()))
}

/// The shredded volume; the other is opened by the host's key with what keyd sealed anew.
fn nothing_opens(host: &Host, key: &Path) -> Outcome {
    let found = openers(host, "disk")?;
    ensure(found.is_empty(), || format!("it is opened by {found:?}"))?;
    let found = openers(host, "other")?;
    ensure(found == [key.to_owned()], || {
        format!("the other volume is opened by {found:?}")
    })
}

/// The other volume's frontend was not disturbed, and is served after every restart.
fn goes_on(host: &mut Host, mut other: Disk) -> Outcome {
    let check = |other: &mut Disk, after: &str| {
        let read = other.read(0, 0, 4096);
        ensure(
            read.as_ref().is_ok_and(|bytes| *bytes == [0x22; 4096]),
            || format!("after {after}: {read:?}"),
        )
    };
    check(&mut other, "the shred")?;
    for role in ["keyd", "agent"] {
        host.kill(role)?;
        settled(host)?;
        check(&mut other, role)?;
    }
    drop(other);
    host.kill("dataplane")?;
    settled(host)?;
    check(&mut attach(host, "other")?, "the data plane")?;
    host.stop();
    host.start()?;
    settled(host)?;
    check(&mut attach(host, "other")?, "the whole host")
}

/// Everything that the bundle says is served, and granted by a keyd that is there.
fn settled(host: &Host) -> Result<(), HostError> {
    host.wait_until("the host is not what its bundle says", |host| {
        host.status().is_ok_and(|status| {
            let there = |role: &str| {
                let processes = status["processes"].as_array();
                processes.is_some_and(|all| all.iter().any(|process| process["role"] == role))
            };
            status["pending"] == serde_json::json!([])
                && status["volumes"][0]["state"]["attached"] == true
                && there("keyd")
                && !status["keys"].is_null()
        })
    })
}

/// The operator's own copies: with the recovery key they open the volume until they are destroyed.
fn copies_end(host: &Host) -> Outcome {
    let recover = |bundle: &str| {
        let arguments = ["volume", "recover", "--bundle", bundle, "--volume", "disk"];
        let with = ["--recovery", "keys/recovery.key", "--out", "disk.key"];
        host.try_cli(&[&arguments[..], &with[..]].concat())
    };
    ensure(recover("disk.toml")?.status.success(), || {
        "the recovery key does not open the stanza".to_owned()
    })?;
    let (stanza, copies) = (
        "disk.toml",
        ["--copy", "bundle-1.cose", "--copy", "bundle-3.cose"],
    );
    let arguments = ["volume", "shred", "--volume", stanza, "--yes"];
    host.cli(&[&arguments[..], &copies[..]].concat())?;
    for copy in [stanza, copies[1], copies[3]] {
        ensure(!host.path(copy).exists(), || format!("{copy} is there"))?;
    }
    Ok(())
}

fn gone_from_memory() -> Outcome {
    let dir = folder()?;
    let (host, order) = serving(dir.path())?;
    let mut disk = attach(&host, "disk")?;
    disk.write(0, 0, &[1; 65536])?;
    disk.read(0, 0, 65536)?;
    let arguments = [
        "volume",
        "recover",
        "--bundle",
        "disk.toml",
        "--volume",
        "disk",
    ];
    let with = ["--recovery", "keys/recovery.key", "--out", "disk.key"];
    host.cli(&[&arguments[..], &with[..]].concat())?;
    let mut secrets = secrets(&fs::read(host.path("disk.key"))?);
    let old = host_seed(&host)?;
    let keyd = host.process("keyd")?.0;
    let (found, _) = search_memory(keyd, &old)?;
    ensure(found.is_some(), || {
        "the search does not find the host's key in keyd".to_owned()
    })?;
    shred(&host, &order)?;
    secrets.extend(old);
    for role in ["keyd", "dataplane", "agent"] {
        let (found, read) = search_memory(host.process(role)?.0, &secrets)?;
        ensure(read > 1 << 16, || {
            format!("only {read} bytes of {role} were read")
        })?;
        ensure(found.is_none(), || {
            format!("{role} has a part of a key at {found:x?}")
        })?;
    }
    ensure(host.process("keyd")?.0 == keyd, || {
        "keyd was restarted".to_owned()
    })
}

/// Both halves of the seed in `host.key`, as the bytes that they are.
fn host_seed(host: &Host) -> Result<Vec<[u8; 16]>, Box<dyn Error>> {
    let text = fs::read_to_string(host.path("state/keyd/host.key"))?;
    let field = text.lines().find_map(|l| l.strip_prefix("xwing_seed = "));
    let base64 = field.ok_or("no seed")?.trim_matches('"');
    let seed = bulkhead_bundle::text::from_base64(base64).ok_or("not base64")?;
    let halves = seed.chunks_exact(16).map(<[u8; 16]>::try_from);
    Ok(halves.collect::<Result<_, _>>()?)
}

fn sealed_after() -> Outcome {
    let dir = folder()?;
    let (host, order) = serving(dir.path())?;
    shred(&host, &order)?;
    // The public key that was made at first: keyd says what is wrong with it.
    host.create_volume(&VolumeSpec::new("late", "4MiB", 4096))?;
    let envelope = host.sign(&BundleSpec::new(3, &["other", "late"]))?;
    let applied = host.try_cli(&["apply", &envelope, "--admin", "run/admin.sock"])?;
    let printed = String::from_utf8_lossy(&applied.stdout).into_owned();
    for part in [
        "late",
        "destroyed when epoch 2 shredded",
        "bulkhead host public",
    ] {
        ensure(printed.contains(part), || format!("no {part:?}: {printed}"))?;
    }
    let public = host.cli(&["host", "public", "--state-dir", "state"])?;
    let status = host.status()?;
    let fingerprint = status["keys"]["fingerprint"]
        .as_str()
        .unwrap_or("none")
        .to_owned();
    ensure(public.contains(&fingerprint), || {
        format!("the status says {fingerprint}, and the host {public}")
    })?;
    ensure(
        fs::read_to_string(host.path("state/host.pub"))? == public,
        || "host.pub is out of date".to_owned(),
    )?;
    host.create_volume(&VolumeSpec::new("fresh", "4MiB", 4096))?;
    let envelope = host.sign(&BundleSpec::new(4, &["other", "fresh"]))?;
    host.apply(&envelope)?;
    let mut fresh = attach(&host, "fresh")?;
    fresh.write(0, 0, &[0x33; 4096])?;
    let read = attach(&host, "other")?.read(0, 0, 4096).map(drop);
    ensure(read.is_ok(), || format!("the other volume: {read:?}"))
}
