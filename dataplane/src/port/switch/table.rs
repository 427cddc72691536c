//! Where the stations are: MAC addresses by VLAN, as the switch has learned them (IEEE 802.1Q, 8.8), and those that
//! NICs have by their configuration.
//!
//! It is bounded, and each member has places of its own: [`NIC_PLACES`] for a NIC, [`UPLINK_PLACES`] for the uplink.
//! A guest that sends from a thousand addresses pushes out its own oldest ones and nobody else's.
//!
//! A NIC's configured address is **pinned**: it is there before the first frame, never grows old, and no other member
//! can take it over, whatever it sends. Every other address moves to the member that used it last.
//!
//! A station keeps its place for as long as it stays with its member, so that whoever remembers a place only has to
//! look whether it still holds the station ([`Table::at`]). The index over the places is a hash table with linear
//! probing, at most half full, whose hash nobody outside can know.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::station::{Member, Station, seeds};

/// Stations behind a NIC.
pub const NIC_PLACES: usize = 64;
/// Stations behind the uplink.
pub const UPLINK_PLACES: usize = 4096;
/// A station that has been silent for longer is not known any more, in seconds (IEEE 802.1Q, table 8-6).
pub const AGE_SECONDS: u32 = 300;
/// Places that are looked at for the one to be given to a new station.
const WINDOW: usize = 64;
/// `seen` of a pinned station: later than any other.
const PINNED: u32 = u32::MAX;

/// Number of a place.
pub type Place = u32;

#[derive(Debug, Clone, Copy)]
struct Entry {
    station: Station,
    /// When it was heard of last, in seconds.
    seen: u32,
    member: Member,
}

const EMPTY: Entry = Entry {
    station: Station::NONE,
    seen: 0,
    member: Member::UPLINK,
};

/// What came of learning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// It is known to be there.
    Known(Place),
    /// It was not known, or not any more.
    New(Place),
    /// It was known to be elsewhere.
    Moved(Place),
    /// It is another member's own address: it stays there.
    Refused,
}

/// An address that is another NIC's own already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another NIC of the switch has this MAC address: give each its own")]
pub struct Taken;

/// The table.
#[derive(Debug)]
pub struct Table {
    /// The uplink's, then those of each NIC.
    entries: Vec<Entry>,
    /// Where the search for a place of a member begins, by its number; the uplink's first.
    hands: Vec<u32>,
    /// Places by hash, plus one; 0: none. A power of two, at least twice as many as entries.
    index: Box<[u32]>,
    seeds: [u64; 2],
    second: u32,
}

impl Default for Table {
    fn default() -> Self {
        let mut table = Self {
            entries: vec![EMPTY; UPLINK_PLACES],
            hands: vec![0],
            index: Box::default(),
            seeds: seeds(),
            second: 0,
        };
        table.rebuild();
        table
    }
}

impl Table {
    /// Makes room for a NIC's stations. It allocates: for when a NIC joins.
    pub fn make_room(&mut self, nic: u16) {
        let nics = usize::from(nic) + 1;
        let entries = UPLINK_PLACES + nics * NIC_PLACES;
        if self.entries.len() < entries {
            self.entries.resize(entries, EMPTY);
            self.hands.resize(nics + 1, 0);
            self.rebuild();
        }
    }

    /// Gives a member an address for as long as it is there; what was learned of that address elsewhere, in whatever
    /// VLAN, is forgotten.
    ///
    /// # Errors
    /// Another member has it for as long as it is there.
    pub fn pin(&mut self, station: Station, member: Member) -> Result<(), Taken> {
        if self.is_anothers(station, member) {
            return Err(Taken);
        }
        for place in (0..).take(self.entries.len()) {
            let entry = self.entries.get(place as usize);
            if entry.is_some_and(|entry| entry.station.untagged() == station.untagged()) {
                self.remove(place);
            }
        }
        let place = self.insert(station, member);
        if let Some(entry) = self.entries.get_mut(place as usize) {
            entry.seen = PINNED;
        }
        Ok(())
    }

