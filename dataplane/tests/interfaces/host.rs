//! The host's side of an interface: its address, its station and its socket.

use std::net::UdpSocket;

use bulkhead_integration::network::ip;

use super::packets::Datagram;
use super::rig::LONG;

/// The port of the guest's that the host answers to.
pub const GUEST_PORT: u16 = 5000;
/// The port of the host's.
const HOST_PORT: u16 = 9000;

/// The host's own stack behind an interface.
pub struct Host {
    interface: &'static str,
    mac: [u8; 6],
    pub socket: UdpSocket,
}

impl Host {
    /// Gives an interface the host's address. It is still down.
    pub fn new(interface: &'static str) -> Self {
        ip(&format!("addr add 10.7.0.1/24 dev {interface}"));
        let host = Self {
            interface,
            mac: mac_of(interface),
            socket: UdpSocket::bind(("0.0.0.0", HOST_PORT)).expect("bound"),
        };
        host.socket.set_read_timeout(Some(LONG)).expect("set");
        host
    }

    /// Has the interface up, which must have its other end by now: one without a carrier loses what is sent until
    /// the kernel has noticed one. And has the kernel know the guest's station, which nobody here would tell it.
    pub fn up(&self) {
        let interface = self.interface;
        ip(&format!("link set dev {interface} up"));
        ip(&format!(
            "neigh replace 10.7.0.2 lladdr 02:00:00:00:00:07 dev {interface} nud permanent"
        ));
    }

    /// From the guest to the host's socket.
    pub fn datagram<'a>(&self, payload: &'a [u8]) -> Datagram<'a> {
        Datagram {
            to: self.mac,
            from_port: GUEST_PORT,
            to_port: HOST_PORT,
            payload,
        }
    }

    /// What the host's socket got next.
    pub fn received(&self) -> Vec<u8> {
        let mut got = vec![0; 70_000];
        let bytes = self.socket.recv(&mut got).expect("received");
        got.truncate(bytes);
        got
    }

    /// Sends to the guest.
    pub fn send(&self, payload: &[u8]) {
        let sent = self.socket.send_to(payload, ("10.7.0.2", GUEST_PORT));
        assert_eq!(sent.expect("sent"), payload.len());
    }
}

fn mac_of(interface: &str) -> [u8; 6] {
    let said = ip(&format!("-o link show dev {interface}"));
    let text = said.split("link/ether ").nth(1).expect("a station");
    let bytes = text.split([' ', ':']).take(6);
    let bytes: Vec<u8> = bytes
        .map(|byte| u8::from_str_radix(byte, 16).expect("hex"))
        .collect();
    bytes.try_into().expect("six bytes")
}
