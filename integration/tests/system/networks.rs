//! Network cards from a signed bundle to the wire: rot, keyd, agent and data plane, two cards on a switch whose uplink
//! is a TAP of the host's, and what becomes of them when bundles change and processes die.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_integration::card::{Card, Options};
use bulkhead_integration::host::{BundleSpec, Host, own_uid, uid_of};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_tap};
use bulkhead_integration::packets::{ARP, ICMPV6, IPV4, Ip, Mac, Packet, sum};
use serde_json::Value;

use crate::support::{Outcome, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_nics_of_a_bundle_on_a_switch_and_a_tap",
        needs: &[Need::Root],
        run: on_a_switch_and_a_tap,
    },
    Test {
        name: "system_nics_change_beneath_their_frontends",
        needs: &[],
        run: beneath_their_frontends,
    },
    Test {
        name: "refused_nics_that_are_in_use_or_have_no_interface",
        needs: &[],
        run: refused,
    },
];

const TAP: &str = "bh-lan";
/// The host's address on the TAP.
const HOST: [u8; 4] = [10, 99, 0, 1];
/// How long something that must happen may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long is waited for something that must not.
const MOMENT: Duration = Duration::from_millis(300);

fn mac(n: u8) -> Mac {
    [0x52, 0x54, 0, 0, 0, n]
}

fn address(n: u8) -> [u8; 4] {
    [10, 99, 0, 10 + n]
}

/// A `[[nic]]` on the switch `lan`, with these lines besides.
fn nic(n: u8, more: &str) -> String {
    let uid = own_uid();
    format!(
        "[[nic]]\nid = \"81818181-8181-8181-8181-8181818181{n:02x}\"\nname = \"net-{n}\"\n\
         mac = \"52:54:00:00:00:{n:02x}\"\nport = {{ switch = \"lan\" }}\n\
         socket = {{ name = \"net-{n}\", uid = {uid}, gid = {uid}, mode = \"0600\" }}\n\
         allowed_uid = {uid}\n{more}\n"
    )
}

fn switch(uplink: &str) -> String {
    format!("[[switch]]\nname = \"lan\"\n{uplink}\n")
}

/// Signs and applies a bundle of nothing but networks.
fn apply(host: &Host, epoch: u64, parts: &[&str]) -> Result<String, Box<dyn std::error::Error>> {
    let more = parts.concat();
    let spec = BundleSpec {
        more: &more,
        ..BundleSpec::new(epoch, &[])
    };
    Ok(host.apply(&host.sign(&spec)?)?)
}

fn ethernet(dst: Mac, src: Mac, kind: u16) -> Vec<u8> {
    let mut frame = [dst, src].concat();
    frame.extend(kind.to_be_bytes());
    frame
}

/// An ARP request (RFC 826).
fn who_has(src: Mac, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut frame = ethernet([0xff; 6], src, ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(src);
    frame.extend(from);
    frame.extend([0; 6]);
    frame.extend(to);
    frame
}

/// An echo request (RFC 792).
fn ping(dst: Mac, src: Mac, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
    icmp.extend(*b"there and back again");
    let check = !sum(&icmp, 0);
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    let length = u16::try_from(20 + icmp.len()).unwrap_or(0).to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0, 7, 0, 0, 64, 1, 0, 0];
    header.extend(from);
    header.extend(to);
    let check = !sum(&header, 0);
    header[10..12].copy_from_slice(&check.to_be_bytes());
    let mut frame = ethernet(dst, src, IPV4);
    frame.extend(header);
    frame.extend(icmp);
    frame
}

/// A router's advertisement (RFC 4861, 4.2) from the first card's own link-local address to the second card.
fn advertisement() -> Vec<u8> {
    let mut message = [0; 16];
    message[0] = 134;
    let mut own = [0; 16];
    own[..2].copy_from_slice(&[0xfe, 0x80]);
    own[8..].copy_from_slice(&[0x50, 0x54, 0, 0xff, 0xfe, 0, 0, 1]);
    let mut packet = Packet::v6(ICMPV6, &message);
    (packet.dst, packet.src) = (mac(2), mac(1));
    packet.ip = Ip::V6(own, own);
    packet.complete()
}