    /// Forgets everything about a member. (One by one: a frontend that comes and goes all the time has no more than its own
    /// part of the table looked at.)
    pub fn forget(&mut self, member: Member) {
        let (first, count) = places(member);
        for at in first..first + count {
            self.remove(Place::try_from(at).unwrap_or(Place::MAX));
        }
    }

    /// It is that many seconds after the start; stations that were silent for too long are not known any more.
    #[inline]
    pub fn set_second(&mut self, second: u32) {
        self.second = second.min(PINNED - 1);
    }

    /// The member that a place's station is with; none if the place does not hold that station, or too old a one.
    #[inline]
    pub fn at(&self, place: Place, station: Station) -> Option<Member> {
        let entry = self.entries.get(place as usize)?;
        (entry.station == station && self.is_fresh(entry)).then_some(entry.member)
    }

    /// As [`Table::at`] of a station that was just heard of from `member`; false if it isn't known to be there.
    #[inline]
    pub fn heard(&mut self, place: Place, station: Station, member: Member) -> bool {
        let second = self.second;
        let Some(entry) = self.entries.get_mut(place as usize) else {
            return false;
        };
        if entry.station != station || entry.member != member {
            return false;
        }
        // Written once a second only; a pinned one never.
        if entry.seen < second {
            entry.seen = second;
        }
        true
    }

    /// Where a station is; none if that isn't known.
    #[must_use]
    pub fn find(&self, station: Station) -> Option<(Place, Member)> {
        let place = self.place_of(station)?;
        Some((place, self.at(place, station)?))
    }

    /// A frame came from a station.
    pub fn learn(&mut self, station: Station, from: Member) -> Learned {
        let place = self.place_of(station);
        if let Some(place) = place
            && self.at(place, station) == Some(from)
            && self.heard(place, station, from)
        {
            return Learned::Known(place);
        }
        if self.is_anothers(station, from) {
            return Learned::Refused;
        }
        let was_elsewhere = place.is_some_and(|place| self.at(place, station).is_some());
        if let Some(place) = place {
            self.remove(place);
        }
        let place = self.insert(station, from);
        if was_elsewhere {
            Learned::Moved(place)
        } else {
            Learned::New(place)
        }
    }

