//! Making volumes: the file, the stanza, and that a refusal leaves neither.

use std::fs;
use std::os::unix::fs::MetadataExt;

use bulkhead_bundle::{Volume, source};
use bulkhead_protocol::DiscardPolicy;

use crate::{Folder, SEALED};

fn stanza(folder: &Folder) -> Volume {
    let mut volumes = source::load_stanza(&folder.path("v.toml")).expect("stanza");
    assert_eq!(volumes.len(), 1);
    volumes.remove(0)
}

#[test]
fn the_defaults_are_those_of_the_help() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v.img --size 1MiB {SEALED} --out v.toml"
    ));
    let volume = stanza(&folder);
    assert_eq!(volume.size_bytes, 1 << 20);
    assert_eq!(volume.data_unit_bytes, Some(4096));
    assert_eq!(volume.logical_block_bytes, 4096);
    assert!(!volume.read_only);
    assert_eq!(volume.discard, DiscardPolicy::Ignore);
    assert_eq!(volume.queues, 1);
    assert_eq!(volume.allowed_uid, 1000);
    assert_eq!((volume.socket.uid, volume.socket.gid), (1000, 0));
    assert_eq!(volume.socket.mode, 0o660);
    assert_eq!(volume.serial.len(), 20);
    let id = volume.id.to_string();
    assert!(id.replace('-', "").starts_with(&volume.serial));
    assert_eq!(id.as_bytes().get(14), Some(&b'4'), "a version 4 UUID: {id}");
    let recipients: Vec<_> = volume.sealed_keys.iter().map(|k| &k.recipient).collect();
    assert_eq!(recipients, ["host-a", "recovery"]);
}

#[test]
fn every_option_reaches_the_stanza() {
    let folder = Folder::with_keys();
    folder.ok("host init --name host-b --state-dir state-b");
    folder.ok(&format!(
        "volume create --name v --path /dev/vg/v --size 4096 --data-unit 512 --logical-block 4096 \
         --read-only --serial S1 --discard pass --queues 8 --socket-uid 5 --socket-gid 6 \
         --socket-mode 0600 --requests 500 --bandwidth 10MiB --bandwidth-burst 64KiB --group tenant-a \
         --host state-b/host.pub {SEALED} --out v.toml"
    ));
    let volume = stanza(&folder);
    assert_eq!(volume.path, "/dev/vg/v");
    assert_eq!(volume.data_unit_bytes, Some(512));
    assert_eq!(volume.logical_block_bytes, 4096);
    assert!(volume.read_only);
    assert_eq!(volume.serial, "S1");
    assert_eq!(volume.discard, DiscardPolicy::Pass);
    assert_eq!(volume.queues, 8);
    let socket = &volume.socket;
    assert_eq!((socket.uid, socket.gid, socket.mode), (5, 6, 0o600));
    let limits = "500 requests/s (burst 50), 10 MiB/s (burst 64 KiB)";
    assert_eq!(volume.limits.to_string(), limits);
    assert_eq!(volume.group, "tenant-a".parse().ok());
    let shown = folder.ok("show v.toml");
    assert!(
        shown.contains(&format!("\n  limits     {limits}\n  group      tenant-a\n")),
        "{shown}"
    );
    for recipient in ["host-a", "host-b", "recovery"] {
        assert!(volume.sealed_for(recipient).is_some(), "{recipient}");
    }
}

#[test]
fn limits_and_group_stay_whenever_a_stanza_is_written_anew() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v.img --size 1MiB --file v.img --requests 500 --group tenant-a \
         {SEALED} --out v.toml"
    ));
    folder.ok(
        "volume reseal --volume v.toml --recovery recovery.key --host state/host.pub --out r.toml",
    );
    folder.ok(
        "volume rekey --volume v.toml --host state/host.pub --recovery recovery.key.pub \
         --out k.toml",
    );
    folder.ok("volume rekey --finish --volume k.toml --out a.toml");
    let said = "limits = { requests = 500, requests_burst = 50 }\ngroup = \"tenant-a\"\n";
    for name in ["v.toml", "r.toml", "k.toml", "a.toml"] {
        assert!(folder.read(name).contains(said), "{}", folder.read(name));
    }
    // The group is the bundle's.
    folder.write_bundle(&["r.toml"]);
    folder.refused(
        "sign --bundle bundle.toml --key alice.key --out b.cose",
        &[
            "r.toml:",
            "volume[0].group",
            "there is no group \"tenant-a\"",
        ],
    );
    let source = folder.read("bundle.toml");
    let more = "[workers]\ncount = 2\ncpus = \"2-3\"\n\n[[group]]\nname = \"tenant-a\"\n\
                limits = { bandwidth = \"1GiB\" }\n";
    folder.write("bundle.toml", &format!("{source}{more}"));
    folder.ok("sign --bundle bundle.toml --key alice.key --out b.cose");
    let shown = folder.ok("show b.cose");
    for line in [
        "workers      2 on CPUs 2-3\n",
        "group        tenant-a: limits 1 GiB/s (burst 107374182 B)\n",
        "  limits     500 requests/s (burst 50)\n",
        "  group      tenant-a\n",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
}

