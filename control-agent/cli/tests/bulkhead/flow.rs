//! From nothing to a signed bundle, and back to the key without any host.

use std::fs;

use crate::{Folder, SEALED};

/// A host's folder with one volume and its signed bundle.
fn signed(create: &str) -> Folder {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name disk --path disk.img --size 4MiB --file disk.img {create} {SEALED} --out disk.toml"
    ));
    folder.write_bundle(&["disk.toml"]);
    folder.ok("sign --bundle bundle.toml --key alice.key --out bundle.cose");
    folder
}

fn recover(folder: &Folder, from: &str, with: &str, out: &str) -> (Vec<u8>, String) {
    let line = folder.ok(&format!(
        "volume recover --bundle {from} --volume disk --recovery {with} --out {out}"
    ));
    (fs::read(folder.path(out)).expect("key"), line)
}

#[test]
fn the_key_comes_back_from_envelope_source_stanza_and_host() {
    let folder = signed("");
    let (key, _) = recover(&folder, "bundle.cose", "recovery.key", "k1");
    assert_eq!(key.len(), 64);
    assert_ne!(key[..32], key[32..], "the halves differ");
    for (index, (from, with)) in [
        ("bundle.toml", "recovery.key"),
        ("disk.toml", "recovery.key"),
        ("bundle.cose", "state/keyd/host.key"),
    ]
    .into_iter()
    .enumerate()
    {
        let (again, _) = recover(&folder, from, with, &format!("again{index}"));
        assert_eq!(again, key, "{from} with {with}");
    }
    assert_eq!(folder.mode("k1"), 0o600);
}

#[test]
fn a_volume_is_found_by_its_id_as_well() {
    let folder = signed("");
    let stanza = folder.read("disk.toml");
    let id = stanza.split('"').nth(1).expect("id");
    folder.ok(&format!(
        "volume recover --bundle disk.toml --volume {id} --recovery recovery.key --out k"
    ));
    assert_eq!(fs::read(folder.path("k")).expect("key").len(), 64);
}

#[test]
fn no_file_holds_the_key_but_the_one_that_recover_wrote() {
    let folder = signed("");
    let (key, _) = recover(&folder, "bundle.cose", "recovery.key", "recovered.key");
    let base64 = bulkhead_files::text::to_base64(&key);
    let hex = bulkhead_files::text::to_hex(&key);
    let needles: [&[u8]; 4] = [
        &key[..16],
        &key[32..48],
        &base64.as_bytes()[..20],
        &hex.as_bytes()[..32],
    ];
    let files = folder.files();
    assert!(files.len() > 9, "only {} files", files.len());
    for (path, bytes) in files {
        let holds = |needle: &&&[u8]| bytes.windows(needle.len()).any(|window| window == **needle);
        let found = needles.iter().filter(holds).count();
        let expected = if path.ends_with("recovered.key") {
            2
        } else {
            0
        };
        assert_eq!(found, expected, "{}", path.display());
    }
}

#[test]
fn the_cryptsetup_line_is_that_of_the_data_unit() {
    for (create, unit) in [
        ("--data-unit 4096", " --sector-size 4096 --iv-large-sectors"),
        ("--data-unit 512", ""),
        ("--data-unit 512 --read-only", ""),
    ] {
        let folder = signed(create);
        let (_, line) = recover(&folder, "bundle.cose", "recovery.key", "my.key");
        let key_file = folder.path("my.key").canonicalize().expect("path");
        let readonly = if create.contains("--read-only") {
            " --readonly"
        } else {
            ""
        };
        assert_eq!(
            line,
            format!(
                "cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 \
                 --key-file {} --keyfile-size 64{unit} --size 8192{readonly} disk.img bulkhead-disk\n",
                key_file.display()
            )
        );
    }
}

#[test]
fn show_says_what_an_envelope_says_and_who_signed() {
    let folder = signed("--serial abc --discard pass --queues 4");
    let verified = folder.ok("show bundle.cose --trust trust.toml");
    for part in [
        "kind         envelope\n",
        "host         host-a\n",
        "epoch        7\n",
        "not before   2026-01-31 12:00:00 UTC\n",
        "expires      2199-03-01 00:00:00 UTC\n",
        "volume       disk\n",
        "  path       disk.img\n",
        "  size       4 MiB, logical block 4096 B\n",
        "AES-256-XTS, data unit 4096 B",
        "read and write, discard passed on",
        "  serial     abc\n",
        "vm1, 4 queue(s), owner 1000:0, mode 0660; uid 1000 may connect",
        "  sealed to  host-a  ",
        "  sealed to  recovery  ",
        "signed by    alice\n",
        "good: 1 operator(s) signed, 1 needed",
    ] {
        assert!(verified.contains(part), "{part:?} is not in {verified}");
    }
    let envelope = fs::read(folder.path("bundle.cose")).expect("read");
    let digest = bulkhead_files::text::to_hex(&bulkhead_bundle::digest_of(&envelope));
    assert!(verified.contains(&format!("digest       {digest}\n")));

    let unverified = folder.ok("show bundle.cose");
    let public = folder.read("alice.key.pub");
    let fingerprint = public.split('"').nth(5).expect("fingerprint");
    assert!(unverified.contains(&format!("signed by    {fingerprint}\n")));
    assert!(unverified.contains("not verified"), "{unverified}");

    assert!(folder.ok("show bundle.toml").contains("not signed"));
    assert!(folder.ok("show disk.toml").contains("volumes alone"));
}

#[test]
fn two_operators_sign_one_envelope() {
    let folder = Folder::with_keys();
    folder.ok("operator new --name bob --out bob.key");
    let trust = "trust new --operator alice.key.pub --operator bob.key.pub --out both.toml";
    // Without --threshold, all of them have to sign.
    assert!(folder.ok(trust).contains("2 of 2 operators"));
    folder.write_bundle(&[]);
    folder.ok("sign --bundle bundle.toml --key alice.key --out one.cose");
    folder.ok("sign --bundle bundle.toml --key alice.key --key bob.key --out two.cose");
    let shown = folder.ok("show two.cose --trust both.toml");
    assert!(shown.contains("signed by    alice\n") && shown.contains("signed by    bob\n"));
    folder.refused(
        "show one.cose --trust both.toml",
        &["NOT to be trusted", "1 operator(s) signed", "demands 2"],
    );
}

#[test]
fn signing_again_replaces_the_envelope_and_leaves_nothing_else() {
    let folder = signed("");
    let before = folder.files().len();
    let first = fs::read(folder.path("bundle.cose")).expect("read");
    folder.ok("sign --bundle bundle.toml --key alice.key --out bundle.cose");
    // ECDSA signs with a fresh nonce: another envelope.
    assert_ne!(fs::read(folder.path("bundle.cose")).expect("read"), first);
    assert_eq!(folder.files().len(), before);
}

#[test]
fn an_expired_bundle_is_signed_with_a_warning() {
    let folder = Folder::with_keys();
    folder.write_bundle(&[]);
    let source = folder.read("bundle.toml").replace("2199-", "2026-");
    folder.write("bundle.toml", &source);
    let ended = folder.run(
        "sign --bundle bundle.toml --key alice.key --out b.cose",
        &[],
    );
    assert_eq!(ended.code, 0);
    assert!(ended.stderr.contains("expired already"), "{}", ended.stderr);
}
