//! Network cards and switches: signed and shown, and refused with their place.

use std::fs;

use crate::Folder;

const BUNDLE: &str = r#"host = "host-a"
epoch = 7
not_before = 2026-01-01T00:00:00Z
expires = 2126-01-01T00:00:00Z
include = ["card.toml"]

[[switch]]
name = "lan"
uplink = { tap = "bh-lan" }
"#;

const CARD: &str = r#"[[nic]]
id = "81818181-8181-8181-8181-818181818181"
name = "vm7-net"
mac = "52:54:00:12:34:56"
queue_pairs = 2
port = { switch = "lan" }
socket = { name = "vm7-net", uid = 1000, gid = 1000, mode = "0660" }
allowed_uid = 1000
sources = ["10.0.0.7"]
limits = { tx_packets = 1000 }
mirror = { file = "vm7.pcapng", snap = 256, bytes = "1GiB" }
"#;

fn folder() -> Folder {
    let folder = Folder::new();
    folder.ok("operator new --name alice --out alice.key");
    folder.ok("trust new --operator alice.key.pub --out trust.toml");
    fs::write(folder.path("bundle.toml"), BUNDLE).expect("write");
    fs::write(folder.path("card.toml"), CARD).expect("write");
    folder
}

const SIGN: &str = "sign --bundle bundle.toml --key alice.key --out bundle.cose";

#[test]
fn a_nic_is_signed_and_shown() {
    let folder = folder();
    let signed = folder.ok(SIGN);
    assert!(signed.contains("\nNICs         1\n"), "{signed}");
    let shown = folder.ok("show bundle.cose --trust trust.toml");
    for line in [
        "switch       lan: uplink TAP bh-lan\n",
        "NIC          vm7-net\n",
        "  id         81818181-8181-8181-8181-818181818181\n",
        "  address    52:54:00:12:34:56, MTU 1500\n",
        "  port       switch lan, 2 queue pair(s)\n",
        "  socket     vm7-net, owner 1000:1000, mode 0660; uid 1000 may connect\n",
        "  may be     its MAC, 10.0.0.7/32\n",
        "  limits     sends 1000 packets/s (burst 100)\n",
        "  mirror     vm7.pcapng, 256 B of each frame, at most 1 GiB\n",
        "signed by    alice\n",
    ] {
        assert!(shown.contains(line), "{line}{shown}");
    }
    let alone = folder.ok("show card.toml");
    assert!(
        alone.contains("volumes and NICs alone, not signed"),
        "{alone}"
    );
    assert!(alone.contains("  port       switch lan"), "{alone}");
}

#[test]
fn what_makes_no_sense_is_not_signed() {
    let folder = folder();
    for (from, to, says) in [
        (
            "switch = \"lan\"",
            "switch = \"wan\"",
            "card.toml:6: nic[0].port: ",
        ),
        ("52:54:00", "53:54:00", "card.toml:4: nic[0].mac: "),
        (
            "queue_pairs = 2",
            "queue_pairs = 17",
            "card.toml:5: nic[0].queue_pairs: ",
        ),
    ] {
        fs::write(folder.path("card.toml"), CARD.replace(from, to)).expect("write");
        folder.refused(SIGN, &[says]);
        assert!(!folder.path("bundle.cose").exists());
    }
}

#[test]
fn a_stanza_with_nics_is_not_taken_for_a_volumes() {
    let folder = folder();
    folder.refused(
        "volume reseal --volume card.toml --size 2MiB --out new.toml",
        &["NIC(s) beside volumes"],
    );
}
