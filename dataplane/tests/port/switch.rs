//! The switch, among NICs, and with an uplink that is a queue.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use bulkhead_dataplane::net::Counts as FrameCounts;
use bulkhead_dataplane::net::frame::Frame;
use bulkhead_dataplane::port::switch::SwitchCounters;
use bulkhead_dataplane::port::{DropReason, Nic, NullPort, Port, Sink, Switch};
use bulkhead_dataplane::worker::ring::{Completion, Ring};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::frames::{BROADCAST, Packet, datagram, ethernet, mac, segment, tagged};
use crate::rig::{NIC, Rig, key, packet};
use crate::suite::{self, HERE, Outside, THERE};

/// An uplink whose other end is the test.
#[derive(Debug, Default, Clone)]
struct Cable(Rc<RefCell<Ends>>);

#[derive(Debug, Default)]
struct Ends {
    sent: Vec<Packet>,
    coming: VecDeque<Packet>,
    is_busy: bool,
}

impl Cable {
    fn take(&self) -> Vec<Packet> {
        std::mem::take(&mut self.0.borrow_mut().sent)
    }

    fn arrives(&self, packet: impl Into<Packet>) {
        self.0.borrow_mut().coming.push_back(packet.into());
    }
}

impl Port for Cable {
    fn receive(&mut self, _now: u64, to: &mut impl Sink, _ring: &mut Ring) -> usize {
        let coming = std::mem::take(&mut self.0.borrow_mut().coming);
        for packet in &coming {
            let frame = Frame::of_bytes(&packet.header, &packet.bytes, key()).expect("a frame");
            // A switch knows better which NIC it is for.
            let _ = to.deliver(Nic(77), &frame);
        }
        coming.len()
    }

    fn room(&self, _from: Nic) -> usize {
        if self.0.borrow().is_busy {
            0
        } else {
            usize::MAX
        }
    }

    fn transmit(
        &mut self,
        _from: Nic,
        frame: &Frame<'_>,
        _to: &mut impl Sink,
        _ring: &mut Ring,
    ) -> Result<(), DropReason> {
        let mut ends = self.0.borrow_mut();
        if ends.is_busy {
            return Err(DropReason::PortBusy);
        }
        ends.sent.push(packet(frame));
        Ok(())
    }

    fn flush(&mut self, _ring: &mut Ring) {}

    fn landed(&mut self, _completion: Completion, _ring: &mut Ring) {}

    fn arm(&mut self, _ring: &mut Ring) -> bool {
        self.0.borrow().coming.is_empty()
    }

    fn stop(&mut self, _ring: &mut Ring) {}

    fn is_idle(&self) -> bool {
        true
    }
}

/// Another NIC of the switch.
struct Peer;

const PEER: Nic = Nic(1);

impl Outside for Peer {
    type Port = Switch<NullPort>;

    fn set_up() -> (Rig<Self::Port>, Self) {
        let mut switch = Switch::new(None, Arc::default());
        switch.join(NIC, mac(HERE)).expect("free");
        switch.join(PEER, mac(THERE)).expect("free");
        (Rig::new(|_| switch), Self)
    }

    fn arrived(&mut self, rig: &mut Rig<Self::Port>) -> Vec<Packet> {
        rig.nics.take(PEER)
    }

    fn send(&mut self, rig: &mut Rig<Self::Port>, packet: &Packet) {
        assert_eq!(rig.transmit(PEER, packet), Ok(()));
    }
}

/// Somebody behind the uplink.
struct World(Cable);

impl Outside for World {
    type Port = Switch<Cable>;

    fn set_up() -> (Rig<Self::Port>, Self) {
        let cable = Cable::default();
        let mut switch = Switch::new(Some(cable.clone()), Arc::default());
        switch.join(NIC, mac(HERE)).expect("free");
        (Rig::new(|_| switch), Self(cable))
    }

    fn arrived(&mut self, _rig: &mut Rig<Self::Port>) -> Vec<Packet> {
        self.0.take()
    }

    fn send(&mut self, _rig: &mut Rig<Self::Port>, packet: &Packet) {
        self.0.arrives(packet.clone());
    }
}

#[test]
fn among_nics_it_does_what_a_port_must() {
    suite::run::<Peer>();
}

#[test]
fn with_an_uplink_it_does_what_a_port_must() {
    suite::run::<World>();
}

/// NICs 0, 1 and 2 with the MAC addresses 1, 2 and 3, and an uplink.
fn three() -> (Rig<Switch<Cable>>, Cable) {
    let cable = Cable::default();
    let mut switch = Switch::new(Some(cable.clone()), Arc::default());
    for number in 0..3u8 {
        let nic = Nic(u16::from(number));
        switch.join(nic, mac(number + 1)).expect("free");
    }
    (Rig::new(|_| switch), cable)
}

