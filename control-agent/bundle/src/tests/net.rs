//! Networks in a bundle: what was signed before there were any stays what it was, and what makes no sense
//! is refused with its place.

use std::fs;

use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::net::{
    MAX_NICS, MAX_SOURCES, MAX_SWITCHES, MirrorSpec, NicLimits, PortSpec, SpoofChecks, Uplink,
};
use bulkhead_protocol::{NicId, ServedId};

use super::*;
use crate::{Nic, Switch, encoding, source, validate, verify};

fn nic(number: u8) -> Nic {
    Nic {
        id: NicId([0x80 + number; 16]),
        name: format!("net{number}"),
        mac: format!("52:54:00:00:00:{number:02x}")
            .parse()
            .expect("a MAC"),
        mtu: 1500,
        queue_pairs: 2,
        port: PortSpec::Switch {
            switch: "lan".parse().expect("a name"),
        },
        socket: SocketSpec {
            name: format!("vm{number}-net").parse().expect("a name"),
            uid: 1000,
            gid: 1000,
            mode: 0o660,
        },
        allowed_uid: 1000,
        force_removal: false,
        limits: NicLimits::default(),
        checks: SpoofChecks::default(),
        mirror: None,
    }
}

fn tap(name: &str) -> PortSpec {
    PortSpec::Tap {
        interface: name.parse().expect("a name"),
    }
}

fn af_xdp(name: &str, queue: u16) -> PortSpec {
    PortSpec::AfXdp {
        interface: name.parse().expect("a name"),
        queue,
    }
}

fn xdp_uplink(queue: u16) -> Uplink {
    Uplink::AfXdp {
        interface: "eth1".parse().expect("a name"),
        queue,
    }
}

/// A bundle that says something of everything here.
fn networked() -> HostBundle {
    let mut bundle = bundle();
    bundle.switches = vec![
        Switch {
            name: "lan".parse().expect("a name"),
            uplink: Some(Uplink::Tap {
                interface: "bh-lan".parse().expect("a name"),
            }),
        },
        Switch {
            name: "inside".parse().expect("a name"),
            uplink: None,
        },
    ];
    bundle.nics = vec![nic(1), nic(2), nic(3)];
    bundle.nics[0].limits.tx.packets = Some(Rate::with_default_burst(10_000));
    bundle.nics[0].limits.rx.bytes = Some(Rate::with_default_burst(100 << 20));
    bundle.nics[0].checks.sources = ["10.0.0.7", "fd00::/64"]
        .map(|text| text.parse().expect("a prefix"))
        .to_vec();
    bundle.nics[0].checks.trusted.router = true;
    bundle.nics[1].port = tap("tap7");
    bundle.nics[1].mirror = Some(MirrorSpec {
        file: "net2.pcapng".to_owned(),
        snap_bytes: 256,
        most_bytes: 1 << 30,
    });
    bundle.nics[2].port = af_xdp("eth1", 3);
    bundle.nics[2].checks.mac = false;
    bundle.force_remove_nics = vec![NicId([9; 16])];
    bundle
}

#[test]
fn without_networks_a_bundle_is_encoded_as_ever() {
    let plain = encoding::encode(&bundle());
    assert_eq!(plain[0], 0xa7, "seven entries");
    // An example by hand: what the field numbers are is what was signed.
    let mut with = bundle();
    with.switches = networked().switches;
    let mut one = nic(1);
    one.port = PortSpec::Null;
    with.nics = vec![one];
    with.force_remove_nics = networked().force_remove_nics;
    let mut expected = vec![0xaa];
    expected.extend(&plain[1..]);
    // 10: [{0: "lan", 1: [0, {0: "bh-lan"}]}, {0: "inside"}]
    expected.extend([0x0a, 0x82, 0xa2, 0x00, 0x63]);
    expected.extend(b"lan\x01\x82\x00\xa1\x00\x66bh-lan\xa1\x00\x66inside");
    // 11: [{0: id, 1: "net1", 2: mac, 3: 1500, 4: 2, 5: [3, {}], 6: socket, 7: 1000, 8: false, 10: {0: true}}]
    expected.extend([0x0b, 0x81, 0xaa, 0x00, 0x50]);
    expected.extend([0x81; 16]);
    expected.extend(b"\x01\x64net1\x02\x46\x52\x54\x00\x00\x00\x01\x03\x19\x05\xdc\x04\x02");
    expected.extend(b"\x05\x82\x03\xa0\x06\xa4\x00\x67vm1-net\x01\x19\x03\xe8\x02\x19\x03\xe8");
    expected.extend(b"\x03\x19\x01\xb0\x07\x19\x03\xe8\x08\xf4\x0a\xa1\x00\xf5");
    // 12: [id]
    expected.extend([0x0c, 0x81, 0x50]);
    expected.extend([9; 16]);
    assert_eq!(encoding::encode(&with), expected);
    assert_eq!(encoding::decode(&expected).as_ref(), Ok(&with));
}

