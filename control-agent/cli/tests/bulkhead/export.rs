//! A volume's bytes come out decrypted, to a file or a stream, and every refusal leaves no trace.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Stdio};

use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

use crate::{Ended, Folder, SEALED};

const SIZE: usize = 3 << 20;
const EXPORT: &str =
    "volume export --bundle v.toml --volume v --recovery recovery.key --file v.img --out raw";

/// Bytes with a hole of zeroes in the middle and at the end.
fn plain() -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..=250).cycle().take(SIZE).collect();
    bytes[1 << 20..2 << 20].fill(0);
    bytes[SIZE - (128 << 10)..].fill(0);
    bytes
}

/// A volume whose file has the plain bytes as a data plane would have written them, and more behind.
fn volume(unit: u32) -> Folder {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v.img --size 3MiB --data-unit {unit} {SEALED} --out v.toml"
    ));
    folder.ok(
        "volume recover --bundle v.toml --volume v --recovery recovery.key --out recovered.key",
    );
    let key = fs::read(folder.path("recovered.key")).expect("key");
    let key = XtsKey::new(
        &SecretArena::new(1).expect("arena"),
        key.as_slice().try_into().expect("64 bytes"),
    )
    .expect("key");
    let mut stored = vec![0; SIZE];
    let unit = DataUnit::new(unit).expect("unit");
    key.encrypt(unit, 0, &plain(), &mut stored)
        .expect("encrypted");
    stored.extend([0xee; 4096]);
    fs::write(folder.path("v.img"), stored).expect("file");
    folder
}

#[test]
fn a_file_gets_the_plain_bytes_and_holes_where_they_are_zero() {
    for unit in [512, 4096] {
        let folder = volume(unit);
        folder.ok(EXPORT);
        assert_eq!(fs::read(folder.path("raw")).expect("read"), plain());
        assert_eq!(folder.mode("raw"), 0o600);
        let metadata = fs::metadata(folder.path("raw")).expect("metadata");
        assert!(
            metadata.blocks() * 512 <= (SIZE - (1 << 20)) as u64,
            "{} blocks: it has no holes",
            metadata.blocks()
        );
    }
}

#[test]
fn standard_output_gets_the_same_and_nothing_else() {
    let folder = volume(4096);
    let export = "volume export --bundle v.toml --volume v --recovery recovery.key --file v.img";
    let output = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .current_dir(folder.path(""))
        .args(export.split_whitespace())
        .output()
        .expect("run");
    assert!(output.status.success());
    assert!(output.stderr.is_empty(), "{:?}", output.stderr);
    assert_eq!(output.stdout, plain());
}

#[test]
fn a_terminal_sees_progress_and_never_the_bytes() {
    let folder = volume(4096);
    // script(1) gives the command a terminal.
    let at_terminal = |line: &str| -> Ended {
        let command = format!("{} {line}", env!("CARGO_BIN_EXE_bulkhead"));
        Command::new("script")
            .current_dir(folder.path(""))
            .args(["-qec", &command, "/dev/null"])
            .stdin(Stdio::null())
            .output()
            .expect("script, of Debian's bsdutils")
            .into()
    };
    let shown = at_terminal(EXPORT);
    assert_eq!(shown.code, 0, "{shown:?}");
    assert!(shown.stdout.contains("100 % of 3 MiB"), "{shown:?}");
    assert_eq!(fs::read(folder.path("raw")).expect("read"), plain());
    let refused = at_terminal(&EXPORT.replace("--out raw", ""));
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stdout.contains("are not for a terminal"));
    assert!(refused.stdout.len() < 1000, "the bytes came as well");
    // Elsewhere there is no such line.
    let quiet = folder.run(&format!("{EXPORT} --force"), &[]);
    assert!(quiet.stderr.is_empty(), "{quiet:?}");
}

#[test]
fn a_reader_that_ends_early_is_an_error() {
    let folder = volume(4096);
    let mut child = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .current_dir(folder.path(""))
        .args(EXPORT.replace("--out raw", "").split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("output");
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("standard output: "), "{stderr}");
}

