//! Network cards, as the command line of `serve` says them: `--net PATH,PORT[,OPTION...]`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use bulkhead_dataplane::net::{MAX_QUEUE_PAIRS, MIN_MTU, NetDevice, Shape};
use bulkhead_dataplane::port::afxdp::{XdpError, XdpQueue};
use bulkhead_dataplane::port::{Guard, OutsideSpec, PortSpec, SwitchSpec, TapSpec, XdpSpec};

use bulkhead_interfaces::InterfaceName;
use bulkhead_interfaces::tap::{self, TapError};
use bulkhead_interfaces::xdp::{self, Prepared};
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::net::SpoofChecks;

use super::limits;
use super::socket::{self, SocketError};

/// MTU of a card that was not given one.
const USUAL_MTU: u16 = 1500;

/// A card on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetSpec {
    /// Where to listen.
    pub socket: PathBuf,
    /// What it is connected to.
    pub port: PortName,
    /// Its address; none: one of its own.
    pub mac: Option<[u8; 6]>,
    /// Bytes of the longest packet.
    pub mtu: u16,
    /// Queue pairs.
    pub pairs: u16,
    /// Its guest may send as itself only.
    pub guarded: bool,
    /// What it may send.
    pub tx: Limits,
    /// What it may receive.
    pub rx: Limits,
}

/// What a card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortName {
    /// Nothing.
    Null,
    /// A source of frames of so many bytes.
    Source(usize),
    /// The switch of that name, with all others that name it.
    Switch(String),
    /// An interface of the host's.
    Outside(Interface),
}

/// An interface of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interface {
    /// A TAP, which is there.
    Tap(InterfaceName),
    /// A queue of an interface, by AF_XDP, and those behind it for further queue pairs.
    Xdp(InterfaceName, u32),
}

/// A switch's way out of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UplinkSpec {
    /// The switch.
    pub switch: String,
    /// The interface.
    pub interface: Interface,
}

/// Not a card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetSpecError {
    /// No socket, or no port behind it.
    #[error(
        "{0:?} is no network card: write SOCKET,PORT as in /tmp/a.sock,switch:lan or /tmp/a.sock,null"
    )]
    Form(String),
    /// Not a port.
    #[error(
        "{0:?} is no port: write null, source:BYTES (60 to 65535), switch:NAME, tap:INTERFACE or xdp:INTERFACE/QUEUE"
    )]
    Port(String),
    /// Not an uplink.
    #[error("{0:?} is no uplink: write SWITCH=tap:INTERFACE or SWITCH=xdp:INTERFACE/QUEUE")]
    Uplink(String),
    /// Not an option.
    #[error(
        "{0:?} is no option of a network card: write mac=52:54:00:00:00:01, mtu={MIN_MTU} to 65535, \
         pairs=1 to {MAX_QUEUE_PAIRS}, guard=on or off, or tx-requests=, tx-bytes=, rx-requests= or rx-bytes= with a rate"
    )]
    Option(String),
}

impl FromStr for NetSpec {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        let mut parts = text.split(',');
        let (Some(socket), Some(port)) = (parts.next().filter(|s| !s.is_empty()), parts.next())
        else {
            return Err(NetSpecError::Form(text.to_owned()));
        };
        let mut spec = Self {
            socket: socket.into(),
            port: port.parse()?,
            mac: None,
            mtu: USUAL_MTU,
            pairs: 1,
            guarded: true,
            tx: Limits::default(),
            rx: Limits::default(),
        };
        for option in parts {
            spec.set(option)
                .ok_or_else(|| NetSpecError::Option(option.to_owned()))?;
        }
        Ok(spec)
    }
}

impl FromStr for PortName {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        match text.split_once(':') {
            None if text == "null" => Ok(Self::Null),
            Some(("source", bytes)) => {
                let bytes = bytes.parse().ok().filter(|n| (60..=65_535).contains(n));
                let bytes = bytes.ok_or_else(|| NetSpecError::Port(text.to_owned()))?;
                Ok(Self::Source(bytes))
            }
            Some(("switch", name)) if !name.is_empty() => Ok(Self::Switch(name.to_owned())),
            _ => interface(text).map(Self::Outside),
        }
    }
}

fn interface(text: &str) -> Result<Interface, NetSpecError> {
    let parsed = match text.split_once(':') {
        Some(("tap", name)) => name.parse().ok().map(Interface::Tap),
        Some(("xdp", rest)) => rest.split_once('/').and_then(|(name, queue)| {
            let name = name.parse().ok()?;
            Some(Interface::Xdp(name, queue.parse().ok()?))
        }),
        _ => None,
    };
    parsed.ok_or_else(|| NetSpecError::Port(text.to_owned()))
}

impl FromStr for UplinkSpec {
    type Err = NetSpecError;

