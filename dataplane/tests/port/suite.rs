//! What every port must do: the same cases for all of them, each on a fresh port with its [`Outside`].

use std::time::Duration;

use bulkhead_dataplane::port::{DropReason, Port};

use crate::frames::{BROADCAST, Packet, datagram, ethernet, mac, segment, tagged};
use crate::rig::{NIC, PATIENCE, Rig};

/// What is behind a port: the other end of the cable, with the MAC address of [`THERE`].
pub trait Outside {
    /// The port.
    type Port: Port;
    /// Whether what is sent arrives anywhere.
    const LEADS_OUT: bool = true;
    /// Whether a segment arrives with its header, uncut; else whoever sends it must know what the port takes.
    const TAKES_SEGMENTS: bool = true;
    /// The longest that does.
    const LONGEST_SEGMENT: usize = 65_549;
    /// Whether other frames than the tests' arrive, such as a host's own announcements: they are left out.
    const IS_ALONE: bool = true;

    /// A port and its outside.
    fn set_up() -> (Rig<Self::Port>, Self);
    /// What has arrived there.
    fn arrived(&mut self, rig: &mut Rig<Self::Port>) -> Vec<Packet>;
    /// Sends a frame to the port.
    fn send(&mut self, rig: &mut Rig<Self::Port>, packet: &Packet);
}

/// Number of the MAC address of [`NIC`], and of what is outside.
pub const HERE: u8 = 1;
/// See [`HERE`].
pub const THERE: u8 = 2;

type Case<O> = (&'static str, fn(&mut Rig<<O as Outside>::Port>, &mut O));

/// Runs all cases.
pub fn run<O: Outside>() {
    let cases: [Case<O>; 9] = [
        (
            "what is sent arrives, in order and unchanged",
            outwards::<O>,
        ),
        (
            "what arrives is received, in order and unchanged",
            inwards::<O>,
        ),
        ("broadcast goes both ways", broadcast::<O>),
        ("frames in VLANs stay in them", vlans::<O>),
        ("segments cross whole", segments::<O>),
        (
            "more than there is room for is dropped and said",
            overflow::<O>,
        ),
        ("a receiver without room holds up nothing", no_room::<O>),
        ("a worker that sleeps is woken", wakes::<O>),
        ("a port that is stopped comes to rest", stops::<O>),
    ];
    for (name, case) in cases {
        println!("{name}");
        let (mut rig, mut outside) = O::set_up();
        case(&mut rig, &mut outside);
        rig.port.stop(&mut rig.ring);
        rig.until("it comes to rest", |rig| rig.port.is_idle());
    }
}

/// Frames of many lengths, each told from the others by its bytes.
fn several(dst: u8, src: u8) -> Vec<Packet> {
    let lengths = [60, 61, 128, 191, 192, 193, 204, 777, 1513, 1514];
    let mut packets: Vec<Packet> = Vec::new();
    for round in 0..30u8 {
        for length in lengths {
            let mut bytes = datagram(dst, src, length);
            let last = bytes.len() - 1;
            bytes[last] = round;
            packets.push(bytes.into());
        }
    }
    packets
}

fn is_ours(packet: &Packet) -> bool {
    let ends = [mac(HERE), mac(THERE)];
    packet
        .bytes
        .get(6..12)
        .is_some_and(|source| ends.iter().any(|end| end == source))
}

/// Waits until as many have arrived outside, and for nothing else.
fn arrive<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O, expected: &[Packet]) {
    if !O::LEADS_OUT {
        rig.turn();
        assert_eq!(outside.arrived(rig), [], "nothing arrives anywhere");
        return;
    }
    let mut arrived: Vec<Packet> = Vec::new();
    rig.until("everything has arrived outside", |rig| {
        arrived.extend(
            outside
                .arrived(rig)
                .into_iter()
                .filter(|one| O::IS_ALONE || is_ours(one)),
        );
        arrived.len() >= expected.len()
    });
    same(&arrived, expected);
}

/// Waits until the NIC has received as many, and for nothing else.
fn receive<O: Outside>(rig: &mut Rig<O::Port>, expected: &[Packet]) {
    let mut received: Vec<Packet> = Vec::new();
    rig.until("everything is received", |rig| {
        let got = rig.nics.take(NIC);
        received.extend(got.into_iter().filter(|one| O::IS_ALONE || is_ours(one)));
        received.len() >= expected.len()
    });
    same(&received, expected);
}

/// A failure says which, and not all bytes of all.
fn same(got: &[Packet], expected: &[Packet]) {
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got, expected, "frame {at}");
    }
}

