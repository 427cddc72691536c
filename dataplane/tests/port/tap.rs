//! The TAP port.

use std::os::fd::AsFd;
use std::sync::Arc;

use bulkhead_dataplane::port::{TapPort, Tokens};
use bulkhead_integration::network::ip;

use crate::bridged::{Bridged, fresh_namespace, is_possible};
use crate::frames::Packet;
use crate::rig::{NIC, Rig, key};
use crate::suite::{self, Outside};

impl Outside for Bridged {
    type Port = TapPort;
    /// The kernel cuts longer ones for whatever it sends by (its `gso_max_size`, of whole frames).
    const LONGEST_SEGMENT: usize = 65_535;
    const IS_ALONE: bool = false;

    fn set_up() -> (Rig<TapPort>, Self) {
        fresh_namespace();
        ip("tuntap add dev near mode tap multi_queue vnet_hdr");
        let name = "near".parse().expect("a name");
        let opened = bulkhead_interfaces::tap::open(&name, 1).expect("opened");
        let rig = Rig::new(|ring| {
            let file = ring.register_file(opened.queues[0].as_fd());
            let (file, tokens) = (file.expect("registered"), Tokens::new(1 << 32));
            TapPort::new(NIC, file, tokens, key(), Arc::default()).expect("a port")
        });
        (rig, Self::new("near"))
    }

    fn arrived(&mut self, _rig: &mut Rig<TapPort>) -> Vec<Packet> {
        Bridged::arrived(self)
    }

    fn send(&mut self, _rig: &mut Rig<TapPort>, packet: &Packet) {
        Bridged::send(self, packet);
    }
}

#[test]
fn tap_does_what_a_port_must() {
    if is_possible("tap_does_what_a_port_must") {
        suite::run::<Bridged>();
    }
}
