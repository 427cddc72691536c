//! The volume keys that an earlier key of the host opened, sealed to the one it has: what a rotation
//! leaves of the old key. Its text: `docs/formats/keyd-state.md`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fmt::Write;

use bulkhead_bundle::{SealedKeyEntry, digest_of, text};
use bulkhead_protocol::VolumeId;
use bulkhead_sealing::SealedKey;
use minicbor::{Encode, to_vec};

use crate::state::Fingerprint;

const KIND: &str = "bulkhead keyd resealed v1";

/// Which sealed entry of which volume.
type Name = (VolumeId, [u8; 48]);

/// Sealed keys in the place of those that bundles name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resealed {
    /// Of the key that all of them are sealed to.
    pub(crate) fingerprint: Fingerprint,
    keys: BTreeMap<Name, Body>,
}

/// A sealed key, less what all of them share.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Body {
    enc: Vec<u8>,
    ciphertext: Vec<u8>,
}

impl Resealed {
    /// None yet, for a key of the host.
    pub(crate) fn new(fingerprint: Fingerprint) -> Self {
        Self {
            fingerprint,
            keys: BTreeMap::new(),
        }
    }

    /// Puts a sealed key in the place of an entry of a volume.
    pub(crate) fn insert(&mut self, volume: VolumeId, entry: &SealedKeyEntry, key: SealedKey) {
        let body = Body {
            enc: key.enc,
            ciphertext: key.ciphertext,
        };
        self.keys.insert((volume, digest(entry)), body);
    }

    /// What is in the place of exactly this entry of this volume.
    pub(crate) fn get(&self, volume: VolumeId, entry: &SealedKeyEntry) -> Option<SealedKey> {
        let body = self.keys.get(&(volume, digest(entry)))?;
        Some(SealedKey {
            recipient: entry.recipient.clone(),
            fingerprint: self.fingerprint.to_vec(),
            enc: body.enc.clone(),
            ciphertext: body.ciphertext.clone(),
        })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// The text of the file.
    pub(crate) fn to_text(&self) -> String {
        let mut out = format!("{KIND}\nhost-key {}\n", text::to_hex(&self.fingerprint));
        for ((volume, digest), body) in &self.keys {
            let digest = text::to_hex(digest);
            let (enc, ciphertext) = (
                text::to_base64(&body.enc),
                text::to_base64(&body.ciphertext),
            );
            // Writing to a String can't fail.
            let _ = writeln!(out, "key {volume} {digest} {enc} {ciphertext}");
        }
        let checksum = text::to_hex(&digest_of(out.as_bytes()));
        let _ = writeln!(out, "sha384 {checksum}");
        out
    }

    /// Reads the text of the file; none if keyd did not write it, or not whole.
    pub(crate) fn from_text(given: &str) -> Option<Self> {
        let mut lines = given.lines();
        (lines.next()? == KIND).then_some(())?;
        let fingerprint = text::from_hex(lines.next()?.strip_prefix("host-key ")?)?;
        let mut resealed = Self::new(fingerprint.try_into().ok()?);
        loop {
            match lines.next()?.split_once(' ')? {
                ("key", rest) => {
                    let (name, body) = key(rest)?;
                    resealed.keys.insert(name, body);
                }
                ("sha384", _) => break,
                _ => return None,
            }
        }
        // One store has one text, the checksum is part of it.
        (resealed.to_text() == given).then_some(resealed)
    }
}

fn key(text: &str) -> Option<(Name, Body)> {
    let mut words = text.split(' ');
    let volume = words.next()?.parse().ok()?;
    let digest = text::from_hex(words.next()?)?.try_into().ok()?;
    let body = Body {
        enc: text::from_base64(words.next()?)?.to_vec(),
        ciphertext: text::from_base64(words.next()?)?.to_vec(),
    };
    Some(((volume, digest), body))
}

/// SHA-384 of an entry's deterministic CBOR, as a bundle has it.
fn digest(entry: &SealedKeyEntry) -> [u8; 48] {
    digest_of(&encoded(entry))
}

fn encoded<T: Encode<()>>(value: &T) -> Vec<u8> {
    // Writing to a Vec can't fail, and no part of an entry refuses to be encoded.
    to_vec(value).unwrap_or_else(|error| unreachable!("encoding failed: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(byte: u8) -> SealedKeyEntry {
        SealedKeyEntry {
            recipient: "host-a".to_owned(),
            fingerprint: vec![1; 48],
            enc: vec![byte; 1120],
            ciphertext: vec![byte; 80],
        }
    }

    fn sealed(byte: u8) -> SealedKey {
        SealedKey {
            recipient: "host-a".to_owned(),
            fingerprint: vec![9; 48],
            enc: vec![byte; 1120],
            ciphertext: vec![byte; 80],
        }
    }

    fn example() -> Resealed {
        let mut resealed = Resealed::new([9; 48]);
        for n in [1, 2] {
            resealed.insert(VolumeId([n; 16]), &entry(n), sealed(n + 100));
        }
        resealed
    }

    #[test]
    fn a_key_is_given_for_its_very_entry_alone() {
        let resealed = example();
        let (one, two) = (VolumeId([1; 16]), VolumeId([2; 16]));
        assert_eq!(resealed.get(one, &entry(1)), Some(sealed(101)));
        assert_eq!(resealed.get(two, &entry(1)), None);
        let field: [fn(&mut SealedKeyEntry) -> &mut Vec<u8>; 3] = [
            |entry| &mut entry.fingerprint,
            |entry| &mut entry.enc,
            |entry| &mut entry.ciphertext,
        ];
        for field in field {
            let mut changed = entry(1);
            field(&mut changed)[0] ^= 1;
            assert_eq!(resealed.get(one, &changed), None);
        }
    }

    #[test]
    fn it_survives_its_text_and_no_other_text_is_one() {
        let whole = example().to_text();
        assert_eq!(Resealed::from_text(&whole), Some(example()));
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).expect("ASCII");
            assert_eq!(Resealed::from_text(&changed), None, "byte {at}");
            assert_eq!(Resealed::from_text(&whole[..at]), None, "cut at {at}");
        }
        assert_eq!(Resealed::from_text(&format!("{whole}\n")), None);
    }
}
