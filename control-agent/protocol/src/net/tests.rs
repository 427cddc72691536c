//! What is well-formed and what is not, and how it travels.

use super::*;
use crate::limits::Rate;

#[test]
fn a_mac_is_that_of_one_station() {
    let mac: Mac = "52:54:00:12:34:Fe".parse().expect("a MAC");
    assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0x12, 0x34, 0xfe]);
    assert_eq!(mac.to_string(), "52:54:00:12:34:fe");
    for bad in [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "52-54-00-12-34-56",
        "5:54:00:12:34:56",
        "+2:54:00:12:34:56",
        "00:00:00:00:00:00",
        "ff:ff:ff:ff:ff:ff",
        "53:54:00:12:34:56",
    ] {
        assert!(bad.parse::<Mac>().is_err(), "{bad}");
    }
    let bytes = minicbor::to_vec(mac).expect("encodes");
    assert_eq!(minicbor::decode::<Mac>(&bytes).ok(), Some(mac));
    let multicast = [0x46, 1, 0, 0, 0, 0, 0];
    assert!(minicbor::decode::<Mac>(&multicast).is_err());
}

#[test]
fn an_interface_is_named_as_the_kernel_can_and_no_pattern() {
    for good in ["eth0", "bh-lan.5", "X_1", "123456789012345"] {
        assert!(good.parse::<InterfaceName>().is_ok(), "{good}");
    }
    for bad in [
        "",
        "1234567890123456",
        ".",
        "..",
        "tap%d",
        "a/b",
        "a b",
        "a:1",
        "-a",
        "ä",
    ] {
        assert!(bad.parse::<InterfaceName>().is_err(), "{bad}");
    }
}