    /// Stations that are known.
    #[must_use]
    pub fn len(&self) -> usize {
        let known = |entry: &&Entry| entry.station != Station::NONE && self.is_fresh(entry);
        self.entries.iter().filter(known).count()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether its address, in another VLAN or in none, is pinned to another member.
    fn is_anothers(&self, station: Station, from: Member) -> bool {
        let pinned = |place: Place| {
            let entry = self.entries.get(place as usize);
            entry.is_some_and(|entry| entry.seen == PINNED && entry.member != from)
        };
        self.place_of(station.untagged()).is_some_and(pinned)
    }

    #[inline]
    fn is_fresh(&self, entry: &Entry) -> bool {
        self.second.saturating_sub(entry.seen) <= AGE_SECONDS
    }

    /// The member's place that is free, or that of the station that it has not used for longest.
    fn insert(&mut self, station: Station, member: Member) -> Place {
        let place = self.oldest(member);
        self.remove(place);
        if let Some(entry) = self.entries.get_mut(place as usize) {
            *entry = Entry {
                station,
                seen: self.second,
                member,
            };
            self.add_to_index(station, place);
        }
        place
    }

    fn oldest(&mut self, member: Member) -> Place {
        let (first, count) = places(member);
        let Some(hand) = self.hands.get_mut(hand_of(member)) else {
            return Place::MAX;
        };
        let from = *hand as usize;
        let in_window = (from..from + WINDOW).map(|at| first + at % count);
        let age = |at: &usize| {
            self.entries
                .get(*at)
                .map(|entry| (entry.station != Station::NONE, entry.seen))
        };
        let oldest = in_window.min_by_key(age).unwrap_or(first);
        *hand = u32::try_from((oldest - first + 1) % count).unwrap_or(0);
        Place::try_from(oldest).unwrap_or(Place::MAX)
    }

    /// Takes a station out of its place, and its number out of the index.
    fn remove(&mut self, place: Place) {
        let Some(entry) = self.entries.get_mut(place as usize) else {
            return;
        };
        let station = std::mem::replace(entry, EMPTY).station;
        if station != Station::NONE
            && let Some(slot) = self.slot_holding(station, place)
        {
            self.close_gap(slot);
        }
    }

    /// The place of a station, however long it was silent.
    fn place_of(&self, station: Station) -> Option<Place> {
        for slot in self.slots_from(self.slot_of(station)) {
            let place = self.index.get(slot)?.checked_sub(1)?;
            if self.entries.get(place as usize)?.station == station {
                return Some(place);
            }
        }
        None
    }

    fn slot_holding(&self, station: Station, place: Place) -> Option<usize> {
        self.slots_from(self.slot_of(station))
            .take_while(|slot| self.index.get(*slot).is_some_and(|held| *held != 0))
            .find(|slot| self.index.get(*slot) == Some(&(place + 1)))
    }

    fn add_to_index(&mut self, station: Station, place: Place) {
        let free = self
            .slots_from(self.slot_of(station))
            .find(|slot| self.index.get(*slot) == Some(&0));
        if let Some(held) = free.and_then(|slot| self.index.get_mut(slot)) {
            *held = place + 1;
        }
    }

    /// Moves those forward that a search would not reach any more across the gap (Knuth, 6.4, algorithm R).
    fn close_gap(&mut self, slot: usize) {
        let mask = self.index.len() - 1;
        let mut gap = slot;
        let mut at = slot;
        loop {
            at = (at + 1) & mask;
            let Some(held) = self.index.get(at).copied().filter(|held| *held != 0) else {
                break;
            };
            let station = self
                .entries
                .get(held as usize - 1)
                .map(|entry| entry.station);
            let home = station.map_or(at, |station| self.slot_of(station));
            // It is reached from its home on; the gap lies on that way if it is no nearer to `at` than home is.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(gap) & mask {
                self.set_slot(gap, held);
                gap = at;
            }
        }
        self.set_slot(gap, 0);
    }

    fn set_slot(&mut self, slot: usize, held: u32) {
        if let Some(at) = self.index.get_mut(slot) {
            *at = held;
        }
    }

    /// Makes the index anew, for as many entries as there are.
    fn rebuild(&mut self) {
        let slots = (self.entries.len() * 2).next_power_of_two();
        self.index = vec![0; slots].into_boxed_slice();
        let held: Vec<(Station, Place)> = (0..)
            .zip(&self.entries)
            .filter(|(_, entry)| entry.station != Station::NONE)
            .map(|(place, entry)| (entry.station, place))
            .collect();
        for (station, place) in held {
            self.add_to_index(station, place);
        }
    }

    #[inline]
    fn slot_of(&self, station: Station) -> usize {
        station.hash(self.seeds) & (self.index.len() - 1)
    }

    fn slots_from(&self, slot: usize) -> impl Iterator<Item = usize> + use<> {
        let mask = self.index.len() - 1;
        (0..=mask).map(move |step| (slot + step) & mask)
    }
}

/// A member's places: the first, and how many.
fn places(member: Member) -> (usize, usize) {
    match member.nic() {
        None => (0, UPLINK_PLACES),
        Some(nic) => (UPLINK_PLACES + usize::from(nic.0) * NIC_PLACES, NIC_PLACES),
    }
}

fn hand_of(member: Member) -> usize {
    member.nic().map_or(0, |nic| usize::from(nic.0) + 1)
}