#[test]
fn networks_are_signed_and_verified() {
    let trust = trust(1);
    let verified = verify(&signed(&networked()), &policy(&trust)).expect("holds");
    assert_eq!(*verified, networked());
    let uplinks: Vec<_> = verified
        .nics
        .iter()
        .map(|nic| verified.uplink_of(nic).is_some())
        .collect();
    assert_eq!(uplinks, [true, false, false]);
    let id = ServedId::Nic(NicId([0x82; 16]));
    assert_eq!(verified.name_of(id), Some("net2"));
    assert_eq!(verified.sockets().count(), 5);
    let gone = ServedId::Nic(NicId([9; 16]));
    assert!(verified.forces_removal_of_served(gone) && !verified.forces_removal_of_served(id));
}

#[test]
fn refused_fields_that_this_version_does_not_know() {
    let refused = |name: &[u8], at: usize| {
        let mut bytes = encoding::encode(&networked());
        let found = bytes.windows(name.len()).position(|w| w == name);
        bytes[found.expect("there") + at] += 8;
        encoding::decode(&bytes).expect_err("refused")
    };
    let unknown = |path: &str| encoding::DecodeError::UnknownField(path.to_owned());
    let checks = refused(b"\x0a\xa3\x00\xf5\x01\x82", 4);
    assert_eq!(checks, unknown("nics[0].checks.9"));
    let trusted = refused(b"\x02\xa2\x00\xf5\x01\xf4", 4);
    assert_eq!(trusted, unknown("nics[0].checks.trusted.9"));
    // A port or an uplink has no other field.
    let uplink = refused(b"\xa1\x00\x66bh-lan", 1);
    assert!(
        matches!(uplink, encoding::DecodeError::Malformed(_)),
        "{uplink:?}"
    );
}

/// The refusal of a bundle that was changed; it is not signed either.
fn refused(change: impl FnOnce(&mut HostBundle), expected: &str) {
    let mut bundle = networked();
    change(&mut bundle);
    let error = validate(&bundle).expect_err("refused").to_string();
    assert!(error.starts_with(expected), "{error}");
    assert!(crate::sign(&bundle, &[alice()]).is_err());
}

#[test]
fn refused_what_is_somebody_elses_already() {
    validate(&networked()).expect("good");
    refused(
        |b| b.nics[1].id = b.nics[0].id,
        "NIC \"net2\": id: \"81818181-8181-8181-8181-818181818181\" is also that of NIC \"net1\"",
    );
    refused(
        |b| b.nics[0].id = NicId(b.volumes[1].id.0),
        "NIC \"net1\": id: \"02020202-0202-0202-0202-020202020202\" is also that of volume \"disk2\"",
    );
    refused(
        |b| b.nics[1].mac = b.nics[0].mac,
        "NIC \"net2\": mac: \"52:54:00:00:00:01\" is also that of NIC \"net1\"",
    );
    refused(
        |b| b.nics[0].name = "disk1".to_owned(),
        "NIC \"disk1\": name: \"disk1\" is also that of volume \"disk1\"",
    );
    refused(
        |b| b.nics[0].socket.name = b.volumes[0].socket.name.clone(),
        "NIC \"net1\": socket: \"vm1\" is also that of volume \"disk1\"",
    );
    refused(
        |b| b.nics[0].mirror = b.nics[1].mirror.clone(),
        "NIC \"net2\": mirror: \"net2.pcapng\" is also that of NIC \"net1\"",
    );
    refused(
        |b| b.switches[1].name = b.switches[0].name.clone(),
        "switch \"lan\": name: there are two switches",
    );
}

#[test]
fn refused_an_interface_that_is_used_twice() {
    refused(
        |b| b.nics[1].port = tap("bh-lan"),
        "NIC \"net2\": port: interface bh-lan is also that of switch lan",
    );
    refused(
        |b| b.nics[1].port = tap("eth1"),
        "NIC \"net3\": port: interface eth1 is also that of NIC \"net2\"",
    );
    refused(
        |b| b.nics[1].port = af_xdp("eth1", 2),
        "NIC \"net3\": port: queue 3 of interface eth1 is also that of NIC \"net2\"",
    );
    refused(
        |b| b.nics[2].port = af_xdp("eth1", u16::MAX),
        "NIC \"net3\": port: queue 65536: only the first 64 of an interface",
    );
    refused(
        |b| b.nics[2].port = af_xdp("eth1", 63),
        "NIC \"net3\": port: queue 64: only the first 64 of an interface, 0 to 63,",
    );
    refused(
        |b| b.switches[1].uplink = Some(xdp_uplink(64)),
        "switch \"inside\": uplink: queue 64: only the first 64",
    );
    refused(
        |b| {
            b.switches[1].uplink = Some(xdp_uplink(4));
        },
        "NIC \"net3\": port: queue 4 of interface eth1 is also that of switch inside",
    );
    let mut side_by_side = networked();
    side_by_side.nics[1].port = af_xdp("eth1", 1);
    validate(&side_by_side).expect("other queues of the interface");
}

