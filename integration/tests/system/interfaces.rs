//! A network card on an interface of the host's by AF_XDP: prepared by rot, its sockets made by the agent, used by the
//! data plane, each of them another user, and as many agents as it takes.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use bulkhead_integration::card::{Card, Options};
use bulkhead_integration::host::nics::{NicSpec, switch};
use bulkhead_integration::host::{BundleSpec, Host, own_uid, uid_of};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_pair, make_tap};
use bulkhead_integration::packets::{Ip, Packet, UDP, check};

use crate::support::{Outcome, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_network_card_on_af_xdp",
        needs: &[Need::Root],
        run: on_af_xdp,
    },
    Test {
        name: "system_network_card_whose_tap_is_removed",
        needs: &[Need::Root],
        run: tap_removed,
    },
];

/// The guest's station.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
/// How long a datagram may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn on_af_xdp() -> Outcome {
    if !enter_namespace("system_network_card_on_af_xdp") {
        return Ok(());
    }
    let outside = Outside::new()?;
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.more = vec!["--xdp".to_owned(), "v0".to_owned()];
    host.start()?;
    serve(&host, 1, "net7")?;
    let mut card = Card::attach(&host.socket("net7"), &Options::default())?;
    outside.talk(&mut card, b"the first")?;
    // The program and the sockets outlive an agent.
    host.kill("agent")?;
    outside.talk(&mut card, b"without an agent")?;
    // Another agent makes another socket for the same queue, which another card has from one bundle to the next.
    drop(card);
    host.wait_until("the new agent does not answer", |host| {
        host.status().is_ok()
    })?;
    serve(&host, 2, "net8")?;
    let mut card = Card::attach(&host.socket("net8"), &Options::default())?;
    outside.talk(&mut card, b"the second")?;
    // An interface that rot was not told of is refused by name.
    let spec = nic("net9", "v1");
    let other = BundleSpec {
        more: &spec,
        ..BundleSpec::new(3, &[])
    };
    let refused = host.apply(&host.sign(&other)?);
    let said = refused.unwrap_or_else(|error| error.to_string());
    ensure(said.contains("--xdp v1"), || said)?;
    outside.talk(&mut card, b"the second goes on")
}

/// What a TAP's queues lead to is gone with it, also if there is another of its name: that is told, and another data plane has the new one.
fn tap_removed() -> Outcome {
    let test = "system_network_card_whose_tap_is_removed";
    if !enter_namespace(test) || !has_taps(test) {
        return Ok(());
    }
    make_tap("t0", uid_of("agent"));
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.start()?;
    let nics = ["net1", "net2"].map(|name| {
        let mac = format!("52:54:00:00:00:0{}", name.trim_start_matches("net"));
        match name {
            "net1" => NicSpec::on_tap(name, &mac, "t0").stanza(),
            _ => NicSpec {
                port: "\"null\"".to_owned(),
                ..NicSpec::on_tap(name, &mac, "")
            }
            .stanza(),
        }
    });
    make_tap("t1", uid_of("agent"));
    let on_lan = NicSpec::on_switch("net3", "52:54:00:00:00:03", "lan").stanza();
    let spec = BundleSpec {
        more: &[nics.concat(), switch("lan", Some("t1")), on_lan].concat(),
        ..BundleSpec::new(1, &[])
    };
    host.apply(&host.sign(&spec)?)?;
    let mut other = Card::attach(&host.socket("net2"), &Options::default())?;
    let mut card = Card::attach(&host.socket("net1"), &Options::default())?;
    let mut packet = Packet::v4(UDP, b"lost");
    packet.src = [0x52, 0x54, 0, 0, 0, 1];
    ensure(fault(&host)?.is_empty(), || "it has its TAP".to_owned())?;
    ip("link del dev t0");
    ensure(!uplink_removed(&host)?, || "it is there".to_owned())?;
    ip("link del dev t1");
    ensure(uplink_removed(&host)?, || "it is not told".to_owned())?;
    card.send(0, &packet.complete())?;
    let words = "TAP t0 was removed: make it again, and end the data plane";
    ensure(fault(&host)? == words, || format!("{:?}", fault(&host)))?;
    host.wait_until("what is lost is not counted", |host| {
        host.tx_drops("net1", "port_error")
            .is_ok_and(|frames| frames > 0)
    })?;
    make_tap("t0", uid_of("agent"));
    host.kill("dataplane")?;
    host.wait_until("it has no other TAP", |host| {
        ip("-d link show dev t0").contains("LOWER_UP") && fault(host).is_ok_and(|f| f.is_empty())
    })?;
    let mut again = Card::attach(&host.socket("net1"), &Options::default())?;
    again.send(0, &packet.complete())?;
    ensure(host.tx_drops("net1", "port_error")? == 0, || {
        "lost again".to_owned()
    })?;
    // Nobody else noticed.
    packet.src = [0x52, 0x54, 0, 0, 0, 2];
    Ok(other.send(0, &packet.complete())?)
}

