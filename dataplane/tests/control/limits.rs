//! Grants with other limits or another group: taken in where the volume is served, and refused if they
//! make no sense.

use std::os::fd::AsFd;

use bulkhead_protocol::keys::{DataplaneToKeyd, VolumeGrant};
use bulkhead_protocol::limits::{GroupGrant, Limits, Rate};

use crate::grant_refused;
use crate::harness::{Host, VOLUME_BYTES, features, grant, key, key_page, volume};

fn requests(per_second: u64) -> Limits {
    Limits {
        requests: Some(Rate::with_default_burst(per_second)),
        bytes: None,
    }
}

fn group(per_second: u64) -> Option<GroupGrant> {
    Some(GroupGrant {
        name: "tenant-a".parse().expect("a name"),
        limits: requests(per_second),
    })
}

fn granted(host: &Host, grant: &VolumeGrant) {
    let page = key_page(&key(1)).into_fd();
    let volume = volume(1);
    let answer = host.grant(grant, &[page.as_fd()]);
    assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
}

#[test]
fn other_limits_and_another_group_leave_the_frontend_where_it_is() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    for (epoch, limits, group) in [
        (2, requests(100), None),
        (3, requests(5), group(7)),
        (4, Limits::default(), group(70)),
        (5, Limits::default(), None),
    ] {
        let limited = VolumeGrant {
            epoch,
            limits,
            group,
            ..grant(1)
        };
        granted(&host, &limited);
        assert!(features(&mut frontend).is_some(), "the connection stays");
        assert!(host.status_of(1).is_some_and(|s| s.attached && s.connected));
    }
    // With a greater size, too.
    host.file_of(1, 2 * VOLUME_BYTES);
    let grown = VolumeGrant {
        epoch: 6,
        limits: requests(100),
        size_bytes: 2 * VOLUME_BYTES,
        ..grant(1)
    };
    granted(&host, &grown);
    assert!(features(&mut frontend).is_some(), "the connection stays");
    let status = host.status_of(1).expect("granted");
    assert_eq!(status.capacity_bytes, 2 * VOLUME_BYTES);
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let host = Host::start();
    let of_nothing = VolumeGrant {
        limits: requests(0),
        ..grant(1)
    };
    let page = key_page(&key(1)).into_fd();
    let answer = host.grant(&of_nothing, &[page.as_fd()]);
    grant_refused(answer, "its limits: requests: 0 requests a second");
    let of_group = VolumeGrant {
        group: group(0),
        ..grant(1)
    };
    let page = key_page(&key(1)).into_fd();
    let answer = host.grant(&of_group, &[page.as_fd()]);
    grant_refused(answer, "the limits of its group tenant-a: requests: 0");
}
