//! What keyd remembers, and its text: `docs/formats/keyd-state.md`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use bulkhead_bundle::{digest_of, text};
use bulkhead_protocol::workers::{Workers, format_cpus, parse_cpus};
use bulkhead_protocol::{ServedId, VolumeId};

/// Before anything was shredded: the text that earlier versions of keyd wrote, and still read.
const KIND: &str = "bulkhead keyd state v1";
/// From the first shred on.
const KIND_SHREDDED: &str = "bulkhead keyd state v2";
/// While the bundle has workers.
const KIND_WORKERS: &str = "bulkhead keyd state v3";
/// While a data plane may hold a NIC's grant.
const KIND_NICS: &str = "bulkhead keyd state v4";
const KINDS: [&str; 4] = [KIND, KIND_SHREDDED, KIND_WORKERS, KIND_NICS];

/// Names a recipient's public key: SHA-384, `docs/formats/keys.md`.
pub(crate) type Fingerprint = [u8; 48];

/// The envelope accepted last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// Epoch of its bundle: the next is above it.
    pub(crate) epoch: u64,
    /// SHA-384 of its bytes.
    pub(crate) digest: [u8; 48],
}

/// One key of the host in the place of another, for the sake of what a bundle shredded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rotation {
    /// Epoch of that bundle.
    pub(crate) epoch: u64,
    /// When it was accepted, in seconds since 1970.
    pub(crate) time_s: u64,
    /// The key that was destroyed.
    pub(crate) old: Fingerprint,
    /// The key that took its place.
    pub(crate) new: Fingerprint,
}

/// What outlives a keyd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    /// Accepted last.
    pub(crate) accepted: Accepted,
    /// Every volume and NIC that a data plane may hold a grant of: those of the bundle, and those of
    /// earlier ones whose revocation was not confirmed.
    pub(crate) held: BTreeSet<ServedId>,
    /// In the order of their epochs; the last one's new key is the host's.
    pub(crate) rotations: Vec<Rotation>,
    /// Every volume that was ever shredded, with the epoch of the rotation it was shredded in.
    pub(crate) shredded: BTreeMap<VolumeId, u64>,
    /// The workers of the bundle accepted last: a data plane asks for them before anybody has handed
    /// the bundle in again.
    pub(crate) workers: Option<Workers>,
}

impl State {
    /// The key that the host has after its last rotation; none if it has the one it was made with.
    pub(crate) fn host_key(&self) -> Option<Fingerprint> {
        self.rotations.last().map(|rotation| rotation.new)
    }

    /// The text of the file.
    pub(crate) fn to_text(&self) -> String {
        let has_nics = self.held.iter().any(|id| id.nic().is_some());
        let kind = match (&self.workers, self.rotations.len()) {
            _ if has_nics => KIND_NICS,
            (Some(_), _) => KIND_WORKERS,
            (None, 0) => KIND,
            (None, _) => KIND_SHREDDED,
        };
        let mut out = format!(
            "{kind}\nepoch {}\naccepted {}\n",
            self.accepted.epoch,
            text::to_hex(&self.accepted.digest)
        );
        // Writing to a String can't fail.
        if let Some(Workers { count, cpus }) = &self.workers {
            let _ = writeln!(out, "workers {count} {}", format_cpus(cpus));
        }
        for rotation in &self.rotations {
            let (old, new) = (text::to_hex(&rotation.old), text::to_hex(&rotation.new));
            let (epoch, time_s) = (rotation.epoch, rotation.time_s);
            let _ = writeln!(out, "rotated {epoch} {time_s} {old} {new}");
        }
        for (volume, epoch) in &self.shredded {
            let _ = writeln!(out, "shredded {volume} {epoch}");
        }
        for id in &self.held {
            let _ = match id {
                ServedId::Volume(id) => writeln!(out, "held {id}"),
                ServedId::Nic(id) => writeln!(out, "held-nic {id}"),
            };
        }
        let checksum = text::to_hex(&digest_of(out.as_bytes()));
        let _ = writeln!(out, "sha384 {checksum}");
        out
    }