/// What is said of the switch's way out.
fn uplink_removed(host: &Host) -> Result<bool, Box<dyn std::error::Error>> {
    let status = host.status()?;
    let removed = status["switches"][0]["state"]["uplink_removed"].as_bool();
    Ok(removed.ok_or_else(|| format!("nothing is said: {status}"))?)
}

/// What is said to be wrong with the card on the TAP.
fn fault(host: &Host) -> Result<String, Box<dyn std::error::Error>> {
    let nic = host.nic("net1")?;
    ensure(nic["state"]["attached"] == true, || {
        format!("not attached: {nic}")
    })?;
    Ok(nic["state"]["fault"]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

fn nic(name: &str, interface: &str) -> String {
    let uid = own_uid();
    format!(
        "[[nic]]\nid = \"81818181-8181-8181-8181-81818181818{}\"\nname = \"{name}\"\n\
         mac = \"52:54:00:00:00:07\"\nport = {{ af_xdp = \"{interface}\", queue = 0 }}\n\
         socket = {{ name = \"{name}\", uid = {uid}, gid = {uid}, mode = \"0600\" }}\nallowed_uid = {uid}\n",
        name.trim_start_matches("net")
    )
}

fn serve(host: &Host, epoch: u64, name: &str) -> Outcome {
    let more = nic(name, "v0");
    let spec = BundleSpec {
        more: &more,
        ..BundleSpec::new(epoch, &[])
    };
    host.apply(&host.sign(&spec)?)?;
    let socket = host.socket(name);
    Ok(host.wait_until("the card is not served", |_| socket.exists())?)
}

/// The other end of the interface: the kernel's own stack.
struct Outside {
    socket: UdpSocket,
    mac: [u8; 6],
}

impl Outside {
    fn new() -> Result<Self, Box<dyn std::error::Error>> {
        make_pair("v0", "v1", "02:00:00:00:00:01", "10.7.0.1/24");
        ip("neigh replace 10.7.0.2 lladdr 52:54:00:00:00:07 dev v1 nud permanent");
        let socket = UdpSocket::bind("10.7.0.1:9000")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket,
            mac: [2, 0, 0, 0, 0, 1],
        })
    }

    /// A datagram out, its checksum left to the port, and one back.
    fn talk(&self, card: &mut Card, text: &[u8]) -> Outcome {
        let mut packet = Packet::v4(UDP, text);
        (packet.dst, packet.src) = (self.mac, MAC);
        packet.ip = Ip::V4([10, 7, 0, 2], [10, 7, 0, 1]);
        packet.ports = (5000, 9000);
        let (frame, start, offset) = packet.partial();
        let [start, offset] = [start, offset].map(u16::to_le_bytes);
        let header = [&[1, 0, 0, 0, 0, 0][..], &start, &offset, &[0, 0]].concat();
        card.send_with(0, &header, &frame)?;
        let mut got = [0; 64];
        let (bytes, from) = self.socket.recv_from(&mut got)?;
        ensure(&got[..bytes] == text, || format!("{:?}", &got[..bytes]))?;
        self.socket.send_to(text, from)?;
        let since = Instant::now();
        loop {
            let received = card.receive(0)?;
            match check(&received.frame) {
                Ok(seen) if seen.ports == (9000, 5000) => {
                    return ensure(seen.payload == text, || format!("{seen:?}"));
                }
                // The host says other things of its own.
                _ => ensure(since.elapsed() < PATIENCE, || "no answer".to_owned())?,
            }
        }
    }
}
