//! A volume's key sealed anew: for other hosts, for a greater size, and the file that grows with it.

use std::fs;

use bulkhead_bundle::{Volume, source};

use crate::{Folder, SEALED};

/// host-a's volume of 1 MiB with its file, and the keys of host-b.
fn folder() -> Folder {
    let folder = Folder::with_keys();
    folder.ok("host init --name host-b --state-dir state-b");
    folder.ok(&format!(
        "volume create --name v --path v.img --size 1MiB --file v.img {SEALED} --out v.toml"
    ));
    folder
}

fn load(folder: &Folder, name: &str) -> Volume {
    let mut volumes = source::load_stanza(&folder.path(name)).expect("stanza");
    assert_eq!(volumes.len(), 1);
    volumes.remove(0)
}

/// The key as this recipient opens it.
fn key(folder: &Folder, stanza: &str, with: &str) -> Vec<u8> {
    let out = format!("{}.{stanza}.key", with.replace('/', "-"));
    folder.ok(&format!(
        "volume recover --bundle {stanza} --volume v --recovery {with} --out {out}"
    ));
    fs::read(folder.path(&out)).expect("key")
}

const RESEAL: &str = "volume reseal --volume v.toml --recovery recovery.key --out new.toml";

#[test]
fn a_further_host_gets_the_same_key_and_the_first_keeps_its_own() {
    let folder = folder();
    let said = folder.ok(&format!("{RESEAL} --host state-b/host.pub"));
    assert!(said.contains("sealed to    host-b  "), "{said}");
    let (old, new) = (load(&folder, "v.toml"), load(&folder, "new.toml"));
    assert_eq!(new.sealed_for("host-a"), old.sealed_for("host-a"));
    let before = key(&folder, "v.toml", "recovery.key");
    for with in [
        "state/keyd/host.key",
        "state-b/keyd/host.key",
        "recovery.key",
    ] {
        assert_eq!(key(&folder, "new.toml", with), before, "{with}");
    }
    let same = Volume {
        sealed_keys: old.sealed_keys.clone(),
        ..new
    };
    assert_eq!(same, old, "nothing but the sealed keys changes");
}

#[test]
fn a_host_is_dropped_and_one_that_is_given_again_gets_its_new_key() {
    let folder = folder();
    folder.ok(&format!(
        "{RESEAL} --host state-b/host.pub --drop-host host-a"
    ));
    let names: Vec<_> = load(&folder, "new.toml")
        .sealed_keys
        .into_iter()
        .map(|k| k.recipient)
        .collect();
    assert_eq!(names, ["host-b", "recovery"]);
    // host-a was set up anew: another key under the same name.
    folder.ok("host init --name host-a --state-dir state-again");
    folder.ok(&format!("{RESEAL}2 --host state-again/host.pub"));
    assert_eq!(
        key(&folder, "new.toml2", "state-again/keyd/host.key"),
        key(&folder, "v.toml", "recovery.key")
    );
    folder.refused(
        "volume recover --bundle new.toml2 --volume v --recovery state/keyd/host.key --out k",
        &["sealed to another key of \"host-a\""],
    );
}

#[test]
fn a_greater_size_takes_the_file_along() {
    let folder = folder();
    fs::write(folder.path("v.img"), vec![0x5a; 1 << 20]).expect("write");
    let said = folder.ok(&format!(
        "{RESEAL} --host state/host.pub --size 4MiB --grow-file v.img"
    ));
    assert!(said.contains("file         v.img enlarged"), "{said}");
    let new = load(&folder, "new.toml");
    assert_eq!(new.size_bytes, 4 << 20);
    let bytes = fs::read(folder.path("v.img")).expect("read");
    assert_eq!(bytes.len(), 4 << 20);
    assert!(bytes[..1 << 20].iter().all(|b| *b == 0x5a));
    assert!(bytes[1 << 20..].iter().all(|b| *b == 0));
    let before = key(&folder, "v.toml", "recovery.key");
    for with in ["state/keyd/host.key", "recovery.key"] {
        assert_eq!(key(&folder, "new.toml", with), before, "{with}");
    }
    // Again: the file is large enough already.
    let again = folder.ok(&format!(
        "{}2 --host state/host.pub --size 2MiB --grow-file v.img",
        RESEAL
    ));
    assert!(again.contains("v.img is large enough"), "{again}");
    assert_eq!(
        fs::metadata(folder.path("v.img")).expect("file").len(),
        4 << 20
    );
}

#[test]
fn a_plain_volume_grows_without_a_key() {
    let folder = Folder::with_keys();
    folder.ok(
        "volume create --name v --path v.img --size 1MiB --data-unit none --socket s --allowed-uid 1 --out v.toml",
    );
    folder.ok("volume reseal --volume v.toml --size 2MiB --out new.toml");
    assert_eq!(load(&folder, "new.toml").size_bytes, 2 << 20);
    folder.refused(
        "volume reseal --volume v.toml --host state/host.pub --out other.toml",
        &["volume \"v\" is plain: it has no key"],
    );
}

#[test]
fn refusals_leave_stanza_and_file_as_they_were() {
    let folder = folder();
    folder.ok("recovery new --out other.key");
    folder.write_bundle(&["v.toml"]);
    folder.write("two.toml", &folder.read("v.toml").repeat(2));
    folder.write("taken.toml", "");
    for (line, says) in [
        (
            format!("{RESEAL} --size 512KiB --host state/host.pub"),
            "never shrinks",
        ),
        (
            format!("{RESEAL} --size 2MiB --host state-b/host.pub"),
            "--host is missing for: host-a",
        ),
        (
            format!("{RESEAL} --size 1052672 --drop-host host-a"),
            "--host",
        ),
        (
            format!("{RESEAL} --size 1049000 --host state/host.pub"),
            "--size: ",
        ),
        (
            format!("{RESEAL} --drop-host host-z"),
            "--drop-host: the key of volume \"v\" is not sealed to \"host-z\"",
        ),
        (
            format!("{RESEAL} --host recovery.key.pub"),
            "recovery.key.pub: is not a host's public key",
        ),
        (
            RESEAL.replace(" --recovery recovery.key", ""),
            "volume \"v\" is encrypted: give its recovery key",
        ),
        (
            RESEAL.replace("recovery.key", "state/keyd/host.key"),
            "is the key of \"host-a\", not of recovery",
        ),
        (
            RESEAL.replace("recovery.key", "other.key"),
            "sealed to another key of \"recovery\"",
        ),
        (
            RESEAL.replace("v.toml", "bundle.toml"),
            "bundle.toml: is a bundle",
        ),
        (RESEAL.replace("v.toml", "two.toml"), "two.toml"),
        (
            format!(
                "{} --size 2MiB --host state/host.pub --grow-file v.img",
                RESEAL.replace("new.toml", "taken.toml")
            ),
            "taken.toml exists",
        ),
        (
            format!("{RESEAL} --size 2MiB --host state/host.pub --grow-file state"),
            "state: ",
        ),
        (
            format!("{RESEAL} --size 2MiB --host state/host.pub --grow-file /dev/null"),
            "/dev/null: is neither a file nor a block device",
        ),
    ] {
        folder.refused(&line, &[says]);
        assert!(!folder.exists("new.toml"), "{line}");
        assert_eq!(
            fs::metadata(folder.path("v.img")).expect("file").len(),
            1 << 20
        );
    }
}
