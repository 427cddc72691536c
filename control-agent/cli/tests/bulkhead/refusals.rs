//! What is refused, with which words and which exit code.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::{Folder, SEALED};

#[test]
fn mistakes_in_the_command_line_are_usage() {
    let folder = Folder::with_keys();
    let create = "volume create --name v --path v --size 1MiB --out v.toml";
    for (line, says) in [
        ("", "Usage: bulkhead"),
        ("frobnicate", "unrecognized subcommand"),
        ("operator new --name a", "--out"),
        ("trust new --out t", "--operator"),
        ("sign --bundle b --out c", "--key"),
        (
            &format!("{create} --socket s --allowed-uid 1 --recovery recovery.key.pub"),
            "--host is missing: the public key (host.pub) of each host",
        ),
        (
            &format!("{create} --socket s --allowed-uid 1 --host state/host.pub"),
            "Usage: bulkhead volume create",
        ),
        (
            &format!("{create} --socket Bad/Name --allowed-uid 1"),
            "socket name",
        ),
        (
            &format!("{create} {SEALED} --socket-mode 0999"),
            "octal permission bits",
        ),
        (&format!("{create} {SEALED} --data-unit 1024"), "1024"),
        (&format!("{create} {SEALED} --existing"), "--file"),
        (
            "volume create --name v --path v --size 64MB --out v.toml",
            "KiB, MiB, GiB or TiB",
        ),
    ] {
        folder.usage(line, says);
    }
}

#[test]
fn help_has_an_example_for_every_command() {
    let folder = Folder::new();
    for command in [
        "operator new",
        "trust new",
        "recovery new",
        "host init",
        "volume create",
        "volume recover",
        "volume export",
        "volume reseal",
        "sign",
        "show",
        "apply",
        "status",
    ] {
        let help = folder.ok(&format!("{command} --help"));
        assert!(help.contains("Example"), "{command}: {help}");
        assert!(
            help.contains(&format!("\n  bulkhead {command}")),
            "{command}"
        );
    }
    assert!(
        folder
            .ok("--help")
            .contains("Exit codes: 0 done, 1 refused")
    );
    assert!(folder.ok("--version").starts_with("bulkhead "));
}

#[test]
fn a_source_with_a_mistake_is_not_signed() {
    let folder = Folder::with_keys();
    folder.write_bundle(&["missing.toml"]);
    let sign = "sign --bundle bundle.toml --key alice.key --out b.cose";
    folder.refused(sign, &["bundle.toml:5: include: missing.toml"]);
    folder.write_bundle(&[]);
    let source = folder.read("bundle.toml").replace("epoch = 7", "epoch = 0");
    folder.write("bundle.toml", &source);
    folder.refused(sign, &["bundle.toml:2: epoch", "the lowest epoch is 1"]);
    folder.refused("show bundle.toml", &["the lowest epoch is 1"]);
    folder.write_bundle(&[]);
    folder.refused(
        "sign --bundle bundle.toml --key alice.key --key alice.key --out b.cose",
        &["alice was given twice"],
    );
    folder.refused(
        "sign --bundle bundle.toml --key recovery.key --out b.cose",
        &["recovery.key:2: kind", "operator private key"],
    );
    assert!(!folder.exists("b.cose"));
}

#[test]
fn a_volume_of_another_host_is_not_signed() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v --size 1MiB {SEALED} --out v.toml"
    ));
    folder.write_bundle(&["v.toml"]);
    let source = folder.read("bundle.toml").replace("host-a", "host-z");
    folder.write("bundle.toml", &source);
    folder.refused(
        "sign --bundle bundle.toml --key alice.key --out b.cose",
        &["no key is sealed to the host \"host-z\""],
    );
}

