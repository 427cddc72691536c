//! The switch whose uplink is a TAP.

use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_dataplane::port::{Port as _, Switch, TapPort, Tokens};
use bulkhead_integration::network::ip;

use crate::bridged::{Bridged, fresh_namespace, is_possible};
use crate::frames::{Packet, datagram, mac};
use crate::rig::{NIC, Rig, key};
use crate::suite::{self, HERE, Outside, THERE};

/// What is behind the uplink.
struct Upstream(Bridged);

impl Outside for Upstream {
    type Port = Switch<TapPort>;
    /// As of the TAP alone.
    const LONGEST_SEGMENT: usize = 65_535;
    const IS_ALONE: bool = false;

    fn set_up() -> (Rig<Self::Port>, Self) {
        fresh_namespace();
        ip("tuntap add dev near mode tap multi_queue vnet_hdr");
        let name = "near".parse().expect("a name");
        let opened = bulkhead_interfaces::tap::open(&name, 1).expect("opened");
        let rig = Rig::new(|ring| {
            let file = ring.register_file(opened.queues[0].as_fd());
            let (file, tokens) = (file.expect("registered"), Tokens::new(1 << 32));
            let tap = TapPort::new(NIC, file, tokens, key(), Arc::default());
            let mut switch = Switch::new(Some(tap.expect("a port")), Arc::default());
            switch.join(NIC, mac(HERE)).expect("free");
            switch
        });
        (rig, Self(Bridged::new("near")))
    }

    fn arrived(&mut self, _rig: &mut Rig<Self::Port>) -> Vec<Packet> {
        self.0.arrived()
    }

    fn send(&mut self, _rig: &mut Rig<Self::Port>, packet: &Packet) {
        self.0.send(packet);
    }
}

#[test]
fn a_switch_with_a_tap_does_what_a_port_must() {
    if is_possible("a_switch_with_a_tap_does_what_a_port_must") {
        suite::run::<Upstream>();
    }
}

/// More than a TAP's buffers take at once, given without looking at what came of the last ones.
#[test]
fn nothing_is_lost_of_a_guest_that_sends_out_and_waits_for_room() {
    let name = "nothing_is_lost_of_a_guest_that_sends_out_and_waits_for_room";
    if !is_possible(name) {
        return;
    }
    let (mut rig, mut outside) = Upstream::set_up();
    // So that it is known out there.
    let hello = Packet::from(datagram(HERE, THERE, 100));
    outside.send(&mut rig, &hello);
    rig.until("it is heard of", |rig| rig.nics.take(NIC).contains(&hello));
    let packet = Packet::from(datagram(THERE, HERE, 1000));
    let mut sent = 0;
    // Turns in which nothing is taken off the ring: the room goes down to nothing, and not below.
    for _ in 0..20 {
        let room = rig.port.room(NIC).min(32);
        for _ in 0..room {
            assert_eq!(rig.transmit(NIC, &packet), Ok(()));
        }
        rig.port.flush(&mut rig.ring);
        sent += room;
    }
    assert!(sent >= 32 && rig.port.room(NIC) == 0, "{sent} were taken");
    let mut arrived = 0;
    rig.until("all have arrived", |rig| {
        let frames = outside.arrived(rig);
        arrived += frames.iter().filter(|frame| **frame == packet).count();
        arrived >= sent
    });
    assert_eq!((arrived, rig.port.counts().uplink_drops), (sent, 0));
}
