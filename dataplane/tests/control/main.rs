//! The data plane's process as rot, keyd and the agent see it: a volume is served where all three agree,
//! every request has one answer, and nobody's nonsense or restart ends what is served.

mod faults;
mod files;
mod harness;
mod hung;
mod limits;
mod memory;
mod nics;
mod overload;
mod rekey;
mod stuck;
mod workers;

use std::io::Read;
use std::os::fd::AsFd;

use bulkhead_crypto::SecretMemory;
use bulkhead_protocol::ChannelError;
use bulkhead_protocol::control::{AgentToDataplane, DataplaneToAgent};
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane, VolumeGrant};
use bulkhead_protocol::rot::{FromRot, Role};

use harness::{Host, VOLUME_BYTES, features, grant, key, key_page, pidfd_of, socket, volume};

/// Makes a grant another one.
type Change = fn(&mut VolumeGrant);

/// Refused with a reason that has this in it.
#[track_caller]
fn refused(result: Result<(), String>, because: &str) {
    let reason = result.expect_err("it is refused");
    assert!(reason.contains(because), "{reason}");
}

#[track_caller]
fn grant_refused(answer: DataplaneToKeyd, because: &str) {
    let DataplaneToKeyd::GrantRefused { reason, .. } = answer else {
        panic!("not refused: {answer:?}");
    };
    assert!(reason.contains(because), "{reason}");
}

#[test]
fn a_granted_volume_is_served_until_it_is_revoked() {
    let mut host = Host::start();
    assert_eq!(host.status(), []);
    host.served(1);
    let mut frontend = host.frontend(1);
    assert_ne!(features(&mut frontend).expect("served") & (1 << 32), 0);
    let status = host.status_of(1).expect("granted");
    assert!(status.attached && status.connected && status.encrypted);
    assert_eq!((status.requests_ok, status.fault), (0, None));
    assert_eq!(host.attach(1), Ok(()), "attaching twice changes nothing");
    assert_eq!(features(&mut frontend).map(|_| ()), Some(()));
    host.revoke(1);
    assert_eq!(host.status(), []);
    assert_eq!(features(&mut frontend), None, "the connection is closed");
    refused(host.attach(1), "has not granted");
    host.revoke(1);
    assert!(host.stop().success());
}

/// What keyd sends to a data plane that said that it holds the keys.
#[test]
fn a_grant_without_its_key_is_taken_where_the_key_is_held() {
    let mut host = Host::start();
    grant_refused(host.grant(&grant(1), &[]), "it came without keys");
    host.served(1);
    host.granted(2);
    let heard = host.ask_keyd(&KeydToDataplane::Workers { workers: None }, &[]);
    let holds = vec![volume(1), volume(2)];
    let restarts = false;
    assert_eq!(heard, DataplaneToKeyd::WorkersHeard { restarts, holds });
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    let newer = VolumeGrant {
        epoch: 2,
        ..grant(1)
    };
    let granted = |n| DataplaneToKeyd::Granted {
        id: volume(n).into(),
    };
    assert_eq!(host.grant(&newer, &[]), granted(1));
    assert!(features(&mut frontend).is_some(), "its frontend stays");
    // Another one needs its key, and does not take the place of the one that is held.
    let other = VolumeGrant {
        serial: "another".to_owned(),
        ..grant(1)
    };
    grant_refused(host.grant(&other, &[]), "it came without keys");
    assert!(features(&mut frontend).is_some());
    // A detach wipes the key.
    assert_eq!(host.detach(1), Ok(()));
    grant_refused(host.grant(&newer, &[]), "it came without keys");
    host.granted(1);
    assert_eq!(host.attach(1), Ok(()));
}

#[test]
fn attach_needs_grant_listener_and_the_granted_socket() {
    let mut host = Host::start();
    refused(host.attach(1), "keyd has not granted");
    host.granted(1);
    refused(host.attach(1), "rot has sent no listener");
    host.served(2);
    let file = host.file(1);
    refused(host.attach_on(1, 2, &file), "is granted for socket disk-1");
    assert!(
        host.status_of(1)
            .is_some_and(|s| !s.attached && s.encrypted)
    );
}

#[test]
fn the_key_of_one_volume_never_serves_another_ones_socket() {
    let mut host = Host::start();
    host.granted(1);
    host.listen(1);
    host.served(2);
    // A taken-over agent asks for volume 1 where volume 2's guest listens, and the other way round.
    let (one, two) = (host.file(1), host.file(2));
    refused(host.attach_on(1, 2, &one), "granted for socket disk-1");
    refused(host.attach_on(2, 1, &two), "granted for socket disk-2");
    // It can put another file there, but not one that is in use.
    refused(host.attach_on(1, 1, &two), "its file is that of volume");
    assert_eq!(host.attach(1), Ok(()));
}

