//! More than there is room for: volumes, queues, frontends, connections. What is too much is refused or waits, what is
//! served is served, and there is room again when something goes.

use std::io::Read as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use bulkhead_integration::frontend::FrontendError;
use bulkhead_integration::frontend::message::request;
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::keys::{DataplaneToKeyd, VolumeGrant};
use bulkhead_protocol::rot::FromRot;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};

use super::faults::{PATIENCE, attach, descriptors, settles, works};
use super::harness::{self, Host, features, grant, key, key_page};
use super::{grant_refused, refused};

/// Each of 256 volumes, and one more.
#[test]
fn one_volume_more_than_fit_is_refused_and_fits_when_another_goes() {
    let mut host = Host::start();
    let numbered = |n: u16| VolumeGrant {
        volume: VolumeId(std::array::from_fn(|i| n.to_le_bytes()[i % 2])),
        socket: format!("disk-{n}").parse().expect("a name"),
        serial: n.to_string(),
        ..grant(1)
    };
    let give = |host: &Host, n: u16| {
        let [low, high] = n.to_le_bytes();
        let mut key = key(low);
        key[0] ^= high;
        host.grant(&numbered(n), &[key_page(&key).into_fd().as_fd()])
    };
    host.served(1);
    let mut disk = attach(&host, 1);
    // Volume 1 is one of them: 0x0101.
    for n in (0..256).filter(|n| *n != 0x0101).take(255) {
        let volume = numbered(n).volume;
        assert_eq!(
            give(&host, n),
            DataplaneToKeyd::Granted { id: volume.into() }
        );
    }
    for _ in 0..3 {
        grant_refused(give(&host, 1000), "no more fit");
        works(&mut disk, 1);
    }
    assert_eq!(host.status().len(), 256);
    host.revoke(0);
    let volume = numbered(1000).volume;
    assert_eq!(
        give(&host, 1000),
        DataplaneToKeyd::Granted { id: volume.into() }
    );
    grant_refused(give(&host, 1001), "no more fit");
    works(&mut disk, 2);
    drop(disk);
    assert!(host.stop().success());
}

/// A frontend that wants more queues than its volume has, and one that is not alone.
#[test]
fn more_queues_and_frontends_than_a_volume_has() {
    let mut host = Host::start();
    host.served(1);
    host.served(2);
    let mut neighbour = attach(&host, 2);
    let disk = attach(&host, 1);
    // It waits: two guests on one volume would destroy it.
    let mut second = host.frontend(1);
    second
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("timeout");
    assert_eq!(features(&mut second), None, "the first is served");
    // Queues 0 and 1 are there.
    let said = disk.frontend.set_vring_state(request::SET_VRING_NUM, 2, 64);
    assert!(
        matches!(
            said,
            Err(FrontendError::Closed | FrontendError::Refused { .. })
        ),
        "{said:?}"
    );
    drop(disk);
    works(&mut neighbour, 1);
    second.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut answer = [0; 20];
    second.read_exact(&mut answer).expect("it is the first now");
    drop(second);
    works(&mut attach(&host, 1), 2);
    refused(host.attach_on(1, 2, &host.file(1)), "socket");
}

/// Connects without waiting for room in the listener's backlog.
fn connect_at_once(path: &Path) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

/// As many frontends as the listener's backlog takes, while one is served; and again, when the first of them goes.
#[test]
fn more_connections_than_a_listener_takes() {
    const BACKLOG: i32 = 16;
    let mut host = Host::start();
    host.granted(1);
    let path = host.socket_path(1);
    let listener = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("socket");
    let address = UnixAddr::new(&path).expect("a short path");
    bind(listener.as_raw_fd(), &address).expect("bind");
    listen(&listener, Backlog::new(BACKLOG).expect("a backlog")).expect("listen");
    let name = harness::socket(1);
    host.tell(&FromRot::Listener { name }, &[listener.as_fd()]);
    assert_eq!(host.attach(1), Ok(()));
    host.served(2);
    let mut neighbour = attach(&host, 2);
    let before = descriptors(host.pid()).len();
    for round in 0..5 {
        let mut disk = attach(&host, 1);
        let mut crowd = Vec::new();
        let full = loop {
            match connect_at_once(&path) {
                Ok(one) => crowd.push(one),
                Err(errno) => break errno,
            }
            assert!(crowd.len() < 1000, "it has no end");
        };
        assert_eq!(full, nix::errno::Errno::EAGAIN);
        works(&mut disk, round);
        works(&mut neighbour, round);
        // Nobody of them cost the data plane anything.
        let now = descriptors(host.pid()).len();
        assert!(now < before + 20, "{now} descriptors, {before} before");
        assert!(host.status_of(1).expect("granted").connected);
        drop(disk);
        // Each is the one that is served until it turns out to be gone.
        crowd.truncate(3);
        drop(crowd);
        works(&mut attach(&host, 1), round);
    }
    host.wait_connected(1, false);
    settles(&host, before);
}