/// How many frames each of the three NICs and the uplink got.
fn got(rig: &mut Rig<Switch<Cable>>, cable: &Cable) -> [usize; 4] {
    rig.turn();
    let nics = [0, 1, 2].map(|nic| rig.nics.take(Nic(nic)).len());
    [nics[0], nics[1], nics[2], cable.take().len()]
}

fn frame(dst: u8, src: u8) -> Packet {
    datagram(dst, src, 100).into()
}

#[test]
fn a_nics_own_address_is_known_before_its_first_frame() {
    let (mut rig, cable) = three();
    assert_eq!(rig.transmit(Nic(0), &frame(2, 1)), Ok(()));
    assert_eq!(got(&mut rig, &cable), [0, 1, 0, 0]);
    cable.arrives(frame(3, 9));
    assert_eq!(got(&mut rig, &cable), [0, 0, 1, 0]);
}

#[test]
fn what_is_for_nobody_known_goes_to_all_others_until_it_answers() {
    let (mut rig, cable) = three();
    assert_eq!(rig.transmit(Nic(0), &frame(50, 1)), Ok(()));
    assert_eq!(got(&mut rig, &cable), [0, 1, 1, 1]);
    cable.arrives(frame(51, 52));
    assert_eq!(got(&mut rig, &cable), [1, 1, 1, 0]);
    // 50 is behind NIC 2, 52 behind the uplink.
    assert_eq!(rig.transmit(Nic(2), &frame(1, 50)), Ok(()));
    assert_eq!(got(&mut rig, &cable), [1, 0, 0, 0]);
    assert_eq!(rig.transmit(Nic(0), &frame(50, 1)), Ok(()));
    assert_eq!(got(&mut rig, &cable), [0, 0, 1, 0]);
    assert_eq!(rig.transmit(Nic(0), &frame(52, 1)), Ok(()));
    assert_eq!(got(&mut rig, &cable), [0, 0, 0, 1]);
    let counts = rig.port.counts();
    assert_eq!((counts.floods, counts.learned, counts.moved), (2, 2, 0));
}

/// Whoever takes none whole has it cut: that is done for one, and not for all.
#[test]
fn a_segment_of_very_many_packets_is_for_one_receiver_only() {
    let (mut rig, cable) = three();
    let of = |dst, mss| segment(dst, 1, 20_054, mss);
    for (mss, reaches) in [(157, 1), (156, 0), (48, 0)] {
        let expected = if reaches == 0 {
            Err(DropReason::BadOffload)
        } else {
            Ok(())
        };
        assert_eq!(rig.transmit(Nic(0), &of(50, mss)), expected, "{mss}");
        assert_eq!(got(&mut rig, &cable), [0, reaches, reaches, reaches]);
        assert_eq!(rig.transmit(Nic(0), &of(2, mss)), Ok(()));
        assert_eq!(got(&mut rig, &cable), [0, 1, 0, 0]);
        cable.arrives(of(50, mss));
        assert_eq!(got(&mut rig, &cable), [reaches, reaches, reaches, 0]);
    }
}

#[test]
fn a_station_that_moves_is_found_with_its_first_frame_from_there() {
    let (mut rig, cable) = three();
    for (from, expected) in [(1u16, [0, 1, 0, 0]), (2, [0, 0, 1, 0]), (1, [0, 1, 0, 0])] {
        assert_eq!(rig.transmit(Nic(from), &frame(1, 50)), Ok(()));
        assert_eq!(got(&mut rig, &cable), [1, 0, 0, 0]);
        for _ in 0..2 {
            assert_eq!(rig.transmit(Nic(0), &frame(50, 1)), Ok(()));
            assert_eq!(got(&mut rig, &cable), expected);
        }
    }
    assert_eq!(rig.port.counts().moved, 2);
}

