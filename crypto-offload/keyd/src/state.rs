//! What keyd remembers, and its text: `docs/formats/keyd-state.md`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fmt::Write;

use bulkhead_bundle::{digest_of, text};
use bulkhead_protocol::VolumeId;

const KIND: &str = "bulkhead keyd state v1";

/// The envelope accepted last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// Epoch of its bundle: the next is above it.
    pub(crate) epoch: u64,
    /// SHA-384 of its bytes.
    pub(crate) digest: [u8; 48],
}

/// What outlives a keyd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    /// Accepted last.
    pub(crate) accepted: Accepted,
    /// Every volume that a data plane may hold a grant of: those of the bundle, and those of
    /// earlier ones whose revocation was not confirmed.
    pub(crate) held: BTreeSet<VolumeId>,
}

impl State {
    /// The text of the file.
    pub(crate) fn to_text(&self) -> String {
        let mut out = format!(
            "{KIND}\nepoch {}\naccepted {}\n",
            self.accepted.epoch,
            text::to_hex(&self.accepted.digest)
        );
        for volume in &self.held {
            // Writing to a String can't fail.
            let _ = writeln!(out, "held {volume}");
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
        if lines.next() != Some(KIND) {
            return Err("it is not a state file of this version of keyd");
        }
        let state =
            parse(lines).ok_or("it is cut short, or a line of it is not what keyd writes")?;
        // One state has one text, the checksum is part of it.
        if state.to_text() != given {
            return Err("its checksum is not that of its content");
        }
        Ok(state)
    }
}

fn parse<'a>(mut lines: impl Iterator<Item = &'a str>) -> Option<State> {
    let epoch = lines.next()?.strip_prefix("epoch ")?.parse().ok()?;
    let digest = text::from_hex(lines.next()?.strip_prefix("accepted ")?)?;
    let accepted = Accepted {
        epoch,
        digest: digest.try_into().ok()?,
    };
    let mut held = BTreeSet::new();
    loop {
        match lines.next()?.split_once(' ')? {
            ("held", id) => held.insert(id.parse().ok()?),
            ("sha384", _) => break,
            _ => return None,
        };
    }
    lines.next().is_none().then_some(State { accepted, held })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example() -> State {
        State {
            accepted: Accepted {
                epoch: 41,
                digest: [0xd1; 48],
            },
            held: [1, 2, 3].map(|n| VolumeId([n; 16])).into(),
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
    fn any_byte_changed_or_missing_is_noticed() {
        let whole = example().to_text();
        assert_eq!(State::from_text(&whole), Ok(example()));
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
        fn states_round_trip(epoch: u64, digest in proptest::array::uniform32(any::<u8>()), ids: Vec<[u8; 16]>) {
            let mut whole = [0; 48];
            whole[..32].copy_from_slice(&digest);
            let state = State {
                accepted: Accepted { epoch, digest: whole },
                held: ids.into_iter().map(VolumeId).collect(),
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