#[test]
fn limits_out_of_bounds_are_refused_with_their_name() {
    let folder = Folder::with_keys();
    for (limits, expected) in [
        (
            "--requests 0",
            "requests: 0 requests a second are not between",
        ),
        (
            "--bandwidth 1KiB",
            "bandwidth: 1024 bytes a second are not between 65536 and",
        ),
        (
            "--requests 1 --requests-burst 0",
            "requests_burst: a burst of 0 requests",
        ),
    ] {
        folder.refused(
            &format!(
                "volume create --name v --path v.img --size 1MiB {limits} {SEALED} --out v.toml"
            ),
            &[expected],
        );
        assert!(!folder.exists("v.toml"));
    }
}

#[test]
fn two_volumes_share_neither_id_nor_key() {
    let folder = Folder::with_keys();
    let mut keys = Vec::new();
    for name in ["a", "b"] {
        folder.ok(&format!(
            "volume create --name {name} --path {name}.img --size 1MiB {SEALED} --out {name}.toml"
        ));
        folder.ok(&format!(
            "volume recover --bundle {name}.toml --volume {name} --recovery recovery.key --out {name}.k"
        ));
        keys.push(fs::read(folder.path(&format!("{name}.k"))).expect("key"));
    }
    assert_ne!(keys[0], keys[1]);
    let id = |name: &str| folder.read(name).lines().nth(1).expect("id").to_owned();
    assert_ne!(id("a.toml"), id("b.toml"));
}

#[test]
fn the_file_is_reserved_in_full_and_given_away() {
    let folder = Folder::with_keys();
    let owner = if nix::unistd::geteuid().is_root() {
        "--owner-uid 4991"
    } else {
        ""
    };
    let ended = folder.run(
        &format!(
            "volume create --name v --path v.img --size 8MiB --file v.img {owner} {SEALED} --out v.toml"
        ),
        &[],
    );
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let metadata = fs::metadata(folder.path("v.img")).expect("file");
    assert_eq!(metadata.len(), 8 << 20);
    assert_eq!(folder.mode("v.img"), 0o600);
    if !owner.is_empty() {
        assert_eq!(metadata.uid(), 4991);
    }
    // Where the file system can't reserve, the operator was told so.
    let reserved = metadata.blocks() * 512 >= 8 << 20;
    assert!(reserved || ended.stderr.contains("sparse"), "{ended:?}");
}

#[test]
fn where_the_file_system_can_not_reserve_the_operator_is_told() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!(
            "skipped: where_the_file_system_can_not_reserve_the_operator_is_told needs root, to mount"
        );
        return;
    }
    let folder = Folder::with_keys();
    fs::create_dir(folder.path("ram")).expect("directory");
    // ramfs has no fallocate. A mount namespace of its own, so that nothing stays mounted.
    let script = format!(
        "mount -t ramfs ramfs ram && {} volume create --name v --path v.img --size 1MiB \
         --file ram/v.img {SEALED} --out v.toml && stat -c %s ram/v.img",
        env!("CARGO_BIN_EXE_bulkhead")
    );
    let ended: crate::Ended = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .current_dir(folder.path(""))
        .output()
        .expect("unshare")
        .into();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.ends_with("\n1048576\n"), "{ended:?}");
    assert!(
        ended
            .stderr
            .contains("can't reserve space; the file is sparse"),
        "{ended:?}"
    );
    assert!(!folder.exists("ram/v.img"), "the mount was its own");
}