proptest! {
    /// Frames among four known stations and two others, some in a VLAN, some to everybody: sent together, and one by one.
    #[test]
    fn frames_that_are_sent_together_go_where_each_would_go_alone(
        frames in vec((0u8..7, 0u8..5, 0u16..2, 1usize..6), 0..20),
        full in prop::sample::subsequence(vec![Nic(0), Nic(1), Nic(2)], 0..3),
    ) {
        let mut packets = Vec::new();
        for (number, (dst, src, vlan, times)) in frames.into_iter().enumerate() {
            let dst = if dst == 6 { BROADCAST } else { mac(dst) };
            let body = [u8::try_from(number).expect("few"); 50];
            let bytes = match vlan {
                0 => ethernet(dst, mac(src), 0x88b5, &body),
                _ => tagged(vlan, dst, mac(src), 0x88b5, &body),
            };
            packets.extend(vec![Packet::from(bytes); times]);
        }
        let ([mut alone, mut together], [one, other]) = {
            let ((a, one), (b, other)) = (three(), three());
            ([a, b], [one, other])
        };
        alone.nics.full.clone_from(&full);
        together.nics.full = full;
        let mut expected = FrameCounts::default();
        for packet in &packets {
            match alone.transmit(Nic(0), packet) {
                Ok(()) => expected.frame(packet.bytes.len() as u64),
                Err(reason) => expected.dropped(reason),
            }
        }
        let all = packets.iter().map(|packet| {
            Frame::of_bytes(&packet.header, &packet.bytes, key()).expect("a frame")
        });
        let Rig { port, nics, ring, .. } = &mut together;
        let mut counts = FrameCounts::default();
        port.transmit_all(Nic(0), all, nics, ring, &mut counts);
        prop_assert_eq!(counts, expected);
        prop_assert_eq!(&together.nics.delivered, &alone.nics.delivered);
        prop_assert_eq!(together.nics.refused, alone.nics.refused);
        prop_assert_eq!(together.port.counts(), alone.port.counts());
        prop_assert_eq!(one.take(), other.take());
    }
}

#[test]
fn vlans_are_apart() {
    let (mut rig, cable) = three();
    let of = |vlan, dst, src| Packet::from(tagged(vlan, mac(dst), mac(src), 0x88b5, &[0; 50]));
    // The same address is behind NIC 1 in one VLAN and behind NIC 2 in another.
    for (nic, vlan) in [(1u16, 10), (2, 20)] {
        assert_eq!(rig.transmit(Nic(nic), &of(vlan, 60, 50)), Ok(()));
    }
    got(&mut rig, &cable);
    for (vlan, expected) in [(10, [0, 1, 0, 0]), (20, [0, 0, 1, 0]), (30, [0, 1, 1, 1])] {
        assert_eq!(rig.transmit(Nic(0), &of(vlan, 50, 1)), Ok(()));
        assert_eq!(got(&mut rig, &cable), expected, "VLAN {vlan}");
    }
    // A priority alone is no VLAN.
    assert_eq!(rig.transmit(Nic(0), &of(0xe000, 2, 1)), Ok(()));
    assert_eq!(got(&mut rig, &cable), [0, 1, 0, 0]);
}

#[test]
fn what_bridges_keep_to_themselves_goes_nowhere() {
    let (mut rig, cable) = three();
    for last in 0..16 {
        let bpdu = ethernet([1, 0x80, 0xc2, 0, 0, last], mac(1), 0x0026, &[0; 50]);
        assert_eq!(
            rig.transmit(Nic(0), &bpdu.clone().into()),
            Err(DropReason::Reserved)
        );
        cable.arrives(bpdu);
    }
    assert_eq!(got(&mut rig, &cable), [0; 4]);
    assert_eq!(rig.port.counts().uplink_drops, 16);
    let multicast = ethernet([1, 0x80, 0xc2, 0, 0, 0x10], mac(1), 0x0026, &[0; 50]);
    assert_eq!(rig.transmit(Nic(0), &multicast.into()), Ok(()));
    assert_eq!(got(&mut rig, &cable), [0, 1, 1, 1]);
}

#[test]
fn nothing_goes_back_to_where_it_came_from() {
    let (mut rig, cable) = three();
    assert_eq!(rig.transmit(Nic(0), &frame(1, 1)), Err(DropReason::Hairpin));
    for _ in 0..2 {
        cable.arrives(frame(71, 70));
        cable.arrives(frame(70, 71));
    }
    // The first was not known yet.
    assert_eq!(got(&mut rig, &cable), [1, 1, 1, 0]);
    assert_eq!(rig.port.counts().uplink_drops, 3);
}

#[test]
fn nobody_can_be_sent_from() {
    let (mut rig, cable) = three();
    for source in [[0; 6], BROADCAST, [0x33, 0x33, 0, 0, 0, 1]] {
        let bytes = ethernet(mac(2), source, 0x88b5, &[0; 50]);
        assert_eq!(
            rig.transmit(Nic(0), &bytes.into()),
            Err(DropReason::Malformed)
        );
    }
    assert_eq!(
        rig.transmit(Nic(9), &frame(2, 9)),
        Err(DropReason::NoPort),
        "not connected"
    );
    assert_eq!(got(&mut rig, &cable), [0; 4]);
}

