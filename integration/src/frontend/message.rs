//! vhost-user messages as bytes, written from the specification (QEMU `docs/interop/vhost-user.rst`).
//! Little-endian, as on every machine these tests run on.

/// Bytes of a message header: request, flags, size.
pub const HEADER_BYTES: usize = 12;
/// Flags of a plain message: version 1 in bits 0 and 1.
pub const VERSION: u32 = 1;
/// Flag of an answer.
pub const FLAG_REPLY: u32 = 1 << 2;
/// Flag that asks for an acknowledgement.
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Numbers of the requests, frontend to backend.
pub mod request {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Bits of the protocol features.
pub mod protocol_feature {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const CONFIG: u64 = 1 << 9;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// A message as it goes over the socket.
#[must_use]
pub fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let mut bytes = header(request, flags, size).to_vec();
    bytes.extend_from_slice(body);
    bytes
}

/// A header that claims a body of `size` bytes.
#[must_use]
pub fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    for (slot, word) in bytes.chunks_exact_mut(4).zip([request, flags, size]) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// A body of 64-bit words.
#[must_use]
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A body of 32-bit words.
#[must_use]
pub fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// One region of a memory table, as it stands in the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionEntry {
    /// Guest-physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size_bytes: u64,
    /// Address in the frontend, which ring addresses are given in.
    pub user_addr: u64,
    /// Where in the file it begins.
    pub mmap_offset: u64,
}

impl RegionEntry {
    fn bytes(&self) -> Vec<u8> {
        words(&[
            self.guest_addr,
            self.size_bytes,
            self.user_addr,
            self.mmap_offset,
        ])
    }
}

/// Body of SET_MEM_TABLE that claims `count` regions.
#[must_use]
pub fn memory_table(count: u32, regions: &[RegionEntry]) -> Vec<u8> {
    let mut body = halves(&[count, 0]);
    for region in regions {
        body.extend(region.bytes());
    }
    body
}

/// Body of ADD_MEM_REG and REM_MEM_REG.
#[must_use]
pub fn single_region(region: &RegionEntry) -> Vec<u8> {
    let mut body = words(&[0]);
    body.extend(region.bytes());
    body
}

/// Body of SET_VRING_ADDR; addresses are the frontend's.
#[must_use]
pub fn vring_addresses(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    let mut body = halves(&[index, 0]);
    body.extend(words(&[desc, used, avail, 0]));
    body
}

/// Flag of SET_VRING_ADDR: writes to the ring are marked in the dirty log.
pub const VRING_LOG: u32 = 1;

/// As [`vring_addresses`], with writes to the used ring marked in the dirty log as of guest address
/// `log`.
#[must_use]
pub fn logged_vring_addresses(index: u32, [desc, used, avail]: [u64; 3], log: u64) -> Vec<u8> {
    let mut body = halves(&[index, VRING_LOG]);
    body.extend(words(&[desc, used, avail, log]));
    body
}

/// The in-flight region, in GET_INFLIGHT_FD and SET_INFLIGHT_FD.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Inflight {
    /// Bytes to map.
    pub mmap_size: u64,
    /// Where in the file they begin.
    pub mmap_offset: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Four bytes follow, as a C compiler pads it: some frontends send them.
    pub padded: bool,
}

impl Inflight {
    /// What asks for a region.
    #[must_use]
    pub fn question(queues: u16, queue_size: u16) -> Self {
        Self {
            queues,
            queue_size,
            ..Self::default()
        }
    }

    /// Its 20 or 24 bytes.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let mut body = words(&[self.mmap_size, self.mmap_offset]);
        let sizes = u32::from(self.queues) | u32::from(self.queue_size) << 16;
        body.extend(halves(&[sizes]));
        if self.padded {
            body.extend([0; 4]);
        }
        body
    }

    /// From a body of 20 or 24 bytes.
    #[must_use]
    pub fn parse(body: &[u8]) -> Option<Self> {
        let (size, rest) = body.split_first_chunk::<8>()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let (&[q0, q1, s0, s1], padding) = rest.split_first_chunk::<4>()?;
        Some(Self {
            mmap_size: u64::from_le_bytes(*size),
            mmap_offset: u64::from_le_bytes(*offset),
            queues: u16::from_le_bytes([q0, q1]),
            queue_size: u16::from_le_bytes([s0, s1]),
            padded: match padding.len() {
                0 => false,
                4 => true,
                _ => return None,
            },
        })
    }
}

/// Body of SET_VRING_KICK, CALL and ERR; bit 8 says that no descriptor comes along.
#[must_use]
pub fn vring_fd(index: u8, has_fd: bool) -> Vec<u8> {
    words(&[u64::from(index) | if has_fd { 0 } else { 1 << 8 }])
}

/// Body of GET_CONFIG and SET_CONFIG.
#[must_use]
pub fn config(offset: u32, size: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = halves(&[offset, size, flags]);
    body.extend_from_slice(payload);
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_specifications() {
        let message = encode(request::SET_VRING_NUM, VERSION, &halves(&[3, 256]));
        assert_eq!(
            message,
            [8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0]
        );
        assert_eq!(vring_fd(2, false), [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(vring_addresses(0, 1, 2, 3).len(), 40);
    }
}
