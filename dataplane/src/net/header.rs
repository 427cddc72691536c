//! `virtio_net_hdr` (virtio 1.2, 5.1.6): the bytes in front of every frame, and the feature bits that give them a
//! meaning (5.1.3).
//!
//! Nothing is believed here: [`super::frame`] holds what a driver wrote against the frame that it describes.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Virtio feature bits of a network device (virtio 1.2, 5.1.3).
pub mod feature {
    /// VIRTIO_NET_F_CSUM: the device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// VIRTIO_NET_F_GUEST_CSUM: the driver takes frames whose checksum is not complete.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// VIRTIO_NET_F_MTU.
    pub const MTU: u64 = 1 << 3;
    /// VIRTIO_NET_F_MAC.
    pub const MAC: u64 = 1 << 5;
    /// VIRTIO_NET_F_GUEST_TSO4: the driver takes TCP segments over IPv4 that are longer than its MTU.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// VIRTIO_NET_F_GUEST_TSO6: the same over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// VIRTIO_NET_F_HOST_TSO4: the device cuts TCP segments over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// VIRTIO_NET_F_HOST_TSO6: the same over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// VIRTIO_NET_F_MRG_RXBUF: a frame may lie in several receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// VIRTIO_NET_F_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// VIRTIO_NET_F_CTRL_VQ: the control queue, which stays in the frontend.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// VIRTIO_NET_F_GUEST_ANNOUNCE: the driver announces itself when it is asked to.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// VIRTIO_NET_F_MQ: several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// VIRTIO_NET_F_GUEST_USO4: the driver takes UDP datagrams over IPv4 that are to be several.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// VIRTIO_NET_F_GUEST_USO6: the same over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// VIRTIO_NET_F_HOST_USO: the device cuts UDP datagrams.
    pub const HOST_USO: u64 = 1 << 56;
}

/// `flags`: the checksum at `csum_start + csum_offset` is to be completed.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum was found good (device to driver only).
pub const DATA_VALID: u8 = 2;

/// `gso_type`: one frame.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP, to be cut into datagrams of their own (USO).
pub const GSO_UDP_L4: u8 = 5;

/// Bytes of the longest header.
pub const MOST_BYTES: usize = 12;

/// How long the header of a device's frames is: 10 bytes without `num_buffers`, which only drivers have that
/// negotiated neither VERSION_1 nor MRG_RXBUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderSize {
    /// 10 bytes.
    Short,
    /// 12 bytes.
    Long,
}

impl HeaderSize {
    /// Of negotiated virtio features.
    #[must_use]
    pub fn of(features: u64) -> Self {
        use crate::vhost_user::feature::VERSION_1;
        if features & (VERSION_1 | feature::MRG_RXBUF) == 0 {
            Self::Short
        } else {
            Self::Long
        }
    }

    /// In bytes.
    #[must_use]
    #[inline]
    pub fn bytes(self) -> usize {
        match self {
            Self::Short => 10,
            Self::Long => MOST_BYTES,
        }
    }
}

/// A header, as it stands there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// [`GSO_NONE`] and its neighbours.
    pub gso_type: u8,
    /// Bytes of all the frame's headers, as a hint.
    pub hdr_len: u16,
    /// Bytes of payload of each frame that is to be made of this one.
    pub gso_size: u16,
    /// Where in the frame the checksummed bytes begin.
    pub csum_start: u16,
    /// Where behind that the checksum stands.
    pub csum_offset: u16,
    /// Receive buffers that the frame lies in.
    pub num_buffers: u16,
}

impl Header {
    /// From its bytes; `num_buffers` of the short form is 0, as those bytes should be.
    #[must_use]
    #[inline]
    pub fn parse(bytes: &[u8; MOST_BYTES]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            csum_start: u16::from_le_bytes([s0, s1]),
            csum_offset: u16::from_le_bytes([o0, o1]),
            num_buffers: u16::from_le_bytes([n0, n1]),
        }
    }

    /// Its bytes; of the short form the first ten.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> [u8; MOST_BYTES] {
        let ([h0, h1], [g0, g1]) = (self.hdr_len.to_le_bytes(), self.gso_size.to_le_bytes());
        let [s0, s1] = self.csum_start.to_le_bytes();
        let [o0, o1] = self.csum_offset.to_le_bytes();
        let [n0, n1] = self.num_buffers.to_le_bytes();
        [
            self.flags,
            self.gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            n0,
            n1,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_little_endian_and_in_the_order_of_the_specification() {
        let bytes = [1, 4, 0x36, 0, 0xa8, 5, 0x22, 0, 0x10, 0, 3, 1];
        let header = Header::parse(&bytes);
        let expected = Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV6,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 259,
        };
        assert_eq!(header, expected);
        assert_eq!(header.bytes(), bytes);
    }

    #[test]
    fn only_a_driver_of_before_1_0_without_mergeable_buffers_has_the_short_header() {
        use crate::vhost_user::feature::VERSION_1;
        assert_eq!(HeaderSize::of(feature::CSUM).bytes(), 10);
        assert_eq!(HeaderSize::of(VERSION_1).bytes(), 12);
        assert_eq!(HeaderSize::of(feature::MRG_RXBUF).bytes(), 12);
    }
}
