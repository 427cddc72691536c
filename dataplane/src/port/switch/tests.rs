//! The decision against a model that remembers everything it hears and has no flow cache.

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::bridge::{Bridge, JoinError, Verdict};
use super::station::{Member, Station};
use super::table::{AGE_SECONDS, Learned, NIC_PLACES, Table, UPLINK_PLACES};
use crate::port::{DropReason, Nic};
use crate::worker::clock;

/// Stations that frames come from and go to: few, so that they meet. Those of the first three numbers are the NICs'
/// own.
fn station(number: u8) -> Station {
    let vlan = if number >= 8 { 7 } else { 0 };
    Station::new(mac(number % 8), vlan)
}

fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number + 1]
}

const BROADCAST: Station = Station::NONE;

fn destination(number: u8) -> Station {
    match number {
        0..16 => station(number),
        16 => Station::new([0xff; 6], 0),
        17 => Station::new([1, 0, 0x5e, 0, 0, 1], 7),
        _ => Station::new([1, 0x80, 0xc2, 0, 0, 3], 0),
    }
}

fn member(number: u8) -> Member {
    match number {
        0 => Member::UPLINK,
        nic => Nic(u16::from(nic) - 1).into(),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Frame {
        from: u8,
        source: u8,
        destination: u8,
    },
    Wait {
        seconds: u16,
    },
    Join {
        nic: u8,
    },
    Leave {
        nic: u8,
    },
    ForgetDecisions,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (0u8..4, 0u8..16, 0u8..19).prop_map(|(from, source, destination)| Step::Frame {
            from, source, destination,
        }),
        3 => prop_oneof![0u16..5, 250u16..350].prop_map(|seconds| Step::Wait { seconds }),
        1 => (0u8..3).prop_map(|nic| Step::Join { nic }),
        1 => (0u8..3).prop_map(|nic| Step::Leave { nic }),
        1 => Just(Step::ForgetDecisions),
    ]
}

/// What a switch is to do, said as simply as can be.
#[derive(Default)]
struct Model {
    known: HashMap<Station, (Member, u64)>,
    /// NICs that are connected, each with its own station.
    joined: HashMap<Member, Station>,
    second: u64,
}

impl Model {
    fn owner(&self, station: Station) -> Option<Member> {
        let own = |(member, own): (&Member, &Station)| (*own == station).then_some(*member);
        self.joined.iter().find_map(own)
    }

    fn find(&self, station: Station) -> Option<Member> {
        self.owner(station).or_else(|| {
            let (member, heard) = self.known.get(&station)?;
            (self.second - heard <= u64::from(AGE_SECONDS)).then_some(*member)
        })
    }

    fn frame(&mut self, from: Member, destination: Station, source: Station) -> Verdict {
        if from != Member::UPLINK && !self.joined.contains_key(&from) {
            return Verdict::Drop(DropReason::NoPort);
        }
        if destination.is_reserved() {
            return Verdict::Drop(DropReason::Reserved);
        }
        if self.owner(source.untagged()).is_none_or(|own| own == from) {
            self.known.insert(source, (from, self.second));
        }
        match self.find(destination) {
            _ if destination.is_group() => Verdict::Flood,
            None => Verdict::Flood,
            Some(to) if to == from => Verdict::Drop(DropReason::Hairpin),
            Some(to) => Verdict::To(to),
        }
    }

    fn join(&mut self, nic: u8) {
        let member: Member = Nic(u16::from(nic)).into();
        if self.joined.insert(member, station(nic)).is_none() {
            self.known
                .retain(|known, _| known.untagged() != station(nic));
        }
    }