#[test]
fn a_plain_volume_is_copied_without_a_key() {
    let folder = Folder::with_keys();
    folder.ok(
        "volume create --name v --path v.img --size 3MiB --data-unit none --socket s --allowed-uid 1 --out v.toml",
    );
    fs::write(folder.path("v.img"), plain()).expect("file");
    folder.ok("volume export --bundle v.toml --volume v --file v.img --out raw");
    assert_eq!(fs::read(folder.path("raw")).expect("read"), plain());
}

#[test]
fn a_volume_in_use_is_read_only_when_forced() {
    let folder = volume(4096);
    let used = File::open(folder.path("v.img")).expect("open");
    used.lock().expect("lock");
    folder.refused(EXPORT, &["v.img: is in use (locked)", "--force"]);
    assert!(!folder.exists("raw"));
    let forced = folder.run(&format!("{EXPORT} --force"), &[]);
    assert_eq!(forced.code, 0, "{forced:?}");
    assert!(forced.stderr.contains("warning: v.img is in use"));
    assert_eq!(fs::read(folder.path("raw")).expect("read"), plain());
    // Another reader is no reason.
    used.unlock().expect("unlock");
    used.lock_shared().expect("lock");
    fs::remove_file(folder.path("raw")).expect("remove");
    folder.ok(EXPORT);
}

#[test]
fn what_is_there_is_overwritten_only_when_forced_and_never_the_volume() {
    let folder = volume(4096);
    folder.write("raw", &"x".repeat(SIZE + 5));
    folder.refused(EXPORT, &["raw: exists", "--force"]);
    assert_eq!(folder.read("raw").len(), SIZE + 5);
    folder.ok(&format!("{EXPORT} --force"));
    assert_eq!(fs::read(folder.path("raw")).expect("read"), plain());
    let before = fs::read(folder.path("v.img")).expect("read");
    fs::hard_link(folder.path("v.img"), folder.path("other")).expect("link");
    for out in ["v.img", "other"] {
        folder.refused(
            &format!("{} --force", EXPORT.replace("raw", out)),
            &[out, "is the volume itself"],
        );
    }
    folder.refused(
        &format!("{} --force", EXPORT.replace("raw", "/dev/null")),
        &["/dev/null: is neither a file nor a block device"],
    );
    assert_eq!(fs::read(folder.path("v.img")).expect("read"), before);
}

#[test]
fn a_refused_or_failed_export_leaves_no_file() {
    let folder = volume(4096);
    folder.ok("recovery new --out other.key");
    let refused = |line: &str, says: &[&str]| {
        folder.refused(line, says);
        assert!(!folder.exists("raw"), "{line}");
    };
    refused(
        &EXPORT.replace("--volume v ", "--volume w "),
        &["there is no volume \"w\"; there are: v"],
    );
    refused(
        &EXPORT.replace("--recovery recovery.key ", ""),
        &["volume \"v\" is encrypted", "--recovery"],
    );
    refused(
        &EXPORT.replace("--recovery recovery.key ", "--recovery other.key "),
        &["sealed to another key of \"recovery\""],
    );
    refused(
        &EXPORT.replace("--file v.img", "--file missing.img"),
        &["missing.img: "],
    );
    refused(
        &EXPORT.replace("--file v.img", "--file state"),
        &["state: is neither a file nor a block device"],
    );
    refused(
        &EXPORT.replace("--out raw", "--out no/such/raw"),
        &["no/such/raw: "],
    );
    // A size that the key was not sealed for.
    let stanza = folder.read("v.toml");
    folder.write(
        "v.toml",
        &stanza.replace("size = 3145728", "size = 2097152"),
    );
    refused(EXPORT, &["does not open"]);
    folder.write("v.toml", &stanza);
    // A file that is too short for the volume.
    let file = File::options().write(true).open(folder.path("v.img"));
    file.expect("open").set_len(3145727).expect("cut");
    refused(
        EXPORT,
        &["v.img: has 3145727 bytes, and the volume needs 3145728"],
    );
}