#[test]
fn a_receiver_without_room_is_its_own_trouble() {
    let (mut rig, cable) = three();
    rig.nics.full = vec![Nic(1)];
    assert_eq!(rig.transmit(Nic(0), &frame(2, 1)), Ok(()));
    let all = ethernet(BROADCAST, mac(1), 0x88b5, &[0; 50]);
    assert_eq!(rig.transmit(Nic(0), &all.into()), Ok(()));
    assert_eq!(rig.nics.refused, 2);
    assert_eq!(got(&mut rig, &cable), [0, 0, 1, 1]);
}

#[test]
fn an_uplink_without_room_loses_what_is_for_it_alone() {
    let (mut rig, cable) = three();
    cable.arrives(frame(1, 50));
    got(&mut rig, &cable);
    cable.0.borrow_mut().is_busy = true;
    assert_eq!(
        rig.port.room(Nic(0)),
        usize::MAX,
        "guests still reach each other"
    );
    assert_eq!(
        rig.transmit(Nic(0), &frame(50, 1)),
        Err(DropReason::PortBusy)
    );
    let all = ethernet(BROADCAST, mac(1), 0x88b5, &[0; 50]);
    assert_eq!(rig.transmit(Nic(0), &all.into()), Ok(()));
    assert_eq!(rig.port.counts().uplink_drops, 1);
    assert_eq!(got(&mut rig, &cable), [0, 1, 1, 0]);
}

#[test]
fn who_sends_out_waits_for_a_full_uplink_but_not_forever() {
    let (mut rig, cable) = three();
    cable.arrives(frame(1, 50));
    rig.turn();
    rig.send(Nic(0), &[frame(50, 1), frame(2, 1)]);
    rig.send(Nic(1), &[frame(1, 2)]);
    cable.0.borrow_mut().is_busy = true;
    rig.turn();
    let rooms = |rig: &Rig<Switch<Cable>>| [0, 1].map(|nic| rig.port.room(Nic(nic)));
    assert_eq!(rooms(&rig), [0, usize::MAX]);
    cable.0.borrow_mut().is_busy = false;
    rig.turn();
    assert_eq!(rooms(&rig), [usize::MAX; 2]);
    cable.0.borrow_mut().is_busy = true;
    rig.until("it is hopeless", |rig| rooms(rig)[0] > 0);
    // A batch for the other guests alone, and it is none that sends out.
    rig.send(Nic(0), &[frame(2, 1)]);
    cable.0.borrow_mut().is_busy = false;
    rig.turn();
    cable.0.borrow_mut().is_busy = true;
    rig.turn();
    assert_eq!(rooms(&rig), [usize::MAX; 2]);
}

#[test]
fn counters_outlive_the_switch_on_a_worker() {
    let counters: Arc<SwitchCounters> = Arc::default();
    for round in 1..=2 {
        let mut switch = Switch::<NullPort>::new(None, Arc::clone(&counters));
        switch.join(NIC, mac(HERE)).expect("free");
        switch.join(PEER, mac(THERE)).expect("free");
        let mut rig = Rig::new(|_| switch);
        rig.send(NIC, &vec![frame(THERE, HERE); 100]);
        rig.send(NIC, &[frame(9, HERE)]);
        let counts = counters.counts();
        assert_eq!(
            (counts.flow_hits, counts.flow_misses),
            (99 * round, 2 * round)
        );
        assert_eq!((counts.floods, counts.learned), (round, 0));
    }
}

#[test]
fn who_leaves_is_forgotten() {
    let (mut rig, cable) = three();
    assert_eq!(rig.transmit(Nic(1), &frame(1, 50)), Ok(()));
    assert_eq!(rig.transmit(Nic(0), &frame(50, 1)), Ok(()));
    got(&mut rig, &cable);
    rig.port.leave(Nic(1));
    rig.port.leave(Nic(1));
    assert_eq!(rig.port.nics(), [Nic(0), Nic(2)]);
    for number in [2, 50] {
        assert_eq!(rig.transmit(Nic(0), &frame(number, 1)), Ok(()));
        assert_eq!(got(&mut rig, &cable), [0, 0, 1, 1]);
    }
    rig.port.leave(Nic(2));
    cable.arrives(frame(1, 60));
    got(&mut rig, &cable);
    assert!(rig.port.set_uplink(None).is_some());
    assert_eq!(rig.transmit(Nic(0), &frame(60, 1)), Err(DropReason::NoPort));
    assert_eq!(rig.port.stations(), 1, "its own");
}
