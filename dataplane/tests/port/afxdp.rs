//! The AF_XDP port, over a veth pair.

use std::process::Command;
use std::sync::Arc;

use bulkhead_dataplane::port::afxdp::XdpQueue;
use bulkhead_dataplane::port::{AfXdpPort, Tokens};
use bulkhead_integration::network::ip;
use bulkhead_interfaces::xdp::Prepared;

use crate::bridged::{Bridged, fresh_namespace, is_possible};
use crate::frames::Packet;
use crate::rig::{NIC, Rig, key};
use crate::suite::{self, Outside};

struct Veth {
    far: Bridged,
    /// Keeps the program attached.
    _prepared: Prepared,
}

impl Outside for Veth {
    type Port = AfXdpPort;
    const TAKES_SEGMENTS: bool = false;
    const IS_ALONE: bool = false;

    fn set_up() -> (Rig<AfXdpPort>, Self) {
        fresh_namespace();
        ip("link add near type veth peer name middle");
        ip("link set dev near up");
        // Checksums and VLAN tags are in the frame: there is no hardware on the way that would put them there.
        let off = ["-K", "middle", "tx", "off", "txvlan", "off"];
        let off = Command::new("ethtool").args(off).output();
        let off = off.expect("ethtool, of the Debian package of that name");
        assert!(off.status.success(), "{off:?}");
        let prepared = Prepared::new(&"near".parse().expect("a name")).expect("prepared");
        let made = prepared.socket(0).expect("a socket");
        let queue = XdpQueue::new(made.socket, made.interface_index, made.queue, 1500);
        let queue = queue.expect("set up");
        assert!(!queue.is_zero_copy(), "a veth has no hardware");
        let rig = Rig::new(|ring| {
            let [socket, _] = queue.descriptors();
            let file = ring.register_file(socket).expect("registered");
            let tokens = Tokens::new(1 << 32);
            AfXdpPort::new(NIC, file, tokens, key(), Arc::default(), queue)
        });
        let far = Bridged::new("middle");
        let outside = Self {
            far,
            _prepared: prepared,
        };
        (rig, outside)
    }

    fn arrived(&mut self, _rig: &mut Rig<AfXdpPort>) -> Vec<Packet> {
        self.far.arrived()
    }

    fn send(&mut self, _rig: &mut Rig<AfXdpPort>, packet: &Packet) {
        self.far.send(packet);
    }
}

#[test]
fn afxdp_does_what_a_port_must() {
    if is_possible("afxdp_does_what_a_port_must") {
        suite::run::<Veth>();
    }
}
