//! The TOML source: what it means, and that each mistake is named with file, line and field.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::source;

const GOOD: &str = r#"host = "host-a"
epoch = 7
not_before = 2026-01-31T12:00:00Z
expires = 2027-01-31T12:00:00+01:00

[[volume]]
id = "0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e90"
name = "root"
path = "root.img"
size = "64MiB"
data_unit = "none"
logical_block = 512
socket = { name = "vm1", mode = "0660", gid = 36 }
allowed_uid = 64055
"#;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).expect("write");
        path
    }
}

/// The error for this source, without the folder's name.
fn error_of(text: &str) -> String {
    let folder = Folder::new();
    let path = folder.write("bundle.toml", text);
    let error = source::load(&path)
        .expect_err("must be refused")
        .to_string();
    error.replace(&format!("{}/", folder.0.path().display()), "")
}

#[test]
fn a_source_means_what_it_says() {
    let folder = Folder::new();
    let bundle = source::load(&folder.write("bundle.toml", GOOD)).expect("good");
    // `date -u -d 2026-01-31T12:00:00Z +%s`
    assert_eq!(bundle.not_before, 1_769_860_800);
    assert_eq!(bundle.expires, 1_769_860_800 + 365 * 86_400 - 3_600);
    let volume = &bundle.volumes[0];
    assert_eq!(volume.size_bytes, 64 << 20);
    assert_eq!(volume.data_unit_bytes, None);
    assert_eq!(volume.socket.mode, 0o660);
    assert_eq!((volume.socket.uid, volume.socket.gid), (0, 36));
    assert_eq!(volume.queues, 1);
    assert_eq!(volume.discard, DiscardPolicy::Ignore);
    assert!(!volume.read_only && !volume.force_removal);
}

#[test]
fn times_are_read_as_the_calendar_has_them() {
    for (text, seconds) in [
        ("1970-01-01T00:00:00Z", 0u64),
        ("2000-02-29T23:59:59Z", 951_868_799),
        ("2024-12-31T00:00:00-05:30", 1_735_623_000),
        ("2100-03-01T00:00:00Z", 4_107_542_400),
        ("12", 12),
    ] {
        let folder = Folder::new();
        let text = GOOD
            .replace("2026-01-31T12:00:00Z", text)
            .replace("2027-01-31T12:00:00+01:00", "9999-01-01T00:00:00Z");
        let bundle = source::load(&folder.write("b.toml", &text)).expect("good");
        assert_eq!(bundle.not_before, seconds);
    }
}

#[test]
fn a_volume_survives_its_stanza_and_is_included() {
    let folder = Folder::new();
    let volumes = [encrypted(1), rekeyed(2)];
    for (number, volume) in (1..).zip(&volumes) {
        let stanza = source::volume_to_toml(volume);
        folder.write(&format!("disk{number}.toml"), &stanza);
    }
    let source = "include = [\"disk1.toml\", \"disk2.toml\"]\nhost = \"host-a\"\nepoch = 7\n\
                  not_before = 1000\nexpires = 2000\n\
                  force_remove = \"09090909-0909-0909-0909-090909090909\"\n";
    let loaded = source::load(&folder.write("bundle.toml", source)).expect("good");
    let expected = HostBundle {
        volumes: volumes.to_vec(),
        ..bundle()
    };
    assert_eq!(loaded, expected);
}