#[test]
fn an_attach_has_exactly_one_descriptor() {
    let mut host = Host::start();
    host.granted(1);
    let make = |request_id| AgentToDataplane::Attach {
        request_id,
        volume: volume(1),
        socket: socket(1),
    };
    refused(host.ask(make, &[]), "0 descriptors");
    let file = host.file(1);
    refused(
        host.ask(make, &[file.as_fd(), file.as_fd()]),
        "2 descriptors",
    );
    let detach = |request_id| AgentToDataplane::Detach {
        request_id,
        id: volume(1).into(),
    };
    refused(host.ask(detach, &[file.as_fd()]), "1 descriptors");
}

#[test]
fn a_grant_that_makes_no_sense_is_refused_and_the_earlier_one_stays() {
    let mut host = Host::start();
    host.served(1);
    let cases: [(&str, &str, Change); 5] = [
        ("block", "logical block", |g| g.logical_block_bytes = 1024),
        ("unit", "data unit", |g| g.logical_block_bytes = 512),
        ("size", "multiple", |g| g.size_bytes += 1),
        ("queues", "queues", |g| g.queues = 0),
        ("serial", "serial", |g| g.serial = "x".repeat(21)),
    ];
    for (name, because, change) in cases {
        let mut bad = grant(1);
        change(&mut bad);
        let page = key_page(&key(9));
        let other = SecretMemory::from_fd(page.as_fd().try_clone_to_owned().expect("dup"), 64);
        grant_refused(host.grant(&bad, &[page.as_fd()]), because);
        assert_eq!(other.expect("map").as_bytes(), [0; 64], "{name}: wiped");
    }
    assert!(host.status_of(1).is_some_and(|s| s.attached));
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some(), "it is still served");
}

#[test]
fn a_key_that_is_none_is_refused() {
    let host = Host::start();
    grant_refused(host.grant(&grant(1), &[]), "it came without keys");
    let page = key_page(&key(1));
    let two = [page.as_fd(), page.as_fd()];
    grant_refused(host.grant(&grant(1), &two), "2 descriptors");
    let file = host.file(7);
    file.set_len(4096).expect("length");
    grant_refused(host.grant(&grant(1), &[file.as_fd()]), "secret memory");
    let mut equal = [7; 64];
    grant_refused(host.grant(&grant(1), &[key_page(&equal).as_fd()]), "halves");
    equal[63] ^= 1;
    let plain = VolumeGrant {
        data_unit_bytes: None,
        ..grant(1)
    };
    let page = key_page(&equal);
    grant_refused(host.grant(&plain, &[page.as_fd()]), "1 descriptors");
    let volume = volume(1);
    assert_eq!(
        host.grant(&plain, &[]),
        DataplaneToKeyd::Granted { id: volume.into() }
    );
}

#[test]
fn an_equal_grant_changes_nothing_and_its_key_is_wiped() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    let newer = VolumeGrant {
        epoch: 2,
        ..grant(1)
    };
    let page = key_page(&key(1));
    let volume = volume(1);
    let answer = host.grant(&newer, &[page.as_fd()]);
    assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
    assert_eq!(page.as_bytes(), [0; 64], "the page is wiped for everyone");
    assert!(features(&mut frontend).is_some(), "the connection stays");
    assert!(host.status_of(1).is_some_and(|s| s.attached && s.connected));
}

#[test]
fn another_grant_detaches_what_was_served_under_the_old_one() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    let other = VolumeGrant {
        allowed_uid: grant(1).allowed_uid + 1,
        epoch: 2,
        ..grant(1)
    };
    let page = key_page(&key(1)).into_fd();
    let volume = volume(1);
    let answer = host.grant(&other, &[page.as_fd()]);
    assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
    assert_eq!(features(&mut frontend), None, "the connection is closed");
    assert!(
        host.status_of(1)
            .is_some_and(|s| !s.attached && s.encrypted)
    );
    assert_eq!(host.attach(1), Ok(()));
    let mut refused = host.frontend(1);
    assert_eq!(features(&mut refused), None, "another uid may connect now");
    assert!(
        host.status_of(1)
            .is_some_and(|s| s.attached && !s.connected)
    );
}