/// The next frame for which this holds; others, like what the host's kernel says by itself, are passed over.
fn receive(card: &mut Card, what: &str, is_it: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>, String> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        match card.poll(0).map_err(|e| e.to_string())? {
            Some(received) if is_it(&received.frame) => return Ok(received.frame),
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    Err(format!("it never came: {what}"))
}

/// Sends a frame that must not arrive.
fn is_kept_from(from: &mut Card, to: &mut Card, frame: &[u8]) -> Outcome {
    from.send(0, frame)?;
    let until = Instant::now() + MOMENT;
    while Instant::now() < until {
        let came = to.poll(0)?.is_some_and(|received| received.frame == frame);
        ensure(!came, || format!("it arrived: {frame:02x?}"))?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Sends a frame that must arrive as it is. A switch learns, and forgets, on its own: so it may be sent again.
fn arrives(from: &mut Card, to: &mut Card, frame: &[u8]) -> Outcome {
    from.send(0, frame)?;
    receive(to, "from one card to the other", |came| came == frame)?;
    Ok(())
}

/// What status says of a NIC.
fn state(host: &Host, n: u8) -> Result<Value, Box<dyn std::error::Error>> {
    let status = host.status()?;
    let name = format!("net-{n}");
    let mut nics = status["nics"].as_array().into_iter().flatten();
    let found = nics.find(|nic| nic["name"] == name.as_str());
    found
        .map(|nic| nic["state"].clone())
        .ok_or_else(|| format!("no {name} in {status}").into())
}

/// Frames of a NIC's that were dropped for a reason.
fn drops(host: &Host, n: u8, reason: &str) -> u64 {
    let state = state(host, n).unwrap_or(Value::Null);
    let drops = ["tx_drops", "rx_drops"].map(|which| state[which].clone());
    let mut all = drops.iter().filter_map(Value::as_array).flatten();
    let found = all.find(|drops| drops["reason"] == reason);
    found
        .and_then(|drops| drops["frames"].as_u64())
        .unwrap_or(0)
}

fn card(host: &Host, n: u8) -> Result<Card, Box<dyn std::error::Error>> {
    Ok(Card::attach(
        &host.socket(&format!("net-{n}")),
        &Options::default(),
    )?)
}

/// Connects as soon as the card is served; a data plane that was just started may not have it yet.
fn card_again(host: &Host, n: u8) -> Result<Card, Box<dyn std::error::Error>> {
    host.wait_until(&format!("net-{n} is not attached"), |host| {
        state(host, n).is_ok_and(|state| state["attached"] == true && state["connected"] == false)
    })?;
    card(host, n)
}

fn on_a_switch_and_a_tap() -> Outcome {
    let name = "system_nics_of_a_bundle_on_a_switch_and_a_tap";
    if !enter_namespace(name) || !has_taps(name) {
        return Ok(());
    }
    make_tap(TAP, uid_of("agent"));
    ip(&format!("address add 10.99.0.1/24 dev {TAP}"));
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.start()?;
    let uplink = switch(&format!("uplink = {{ tap = \"{TAP}\" }}"));
    let said = apply(&host, 1, &[&uplink, &nic(1, ""), &nic(2, "")])?;
    for line in [
        "done: switch lan: uplink TAP bh-lan",
        "done: NIC net-1: added, 52:54:00:00:00:01 on switch lan, listener net-1",
        "done: listener net-2: bound",
    ] {
        ensure(said.contains(line), || format!("no {line:?} in {said}"))?;
    }
    let (mut one, mut two) = (card(&host, 1)?, card(&host, 2)?);
    from_one_to_the_other(&mut one, &mut two)?;
    reaches_the_host(&mut one, 1)?;
    reaches_the_host(&mut two, 2)?;
    let table = host.cli(&["status", "--admin", "run/admin.sock"])?;
    ensure(table.contains("lan   2     TAP bh-lan"), || table.clone())?;
    // The agent dies and nobody's frames stop; the data plane dies, and there are switch, uplink and cards again.
    host.kill("agent")?;
    from_one_to_the_other(&mut one, &mut two)?;
    drop((one, two));
    host.kill("dataplane")?;
    let (mut one, mut two) = (card_again(&host, 1)?, card_again(&host, 2)?);
    from_one_to_the_other(&mut one, &mut two)?;
    reaches_the_host(&mut one, 1)?;
    Ok(())
}

fn from_one_to_the_other(one: &mut Card, two: &mut Card) -> Outcome {
    arrives(one, two, &ping(mac(2), mac(1), address(1), address(2)))?;
    arrives(two, one, &ping(mac(1), mac(2), address(2), address(1)))
}

/// Asks for the host's address and pings it.
fn reaches_the_host(card: &mut Card, n: u8) -> Outcome {
    card.send(0, &who_has(mac(n), address(n), HOST))?;
    let reply = receive(card, "an answer to ARP", |frame| {
        frame.get(12..14) == Some(&ARP.to_be_bytes()[..]) && frame.get(28..32) == Some(&HOST[..])
    })?;
    let host: Mac = reply[22..28].try_into()?;
    let request = ping(host, mac(n), address(n), HOST);
    card.send(0, &request)?;
    let reply = receive(card, "an answer to a ping", |frame| {
        frame.get(26..30) == Some(&HOST[..]) && frame.get(34) == Some(&0)
    })?;
    ensure(reply[38..] == request[38..], || "another echo".to_owned())
}

fn beneath_their_frontends() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.start()?;
    let lan = switch("");
    apply(&host, 1, &[&lan, &nic(1, ""), &nic(2, "")])?;
    let (mut one, mut two) = (card(&host, 1)?, card(&host, 2)?);
    from_one_to_the_other(&mut one, &mut two)?;
    // A router's advertisement, by a guest that is none: nor is it one with an address that is its own.
    let advertisement = advertisement();
    is_kept_from(&mut one, &mut two, &advertisement)?;
    host.wait_until("no rogue_router is counted", |host| {
        drops(host, 1, "rogue_router") == 1
    })?;
    // Somebody else's address, which is checked from the start.
    let spoofed = ping(mac(2), mac(9), address(1), address(2));
    is_kept_from(&mut one, &mut two, &spoofed)?;
    host.wait_until("no spoofed_mac is counted", |host| {
        drops(host, 1, "spoofed_mac") == 1
    })?;
    // What the switch did stands beside them: two cards' own stations, one way looked up for each and known from then on.
    from_one_to_the_other(&mut one, &mut two)?;
    host.wait_until("the switch says something else", |host| {
        let status = host.status().unwrap_or_default();
        let state = &status["switches"][0]["state"];
        let count = |name: &str| state[name].as_u64().unwrap_or(0);
        let table = host.cli(&["status", "--admin", "run/admin.sock"]);
        count("stations") == 2
            && count("flow_hits") + count("flow_misses") == 4
            && count("flow_misses") >= 2
            && count("uplink_drops") == 0
            && table.is_ok_and(|table| table.contains("STATIONS"))
    })?;
    // Another IP address, which is not, until a bundle says so. The frontends stay.
    let other = ping(mac(2), mac(1), address(7), address(2));
    arrives(&mut one, &mut two, &other)?;
    let mine = "sources = [\"10.99.0.11\"]\ntrusted = [\"router\"]\nlimits = { rx_packets = 1_000_000 }\n\
                mirror = { file = \"net-1.pcapng\", bytes = \"1MiB\" }";
    let said = apply(&host, 2, &[&lan, &nic(1, mine), &nic(2, "")])?;
    ensure(
        said.contains("mirror net-1.pcapng; its frontend stays"),
        || said.clone(),
    )?;
    is_kept_from(&mut one, &mut two, &other)?;
    from_one_to_the_other(&mut one, &mut two)?;
    host.wait_until("no spoofed_ip is counted", |host| {
        drops(host, 1, "spoofed_ip") == 1
    })?;
    // Of the two frames that passed: a section header block (draft-ietf-opsawg-pcapng, 4.1) and their bytes.
    let file = host.mirrors().join("net-1.pcapng");
    host.wait_until("the mirror has not two frames", |host| {
        state(host, 1).is_ok_and(|state| state["mirror"]["frames"] == 2)
    })?;
    host.wait_until("the frames are not in the file", |_| {
        fs::read(&file).is_ok_and(|bytes| {
            let has = |frame: &[u8]| bytes.windows(frame.len()).any(|window| window == frame);
            bytes.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a])
                && has(&ping(mac(2), mac(1), address(1), address(2)))
                && has(&ping(mac(1), mac(2), address(2), address(1)))
                && !has(&other)
        })
    })?;
    arrives(&mut one, &mut two, &advertisement)?;
    apply(&host, 3, &[&lan, &nic(1, ""), &nic(2, "")])?;
    arrives(&mut one, &mut two, &other)?;
    let log = host.log();
    for (line, epoch) in [("mirror begins", "epoch=2"), ("mirror ends", "epoch=3")] {
        let is_it = |said: &&str| said.contains(line) && said.contains("signers=alice");
        let found = log.lines().find(is_it);
        let right = found.is_some_and(|said| said.contains(epoch) && said.contains("net-1.pcapng"));
        ensure(right, || format!("{line}: {found:?}\n{log}"))?;
    }
    // One that is full ends by itself, and is written down once, also when a bundle takes it out.
    let full = "mirror = { file = \"net-2.pcapng\", bytes = \"64KiB\" }";
    apply(&host, 4, &[&lan, &nic(1, ""), &nic(2, full)])?;
    let mut long = ethernet(mac(2), mac(1), 0x88b5);
    long.resize(1400, 7);
    for _ in 0..64 {
        arrives(&mut one, &mut two, &long)?;
    }
    let ends = |host: &Host| {
        let log = host.log();
        let lines = log.lines().filter(|line| line.contains("mirror ends"));
        lines.filter(|line| line.contains("net-2.pcapng")).count()
    };
    host.wait_until("no mirror ends", |host| ends(host) == 1)?;
    let log = host.log();
    ensure(log.contains("it is full"), || log.clone())?;
    apply(&host, 5, &[&lan, &nic(1, ""), &nic(2, "")])?;
    ensure(ends(&host) == 1, || "it is said twice".to_owned())
}

