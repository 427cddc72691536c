//! Descriptors as they stand in memory: 16 bytes, split (virtio 1.2, section 2.7.5) or packed (2.8.2).

/// The chain goes on in `next`.
pub const NEXT: u16 = 1;
/// The device writes to this buffer.
pub const WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Packed: made available by the driver, if it equals the driver's wrap counter.
pub const AVAIL: u16 = 1 << 7;
/// Packed: used by the device, if it equals [`AVAIL`].
pub const USED: u16 = 1 << 15;
/// Bytes of a descriptor.
pub const DESC_BYTES: u64 = 16;

/// A descriptor as it stands in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Split: index of the next one. Packed: the buffer's id.
    pub next: u16,
}

impl Desc {
    /// A buffer that the device reads.
    #[must_use]
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            flags: 0,
            next: 0,
        }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            flags: WRITE,
            ..Self::readable(addr, len)
        }
    }

    /// A table of descriptors.
    #[must_use]
    pub fn indirect(addr: u64, len: u32) -> Self {
        Self {
            flags: INDIRECT,
            ..Self::readable(addr, len)
        }
    }

    /// Its 16 bytes in a packed ring: address, length, id, flags.
    #[must_use]
    pub fn packed_bytes(&self) -> [u8; 16] {
        let mut bytes = self.bytes();
        bytes[12..14].copy_from_slice(&self.next.to_le_bytes());
        bytes[14..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    /// From 16 bytes of a packed ring.
    #[must_use]
    pub fn from_packed(bytes: [u8; 16]) -> Self {
        let word = u128::from_le_bytes(bytes);
        #[expect(clippy::cast_possible_truncation, reason = "fields are cut out of it")]
        let field = |shift: u32| (word >> shift) as u64;
        let small = |shift: u32| u16::try_from(field(shift) & 0xffff).unwrap_or(0);
        Self {
            addr: field(0),
            len: u32::try_from(field(64) & 0xffff_ffff).unwrap_or(0),
            next: small(96),
            flags: small(112),
        }
    }

    /// Its 16 bytes in a split ring, and in the indirect table of one.
    #[must_use]
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The chain of `descs` as table entries from index `first` on: each but the last gets [`NEXT`].
#[must_use]
pub fn linked(descs: &[Desc], first: u16) -> Vec<Desc> {
    let mut table = descs.to_vec();
    let last = table.len().saturating_sub(1);
    for ((i, desc), next) in table.iter_mut().enumerate().zip(first.wrapping_add(1)..) {
        if i < last {
            desc.flags |= NEXT;
            desc.next = next;
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_linked_but_for_its_last() {
        let table = linked(&[Desc::readable(1, 2), Desc::writable(3, 4)], 7);
        assert_eq!((table[0].flags, table[0].next), (NEXT, 8));
        assert_eq!((table[1].flags, table[1].next), (WRITE, 0));
        assert_eq!(table[0].bytes()[12..], [1, 0, 8, 0]);
    }

    #[test]
    fn a_packed_descriptor_ends_with_id_and_flags() {
        let desc = Desc {
            addr: 0x0102_0304_0506_0708,
            len: 0x1122_3344,
            flags: AVAIL | NEXT,
            next: 0x5566,
        };
        let bytes = desc.packed_bytes();
        assert_eq!(bytes[8..], [0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0x81, 0]);
        assert_eq!(Desc::from_packed(bytes), desc);
    }
}
