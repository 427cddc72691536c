//! The data plane is killed and upgraded under network cards that lead out of the host, by a TAP or by AF_XDP, each of
//! its own or as the uplink of a switch: frames go on in both directions, and no frontend connects again.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_integration::card::{Card, HEADER_BYTES, Options};
use bulkhead_integration::disk::feature;
use bulkhead_integration::frontend::message::request;
use bulkhead_integration::host::nics::{NicSpec, switch};
use bulkhead_integration::host::{BundleSpec, Host, own_binaries, uid_of};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_pair, make_tap};
use bulkhead_integration::packets::{IPV4, Ip, Packet, UDP};
use bulkhead_integration::survive::kills::{Child, Victim as _};

use crate::nics::{PATIENCE, Side, talk};
use crate::resume::{Outcome, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "survive_card_on_a_tap",
        run: || through("survive_card_on_a_tap", By::Tap, false),
    },
    Test {
        name: "survive_card_on_af_xdp",
        run: || through("survive_card_on_af_xdp", By::Xdp, false),
    },
    Test {
        name: "survive_switch_with_a_tap",
        run: || through("survive_switch_with_a_tap", By::Tap, true),
    },
    Test {
        name: "survive_switch_with_af_xdp",
        run: || through("survive_switch_with_af_xdp", By::Xdp, true),
    },
];

/// How often the data plane is killed, and upgraded.
const KILLS: u32 = 5;
const UPGRADES: u64 = 2;
/// The TAP, or the end of the pair that leads to the host.
const FAR: &str = "bh-far";
/// The end of the pair that is the data plane's.
const NEAR: &str = "bh-near";
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const CARD_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];
const HOST_IP: [u8; 4] = [10, 7, 0, 1];
const CARD_IP: [u8; 4] = [10, 7, 0, 2];
const HOST_PORT: u16 = 9000;
const CARD_PORT: u16 = 5000;

/// What leads out of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Tap,
    Xdp,
}

/// An address as `ip` and bundles have it.
fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Makes the interface, and gives what its port is called in a bundle.
fn interface(by: By) -> String {
    let mac = text(HOST_MAC);
    let port = match by {
        By::Tap => {
            make_tap(FAR, uid_of("agent"));
            ip(&format!("link set dev {FAR} address {mac}"));
            ip(&format!("addr add 10.7.0.1/24 dev {FAR}"));
            format!("{{ tap = \"{FAR}\" }}")
        }
        By::Xdp => {
            make_pair(NEAR, FAR, &mac, "10.7.0.1/24");
            format!("{{ af_xdp = \"{NEAR}\", queue = 0 }}")
        }
    };
    let card = text(CARD_MAC);
    ip(&format!(
        "neigh replace 10.7.0.2 lladdr {card} dev {FAR} nud permanent"
    ));
    port
}

/// A card and the host's own stack, which send each other numbered datagrams.
struct Line {
    card: Card,
    host: UdpSocket,
    sent: u32,
}