#[test]
fn a_greater_size_reaches_a_served_volume_whose_frontend_stays() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    let grown = VolumeGrant {
        size_bytes: 2 * VOLUME_BYTES,
        epoch: 2,
        ..grant(1)
    };
    let capacity = |host: &mut Host| host.status_of(1).expect("granted").capacity_bytes;
    assert_eq!(capacity(&mut host), VOLUME_BYTES);
    // Its file is as short as before: refused, and nothing changed.
    let page = key_page(&key(1));
    grant_refused(host.grant(&grown, &[page.as_fd()]), "1048576");
    assert_eq!(page.as_bytes(), [0; 64], "the page is wiped for everyone");
    // Its file is longer, and the key another: refused as well.
    host.file_of(1, 2 * VOLUME_BYTES);
    let other = key_page(&key(2));
    let answer = host.grant(&grown, &[other.as_fd()]);
    grant_refused(answer, "its size and its key changed at once");
    assert_eq!(capacity(&mut host), VOLUME_BYTES);
    let page = key_page(&key(1));
    let volume = volume(1);
    let answer = host.grant(&grown, &[page.as_fd()]);
    assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
    assert_eq!(capacity(&mut host), 2 * VOLUME_BYTES);
    assert!(features(&mut frontend).is_some(), "the connection stays");
    assert!(host.status_of(1).is_some_and(|s| s.attached && s.connected));
    // The same again changes nothing; the size it had replaces the grant.
    let page = key_page(&key(1));
    let answer = host.grant(&grown, &[page.as_fd()]);
    assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
    assert!(features(&mut frontend).is_some(), "the connection stays");
    host.granted(1);
    assert_eq!(features(&mut frontend), None, "it was detached to shrink");
    assert_eq!(capacity(&mut host), 0);
    // Not served, it takes any size; the file is looked at when it is attached.
    let page = key_page(&key(1));
    let answer = host.grant(&grown, &[page.as_fd()]);
    assert_eq!(answer, DataplaneToKeyd::Granted { id: volume.into() });
    refused(host.attach(1), "its file has 1048576 bytes");
    let file = host.file_of(1, 2 * VOLUME_BYTES);
    assert_eq!(host.attach_on(1, 1, &file), Ok(()));
    assert_eq!(capacity(&mut host), 2 * VOLUME_BYTES);
}

#[test]
fn a_detached_volume_has_no_key_until_keyd_grants_it_again() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    assert_eq!(host.detach(1), Ok(()));
    assert_eq!(features(&mut frontend), None);
    assert!(
        host.status_of(1)
            .is_some_and(|s| !s.attached && !s.encrypted)
    );
    assert_eq!(host.detach(1), Ok(()), "what is not attached is detached");
    refused(host.attach(1), "was wiped when it was detached");
    host.granted(1);
    assert_eq!(host.attach(1), Ok(()));
    assert!(features(&mut host.frontend(1)).is_some());
}

#[test]
fn a_volume_in_use_is_not_prepared_for_removal() {
    let mut host = Host::start();
    host.served(1);
    let mut first = host.frontend(1);
    assert!(features(&mut first).is_some());
    refused(host.prepare_remove(1, false), "is in use");
    drop(first);
    host.wait_connected(1, false);
    assert_eq!(host.prepare_remove(1, false), Ok(()));
    let mut second = host.frontend(1);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(host.status_of(1).is_some_and(|s| !s.connected));
    assert_eq!(host.cancel_remove(1), Ok(()));
    assert!(features(&mut second).is_some(), "it waited in the backlog");
    assert_eq!(host.prepare_remove(1, true), Ok(()));
    assert!(features(&mut second).is_some(), "it stays until the detach");
    assert_eq!(host.prepare_remove(77, false), Ok(()));
}

#[test]
fn a_listener_that_is_gone_takes_nobody_in() {
    let mut host = Host::start();
    host.served(1);
    let mut first = host.frontend(1);
    assert!(features(&mut first).is_some());
    let name = socket(1);
    host.tell(&FromRot::ListenerGone { name }, &[]);
    drop(first);
    host.wait_connected(1, false);
    let _second = host.frontend(1);
    assert_eq!(host.cancel_remove(1), Ok(()));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(host.status_of(1).is_some_and(|s| !s.connected));
    assert_eq!(host.detach(1), Ok(()));
    host.granted(1);
    refused(host.attach(1), "rot has sent no listener");
}