fn refused() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.start()?;
    let lan = switch("");
    apply(&host, 1, &[&lan, &nic(1, ""), &nic(2, "")])?;
    let (mut one, mut two) = (card(&host, 1)?, card(&host, 2)?);
    let refuse = |parts: &[&str], words: &str| -> Outcome {
        match apply(&host, 2, parts) {
            Ok(said) => Err(format!("not refused: {said}").into()),
            Err(error) => {
                let error = error.to_string();
                ensure(error.contains(words), || error.clone())
            }
        }
    };
    let changed = nic(2, "mtu = 9000");
    refuse(&[&lan, &nic(1, "")], "NIC net-2 is in use")?;
    refuse(&[&lan, &nic(1, ""), &changed], "NIC net-2 is in use")?;
    let away = switch("uplink = { tap = \"bh-not-there\" }");
    refuse(&[&away, &nic(1, ""), &nic(2, "")], "switch lan: ")?;
    let twin = nic(2, "").replace("52:54:00:00:00:02", "52:54:00:00:00:01");
    let spec_error = "is also that of NIC \"net-1\"";
    refuse(&[&lan, &nic(1, ""), &twin], spec_error)?;
    from_one_to_the_other(&mut one, &mut two)?;
    // By force it goes, and its frontend with it; the other one's stays.
    let force = "force_remove_nics = [\"81818181-8181-8181-8181-818181818102\"]\n";
    let said = apply(&host, 2, &[force, &lan, &nic(1, "")])?;
    ensure(said.contains("NIC net-2: removed"), || said.clone())?;
    ensure(!host.socket("net-2").exists(), || {
        "its socket is there".to_owned()
    })?;
    let left = state(&host, 1)?;
    ensure(left["connected"] == true, || left.to_string())?;
    ensure(
        host.status()?["nics"].as_array().map(Vec::len) == Some(1),
        || "another NIC".to_owned(),
    )
}
