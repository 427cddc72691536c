//! Network cards: what keyd grants of them, and what it revokes, by whichever keyd it was granted.

use bulkhead_bundle::{HostBundle, Nic, SocketSpec, Switch};
use bulkhead_protocol::NicId;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::net::{MirrorSpec, NicGrant, NicLimits, PortSpec, SpoofChecks, Uplink};

use crate::bundles::{bundle, encrypted, plain, random_key, signed};
use crate::host::Host;

fn nic_id(number: u8) -> NicId {
    NicId([0x80 + number; 16])
}

fn nic(number: u8) -> Nic {
    Nic {
        id: nic_id(number),
        name: format!("net{number}"),
        mac: format!("52:54:00:00:00:{number:02x}")
            .parse()
            .expect("a MAC"),
        mtu: 9000,
        queue_pairs: 4,
        port: PortSpec::Switch {
            switch: "lan".parse().expect("a name"),
        },
        socket: SocketSpec {
            name: format!("vm{number}-net").parse().expect("a name"),
            uid: 1,
            gid: 2,
            mode: 0o660,
        },
        allowed_uid: 2000 + u32::from(number),
        force_removal: false,
        limits: NicLimits::default(),
        checks: SpoofChecks::default(),
        mirror: None,
    }
}

fn uplink() -> Uplink {
    Uplink::Tap {
        interface: "bh-lan".parse().expect("a name"),
    }
}

fn networked(epoch: u64, nics: Vec<Nic>) -> HostBundle {
    let mut bundle = bundle(epoch, Vec::new());
    bundle.switches = vec![Switch {
        name: "lan".parse().expect("a name"),
        uplink: Some(uplink()),
    }];
    bundle.nics = nics;
    bundle
}

#[test]
fn a_grant_of_a_nic_says_what_the_bundle_says_and_has_no_key() {
    let mut limited = nic(1);
    limited.limits.tx.packets = Some(Rate::with_default_burst(1000));
    limited.checks.sources = vec!["10.0.0.1".parse().expect("a prefix")];
    limited.mirror = Some(MirrorSpec {
        file: "net1.pcapng".to_owned(),
        snap_bytes: 96,
        most_bytes: 1 << 20,
    });
    let mut alone = nic(2);
    alone.port = PortSpec::Tap {
        interface: "tap2".parse().expect("a name"),
    };
    let mut bundle = networked(7, vec![limited.clone(), alone.clone()]);
    let key = random_key();
    bundle.volumes = vec![encrypted(1, &key)];
    let mut host = Host::new();
    let got = host.apply(&signed(&bundle), 3);
    assert!(matches!(got[0].message, KeydToDataplane::Grant { .. }));
    let grants = [limited, alone].map(|nic| NicGrant {
        nic: nic.id,
        socket: nic.socket.name.clone(),
        allowed_uid: nic.allowed_uid,
        mac: nic.mac,
        mtu: 9000,
        queue_pairs: 4,
        uplink: matches!(nic.port, PortSpec::Switch { .. }).then(uplink),
        port: nic.port,
        limits: nic.limits,
        checks: nic.checks,
        mirror: nic.mirror,
        epoch: 7,
    });
    for (delivered, grant) in got[1..].iter().zip(grants) {
        assert_eq!(grant.check(), Ok(()));
        assert_eq!(delivered.message, KeydToDataplane::GrantNic { grant });
        assert_eq!(delivered.key, None);
    }
}

#[test]
fn a_nic_that_a_bundle_leaves_out_is_revoked_also_by_the_next_keyd() {
    let mut host = Host::new();
    host.apply(&signed(&networked(1, vec![nic(1), nic(2)])), 2);
    let got = host.apply(&signed(&networked(2, vec![nic(2)])), 2);
    let id = nic_id(1).into();
    assert_eq!(got[0].message, KeydToDataplane::Revoke { id });
    // A revocation that was never confirmed is what the next keyd begins with.
    host.ask(&signed(&bundle(3, vec![plain(1)])));
    let id = nic_id(2).into();
    assert_eq!(host.delivered().message, KeydToDataplane::Revoke { id });
    let state = std::fs::read_to_string(host.path("keyd/accepted")).expect("a state");
    assert!(state.starts_with("bulkhead keyd state v4\n"), "{state}");
    assert!(state.contains("\nheld-nic 82828282-8282-8282-8282-828282828282\n"));
    host.start();
    host.connect();
    let got = host.apply(&signed(&bundle(4, vec![plain(1)])), 2);
    assert_eq!(got[0].message, KeydToDataplane::Revoke { id });
    let state = std::fs::read_to_string(host.path("keyd/accepted")).expect("a state");
    assert!(state.starts_with("bulkhead keyd state v1\n"), "{state}");
}

#[test]
fn a_nic_that_the_data_plane_refuses_is_undelivered() {
    let mut host = Host::new();
    host.ask(&signed(&networked(1, vec![nic(1)])));
    let delivered = host.delivered();
    let id = nic_id(1).into();
    assert!(matches!(
        delivered.message,
        KeydToDataplane::GrantNic { .. }
    ));
    let reason = "no room".to_owned();
    host.say(&DataplaneToKeyd::GrantRefused { id, reason });
    let (_, undelivered) = host.accepted();
    assert_eq!(undelivered.len(), 1);
    assert_eq!(undelivered[0].id, id);
    assert!(undelivered[0].reason.contains("no room"));
}