    fn from_str(text: &str) -> Result<Self, NetSpecError> {
        let (switch, port) = text
            .split_once('=')
            .filter(|(switch, _)| !switch.is_empty())
            .ok_or_else(|| NetSpecError::Uplink(text.to_owned()))?;
        Ok(Self {
            switch: switch.to_owned(),
            interface: interface(port)?,
        })
    }
}

impl NetSpec {
    fn set(&mut self, option: &str) -> Option<()> {
        let (name, value) = option.split_once('=')?;
        match name {
            "mac" => self.mac = Some(mac(value)?),
            "mtu" => self.mtu = value.parse().ok().filter(|mtu| *mtu >= MIN_MTU)?,
            "guard" => {
                self.guarded = match value {
                    "on" => true,
                    "off" => false,
                    _ => return None,
                }
            }
            "pairs" => {
                let most = 1..=MAX_QUEUE_PAIRS;
                self.pairs = value.parse().ok().filter(|n| most.contains(n))?;
            }
            "tx-requests" | "tx-bytes" | "rx-requests" | "rx-bytes" => {
                let (direction, what) = name.split_once('-')?;
                let given = limits::parse(&format!("{what}={value}")).ok()?;
                let of = match direction {
                    "tx" => &mut self.tx,
                    _ => &mut self.rx,
                };
                of.requests = given.requests.or(of.requests);
                of.bytes = given.bytes.or(of.bytes);
            }
            _ => return None,
        }
        Some(())
    }
}

/// A MAC address that a card can have: not a group's, not zero.
fn mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let [first, ..] = mac;
    let usable = parts.next().is_none() && first & 1 == 0 && mac != [0; 6];
    usable.then_some(mac)
}

/// A card to be served.
#[derive(Debug)]
pub struct Card {
    /// Where its listener is.
    pub socket: PathBuf,
    /// Its listener, blocking.
    pub listener: UnixListener,
    /// What is served there.
    pub device: Arc<NetDevice>,
}