#[test]
fn a_prefix_is_written_in_one_way() {
    for (text, written) in [
        ("10.1.2.0/24", "10.1.2.0/24"),
        ("10.1.2.3", "10.1.2.3/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("fd00::/64", "fd00::/64"),
        ("::/0", "::/0"),
        ("fe80::1", "fe80::1/128"),
    ] {
        let prefix: IpPrefix = text.parse().expect("a prefix");
        assert_eq!(prefix.to_string(), written);
        let bytes = minicbor::to_vec(prefix).expect("encodes");
        assert_eq!(minicbor::decode::<IpPrefix>(&bytes).ok(), Some(prefix));
    }
    for bad in [
        "",
        "10.1.2.3/24",
        "10.1.2.0/33",
        "10.1.2.0/-1",
        "10.1.2.0/+24",
        "10.1.2.0/",
        "fd00::1/64",
        "fd00::/129",
        "10.1.2",
    ] {
        assert!(bad.parse::<IpPrefix>().is_err(), "{bad}");
    }
    for bad in [&[0x45, 10, 0, 0, 1, 24][..], &[0x44, 10, 0, 0, 8], &[0x40]] {
        assert!(minicbor::decode::<IpPrefix>(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_prefix_has_the_addresses_that_begin_like_it() {
    let has = |prefix: &str, address: &str| {
        let prefix: IpPrefix = prefix.parse().expect("a prefix");
        prefix.contains(address.parse().expect("an address"))
    };
    assert!(has("10.1.2.0/23", "10.1.3.255") && !has("10.1.2.0/23", "10.1.4.0"));
    assert!(has("0.0.0.0/0", "255.255.255.255") && !has("0.0.0.0/0", "::1"));
    assert!(has("10.0.0.1", "10.0.0.1") && !has("10.0.0.1", "10.0.0.0"));
    assert!(has("fd00::/64", "fd00::ffff") && !has("fd00::/64", "fd00:0:0:1::"));
    assert!(!has("10.0.0.0/8", "::ffff:10.0.0.1"));
}

#[test]
fn limits_out_of_bounds_are_named_by_field_and_direction() {
    let with = |change: fn(&mut NicLimits)| {
        let mut limits = NicLimits::default();
        change(&mut limits);
        limits.check().map_err(|e| e.field)
    };
    const NOTHING: Option<Rate> = Some(Rate {
        per_second: 0,
        burst: 0,
    });
    let no_burst = |per_second| {
        Some(Rate {
            per_second,
            burst: 0,
        })
    };
    assert_eq!(with(|_| {}), Ok(()));
    assert_eq!(with(|l| l.tx.packets = NOTHING), Err("tx_packets"));
    assert_eq!(with(|l| l.tx.bytes = NOTHING), Err("tx_bandwidth"));
    assert_eq!(with(|l| l.rx.packets = NOTHING), Err("rx_packets"));
    let mut limits = NicLimits::default();
    limits.rx.bytes = no_burst(1 << 20);
    let error = limits.check().expect_err("refused");
    assert_eq!(error.field, "rx_bandwidth_burst");
}

#[test]
fn limits_are_told_in_words() {
    let mut limits = NicLimits::default();
    assert_eq!(limits.to_string(), "none");
    limits.tx.packets = Some(Rate::with_default_burst(1000));
    assert_eq!(limits.to_string(), "sends 1000 packets/s (burst 100)");
    limits.rx.bytes = Some(Rate::with_default_burst(10 << 20));
    let words = "sends 1000 packets/s (burst 100); gets 10 MiB/s (burst 1 MiB)";
    assert_eq!(limits.to_string(), words);
}

fn grant() -> NicGrant {
    NicGrant {
        nic: NicId([1; 16]),
        socket: "vm7-net".parse().expect("a name"),
        allowed_uid: 1000,
        mac: "52:54:00:00:00:07".parse().expect("a MAC"),
        mtu: 1500,
        queue_pairs: 4,
        port: PortSpec::Switch {
            switch: "lan".parse().expect("a name"),
        },
        uplink: Some(Uplink::Tap {
            interface: "bh-lan".parse().expect("a name"),
        }),
        limits: NicLimits::default(),
        checks: SpoofChecks::default(),
        mirror: None,
        epoch: 3,
    }
}

fn xdp_uplink(queue: u16) -> Uplink {
    Uplink::AfXdp {
        interface: "eth1".parse().expect("a name"),
        queue,
    }
}

#[test]
fn af_xdp_has_its_longest_mtu_and_its_last_queue() {
    let mut good = grant();
    (good.uplink, good.mtu) = (Some(xdp_uplink(AF_XDP_QUEUES - 1)), MAX_AF_XDP_MTU);
    assert_eq!(good.check(), Ok(()));
    let interface = "eth0".parse().expect("a name");
    let queue = AF_XDP_QUEUES - good.queue_pairs;
    (good.uplink, good.port) = (None, PortSpec::AfXdp { interface, queue });
    assert_eq!(good.check(), Ok(()));
    good.mtu += 1;
    let refused = good.check().expect_err("too long");
    assert!(
        refused.starts_with("its mtu: 3819 is more than the 3818 that its port"),
        "{refused}"
    );
    good.port = PortSpec::Null;
    assert_eq!(good.check(), Ok(()));
}

#[test]
fn a_grant_that_describes_no_nic_is_refused() {
    assert_eq!(grant().check(), Ok(()));
    type Change = fn(&mut NicGrant);
    let cases: [(&str, Change); 11] = [
        ("MTU", |g| g.mtu = 67),
        ("no queue", |g| g.queue_pairs = 0),
        ("queues", |g| g.queue_pairs = 17),
        ("uplink of no switch", |g| g.port = PortSpec::Null),
        ("an MTU that its uplink has not", |g| {
            (g.uplink, g.mtu) = (Some(xdp_uplink(0)), MAX_AF_XDP_MTU + 1);
        }),
        ("a queue that no uplink has", |g| {
            g.uplink = Some(xdp_uplink(AF_XDP_QUEUES));
        }),
        ("queues that no port has", |g| {
            let interface = "eth0".parse().expect("a name");
            (g.uplink, g.port) = (
                None,
                PortSpec::AfXdp {
                    interface,
                    queue: AF_XDP_QUEUES - 3,
                },
            );
        }),
        ("a rate of nothing", |g| {
            g.limits.rx.packets = Some(Rate {
                per_second: 0,
                burst: 1,
            });
        }),
        ("sources", |g| {
            g.checks.sources = vec!["10.0.0.1".parse().expect("one"); MAX_SOURCES + 1];
        }),
        ("snap", |g| {
            g.mirror = Some(MirrorSpec {
                file: "a".to_owned(),
                snap_bytes: 63,
                most_bytes: 1 << 20,
            });
        }),
        ("mirror", |g| {
            g.mirror = Some(MirrorSpec {
                file: "a".to_owned(),
                snap_bytes: 64,
                most_bytes: 1,
            });
        }),
    ];
    for (name, change) in cases {
        let mut bad = grant();
        change(&mut bad);
        assert!(bad.check().is_err(), "{name}");
    }
}

#[test]
fn a_grant_travels_whole() {
    let mut sent = grant();
    sent.checks.sources = vec!["10.0.0.0/8".parse().expect("a prefix")];
    sent.limits.tx.bytes = Some(Rate::with_default_burst(1 << 20));
    for port in [
        sent.port.clone(),
        PortSpec::Tap {
            interface: "tap0".parse().expect("a name"),
        },
        PortSpec::AfXdp {
            interface: "eth0".parse().expect("a name"),
            queue: 3,
        },
        PortSpec::Null,
    ] {
        sent.port = port;
        let bytes = minicbor::to_vec(&sent).expect("encodes");
        assert_eq!(
            minicbor::decode::<NicGrant>(&bytes).ok().as_ref(),
            Some(&sent)
        );
    }
    assert_eq!(sent.port.descriptors(4), 0);
}