#[test]
fn an_envelope_that_was_changed_is_shown_as_not_to_be_trusted() {
    let folder = Folder::with_keys();
    folder.write_bundle(&[]);
    folder.ok("sign --bundle bundle.toml --key alice.key --out b.cose");
    let mut bytes = fs::read(folder.path("b.cose")).expect("read");
    // The host's name stands in the payload as it is written.
    let at = bytes
        .windows(6)
        .position(|window| window == b"host-a")
        .expect("name");
    bytes[at + 5] = b'b';
    fs::write(folder.path("changed.cose"), &bytes).expect("write");
    folder.refused(
        "show changed.cose --trust trust.toml",
        &["NOT to be trusted", "signature of operator alice is wrong"],
    );
    folder.ok("operator new --name mallory --out mallory.key");
    folder.ok("sign --bundle bundle.toml --key mallory.key --out m.cose");
    folder.refused(
        "show m.cose --trust trust.toml",
        &["NOT to be trusted", "unknown key"],
    );
    folder.refused(
        "show bundle.toml --trust trust.toml",
        &["is not signed", "sign it first"],
    );
    fs::write(folder.path("half.cose"), &bytes[..200]).expect("write");
    folder.refused("show half.cose", &["half.cose: the envelope is malformed"]);
    folder.refused("show nothing.cose", &["nothing.cose: No such file"]);
}

#[test]
fn a_file_that_is_far_too_long_is_not_read() {
    let folder = Folder::new();
    let file = fs::File::create(folder.path("big")).expect("create");
    file.set_len(1 << 40).expect("sparse");
    folder.refused("show big", &["size cap of 1048576 bytes"]);
    folder.refused("apply big", &["size cap of 1048576 bytes"]);
}

#[test]
fn recovery_refuses_what_it_can_not_recover() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v --size 1MiB {SEALED} --out v.toml"
    ));
    let recover = "volume recover --bundle v.toml --volume v --out k --recovery";
    folder.refused(
        "volume recover --bundle v.toml --volume w --recovery recovery.key --out k",
        &["there is no volume \"w\"; there are: v"],
    );
    folder.ok("recovery new --out other.key");
    folder.refused(
        &format!("{recover} other.key"),
        &["another key of \"recovery\""],
    );
    folder.ok("host init --name host-b --state-dir b");
    folder.refused(
        &format!("{recover} b/keyd/host.key"),
        &["not sealed to \"host-b\", only to: host-a, recovery"],
    );
    folder.refused(
        &format!("{recover} alice.key"),
        &["alice.key:2: kind", "recipient private key"],
    );
    fs::set_permissions(
        folder.path("recovery.key"),
        fs::Permissions::from_mode(0o604),
    )
    .expect("chmod");
    folder.refused(
        &format!("{recover} recovery.key"),
        &["recovery.key can be read by others"],
    );
    assert!(!folder.exists("k"), "no key file after a refusal");
}

#[test]
fn recovery_never_overwrites_a_file() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v --size 1MiB {SEALED} --out v.toml"
    ));
    folder.write("k", "precious");
    folder.refused(
        "volume recover --bundle v.toml --volume v --recovery recovery.key --out k",
        &["k exists"],
    );
    assert_eq!(folder.read("k"), "precious");
}

#[test]
fn a_changed_geometry_does_not_open() {
    let folder = Folder::with_keys();
    folder.ok(&format!(
        "volume create --name v --path v --size 1MiB {SEALED} --out v.toml"
    ));
    let stanza = folder.read("v.toml");
    for (from, to) in [
        ("size = 1048576", "size = 2097152"),
        ("data_unit = 4096", "data_unit = 512"),
        (
            "id = \"",
            "id = \"00000000-0000-4000-8000-000000000000\" # ",
        ),
    ] {
        folder.write("w.toml", &stanza.replacen(from, to, 1));
        folder.refused(
            "volume recover --bundle w.toml --volume v --recovery recovery.key --out k",
            &[
                "does not open for volume",
                "size, data unit or logical block",
            ],
        );
    }
    assert!(!folder.exists("k"));
}
