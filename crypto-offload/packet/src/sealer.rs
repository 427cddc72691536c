//! Sealing: the numbers of packets, each given once, and how much one key may seal.
#![forbid(unsafe_code)]

use crate::key::PacketKey;
use crate::packet::{Job, SealPacket};

/// How many cipher blocks (16 bytes) of plaintext and associated data one key seals, each packet
/// counted as one more: 1 TiB. An attacker's advantage in telling the packets from random bytes
/// then is 2^-57 at most, what QUIC allows (RFC 9001, appendix B.1, and the CFRG's draft on usage
/// limits of AEADs: blocks * 2^-64.5, squared). A number of 64 bits lasts longer than that.
pub const SEAL_LIMIT_BLOCKS: u64 = 1 << 36;

/// Why nothing was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The batch does not fit in what the key may still seal, or in the numbers there are. It was
    /// not touched: its packets are not sealed, and their outputs may hold plaintext.
    #[error(
        "the key may seal {left_blocks} more blocks of 16 bytes, the batch has {batch_blocks}, \
         its first number would be {sequence}: agree on a new key with the peer"
    )]
    KeySpent {
        /// What the key may still seal.
        left_blocks: u64,
        /// What the batch has.
        batch_blocks: u64,
        /// The number of its first packet.
        sequence: u64,
    },
    /// AWS-LC failed, which it does for no packet of a valid length. The batch's outputs hold
    /// zeroes, its numbers are used up.
    #[error("AWS-LC failed to seal a batch: drop its packets")]
    Library,
}

/// Seals packets under one key and counts them, so that no number is used twice.
#[derive(Debug)]
pub struct Sealer {
    key: PacketKey,
    salt: [u8; 4],
    /// Number of the next packet; none when they are used up.
    next: Option<u64>,
    left_blocks: u64,
}

impl Sealer {
    /// A sealer whose first packet has the number `first_sequence` (1 in ESP, RFC 4303 section 3.3.3).
    /// The key is fresh: these 32 bytes have sealed nothing under this salt before, in this process
    /// or another. After a restart a tunnel agrees on a new key.
    #[must_use]
    pub fn new(key: PacketKey, salt: [u8; 4], first_sequence: u64) -> Self {
        Self {
            key,
            salt,
            next: Some(first_sequence),
            left_blocks: SEAL_LIMIT_BLOCKS,
        }
    }

    /// Number of the first packet of the next batch, for headers that carry it; those behind it
    /// follow by one. None when the numbers are used up.
    #[must_use]
    pub fn next_sequence(&self) -> Option<u64> {
        self.next
    }

    /// How many blocks of 16 bytes the key may still seal, of [`SEAL_LIMIT_BLOCKS`]. At a half a
    /// tunnel agrees on a new key.
    #[must_use]
    pub fn left_blocks(&self) -> u64 {
        self.left_blocks
    }

    /// Seals all packets, in order, and returns the number of the first.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn seal_batch(&mut self, packets: &mut [SealPacket<'_>]) -> Result<u64, SealError> {
        let batch_blocks = packets.iter().map(blocks).sum();
        let spent = SealError::KeySpent {
            left_blocks: self.left_blocks,
            batch_blocks,
            sequence: self.next.unwrap_or(u64::MAX),
        };
        let first = self.next.ok_or(spent)?;
        let left_blocks = self.left_blocks.checked_sub(batch_blocks).ok_or(spent)?;
        let Some(last) = (packets.len() as u64).checked_sub(1) else {
            return Ok(first);
        };
        let last = first.checked_add(last).ok_or(spent)?;
        // Used up before they are used: whatever happens below, no number comes again.
        self.next = last.checked_add(1);
        self.left_blocks = left_blocks;
        for (packet, sequence) in packets.iter_mut().zip(first..=last) {
            packet.number(sequence);
        }
        if !self.key.seal(self.salt, packets) {
            packets.iter_mut().for_each(SealPacket::clear);
            return Err(SealError::Library);
        }
        Ok(first)
    }
}

fn blocks(packet: &SealPacket<'_>) -> u64 {
    let ranges = packet.ranges();
    let blocks = ranges.bytes.div_ceil(16) + ranges.associated_bytes.div_ceil(16) + 1;
    blocks as u64
}

#[cfg(test)]
mod tests {
    use bulkhead_crypto::SecretArena;

    use super::*;

    fn sealer(first: u64) -> Sealer {
        let arena = SecretArena::new(1).expect("arena");
        Sealer::new(
            PacketKey::new(&arena, &[7; 32]).expect("key"),
            [0; 4],
            first,
        )
    }

    fn seal(sealer: &mut Sealer, packets: usize) -> Result<u64, SealError> {
        let mut buffers = vec![[0x5a_u8; 48]; packets];
        let mut batch: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| SealPacket::in_place(&[1; 8], buffer).expect("packet"))
            .collect();
        let result = sealer.seal_batch(&mut batch);
        drop(batch);
        let touched = buffers.iter().any(|buffer| buffer[..32] != [0x5a; 32]);
        assert_eq!(touched, result.is_ok() && packets > 0);
        result
    }

    #[test]
    fn numbers_end_and_never_wrap() {
        let mut sealer = sealer(u64::MAX - 2);
        assert_eq!(seal(&mut sealer, 2), Ok(u64::MAX - 2));
        assert_eq!(sealer.next_sequence(), Some(u64::MAX));
        assert!(matches!(
            seal(&mut sealer, 2),
            Err(SealError::KeySpent { .. })
        ));
        assert_eq!(seal(&mut sealer, 0), Ok(u64::MAX));
        assert_eq!(seal(&mut sealer, 1), Ok(u64::MAX));
        assert_eq!(sealer.next_sequence(), None);
        assert!(matches!(
            seal(&mut sealer, 1),
            Err(SealError::KeySpent { .. })
        ));
    }

    #[test]
    fn a_key_seals_so_much_and_no_more() {
        // Two blocks of plaintext, one of associated data, one for the packet.
        let mut sealer = sealer(1);
        assert_eq!(seal(&mut sealer, 3), Ok(1));
        assert_eq!(sealer.left_blocks(), SEAL_LIMIT_BLOCKS - 12);
        sealer.left_blocks = 11;
        assert_eq!(
            seal(&mut sealer, 3),
            Err(SealError::KeySpent {
                left_blocks: 11,
                batch_blocks: 12,
                sequence: 4
            })
        );
        assert_eq!(seal(&mut sealer, 2), Ok(4));
        assert_eq!(sealer.left_blocks(), 3);
        assert_eq!(sealer.next_sequence(), Some(6));
    }
}