    /// Reads the text of the file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn from_text(given: &str) -> Result<Self, &'static str> {
        let mut lines = given.lines();
        if !lines.next().is_some_and(|line| KINDS.contains(&line)) {
            return Err("it is not a state file of this version of keyd");
        }
        let state =
            parse(lines).ok_or("it is cut short, or a line of it is not what keyd writes")?;
        // One state has one text, the checksum is part of it.
        if state.to_text() != given {
            return Err("its checksum is not that of its content");
        }
        if !state.is_consistent() {
            return Err("what it says of destroyed keys contradicts itself");
        }
        Ok(state)
    }

    /// Each rotation begins with the key that the one before ended with, and each shredded volume
    /// has its rotation.
    fn is_consistent(&self) -> bool {
        let follows = |(a, b): (&Rotation, &Rotation)| a.new == b.old && a.epoch < b.epoch;
        let rotated = |epoch: &u64| self.rotations.iter().any(|r| r.epoch == *epoch);
        let next = self.rotations.iter().skip(1);
        self.rotations.iter().zip(next).all(follows) && self.shredded.values().all(rotated)
    }
}

fn parse<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<State> {
    let epoch = lines.next()?.strip_prefix("epoch ")?.parse().ok()?;
    let digest = fingerprint(lines.next()?.strip_prefix("accepted ")?)?;
    let mut state = State {
        accepted: Accepted { epoch, digest },
        held: BTreeSet::new(),
        rotations: Vec::new(),
        shredded: BTreeMap::new(),
        workers: None,
    };
    loop {
        match lines.next()?.split_once(' ')? {
            ("workers", rest) => state.workers = Some(workers(rest)?),
            ("rotated", rest) => state.rotations.push(rotation(rest)?),
            ("shredded", rest) => {
                let (volume, epoch) = rest.split_once(' ')?;
                let epoch = epoch.parse().ok()?;
                state.shredded.insert(volume.parse().ok()?, epoch);
            }
            ("held", id) => {
                state.held.insert(ServedId::Volume(id.parse().ok()?));
            }
            ("held-nic", id) => {
                state.held.insert(ServedId::Nic(id.parse().ok()?));
            }
            ("sha384", _) => break,
            _ => return None,
        }
    }
    lines.next().is_none().then_some(state)
}

fn workers(text: &str) -> Option<Workers> {
    let (count, cpus) = text.split_once(' ')?;
    let cpus = match cpus {
        "" => Vec::new(),
        cpus => parse_cpus(cpus).ok()?,
    };
    Workers::new(Some(count.parse().ok()?), cpus).ok()
}

fn rotation(text: &str) -> Option<Rotation> {
    let mut words = text.split(' ');
    Some(Rotation {
        epoch: words.next()?.parse().ok()?,
        time_s: words.next()?.parse().ok()?,
        old: fingerprint(words.next()?)?,
        new: fingerprint(words.next()?)?,
    })
}