#[test]
fn without_a_file_option_no_file_is_touched() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v.img --size 1MiB {SEALED} --out v.toml"
    ));
    assert!(!folder.exists("v.img"));
}

#[test]
fn an_existing_file_is_used_only_when_asked_and_only_as_it_is() {
    let folder = Folder::with_keys();
    folder.write("old.img", &"x".repeat(8192));
    let line = |size: &str, more: &str| {
        format!(
            "volume create --name v --path old.img --size {size} --file old.img {more} {SEALED} --out v.toml"
        )
    };
    folder.refused(&line("8192", ""), &["old.img: exists", "--existing"]);
    folder.refused(
        &line("12288", "--existing"),
        &["has 8192 bytes, and the volume needs 12288"],
    );
    assert!(!folder.exists("v.toml"));
    folder.ok(&line("8192", "--existing"));
    assert_eq!(folder.read("old.img"), "x".repeat(8192));
    folder.refused(
        &format!(
            "volume create --name v --path p --size 4096 --file state --existing {SEALED} --out w.toml"
        ),
        &["state: is neither a file nor a block device"],
    );
}

#[test]
fn a_refused_volume_leaves_no_file_behind() {
    let folder = Folder::with_keys();
    folder.write("taken.toml", "");
    let before = folder.files().len();
    for (options, says) in [
        ("--name a/b --path v --size 1MiB --out v.toml", "--name: "),
        (
            "--name v --path a/../b --size 1MiB --out v.toml",
            "--path: ",
        ),
        ("--name v --path v --size 1000 --out v.toml", "--size: "),
        ("--name v --path v --size 0 --out v.toml", "--size: "),
        (
            "--name v --path v --size 1MiB --queues 65 --out v.toml",
            "--queues: ",
        ),
        (
            "--name v --path v --size 1MiB --logical-block 512 --out v.toml",
            "--data-unit: ",
        ),
        (
            "--name v --path v --size 1MiB --serial 123456789012345678901 --out v.toml",
            "--serial: ",
        ),
        (
            "--name v --path v --size 1MiB --out taken.toml",
            "taken.toml exists",
        ),
        (
            "--name v --path v --size 1MiB --out no/such/folder.toml",
            "folder.toml",
        ),
        ("--name v --path v --size 4096TiB --out v.toml", "bytes"),
    ] {
        folder.refused(
            &format!("volume create {options} --file v.img {SEALED}"),
            &[says],
        );
        assert_eq!(folder.files().len(), before, "{options}");
    }
}

#[test]
fn the_roles_of_hosts_and_recovery_are_not_mixed_up() {
    let folder = Folder::with_keys();
    let create =
        "volume create --name v --path v --size 1MiB --socket s --allowed-uid 1 --out v.toml";
    folder.refused(
        &format!("{create} --host recovery.key.pub --recovery recovery.key.pub"),
        &["recovery.key.pub: is not a host's public key"],
    );
    folder.refused(
        &format!("{create} --host state/host.pub --recovery state/host.pub"),
        &["state/host.pub: is the public key of \"host-a\", not of recovery"],
    );
    folder.refused(
        &format!("{create} --host alice.key.pub --recovery recovery.key.pub"),
        &["alice.key.pub:1: kind", "recipient public key"],
    );
    folder.refused(
        &format!(
            "{create} --host state/host.pub --host state/host.pub --recovery recovery.key.pub"
        ),
        &["--host: two keys are sealed to \"host-a\""],
    );
    assert!(!folder.exists("v.toml"));
}

#[test]
fn a_plain_volume_has_no_key_and_says_so() {
    let folder = Folder::with_keys();
    let create =
        "volume create --name v --path v --size 1MiB --socket s --allowed-uid 1 --out v.toml";
    let stdout = folder.ok(&format!("{create} --data-unit none"));
    assert!(stdout.contains("a plain volume"), "{stdout}");
    let volume = stanza(&folder);
    assert_eq!(volume.data_unit_bytes, None);
    assert_eq!(volume.logical_block_bytes, 512);
    assert!(volume.sealed_keys.is_empty());
    folder.refused(
        "volume recover --bundle v.toml --volume v --recovery recovery.key --out k",
        &["volume \"v\" is plain", "can be read as it is"],
    );
    folder.usage(
        &format!("{create} --data-unit none --host state/host.pub"),
        "a plain volume (--data-unit none) has no key",
    );
}
