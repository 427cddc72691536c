//! Opening: each packet is authenticated by itself.
#![forbid(unsafe_code)]

use crate::key::PacketKey;
use crate::packet::OpenPacket;

/// Opens packets of one peer under one key.
///
/// Forgeries are not counted. A packet of at most 2^13 blocks is forged with a probability of
/// 2^-114 at most, so that the 2^-57 that QUIC allows (RFC 9001, appendix B.1) is reached after
/// 2^57 tries: 400 years at ten million packets a second.
#[derive(Debug)]
pub struct Opener {
    key: PacketKey,
    salt: [u8; 4],
}

impl Opener {
    /// An opener for what the peer sealed under this key and salt.
    #[must_use]
    pub fn new(key: PacketKey, salt: [u8; 4]) -> Self {
        Self { key, salt }
    }

    /// Opens all packets; each says how it went ([`OpenPacket::plaintext`]), and one that is refused
    /// has no effect on the others. Packets that were opened or refused before stay as they are.
    ///
    /// It does not see replays: see the crate's documentation.
    pub fn open_batch(&self, packets: &mut [OpenPacket<'_>]) {
        self.key.open(self.salt, packets);
    }
}