fn outwards<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    let packets = several(THERE, HERE);
    rig.send(NIC, &packets);
    arrive(rig, outside, &packets);
}

fn inwards<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    if !O::LEADS_OUT {
        assert_eq!(rig.turn(), 0, "nothing comes");
        return;
    }
    let packets = several(HERE, THERE);
    // No more than a host keeps for a reader that is late.
    for some in packets.chunks(20) {
        for packet in some {
            outside.send(rig, packet);
        }
        receive::<O>(rig, some);
    }
}

fn broadcast<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    let of = |src| Packet::from(ethernet(BROADCAST, mac(src), 0x88b5, &[src; 50]));
    rig.send(NIC, &[of(HERE)]);
    arrive(rig, outside, &[of(HERE)]);
    if O::LEADS_OUT {
        outside.send(rig, &of(THERE));
        receive::<O>(rig, &[of(THERE)]);
    }
}

fn vlans<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    let of = |vlan, dst, src| Packet::from(tagged(vlan, mac(dst), mac(src), 0x88b5, &[7; 60]));
    let sent = [5, 0, 0x6005, 4094].map(|vlan| of(vlan, THERE, HERE));
    rig.send(NIC, &sent);
    arrive(rig, outside, &sent);
    if O::LEADS_OUT {
        let back = [5, 4094].map(|vlan| of(vlan, HERE, THERE));
        back.iter().for_each(|packet| outside.send(rig, packet));
        receive::<O>(rig, &back);
    }
}

fn segments<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    if !O::TAKES_SEGMENTS {
        return;
    }
    let lengths = [1600, 9000, 65_000, O::LONGEST_SEGMENT];
    let segments = lengths.map(|bytes| segment(THERE, HERE, bytes, 1448));
    rig.send(NIC, &segments);
    arrive(rig, outside, &segments);
}

fn overflow<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    let room = rig.port.room(NIC);
    if room > 100_000 {
        return;
    }
    let packet = Packet::from(datagram(THERE, HERE, 100));
    let taken: Vec<_> = (0..room * 2).map(|_| rig.transmit(NIC, &packet)).collect();
    assert!(taken.iter().take(room).all(Result::is_ok), "there was room");
    for dropped in taken.iter().filter_map(|one| one.err()) {
        assert_eq!(dropped, DropReason::PortBusy);
    }
    rig.port.flush(&mut rig.ring);
    let taken = taken.iter().filter(|one| one.is_ok()).count();
    arrive(rig, outside, &vec![packet; taken]);
    rig.until("there is as much room as before", |rig| {
        rig.port.room(NIC) >= room
    });
}

fn no_room<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    if !O::LEADS_OUT {
        return;
    }
    rig.nics.full = vec![NIC];
    let packets = several(HERE, THERE);
    for packet in packets.iter().take(20) {
        outside.send(rig, packet);
    }
    rig.until("all were refused", |rig| rig.nics.refused >= 20);
    rig.nics.full.clear();
    outside.send(rig, &packets[20]);
    receive::<O>(rig, &packets[20..21]);
    let sent = several(THERE, HERE);
    rig.send(NIC, &sent[..5]);
    arrive(rig, outside, &sent[..5]);
}

fn wakes<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    rig.turn();
    if !O::LEADS_OUT {
        assert!(rig.port.arm(&mut rig.ring), "nothing is there to be done");
        return;
    }
    let packet = Packet::from(datagram(HERE, THERE, 200));
    for _ in 0..10 {
        // As a worker falls asleep: not while it has something to do.
        rig.until("it may sleep", |rig| rig.port.arm(&mut rig.ring));
        outside.send(rig, &packet);
        let began = std::time::Instant::now();
        while rig.nics.delivered.is_empty() {
            assert!(began.elapsed() < PATIENCE, "it is not woken");
            // Without an end of its own: only a completion ends it, or the test fails.
            if rig.turn() == 0 && rig.port.arm(&mut rig.ring) {
                rig.ring.wait(Some(PATIENCE + Duration::from_secs(1)));
            }
        }
        receive::<O>(rig, std::slice::from_ref(&packet));
    }
}

fn stops<O: Outside>(rig: &mut Rig<O::Port>, outside: &mut O) {
    let packets = several(THERE, HERE);
    rig.send(NIC, &packets[..40]);
    if O::LEADS_OUT {
        outside.send(rig, &datagram(HERE, THERE, 100).into());
    }
    rig.port.stop(&mut rig.ring);
    rig.until("it comes to rest", |rig| rig.port.is_idle());
    assert_eq!(rig.ring.in_flight(), 0);
}
