//! Both ports behind the filters of the threads that have them: a system call too many would end the tests.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_dataplane::net::header::Header;
use bulkhead_dataplane::port::afxdp::XdpQueue;
use bulkhead_dataplane::port::{Port, TapPort, Tokens};
use bulkhead_dataplane::sandbox::{lock_control_thread, lock_worker_thread};
use bulkhead_integration::network::{enter_namespace, has_taps, ip};

use super::afxdp::{self, veth};
use super::host::Host;
use super::rig::{NIC, Rig, key};

/// Sends a datagram to the host as a worker does: the ring is there before the lock-in, the port is made after it.
fn send_as_worker<P: Port>(host: &Host, make: impl FnOnce(&mut Rig) -> P + Send) {
    let frame = host.datagram(b"from a worker").whole();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rig = Rig::new();
            lock_worker_thread().expect("locked in");
            let mut port = make(&mut rig);
            rig.turn(&mut port);
            let sent = rig.send(&mut port, &Header::default(), &frame);
            sent.expect("taken");
            rig.flush(&mut port);
            rig.sleep(&mut port, Duration::from_millis(1));
            rig.stop(&mut port);
        });
    });
    assert_eq!(host.received(), b"from a worker");
}

#[test]
fn tap_port_works_in_a_worker_that_is_locked_in() {
    let test = "tap_port_works_in_a_worker_that_is_locked_in";
    if !has_taps(test) || !enter_namespace(test) {
        return;
    }
    ip("tuntap add dev t0 mode tap multi_queue vnet_hdr");
    let host = Host::new("t0");
    let name = "t0".parse().expect("a name");
    let opened = bulkhead_interfaces::tap::open(&name, 1).expect("opened");
    host.up();
    send_as_worker(&host, |rig| {
        let file = rig.ring.register_file(opened.queues[0].as_fd());
        let (file, tokens) = (file.expect("registered"), Tokens::new(0));
        TapPort::new(NIC, file, tokens, key(), Arc::default()).expect("a port")
    });
}

#[test]
fn afxdp_port_is_set_up_and_works_in_threads_that_are_locked_in() {
    let test = "afxdp_port_is_set_up_and_works_in_threads_that_are_locked_in";
    if !enter_namespace(test) {
        return;
    }
    let (_prepared, made) = veth();
    let queue = std::thread::scope(|scope| {
        let control = scope.spawn(|| {
            lock_control_thread().expect("locked in");
            XdpQueue::new(made.socket, made.interface_index, made.queue, 1500)
        });
        control.join().expect("joined")
    });
    let queue = match queue {
        Err(error) if error.to_string().contains("RLIMIT_MEMLOCK") => {
            println!("skipped: {test}: {error}");
            return;
        }
        queue => queue.expect("set up"),
    };
    let host = Host::new("v1");
    host.up();
    send_as_worker(&host, |rig| afxdp::port(rig, &Arc::default(), queue));
}