#[test]
fn mistakes_are_named_with_file_line_and_field() {
    let digest = format!("supersedes = \"{}\"\nepoch", "0g".repeat(48));
    for (from, to, expected) in [
        ("epoch = 7", "epoch = ", "bundle.toml:2: not TOML: "),
        (
            "epoch = 7",
            "epoch = \"7\"",
            "bundle.toml:2: epoch: must be an integer, not a value of type string",
        ),
        (
            "epoch = 7",
            "epoch = -7",
            "bundle.toml:2: epoch: -7 is not between 0 and",
        ),
        ("epoch = 7\n", "", "bundle.toml:1: epoch: is missing"),
        (
            "epoch = 7",
            "epoch = 7\nfoo = 1",
            "bundle.toml:3: foo: is an unknown field; there are: volume, nic, include, group",
        ),
        (
            "epoch",
            digest.as_str(),
            "bundle.toml:2: supersedes: is not a SHA-384 digest",
        ),
        (
            "2026-01-31T12:00:00Z",
            "2026-01-31T12:00:00",
            "bundle.toml:3: not_before: must be a time with its offset",
        ),
        ("2027-", "2025-", "bundle.toml:4: expires: "),
        (
            "allowed_uid",
            "read_onyl = true\nallowed_uid",
            "bundle.toml:14: volume[0].read_onyl: is an unknown field",
        ),
        (
            "allowed_uid = 64055",
            "",
            "bundle.toml:6: volume[0].allowed_uid: is missing",
        ),
        (
            "0b5f6d1e-",
            "",
            "bundle.toml:7: volume[0].id: volume id \"9d4c",
        ),
        (
            "64MiB",
            "64MB",
            "bundle.toml:10: volume[0].size: \"64MB\" has the unknown unit",
        ),
        (
            "64MiB",
            "99999999TiB",
            "bundle.toml:10: volume[0].size: \"99999999TiB\" is over 2^64",
        ),
        (
            "64MiB",
            "513B",
            "bundle.toml:10: volume[0].size: volume \"root\": 513 bytes are not",
        ),
        (
            "data_unit = \"none\"\n",
            "",
            "bundle.toml:6: volume[0].data_unit: is missing",
        ),
        (
            "data_unit = \"none\"",
            "data_unit = 4096",
            "bundle.toml:11: volume[0].data_unit: volume \"root\": 4096 is larger",
        ),
        (
            "data_unit = \"none\"",
            "data_unit = 512",
            "bundle.toml:6: volume[0].sealed_key: volume \"root\": no key is sealed",
        ),
        (
            "\"0660\"",
            "660",
            "bundle.toml:13: volume[0].socket.mode: must be octal",
        ),
        (
            "\"0660\"",
            "0o7660",
            "bundle.toml:13: volume[0].socket: volume \"root\": mode 0o7660",
        ),
        (
            "\"vm1\"",
            "\"../vm1\"",
            "bundle.toml:13: volume[0].socket.name: socket name \"../vm1\" is not valid",
        ),
        (
            "gid = 36",
            "grp = 36",
            "bundle.toml:13: volume[0].socket.grp: is an unknown field",
        ),
        (
            "root.img",
            "../root.img",
            "bundle.toml:9: volume[0].path: volume \"root\": ",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let error = error_of(&GOOD.replacen(from, to, 1));
        assert!(error.starts_with(expected), "{from} -> {to}: {error}");
    }
}

#[test]
fn mistakes_across_files_name_the_file_that_has_them() {
    let folder = Folder::new();
    let text = GOOD.replace("host =", "include = [\"more.toml\"]\nhost =");
    let main = folder.write("bundle.toml", &text);
    let error = source::load(&main).expect_err("no such file").to_string();
    assert!(
        error.contains("bundle.toml:1: include: ") && error.contains("more.toml: No such file"),
        "{error}"
    );
    let (_, volume) = GOOD.split_at(GOOD.find("[[volume]]").expect("there"));
    let other = volume
        .replace("0b5f6d1e", "ffffffff")
        .replace("\"root\"", "\"data\"")
        .replace("root.img", "data.img");
    folder.write("more.toml", &format!("# a comment\n{other}"));
    let error = source::load(&main).expect_err("same socket").to_string();
    assert!(error.contains("more.toml:9: volume[0].socket: volume \"data\": \"vm1\" is also that of volume \"root\""), "{error}");
    folder.write("more.toml", "epoch = 4\n");
    let error = source::load(&main).expect_err("not a volume").to_string();
    assert!(
        error.contains("more.toml:1: epoch: is an unknown field"),
        "{error}"
    );
}
