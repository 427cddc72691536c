//! Another key for a volume: its stanzas, the record that its file gets, and what is refused.

use std::fs;
use std::os::unix::fs::FileExt as _;

use bulkhead_bundle::{Volume, source};
use bulkhead_protocol::rekey::{Found, RECORD_BYTES, Stage};

use crate::half_rekeyed::{Half, MIB, REKEY, SIZE, file, found, key, load, places, prepared};
use crate::{Folder, SEALED};

const KEYS: &str = "--host state/host.pub --recovery recovery.key.pub";
const PREPARE: &str = "volume rekey --prepare --volume v-2.toml --file v.img";
#[test]
fn a_rekey_has_a_new_key_and_keeps_the_old_one_as_it_was_sealed() {
    let folder = prepared(4096);
    let (old, new, last) = (
        load(&folder, "v.toml"),
        load(&folder, "v-2.toml"),
        load(&folder, "v-3.toml"),
    );
    let rekey = new.rekey.clone().expect("a re-key");
    assert_eq!(rekey.previous_keys, old.sealed_keys);
    assert_eq!(last.sealed_keys, new.sealed_keys);
    for (one, two) in old.sealed_keys.iter().zip(&new.sealed_keys) {
        assert_eq!(
            (&one.recipient, &one.fingerprint),
            (&two.recipient, &two.fingerprint)
        );
        assert_ne!(one.ciphertext, two.ciphertext);
    }
    let bare = |volume: &Volume| Volume {
        sealed_keys: Vec::new(),
        rekey: None,
        ..volume.clone()
    };
    assert_eq!(bare(&new), bare(&old), "nothing else changes");
    assert_eq!(bare(&last), bare(&old));
    let shown = folder.ok("show v-2.toml");
    assert!(
        shown.contains(&format!("re-key     {}", rekey.id)),
        "{shown}"
    );
    assert!(shown.contains("  previous   host-a  "), "{shown}");
    let (key, previous) = (key(&folder, "v-3.toml"), key(&folder, "v.toml"));
    assert!(!key.is_same(&previous));
    // Signed and shown like any other.
    folder.write_bundle(&["v-2.toml"]);
    folder.ok("sign --bundle bundle.toml --key alice.key --out b.cose");
    assert!(folder.ok("show b.cose").contains(&rekey.id.to_string()));
}

#[test]
fn the_file_gets_room_and_one_record_while_it_is_in_use() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v.img --size 3MiB --file v.img {SEALED} --out v.toml"
    ));
    let before = fs::read(folder.path("v.img")).expect("file");
    let used = file(&folder);
    used.lock().expect("lock");
    let said = folder.ok(REKEY);
    assert!(said.contains("next         bulkhead volume rekey --prepare --volume v-2.toml"));
    assert_eq!(fs::read(folder.path("v.img")).expect("file"), before);
    assert!(folder.ok(PREPARE).contains("v.img is prepared"));
    let after = fs::read(folder.path("v.img")).expect("file");
    assert_eq!(after.len() as u64, places().end);
    assert!(after[..before.len()] == before[..], "the volume's bytes");
    let volume = load(&folder, "v-2.toml");
    let Found::Record(record) = found(&folder) else {
        panic!("no record");
    };
    assert_eq!(record.stage, Stage::Prepared);
    assert_eq!(record.volume, volume.id);
    assert_eq!(record.rekey, volume.rekey.expect("a re-key").id);
    assert_eq!((record.size_bytes, record.data_unit_bytes), (SIZE, 4096));
    // Once more changes nothing, however far it is meanwhile.
    let half = record.next(Stage::Running {
        frontier_bytes: MIB,
        zone: None,
        previous_check: [1; 16],
        check: [2; 16],
    });
    let at = places().copy_for(half.sequence);
    used.write_all_at(&half.encode(), at).expect("record");
    assert!(folder.ok(PREPARE).contains("was prepared already"));
    assert_eq!(found(&folder), Found::Record(half));
}