#[test]
fn refused_an_mtu_that_af_xdp_has_not() {
    refused(
        |b| b.nics[2].mtu = 9000,
        "NIC \"net3\": mtu: 9000 is more than the 3818 that its port can have",
    );
    refused(
        |b| (b.switches[0].uplink, b.nics[0].mtu) = (Some(xdp_uplink(0)), 3819),
        "NIC \"net1\": mtu: 3819 is more than the 3818 that its switch's uplink can have",
    );
    let mut good = networked();
    (good.nics[0].mtu, good.nics[1].mtu, good.nics[2].mtu) = (65_535, 65_535, 3818);
    validate(&good).expect("TAPs have any");
}

#[test]
fn refused_nics_that_make_no_sense() {
    refused(
        |b| b.nics[0].mtu = 67,
        "NIC \"net1\": mtu: 67 is not between 68 and 65535",
    );
    for pairs in [0, 17] {
        refused(
            |b| b.nics[0].queue_pairs = pairs,
            &format!("NIC \"net1\": queue_pairs: {pairs} is not between 1 and 16"),
        );
    }
    refused(
        |b| b.switches.clear(),
        "NIC \"net1\": port: there is no switch \"lan\" in the bundle",
    );
    refused(
        |b| b.nics[0].name = "a b".to_owned(),
        "NIC \"a b\": name: \"a b\" is not a name",
    );
    refused(
        |b| b.nics[0].socket.mode = 0o1777,
        "NIC \"net1\": socket: mode 0o1777",
    );
    refused(
        |b| b.nics[0].limits.tx.bytes = Some(Rate::with_default_burst(1)),
        "NIC \"net1\": limits: tx_bandwidth: 1 bytes a second are not between 65536 and",
    );
    refused(
        |b| {
            b.nics[0]
                .checks
                .sources
                .push("10.0.0.7/32".parse().expect("one"))
        },
        "NIC \"net1\": sources: 10.0.0.7/32 is named twice",
    );
    for (file, says) in [
        ("../x", "file: \"../x\" is not a name"),
        ("a/b", "file: \"a/b\""),
    ] {
        refused(
            |b| b.nics[1].mirror.as_mut().expect("one").file = file.to_owned(),
            &format!("NIC \"net2\": mirror: {says}"),
        );
    }
    refused(
        |b| b.nics[1].mirror.as_mut().expect("one").snap_bytes = 0,
        "NIC \"net2\": mirror: snap: 0 bytes are not between 64 and",
    );
    refused(
        |b| b.nics[1].mirror.as_mut().expect("one").most_bytes = u64::MAX,
        "NIC \"net2\": mirror: bytes: 18446744073709551615 bytes are not between",
    );
    refused(
        |b| b.force_remove_nics = vec![NicId([9; 16]); 2],
        "force_remove_nics: NIC 09090909-0909-0909-0909-090909090909 is named twice",
    );
    refused(
        |b| b.force_remove_nics = vec![NicId([0x81; 16])],
        "force_remove_nics: NIC 81818181-8181-8181-8181-818181818181 (\"net1\") is also among",
    );
}

#[test]
fn refused_more_than_a_host_has_room_for() {
    refused(
        |b| b.nics = (0..=MAX_NICS).map(|_| nic(1)).collect(),
        "nic: 257 NICs are more than 256",
    );
    refused(
        |b| b.switches = vec![b.switches[1].clone(); MAX_SWITCHES + 1],
        "switch: 65 switches are more than 64",
    );
    refused(
        |b| {
            let sources = (0..=MAX_SOURCES).map(|n| format!("10.0.0.{n}").parse().expect("one"));
            b.nics[0].checks.sources = sources.collect();
        },
        "NIC \"net1\": sources: 65 prefixes are more than 64",
    );
}

const SOURCE: &str = r#"host = "host-a"
epoch = 7
not_before = 1000
expires = 2000
force_remove = "09090909-0909-0909-0909-090909090909"
force_remove_nics = "09090909-0909-0909-0909-090909090909"
include = ["disks.toml"]

[[switch]]
name = "lan"
uplink = { tap = "bh-lan" }

[[switch]]
name = "inside"

[[nic]]
id = "81818181-8181-8181-8181-818181818181"
name = "net1"
mac = "52:54:00:00:00:01"
queue_pairs = 2
port = { switch = "lan" }
socket = { name = "vm1-net", uid = 1000, gid = 1000, mode = "0660" }
allowed_uid = 1000
limits = { tx_packets = 10_000, rx_bandwidth = "100MiB" }
sources = ["10.0.0.7", "fd00::/64"]
trusted = ["router"]
"#;

