//! The decision of a switch: where a frame goes, from its two stations and who sent it. It learns on the way.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::flow::{Flows, NIC_FLOWS, Now, Places, UPLINK_FLOWS};
use super::station::{Member, Seeds, Station, seeds};
use super::table::{Learned, Table, Taken};
use crate::port::{DropReason, Nic};
use crate::worker::clock;

/// NICs of a switch at most.
pub const MOST_NICS: u16 = 1024;

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// To this member, which is not the one that it came from.
    To(Member),
    /// To every member but the one that it came from.
    Flood,
    /// No further.
    Drop(DropReason),
}

/// Why a NIC can't join a switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Its number is too high.
    #[error("a switch has {MOST_NICS} NICs at most: put some on another one")]
    Full,
    /// It is there already.
    #[error("NIC {} is on the switch already", .0.0)]
    Member(Nic),
    /// Its MAC address is none that a NIC can have.
    #[error("a NIC's MAC address is neither zeroes nor one of a group")]
    Mac,
    /// Another NIC has its MAC address.
    #[error(transparent)]
    Taken(#[from] Taken),
}

/// What a switch has done since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that the flow cache knew.
    pub flow_hits: u64,
    /// Frames to a single station that it did not know.
    pub flow_misses: u64,
    /// Frames that went to all members, as they were for many or for a station that wasn't known.
    pub floods: u64,
    /// Stations that were not known before.
    pub learned: u64,
    /// Stations that went from one member to another.
    pub moved: u64,
    /// Frames from outside that went no further, with the uplink's own losses.
    pub uplink_drops: u64,
}

/// A switch without anything that moves frames.
#[derive(Debug)]
pub struct Bridge {
    table: Table,
    /// Of the uplink.
    uplink_flows: Flows,
    /// By number; none: not a member.
    nics: Vec<Option<Flows>>,
    /// The numbers of those that are.
    members: Vec<Nic>,
    seeds: Seeds,
    now: Now,
    /// When the next second begins, in ticks.
    next_second: u64,
    second_ticks: u64,
    pub(super) counts: Counts,
    /// Stations that were known when this second began, or when a NIC last came or went.
    pub(super) known: usize,
}

impl Default for Bridge {
    fn default() -> Self {
        let seeds = seeds();
        Self {
            table: Table::default(),
            uplink_flows: Flows::new(UPLINK_FLOWS, seeds),
            nics: Vec::new(),
            members: Vec::new(),
            seeds,
            now: Now {
                second: 0,
                generation: 1,
            },
            next_second: 0,
            second_ticks: clock::ticks_in(std::time::Duration::from_secs(1)).max(1),
            counts: Counts::default(),
            known: 0,
        }
    }
}

impl Bridge {
    /// A NIC with this MAC address is served from now on.
    ///
    /// # Errors
    /// [`JoinError`]; it is then no member.
    pub fn join(&mut self, nic: Nic, mac: [u8; 6]) -> Result<(), JoinError> {
        let station = Station::new(mac, 0);
        if nic.0 >= MOST_NICS {
            return Err(JoinError::Full);
        }
        if !station.is_single() {
            return Err(JoinError::Mac);
        }
        let at = usize::from(nic.0);
        if self.nics.len() <= at {
            self.nics.resize_with(at + 1, || None);
        }
        self.table.make_room(nic.0);
        let place = self.nics.get_mut(at).ok_or(JoinError::Full)?;
        if place.is_some() {
            return Err(JoinError::Member(nic));
        }
        self.table.pin(station, nic.into())?;
        *place = Some(Flows::new(NIC_FLOWS, self.seeds));
        self.members.push(nic);
        self.known = self.table.len();
        self.forget_decisions();
        Ok(())
    }

    /// A NIC is not served any more: what was learned from it is forgotten. Nothing happens if it is no member.
    pub fn leave(&mut self, nic: Nic) {
        let Some(flows) = self.nics.get_mut(usize::from(nic.0)) else {
            return;
        };
        if flows.take().is_some() {
            self.members.retain(|member| *member != nic);
            self.table.forget(nic.into());
            self.known = self.table.len();
            self.forget_decisions();
        }
    }

    /// What was learned from the uplink is forgotten: another one comes, or none.
    pub fn forget_uplink(&mut self) {
        self.table.forget(Member::UPLINK);
        self.forget_decisions();
    }