    fn leave(&mut self, nic: u8) {
        let member: Member = Nic(u16::from(nic)).into();
        if self.joined.remove(&member).is_some() {
            self.known.retain(|_, (behind, _)| *behind != member);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn it_decides_as_the_model_does(steps in vec(step(), 0..400)) {
        let (mut bridge, mut model) = (Bridge::default(), Model::default());
        let second = clock::ticks_in(std::time::Duration::from_secs(1));
        let mut now = 1;
        bridge.set_now(now);
        for step in steps {
            match step {
                Step::Frame { from, source, destination: to } => {
                    let (from, source, to) = (member(from), station(source), destination(to));
                    let verdict = bridge.decide(from, to, source);
                    prop_assert_eq!(verdict, model.frame(from, to, source), "{:?} to {:?}", source, to);
                }
                Step::Wait { seconds } => {
                    now += u64::from(seconds) * second;
                    bridge.set_now(now);
                    model.second += u64::from(seconds);
                }
                Step::Join { nic } => {
                    let joined = bridge.join(Nic(u16::from(nic)), mac(nic));
                    let is_new = !model.joined.contains_key(&member(nic + 1));
                    prop_assert_eq!(joined.is_ok(), is_new);
                    model.join(nic);
                }
                Step::Leave { nic } => {
                    bridge.leave(Nic(u16::from(nic)));
                    model.leave(nic);
                }
                Step::ForgetDecisions => bridge.forget_decisions(),
            }
        }
        let known = (0..16).filter(|number| model.find(station(*number)).is_some()).count();
        prop_assert_eq!(bridge.stations(), known);
    }
}

fn numbered(number: u32) -> Station {
    let [a, b, c, d] = number.to_be_bytes();
    Station::new([2, 1, a, b, c, d], 0)
}

#[test]
fn a_guest_pushes_out_nothing_but_its_own() {
    let mut table = Table::default();
    let (flooder, other) = (Nic(0).into(), Nic(1).into());
    table.make_room(1);
    let own = [Station::new(mac(0), 0), Station::new(mac(1), 0)];
    table.pin(own[0], flooder).expect("free");
    table.pin(own[1], other).expect("free");
    for number in 0..40 {
        assert!(matches!(
            table.learn(numbered(1_000_000 + number), other),
            Learned::New(_)
        ));
        assert!(matches!(
            table.learn(numbered(2_000_000 + number), Member::UPLINK),
            Learned::New(_)
        ));
    }
    for number in 0..100_000 {
        assert!(matches!(
            table.learn(numbered(number), flooder),
            Learned::New(_)
        ));
        assert_eq!(
            table.find(numbered(number)).map(|(_, member)| member),
            Some(flooder)
        );
    }
    for number in 0..40 {
        let found = |number| table.find(numbered(number)).map(|(_, member)| member);
        assert_eq!(found(1_000_000 + number), Some(other));
        assert_eq!(found(2_000_000 + number), Some(Member::UPLINK));
    }
    assert_eq!(table.find(own[0]).map(|(_, member)| member), Some(flooder));
    assert_eq!(table.len(), NIC_PLACES + 41 + 40);
    // What is left of the flooder is its latest.
    for number in (0..100_000).rev().take(NIC_PLACES - 1) {
        assert!(table.find(numbered(number)).is_some(), "{number}");
    }
}

#[test]
fn the_uplink_is_bounded_too() {
    let mut table = Table::default();
    for number in (0..).take(3 * UPLINK_PLACES) {
        table.learn(numbered(number), Member::UPLINK);
    }
    assert_eq!(table.len(), UPLINK_PLACES);
    table.forget(Member::UPLINK);
    assert!(table.is_empty());
}

#[test]
fn a_nics_own_address_is_nobody_elses_in_any_vlan() {
    let mut bridge = Bridge::default();
    bridge.join(Nic(0), mac(0)).expect("free");
    bridge.join(Nic(1), mac(1)).expect("free");
    let victim: Member = Nic(0).into();
    let [untagged, tagged] = [0, 7].map(|vlan| Station::new(mac(0), vlan));
    for thief in [Member::UPLINK, Nic(1).into()] {
        for source in [untagged, tagged] {
            bridge.decide(thief, BROADCAST, source);
            bridge.decide(thief, Station::new([0xff; 6], 0), source);
        }
        assert_eq!(
            bridge.decide(thief, untagged, station(5)),
            Verdict::To(victim)
        );
        // Nobody has it in that VLAN: so everyone gets it, and not the thief alone.
        assert_eq!(bridge.decide(thief, tagged, station(13)), Verdict::Flood);
    }
}

#[test]
fn who_cannot_join_is_told_why() {
    let mut bridge = Bridge::default();
    bridge.join(Nic(3), mac(0)).expect("free");
    assert_eq!(bridge.join(Nic(3), mac(1)), Err(JoinError::Member(Nic(3))));
    assert!(matches!(
        bridge.join(Nic(4), mac(0)),
        Err(JoinError::Taken(_))
    ));
    assert_eq!(bridge.join(Nic(5), [0xff; 6]), Err(JoinError::Mac));
    assert_eq!(bridge.join(Nic(5), [0; 6]), Err(JoinError::Mac));
    assert_eq!(bridge.join(Nic(1024), mac(1)), Err(JoinError::Full));
    assert_eq!(bridge.members(), [Nic(3)]);
    bridge.leave(Nic(3));
    bridge.join(Nic(4), mac(0)).expect("free again");
}

#[test]
fn a_flow_is_decided_once() {
    let mut bridge = Bridge::default();
    bridge.join(Nic(0), mac(0)).expect("free");
    bridge.join(Nic(1), mac(1)).expect("free");
    let from: Member = Nic(0).into();
    let to = Verdict::To(Nic(1).into());
    for _ in 0..100 {
        assert_eq!(bridge.decide(from, station(1), station(0)), to);
    }
    let counts = bridge.counts();
    assert_eq!((counts.flow_misses, counts.flow_hits), (1, 99));
    bridge.forget_decisions();
    assert_eq!(bridge.decide(from, station(1), station(0)), to);
    assert_eq!(bridge.counts().flow_misses, 2);
    // A minute without a frame.
    bridge.set_now(1);
    bridge.set_now(1 + clock::ticks_in(std::time::Duration::from_secs(60)));
    assert_eq!(bridge.decide(from, station(1), station(0)), to);
    assert_eq!(bridge.counts().flow_misses, 3);
}