#[test]
fn a_record_that_is_needed_is_not_overwritten() {
    let half = Half::new(512);
    let folder = &half.folder;
    folder.ok(&REKEY.replace("v-2.toml", "other.toml"));
    let other = PREPARE.replace("v-2.toml", "other.toml");
    half.record(half.running(2 * MIB, None));
    folder.refused(
        &other,
        &[
            "v.img: its re-key ",
            "stopped at 66 %",
            "must be done first",
        ],
    );
    half.record(Stage::Done {
        check: half.check(&half.key),
    });
    folder.refused(&other, &["is done and not finished", "--finish"]);
    // Over: never again for this one, and at once for the next.
    let over = Stage::Over {
        check: half.check(&half.key),
    };
    half.record(over);
    folder.refused(PREPARE, &["v.img: the re-key ", "is over", "would destroy"]);
    assert!(matches!(found(folder), Found::Record(record) if record.stage == over));
    folder.ok(&other);
    half.record(half.running(2 * MIB, None));
    let copies = places().copies[0];
    let magic = file(folder).write_all_at(&[0; 4000], copies + 64);
    magic.expect("write");
    file(folder)
        .write_all_at(&[0; 4000], copies + RECORD_BYTES as u64 + 64)
        .expect("write");
    folder.refused(
        &other,
        &["v.img: its re-key record is damaged", "from byte 3145728"],
    );
    // One that nothing has begun with is: unless a data plane may be about to.
    fs::write(folder.path("v.img"), vec![0; 3 << 20]).expect("file");
    folder.ok(PREPARE);
    let used = file(folder);
    used.lock().expect("lock");
    folder.refused(&other, &["is prepared for the re-key", "in use"]);
    used.unlock().expect("unlock");
    folder.ok(&other);
    let Found::Record(record) = found(folder) else {
        panic!("no record");
    };
    let rekey = load(folder, "other.toml").rekey.expect("a re-key");
    assert_eq!(record.rekey, rekey.id);
}

#[test]
fn both_keys_are_sealed_to_a_further_host_and_the_size_stays() {
    let folder = prepared(4096);
    folder.ok("host init --name host-b --state-dir state-b");
    let reseal = "volume reseal --volume v-2.toml --recovery recovery.key --out both.toml";
    folder.refused(
        &format!("{reseal} --host state/host.pub --size 4MiB"),
        &["--size: volume \"v\" is re-keyed"],
    );
    folder.ok(&format!(
        "{reseal} --host state-b/host.pub --drop-host host-a"
    ));
    let (before, after) = (load(&folder, "v-2.toml"), load(&folder, "both.toml"));
    let (old, new) = (
        before.rekey.expect("re-key"),
        after.rekey.clone().expect("re-key"),
    );
    assert_eq!(old.id, new.id);
    let names = |keys: &[bulkhead_bundle::SealedKeyEntry]| -> Vec<String> {
        keys.iter().map(|entry| entry.recipient.clone()).collect()
    };
    assert_eq!(names(&after.sealed_keys), ["host-b", "recovery"]);
    assert_eq!(names(&new.previous_keys), ["host-b", "recovery"]);
    // Each is the key it was.
    let one_key = |name: &str, volume: Volume| {
        folder.write(name, &source::volume_to_toml(&volume));
        key(&folder, name)
    };
    let previous = one_key(
        "p.toml",
        Volume {
            sealed_keys: new.previous_keys,
            rekey: None,
            ..after.clone()
        },
    );
    let now = one_key(
        "n.toml",
        Volume {
            rekey: None,
            ..after
        },
    );
    assert!(previous.is_same(&key(&folder, "v.toml")));
    assert!(now.is_same(&key(&folder, "v-3.toml")));
}