fn fingerprint(hex: &str) -> Option<Fingerprint> {
    text::from_hex(hex)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::NicId;
    use proptest::prelude::*;

    use super::*;

    fn example() -> State {
        State {
            accepted: Accepted {
                epoch: 41,
                digest: [0xd1; 48],
            },
            held: [1, 2, 3].map(|n| VolumeId([n; 16]).into()).into(),
            rotations: Vec::new(),
            shredded: BTreeMap::new(),
            workers: None,
        }
    }

    fn rotated(epoch: u64, from: u8) -> Rotation {
        Rotation {
            epoch,
            time_s: 1_700_000_000 + epoch,
            old: [from; 48],
            new: [from + 1; 48],
        }
    }

    /// Three volumes, shredded by two bundles.
    fn shredding() -> State {
        State {
            rotations: vec![rotated(20, 0xa0), rotated(41, 0xa1)],
            shredded: [(7, 41), (8, 20), (9, 41)]
                .map(|(n, epoch)| (VolumeId([n; 16]), epoch))
                .into(),
            ..example()
        }
    }

    #[test]
    fn the_text_is_as_documented() {
        let text = example().to_text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "bulkhead keyd state v1");
        assert_eq!(lines[1], "epoch 41");
        assert_eq!(lines[2], format!("accepted {}", "d1".repeat(48)));
        assert_eq!(lines[3], "held 01010101-0101-0101-0101-010101010101");
        assert!(lines[6].starts_with("sha384 ") && lines.len() == 7);
    }

    #[test]
    fn the_text_with_shreds_is_as_documented() {
        let text = shredding().to_text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "bulkhead keyd state v2");
        let (old, new) = ("a0".repeat(48), "a1".repeat(48));
        assert_eq!(lines[3], format!("rotated 20 1700000020 {old} {new}"));
        assert_eq!(lines[5], "shredded 07070707-0707-0707-0707-070707070707 41");
        assert!(lines[8].starts_with("held ") && lines.len() == 12);
        assert_eq!(shredding().host_key(), Some([0xa2; 48]));
        assert_eq!(example().host_key(), None);
    }

    #[test]
    fn the_text_with_workers_is_as_documented() {
        for (cpus, line) in [(vec![2, 3], "workers 2 2-3"), (vec![], "workers 2 ")] {
            let state = State {
                workers: Workers::new(Some(2), cpus).ok(),
                ..shredding()
            };
            let text = state.to_text();
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!((lines[0], lines[3]), ("bulkhead keyd state v3", line));
            assert!(lines[4].starts_with("rotated 20 "));
            every_change_is_noticed(&state);
        }
    }

    #[test]
    fn rotations_that_contradict_each_other_are_refused() {
        let refused = |change: fn(&mut State)| {
            let mut state = shredding();
            change(&mut state);
            let refused = State::from_text(&state.to_text());
            assert_eq!(
                refused,
                Err("what it says of destroyed keys contradicts itself")
            );
        };
        refused(|state| state.rotations[1].old = [9; 48]);
        refused(|state| state.rotations.swap(0, 1));
        refused(|state| state.rotations[1].epoch = 20);
        refused(|state| state.rotations.truncate(1));
    }

    #[test]
    fn the_text_with_nics_is_as_documented() {
        let mut state = example();
        state.held.insert(NicId([4; 16]).into());
        let text = state.to_text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "bulkhead keyd state v4");
        assert_eq!(lines[5], "held 03030303-0303-0303-0303-030303030303");
        assert_eq!(lines[6], "held-nic 04040404-0404-0404-0404-040404040404");
        // Without one it is what it was before.
        state.held.remove(&NicId([4; 16]).into());
        assert_eq!(state.to_text(), example().to_text());
    }

    #[test]
    fn any_byte_changed_or_missing_is_noticed() {
        let mut with_nic = shredding();
        with_nic.held.insert(NicId([4; 16]).into());
        for state in [example(), shredding(), with_nic] {
            every_change_is_noticed(&state);
        }
    }

    fn every_change_is_noticed(state: &State) {
        let whole = state.to_text();
        assert_eq!(State::from_text(&whole).as_ref(), Ok(state));
        for at in 0..whole.len() {
            let mut bytes = whole.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).expect("ASCII");
            assert!(State::from_text(&changed).is_err(), "byte {at}");
            assert!(State::from_text(&whole[..at]).is_err(), "cut at {at}");
        }
        assert!(State::from_text(&format!("{whole}\n")).is_err());
        assert!(State::from_text(&whole.repeat(2)).is_err());
    }

    proptest! {
        #[test]
        fn states_round_trip(
            epoch: u64,
            digest in proptest::array::uniform32(any::<u8>()),
            ids: Vec<([u8; 16], bool)>,
        ) {
            let mut whole = [0; 48];
            whole[..32].copy_from_slice(&digest);
            let state = State {
                accepted: Accepted { epoch, digest: whole },
                held: ids
                    .into_iter()
                    .map(|(id, nic)| match nic {
                        true => NicId(id).into(),
                        false => VolumeId(id).into(),
                    })
                    .collect(),
                ..example()
            };
            prop_assert_eq!(State::from_text(&state.to_text()), Ok(state));
        }

        #[test]
        fn noise_is_refused(noise: String) {
            prop_assert!(State::from_text(&noise).is_err());
            let noise = format!("{KIND}\n{noise}");
            prop_assert!(State::from_text(&noise).is_err());
        }
    }
}