    /// Ends every flow: something that decisions depend on has changed.
    pub fn forget_decisions(&mut self) {
        self.now.generation = self.now.generation.wrapping_add(1).max(1);
    }

    /// The time of a turn, in ticks of [`clock::now`].
    #[inline]
    pub fn set_now(&mut self, ticks: u64) {
        if ticks >= self.next_second {
            self.set_second(ticks);
        }
    }

    #[cold]
    fn set_second(&mut self, ticks: u64) {
        if self.next_second > 0 {
            let late = ticks.saturating_sub(self.next_second) / self.second_ticks;
            let passed = u32::try_from(late + 1).unwrap_or(u32::MAX);
            self.now.second = self.now.second.saturating_add(passed);
            self.next_second += (late + 1) * self.second_ticks;
            self.table.set_second(self.now.second);
            self.known = self.table.len();
        } else {
            self.next_second = ticks.saturating_add(self.second_ticks);
        }
    }

    /// The NICs that are connected.
    #[inline]
    pub fn members(&self) -> &[Nic] {
        &self.members
    }

    /// Stations that are known now.
    #[must_use]
    pub fn stations(&self) -> usize {
        self.table.len()
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Where a frame of a member's goes.
    #[inline]
    pub fn decide(&mut self, from: Member, destination: Station, source: Station) -> Verdict {
        match self.known(from, destination, source) {
            Some(to) => {
                self.counts.flow_hits += 1;
                unless_back(from, to)
            }
            None => self.decide_first(from, destination, source),
        }
    }

    /// The NIC that so many frames of a member's go to, which are of one flow; none if that isn't known, or is not a NIC
    /// or the one that they come from: then nothing is counted, and each is to be decided about.
    #[inline]
    pub fn known_nic(
        &mut self,
        from: Member,
        destination: Station,
        source: Station,
        frames: u64,
    ) -> Option<Nic> {
        let to = self.known(from, destination, source)?;
        let nic = to.nic().filter(|_| to != from)?;
        self.counts.flow_hits += frames;
        Some(nic)
    }

    /// The member that a flow goes to, as was decided about its first frame.
    #[inline]
    fn known(&mut self, from: Member, destination: Station, source: Station) -> Option<Member> {
        let now = self.now;
        let places = self.flows(from)?.find(destination, source, now)?;
        let to = self.table.at(places.destination, destination)?;
        self.table.heard(places.source, source, from).then_some(to)
    }

    /// Where a frame goes whose flow isn't known, or is none that is remembered.
    #[inline(never)]
    fn decide_first(&mut self, from: Member, destination: Station, source: Station) -> Verdict {
        if self.flows(from).is_none() {
            return Verdict::Drop(DropReason::NoPort);
        }
        if !source.is_single() || destination.untagged() == Station::NONE {
            return Verdict::Drop(DropReason::Malformed);
        }
        if destination.is_reserved() {
            return Verdict::Drop(DropReason::Reserved);
        }
        let source_place = match self.table.learn(source, from) {
            Learned::Known(place) => Some(place),
            Learned::New(place) => {
                self.counts.learned += 1;
                Some(place)
            }
            Learned::Moved(place) => {
                self.counts.moved += 1;
                Some(place)
            }
            Learned::Refused => None,
        };
        if destination.is_group() {
            self.counts.floods += 1;
            return Verdict::Flood;
        }
        self.counts.flow_misses += 1;
        let Some((destination_place, to)) = self.table.find(destination) else {
            self.counts.floods += 1;
            return Verdict::Flood;
        };
        if let Some(source_place) = source_place {
            let places = Places {
                destination: destination_place,
                source: source_place,
            };
            let now = self.now;
            if let Some(flows) = self.flows(from) {
                flows.remember(destination, source, places, now);
            }
        }
        unless_back(from, to)
    }

    #[inline]
    fn flows(&mut self, of: Member) -> Option<&mut Flows> {
        match of.nic() {
            None => Some(&mut self.uplink_flows),
            Some(nic) => self.nics.get_mut(usize::from(nic.0))?.as_mut(),
        }
    }
}

/// To `to`, but not back to where it came from: who sent it has its own way to that station.
#[inline]
fn unless_back(from: Member, to: Member) -> Verdict {
    if from == to {
        Verdict::Drop(DropReason::Hairpin)
    } else {
        Verdict::To(to)
    }
}