#[test]
fn a_refused_rekey_leaves_no_stanza_and_the_file_as_it_was() {
    let folder = Folder::with_keys();
    folder.ok("host init --name host-b --state-dir state-b");
    folder.ok(&format!(
        "volume create --name v --path v.img --size 1MiB --file v.img {SEALED} --host \
         state-b/host.pub --out v.toml"
    ));
    let plain = "volume create --name p --path p.img --size 1MiB --data-unit none --socket p \
                 --allowed-uid 1 --out p.toml";
    folder.ok(plain);
    folder.ok(&plain
        .replace("--name p", "--read-only --name p")
        .replace(
            "--data-unit none --socket p",
            "--socket p --host state/host.pub --recovery recovery.key.pub",
        )
        .replace("p.toml", "ro.toml"));
    let all = format!("volume rekey --volume v.toml {KEYS} --host state-b/host.pub --out new.toml");
    folder.ok(&all.replace("new.toml", "has.toml"));
    folder.ok("host init --name host-b --state-dir anew");
    folder.write("short.img", "");
    folder.write("taken.toml", "");
    for (line, says) in [
        (all.replace("v.toml", "has.toml"), "has a re-key already"),
        (
            format!("volume rekey --volume p.toml {KEYS} --out new.toml"),
            "is plain: it has no key to replace",
        ),
        (
            format!("volume rekey --volume ro.toml {KEYS} --out new.toml"),
            "--volume: a read-only volume can't be re-keyed",
        ),
        (
            format!("volume rekey --volume v.toml {KEYS} --out new.toml"),
            "--host is missing for: host-b",
        ),
        (
            all.replace("state-b", "anew"),
            "is not sealed to \"host-b\" with the key",
        ),
        (
            format!("{all} --drop-host recovery"),
            "--drop-host: the key of volume \"v\" is not sealed to a host \"recovery\"",
        ),
        (
            all.replace("recovery.key.pub", "state/host.pub"),
            "not of recovery",
        ),
        (all.replace("new.toml", "taken.toml"), "taken.toml exists"),
        (
            format!("{all} --file short.img"),
            "short.img: has 0 bytes, and the volume has 1048576: is it the right file?",
        ),
        (format!("{all} --file state"), "state: "),
        (
            "volume rekey --finish --volume v.toml --out new.toml".to_owned(),
            "v.toml: has no re-key",
        ),
        (
            "volume rekey --prepare --volume v.toml --file v.img".to_owned(),
            "has no re-key to prepare for",
        ),
    ] {
        folder.refused(&line, &[says]);
        assert!(!folder.exists("new.toml"), "{line}");
        let length = fs::metadata(folder.path("v.img")).expect("file").len();
        assert_eq!(length, MIB);
    }
    folder.usage("volume rekey --volume v.toml --out new.toml", "--host");
    folder.usage(&format!("volume rekey --volume v.toml {KEYS}"), "--out");
    folder.usage("volume rekey --prepare --volume v.toml", "--file");
    folder.usage(
        "volume rekey --finish --volume v.toml --file v.img --out new.toml",
        "cannot be used with",
    );
    // A host that is dropped gets neither key.
    folder.ok(&format!(
        "volume rekey --volume v.toml {KEYS} --drop-host host-b --out new.toml"
    ));
    let volume = load(&folder, "new.toml");
    assert!(volume.sealed_for("host-b").is_none());
    assert!(volume.previous_sealed_for("host-b").is_none());
    // Another recovery key is taken, and said to be one.
    folder.ok("recovery new --out other.key");
    let ended = folder.run(
        &all.replace("recovery.key.pub", "other.key.pub")
            .replace("new.toml", "o.toml"),
        &[],
    );
    assert!(
        ended
            .stderr
            .contains("other.key.pub is another recovery key"),
        "{ended:?}"
    );
}

#[test]
fn a_volume_beyond_the_advised_scope_of_a_key_is_made_with_a_warning() {
    let folder = Folder::with_keys();
    let create = format!("volume create --name v --path v.img {SEALED} --out v.toml --size");
    let ended = folder.run(&format!("{create} 2TiB"), &[]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended
            .stderr
            .contains("IEEE 1619 advises at most 1099511627776"),
        "{ended:?}"
    );
    folder.write_bundle(&["v.toml"]);
    let ended = folder.run(
        "sign --bundle bundle.toml --key alice.key --out b.cose",
        &[],
    );
    assert!(ended.stderr.contains("IEEE 1619 advises"), "{ended:?}");
    fs::remove_file(folder.path("v.toml")).expect("remove");
    folder.refused(
        &format!("{create} 257TiB"),
        &["--size: ", "make several volumes"],
    );
    assert!(folder.run(&format!("{create} 1TiB"), &[]).stderr.is_empty());
}