#[test]
fn requests_sent_at_once_are_each_answered_once_and_in_turn() {
    let host = Host::start();
    host.granted(1);
    host.listen(1);
    let file = host.file(1);
    let attach = |request_id| AgentToDataplane::Attach {
        request_id,
        volume: volume(1),
        socket: socket(1),
    };
    let detach = AgentToDataplane::Detach {
        request_id: 12,
        id: volume(1).into(),
    };
    host.agent.send(&attach(10), &[file.as_fd()]).expect("send");
    host.agent.send(&attach(11), &[file.as_fd()]).expect("send");
    host.agent.send(&detach, &[]).expect("send");
    host.agent.send(&attach(13), &[file.as_fd()]).expect("send");
    let answers: Vec<_> = (0..4)
        .map(|_| host.agent.receive::<DataplaneToAgent>().expect("answer"))
        .map(|received| match received.message {
            DataplaneToAgent::Done { request_id } => (request_id, true),
            DataplaneToAgent::Refused { request_id, .. } => (request_id, false),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = [(10, true), (11, true), (12, true), (13, false)];
    assert_eq!(answers, expected, "the key went with the detach");
}

#[test]
fn a_restarted_keyd_and_agent_change_nothing_for_the_frontend() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    let me = pidfd_of(std::process::id());
    let new = host.introduce(Role::Keyd, 2, &me);
    let old = std::mem::replace(&mut host.keyd, new);
    host.granted(1);
    let closed = old.receive::<DataplaneToKeyd>().map(|_| ());
    assert!(matches!(closed, Err(ChannelError::Closed)), "{closed:?}");
    host.agent = host.introduce(Role::Agent, 5, &me);
    assert!(host.status_of(1).is_some_and(|s| s.connected));
    assert!(features(&mut frontend).is_some());
    // An earlier generation is not taken: its channel is closed, the newer one stays.
    let stale = host.introduce(Role::Agent, 4, &me);
    let closed = stale.receive::<DataplaneToAgent>().map(|_| ());
    assert!(matches!(closed, Err(ChannelError::Closed)), "{closed:?}");
    assert!(host.status_of(1).is_some_and(|s| s.connected));
}

#[test]
fn what_another_process_sends_over_keyds_channel_is_dropped() {
    let mut host = Host::start();
    let mut sleeper = std::process::Command::new("/bin/sleep")
        .arg("60")
        .spawn()
        .expect("sleep");
    let not_me = pidfd_of(sleeper.id());
    let channel = host.introduce(Role::Keyd, 2, &not_me);
    let page = key_page(&key(1)).into_fd();
    let grant = grant(1);
    let message = KeydToDataplane::Grant { grant };
    channel.send(&message, &[page.as_fd()]).expect("send");
    // A second message that is answered would be answered after the first.
    let channel = host.introduce(Role::Keyd, 3, &pidfd_of(std::process::id()));
    host.keyd = channel;
    host.revoke(2);
    assert_eq!(host.status(), []);
    let _ = sleeper.kill();
    let _ = sleeper.wait();
}

#[test]
fn garbage_is_dropped_and_too_much_of_it_costs_only_the_channel() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    let garbage: [&[u8]; 4] = [
        &[0xff],
        &[0x82, 0x18, 0x63, 0x80],
        &[0; 200_000],
        b"not CBOR",
    ];
    for bytes in garbage {
        nix::unistd::write(&host.agent, bytes).expect("write");
        nix::unistd::write(&host.keyd, bytes).expect("write");
    }
    assert!(host.status_of(1).is_some_and(|s| s.connected));
    host.granted(2);
    for _ in 0..40 {
        // The channel closes on the way.
        let _ = nix::unistd::write(&host.agent, &[0xff]);
    }
    let closed = host.agent.receive::<DataplaneToAgent>().map(|_| ());
    assert!(matches!(closed, Err(ChannelError::Closed)), "{closed:?}");
    host.agent = host.introduce(Role::Agent, 2, &pidfd_of(std::process::id()));
    assert!(host.status_of(1).is_some_and(|s| s.connected));
    assert!(features(&mut frontend).is_some() && host.is_alive());
}

#[test]
fn an_agent_that_does_not_read_its_answers_holds_up_nobody() {
    let mut host = Host::start();
    host.served(1);
    host.agent.set_nonblocking(true).expect("fcntl");
    let mut sent = 0u64;
    let status = |request_id| AgentToDataplane::Status { request_id };
    loop {
        match host.agent.send(&status(sent), &[]) {
            Ok(()) => sent += 1,
            Err(ChannelError::WouldBlock) => {
                std::thread::sleep(std::time::Duration::from_millis(50));
                if host.agent.send(&status(sent), &[]).is_err() {
                    break;
                }
                sent += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some(), "the others are served");
    host.agent.set_nonblocking(false).expect("fcntl");
    for number in 0..sent {
        let answer = host.agent.receive::<DataplaneToAgent>().expect("answer");
        let DataplaneToAgent::Status { request_id, .. } = answer.message else {
            panic!("{answer:?}");
        };
        assert_eq!(request_id, number);
    }
}

#[test]
fn without_rot_it_does_not_start() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-dataplane"))
        .env_remove(bulkhead_protocol::process::ROT_ENV)
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("bulkhead-rot"), "{said}");
}

#[test]
fn a_frontend_reads_nothing_of_what_it_did_not_ask() {
    let mut host = Host::start();
    host.served(1);
    let mut frontend = host.frontend(1);
    assert!(features(&mut frontend).is_some());
    frontend.set_nonblocking(true).expect("fcntl");
    let more = frontend.read(&mut [0; 1]);
    assert!(more.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
}