impl Line {
    fn attach(host: &Host) -> Result<Self, Box<dyn std::error::Error>> {
        let mut options = Options::default();
        options.features |= feature::RING_PACKED;
        let socket = UdpSocket::bind(("10.7.0.1", HOST_PORT))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            card: Card::attach(&host.socket("out"), &options)?,
            host: socket,
            sent: 0,
        })
    }

    /// The next number, each way.
    fn send(&mut self) -> Outcome {
        self.sent += 1;
        let number = self.sent.to_le_bytes();
        let mut packet = Packet::v4(UDP, &number);
        (packet.dst, packet.src) = (HOST_MAC, CARD_MAC);
        packet.ip = Ip::V4(CARD_IP, HOST_IP);
        packet.ports = (CARD_PORT, HOST_PORT);
        self.card.offer(0, &[0; HEADER_BYTES], &packet.complete())?;
        self.card.publish(0)?;
        match self.host.send_to(&number, ("10.7.0.2", CARD_PORT)) {
            Ok(_) => Ok(()),
            // Its queue is full while nobody takes anything out.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock) => Ok(()),
            Err(error) if error.raw_os_error() == Some(nix::Error::ENOBUFS as i32) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends until something that was sent from now on has arrived, each way.
    fn talk(&mut self) -> Result<Duration, Box<dyn std::error::Error>> {
        let began = Instant::now();
        let before = self.sent;
        let mut heard = [false; 2];
        while heard != [true; 2] {
            if began.elapsed() > PATIENCE {
                return Err(format!("no datagram arrives any more: {heard:?}").into());
            }
            self.send()?;
            std::thread::sleep(Duration::from_millis(2));
            let mut datagram = [0; 4];
            while self.host.recv(&mut datagram).is_ok() {
                heard[0] |= u32::from_le_bytes(datagram) > before;
            }
            while let Some(received) = self.card.poll(0)? {
                heard[1] |= number_in(&received.frame).is_some_and(|number| number > before);
            }
        }
        Ok(began.elapsed())
    }
}

/// Of a datagram for the card; none: it is something else.
fn number_in(frame: &[u8]) -> Option<u32> {
    let is_one = frame.get(12..14)? == IPV4.to_be_bytes()
        && frame.get(23)? == &UDP
        && frame.get(36..38)? == CARD_PORT.to_be_bytes();
    let number = frame.get(42..46).filter(|_| is_one)?;
    Some(u32::from_le_bytes(number.try_into().ok()?))
}

/// Locked memory is the user's, and each of these hosts wants 3 or 6 MiB of it for its port: where root can't lift the limit, two of
/// them at once are more than the usual 8 MiB.
static XDP_TURN: Mutex<()> = Mutex::new(());

fn through(test: &str, by: By, on_switch: bool) -> Outcome {
    let turn = || XDP_TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let _turn = (by == By::Xdp).then(turn);
    if !enter_namespace(test) || (by == By::Tap && !has_taps(test)) {
        return Ok(());
    }
    let port = interface(by);
    let mac = text(CARD_MAC);
    let network = if on_switch {
        let sides = [1, 2].map(|number: u8| {
            let mac = text([0x52, 0x54, 0, 0, 0, number]);
            NicSpec::on_switch(&format!("nic{number}"), &mac, "lan").stanza()
        });
        let out = NicSpec::on_switch("out", &mac, "lan").stanza();
        let lan = format!("{}uplink = {port}\n", switch("lan", None));
        [lan, sides.concat(), out].concat()
    } else {
        let spec = NicSpec::on_tap("out", &mac, FAR);
        NicSpec { port, ..spec }.stanza()
    };
    let dir = crate::folder()?;
    let bin_dir = own_binaries(dir.path())?;
    let mut host = Host::create_with(dir.path(), &bin_dir)?;
    if by == By::Xdp {
        host.more = vec!["--xdp".to_owned(), NEAR.to_owned()];
    }
    let envelope = host.sign(&BundleSpec {
        more: &network,
        ..BundleSpec::new(1, &[])
    })?;
    host.start()?;
    host.apply(&envelope)?;
    let outcome = go_through(&host, on_switch);
    outcome.map_err(|e| format!("{e}\n--- log:\n{}", host.log()).into())
}

fn go_through(host: &Host, on_switch: bool) -> Outcome {
    let mut line = Line::attach(host)?;
    let mut sides = if on_switch {
        Some([Side::attach(host, 1, 2, 0)?, Side::attach(host, 2, 1, 0)?])
    } else {
        None
    };
    let mut all_talk = |what: &str| -> Result<Duration, Box<dyn std::error::Error>> {
        let out = line.talk().map_err(|e| format!("{what}: {e}"))?;
        let within = sides.as_mut().map(talk).transpose();
        Ok(out
            + within
                .map_err(|e| format!("{what}: {e}"))?
                .unwrap_or_default())
    };
    all_talk("at first")?;
    // The last reply of each attach is long over.
    std::thread::sleep(Duration::from_millis(200));
    let mut away = Vec::new();
    let mut victim = Child::data_plane(host);
    for round in 0..KILLS {
        victim.kill()?;
        away.push(all_talk(&format!("kill {round}"))?);
    }
    for version in 1..=UPGRADES {
        host.upgrade("dataplane", version)?;
        away.push(all_talk(&format!("upgrade {version}"))?);
    }
    // Not before: a kill right after a reply is the one that a connection may not survive.
    line.card.frontend.ask_u64(request::GET_FEATURES)?;
    let connected = host.log().matches("frontend connected to NIC").count();
    assert_eq!(connected, if on_switch { 3 } else { 1 }, "each once");
    println!("away: {away:?}");
    Ok(())
}