/// The source with these changes, or why it is refused.
fn load(from: &str, to: &str) -> Result<HostBundle, String> {
    let folder = tempfile::tempdir().expect("folder");
    let all = networked();
    let volumes = all.volumes.iter().map(source::volume_to_toml);
    let included: String = volumes
        .chain(all.nics.iter().skip(1).map(source::nic_to_toml))
        .collect();
    let path = folder.path().join("bundle.toml");
    assert!(SOURCE.contains(from) || included.contains(from), "{from}");
    let write = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text.replacen(from, to, 1)).expect("write");
    };
    write("bundle.toml", SOURCE);
    write("disks.toml", &included);
    let prefix = format!("{}/", folder.path().display());
    source::load(&path).map_err(|error| error.to_string().replace(&prefix, ""))
}

#[test]
fn a_source_says_networks() {
    assert_eq!(load("host-a", "host-a"), Ok(networked()));
    let bundle = load(
        "uplink = { tap = \"bh-lan\" }",
        "uplink = { af_xdp = \"eth0\" }",
    );
    let uplink = bundle.expect("good").switches[0].uplink.clone();
    assert_eq!(
        uplink.map(|u| u.to_string()).as_deref(),
        Some("AF_XDP eth0 queue 0")
    );
    let null = load("port = { switch = \"lan\" }", "port = \"null\"").expect("good");
    assert_eq!(null.nics[0].port, PortSpec::Null);
}

#[test]
fn mistakes_in_networks_are_named_with_file_line_and_field() {
    for (from, to, expected) in [
        (
            "uplink = { tap = \"bh-lan\" }",
            "uplink = { tap = \"a\", af_xdp = \"b\" }",
            "bundle.toml:11: switch[0].uplink.tap: is to be there, or af_xdp, and not both",
        ),
        (
            "uplink = { tap = \"bh-lan\" }",
            "uplink = { tap = \"tap%d\" }",
            "bundle.toml:11: switch[0].uplink.tap: interface name \"tap%d\" is not valid",
        ),
        (
            "uplink = { tap = \"bh-lan\" }",
            "uplink = \"bh-lan\"",
            "bundle.toml:11: switch[0].uplink: must be { tap = \"…\" } or { af_xdp",
        ),
        (
            "\n[[nic]]",
            "\n[nic]",
            "bundle.toml:16: nic: must be a list of tables, each begun with [[nic]]",
        ),
        (
            "52:54:00:00:00:01",
            "53:54:00:00:00:01",
            "bundle.toml:19: nic[0].mac: MAC address \"53:54:00:00:00:01\" is not valid",
        ),
        (
            "port = { switch = \"lan\" }",
            "port = { switch = \"lan\", tap = \"a\" }",
            "bundle.toml:21: nic[0].port: has one of switch, tap and af_xdp",
        ),
        (
            "port = { switch = \"lan\" }",
            "port = \"lan\"",
            "bundle.toml:21: nic[0].port: must be { switch",
        ),
        (
            "port = { switch = \"lan\" }",
            "port = { switch = \"wan\" }",
            "bundle.toml:21: nic[0].port: NIC \"net1\": there is no switch \"wan\"",
        ),
        (
            "queue_pairs = 2",
            "queue_pairs = 17",
            "bundle.toml:20: nic[0].queue_pairs: NIC \"net1\": 17 is not between",
        ),
        (
            "queue_pairs = 2",
            "queues = 2",
            "bundle.toml:20: nic[0].queues: is an unknown field",
        ),
        (
            "\"10.0.0.7\"",
            "\"10.0.0.7/24\"",
            "bundle.toml:25: nic[0].sources: IP prefix \"10.0.0.7/24\" is not valid",
        ),
        (
            "[\"router\"]",
            "[\"router\", \"bridge\"]",
            "bundle.toml:26: nic[0].trusted: is a list of \"router\" and \"dhcp\"",
        ),
        (
            "tx_packets = 10_000",
            "tx_packets_burst = 10_000",
            "bundle.toml:24: nic[0].limits.tx_packets_burst: is a burst over no rate",
        ),
        (
            "file = \"net2.pcapng\"",
            "file = \"x/y\"",
            "disks.toml:64: nic[0].mirror: NIC \"net2\": file: \"x/y\" is not a name",
        ),
        (
            "name = \"inside\"",
            "name = \"lan\"",
            "bundle.toml:14: switch[1].name: switch \"lan\": there are two switches",
        ),
    ] {
        let error = load(from, to).expect_err("refused");
        assert!(error.starts_with(expected), "{from} -> {to}: {error}");
    }
}
