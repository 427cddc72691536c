//! The keys of an encrypted device, and which of them a byte is under: one, or two while the volume is
//! re-keyed, apart at the frontier (ADR 0018).
//!
//! The device has them for its workers; each worker has its own [`Keys`] and moves the frontier when the
//! rekeyer says so, which it does only while nothing that overlaps the bytes in between is in flight.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use bulkhead_crypto::{DataUnit, XtsKey};
use bulkhead_protocol::{RekeyId, VolumeId};

/// A key and how it is used.
#[derive(Debug)]
pub struct Cipher {
    /// Expanded.
    pub key: XtsKey,
    /// Bytes that share a tweak.
    pub unit: DataUnit,
}

/// What a re-key replaces.
#[derive(Debug, Clone)]
pub struct Rekey {
    /// Which re-key.
    pub id: RekeyId,
    /// The key that everything was under before; its data unit is that of the new one.
    pub previous: Arc<Cipher>,
}

/// All keys of a device. The last copy to be dropped wipes them.
#[derive(Debug, Clone)]
pub struct Ciphers {
    /// What is written is under this one.
    pub cipher: Arc<Cipher>,
    /// Whose record of a re-key is looked for behind the volume; none: of nobody, as in tests and for
    /// measuring.
    pub volume: Option<VolumeId>,
    /// The re-key, if there is one.
    pub rekey: Option<Rekey>,
}

impl Ciphers {
    /// A single key, of a device without a record.
    #[must_use]
    pub fn single(cipher: Cipher) -> Self {
        Self {
            cipher: Arc::new(cipher),
            volume: None,
            rekey: None,
        }
    }
}

/// A worker's keys of a device.
#[derive(Debug)]
pub(crate) struct Keys {
    key: Arc<Cipher>,
    /// What bytes from the frontier on are under.
    previous: Option<Arc<Cipher>>,
    /// In bytes from the start of the device, whole data units. Without a previous key as high as can be.
    frontier_bytes: u64,
}

impl Keys {
    /// The keys of a device whose frontier is not known yet. Until it is told, everything is taken to be
    /// under the previous key, if there is one.
    pub(crate) fn new(ciphers: &Ciphers) -> Self {
        let previous = ciphers.rekey.as_ref().map(|r| Arc::clone(&r.previous));
        Self {
            key: Arc::clone(&ciphers.cipher),
            frontier_bytes: if previous.is_some() { 0 } else { u64::MAX },
            previous,
        }
    }

    /// Everything below is under the key from now on.
    pub(crate) fn set_frontier(&mut self, bytes: u64) {
        if self.previous.is_some() {
            self.frontier_bytes = bytes;
        }
    }

    /// How the first of `bytes` bytes from an offset on are encrypted, and how many are so: a transfer
    /// has no more than these. All of them, unless the frontier lies between.
    #[inline]
    pub(crate) fn part(&self, offset_bytes: u64, bytes: u64) -> (&Cipher, u64) {
        if offset_bytes.saturating_add(bytes) <= self.frontier_bytes {
            return (&self.key, bytes);
        }
        self.part_at_frontier(offset_bytes, bytes)
    }

    #[cold]
    fn part_at_frontier(&self, offset_bytes: u64, bytes: u64) -> (&Cipher, u64) {
        match (
            self.frontier_bytes.checked_sub(offset_bytes),
            &self.previous,
        ) {
            (None | Some(0), Some(previous)) => (previous, bytes),
            (Some(below), Some(_)) => (&self.key, below),
            (_, None) => (&self.key, bytes),
        }
    }
}

/// [`Keys::part`] of a device that may be plain.
#[inline]
pub(crate) fn part(keys: Option<&Keys>, offset_bytes: u64, bytes: u64) -> (Option<&Cipher>, u64) {
    match keys {
        None => (None, bytes),
        Some(keys) => {
            let (cipher, bytes) = keys.part(offset_bytes, bytes);
            (Some(cipher), bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_crypto::SecretArena;

    use super::*;

    fn cipher(byte: u8) -> Arc<Cipher> {
        let arena = SecretArena::new(1).expect("arena");
        let mut key = [byte; 64];
        key[0] = !byte;
        Arc::new(Cipher {
            key: XtsKey::new(&arena, &key).expect("key"),
            unit: DataUnit::B4096,
        })
    }

    #[test]
    fn a_part_is_under_one_key() {
        let (key, previous) = (cipher(1), cipher(2));
        let mut ciphers = Ciphers {
            cipher: Arc::clone(&key),
            volume: None,
            rekey: Some(Rekey {
                id: RekeyId([0; 16]),
                previous: Arc::clone(&previous),
            }),
        };
        let mut keys = Keys::new(&ciphers);
        let part = |keys: &Keys, offset, bytes| {
            let (cipher, bytes) = keys.part(offset, bytes);
            (std::ptr::eq(cipher, &raw const *key), bytes)
        };
        assert_eq!(part(&keys, 0, 8192), (false, 8192), "not told yet");
        keys.set_frontier(8192);
        assert_eq!(part(&keys, 0, 8192), (true, 8192));
        assert_eq!(part(&keys, 4096, 8192), (true, 4096));
        assert_eq!(part(&keys, 8192, 4096), (false, 4096));
        assert_eq!(part(&keys, u64::MAX - 4095, 4096), (false, 4096));
        ciphers.rekey = None;
        let mut keys = Keys::new(&ciphers);
        keys.set_frontier(0);
        assert_eq!(part(&keys, 0, 4096), (true, 4096), "there is no other");
        assert_eq!(part(&keys, u64::MAX - 4095, 4096), (true, 4096));
    }
}