/// Why cards can't be served.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// A listener.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A TAP.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// An interface for AF_XDP.
    #[error(transparent)]
    Prepare(#[from] xdp::XdpError),
    /// Its sockets.
    #[error(transparent)]
    Xdp(#[from] XdpError),
}

/// Makes the cards, and listens for their frontends.
///
/// # Errors
/// [`CardError`]; then no socket was left behind.
pub fn open(specs: &[NetSpec], uplinks: &[UplinkSpec]) -> Result<Vec<Card>, CardError> {
    let mut switches = BTreeMap::new();
    for uplink in uplinks {
        let way = outside(&uplink.interface, 1, USUAL_MTU)?;
        let switch = SwitchSpec::new(uplink.switch.clone(), Some(way));
        switches.insert(uplink.switch.clone(), switch);
    }
    let mut devices = Vec::new();
    for (spec, number) in specs.iter().zip(1u16..) {
        devices.push(device(spec, number, &mut switches)?);
    }
    let mut cards: Vec<Card> = Vec::new();
    for (spec, device) in specs.iter().zip(devices) {
        let listener = socket::listen(&spec.socket).inspect_err(|_| {
            super::devices::remove_sockets(sockets(&cards));
        })?;
        cards.push(Card {
            socket: spec.socket.clone(),
            listener,
            device,
        });
    }
    Ok(cards)
}

/// Where they listen.
pub fn sockets(cards: &[Card]) -> impl Iterator<Item = &Path> {
    cards.iter().map(|card| card.socket.as_path())
}

fn device(
    spec: &NetSpec,
    number: u16,
    switches: &mut BTreeMap<String, Arc<SwitchSpec>>,
) -> Result<Arc<NetDevice>, CardError> {
    let [high, low] = number.to_be_bytes();
    let shape = Shape {
        mac: spec.mac.unwrap_or([0x52, 0x54, 0, 0xb1, high, low]),
        mtu: spec.mtu,
        queue_pairs: spec.pairs,
    };
    let port = match &spec.port {
        PortName::Null => PortSpec::Null,
        PortName::Source(bytes) => PortSpec::Source(*bytes),
        PortName::Switch(name) => {
            let new = || SwitchSpec::new(name.clone(), None);
            let switch = switches.entry(name.clone()).or_insert_with(new);
            PortSpec::Switch(Arc::clone(switch))
        }
        PortName::Outside(interface) => {
            PortSpec::Outside(outside(interface, spec.pairs, spec.mtu)?)
        }
    };
    let checks = SpoofChecks {
        mac: spec.guarded,
        ..SpoofChecks::default()
    };
    let guard = Guard::new(shape.mac, &checks);
    let device = NetDevice::with_port(shape, port, guard);
    device.tx_qos().set(&spec.tx, None);
    device.rx_qos().set(&spec.rx, None);
    Ok(device)
}

fn outside(interface: &Interface, pairs: u16, mtu: u16) -> Result<OutsideSpec, CardError> {
    match interface {
        Interface::Tap(name) => Ok(OutsideSpec::Tap(Arc::new(TapSpec {
            queues: tap::open(name, pairs)?.queues,
            name: name.to_string(),
            counters: Arc::default(),
        }))),
        Interface::Xdp(name, first) => {
            let prepared = Prepared::new(name)?;
            let (mut queues, mut links) = (Vec::new(), Vec::new());
            for queue in (*first..).take(usize::from(pairs)) {
                let made = prepared.socket(queue)?;
                let (index, queue) = (made.interface_index, made.queue);
                queues.push(XdpQueue::new(made.socket, index, queue, mtu)?);
                links.push(made.link);
            }
            let spec = XdpSpec::new(name.to_string(), queues, links);
            Ok(OutsideSpec::Xdp(spec))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_that_name_one_switch_share_it() {
        let dir = tempfile::tempdir().expect("folder");
        let spec = |text: &str| {
            let text = text.replace('@', &dir.path().display().to_string());
            text.parse::<NetSpec>().expect("parses")
        };
        let specs = [
            spec("@/a,switch:lan,pairs=4,mtu=9000"),
            spec("@/b,switch:lan,mac=52:54:00:aa:bb:cc,tx-requests=1000,tx-bytes=1MiB"),
            spec("@/c,switch:wan"),
            spec("@/d,null"),
        ];
        let cards = open(&specs, &[]).expect("opens");
        let switch = |card: &Card| match &card.device.port {
            PortSpec::Switch(switch) => Some(switch.number()),
            _ => None,
        };
        let numbers: Vec<_> = cards.iter().map(switch).collect();
        assert!(numbers[0].is_some() && numbers[0] == numbers[1]);
        assert!(numbers[2].is_some() && numbers[2] != numbers[0]);
        assert_eq!(numbers[3], None);
        assert_eq!(cards[0].device.shape.mtu, 9000);
        assert_eq!(cards[0].device.queues(), 8);
        assert_eq!(cards[1].device.shape.mac, [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]);
        assert_ne!(cards[2].device.shape.mac, cards[3].device.shape.mac);
        assert_eq!(specs[1].tx.requests.map(|rate| rate.per_second), Some(1000));
        assert_eq!(specs[1].tx.bytes.map(|rate| rate.per_second), Some(1 << 20));
        assert!(specs[1].rx.is_none());
    }

    #[test]
    fn what_is_no_card_is_refused() {
        let cases = [
            ("", "is no network card"),
            ("/a", "is no network card"),
            (",null", "is no network card"),
            ("/a,bridge:x", "is no port"),
            ("/a,switch:", "is no port"),
            ("/a,tap:", "is no port"),
            ("/a,tap:a/b", "is no port"),
            ("/a,xdp:eth0", "is no port"),
            ("/a,xdp:eth0/x", "is no port"),
            ("/a,source:59", "is no port"),
            ("/a,source:65536", "is no port"),
            ("/a,null,mtu=67", "is no option"),
            ("/a,null,mtu=65536", "is no option"),
            ("/a,null,pairs=0", "is no option"),
            ("/a,null,pairs=17", "is no option"),
            ("/a,null,mac=53:54:00:00:00:01", "is no option"),
            ("/a,null,mac=52:54:00:00:00", "is no option"),
            ("/a,null,mac=00:00:00:00:00:00", "is no option"),
            ("/a,null,tx-requests=x", "is no option"),
            ("/a,null,speed=1", "is no option"),
            ("/a,null,guard=no", "is no option"),
        ];
        for (text, expected) in cases {
            let error = text.parse::<NetSpec>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn nothing_stays_behind_a_failure() {
        let dir = tempfile::tempdir().expect("folder");
        std::fs::write(dir.path().join("b"), "a file").expect("write");
        let spec = |name: &str| {
            let text = format!("{},null", dir.path().join(name).display());
            text.parse::<NetSpec>().expect("parses")
        };
        open(&[spec("a"), spec("b")], &[]).expect_err("b is a file");
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn an_uplink_names_its_switch_and_an_interface_that_is_there() {
        let uplink: UplinkSpec = "lan=tap:no-such-tap".parse().expect("parses");
        assert_eq!(uplink.switch, "lan");
        let error = open(&[], &[uplink]).expect_err("there is none");
        assert!(error.to_string().contains("no-such-tap"), "{error}");
        for (text, expected) in [
            ("lan", "is no uplink"),
            ("=tap:x", "is no uplink"),
            ("lan=null", "is no port"),
        ] {
            let error = text.parse::<UplinkSpec>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
