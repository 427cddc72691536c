//! The pcap-ng format (IETF draft-ietf-opsawg-pcapng), as much as a mirror writes: one section, one interface, and an
//! enhanced packet block for each frame, with its direction and how many are missing before it. Little-endian, times
//! in nanoseconds.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
/// Tells readers the order of bytes.
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
/// `LINKTYPE_ETHERNET`.
const ETHERNET: u16 = 1;
/// Options: the last; of an interface its name and the unit of its times; of a packet its flags and the drops.
const END_OF_OPTIONS: u16 = 0;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;
const EPB_DROPCOUNT: u16 = 4;
/// Times are in units of 10 to the power of minus so much.
const NANOSECONDS: u8 = 9;

/// Bytes of a packet block before its data, and behind it at most.
const BEFORE_DATA: usize = 28;
const BEHIND_DATA: usize = 8 + 12 + 4 + 4;

/// Which way a frame went, as its guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The guest received it.
    Inbound,
    /// The guest sent it.
    Outbound,
}

/// A frame without its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    /// When, in nanoseconds since 1970.
    pub time_ns: u64,
    /// Which way.
    pub direction: Direction,
    /// Bytes of it that are kept.
    pub captured: u32,
    /// Bytes that it had.
    pub original: u32,
    /// Frames that are missing before it.
    pub dropped: u64,
}

/// What a file begins with: of which NIC, and how many bytes of a frame are kept at most.
#[must_use]
pub fn header(nic: &str, snap_bytes: u32) -> Vec<u8> {
    let mut section = Vec::new();
    section.extend(BYTE_ORDER_MAGIC.to_le_bytes());
    // Version 1.0.
    section.extend([1, 0, 0, 0]);
    // The section's length is not known.
    section.extend(u64::MAX.to_le_bytes());
    let mut interface = Vec::new();
    interface.extend(ETHERNET.to_le_bytes());
    interface.extend([0, 0]);
    interface.extend(snap_bytes.to_le_bytes());
    option(&mut interface, IF_NAME, nic.as_bytes());
    option(&mut interface, IF_TSRESOL, &[NANOSECONDS]);
    option(&mut interface, END_OF_OPTIONS, &[]);
    let mut all = Vec::new();
    for (kind, body) in [
        (SECTION_HEADER, section),
        (INTERFACE_DESCRIPTION, interface),
    ] {
        let bytes = u32::try_from(body.len() + 12).unwrap_or(0).to_le_bytes();
        all.extend(kind.to_le_bytes());
        all.extend(bytes);
        all.extend(body);
        all.extend(bytes);
    }
    all
}

fn option(to: &mut Vec<u8>, code: u16, value: &[u8]) {
    to.extend(code.to_le_bytes());
    to.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// Bytes of a frame's block at most, of which so many are kept.
#[must_use]
pub fn most_bytes(captured: usize) -> usize {
    BEFORE_DATA + captured.next_multiple_of(4) + BEHIND_DATA
}

/// Writes a frame's block to the front of `to`, whose data `fill` puts in place: its length. None if `to` is too short,
/// or `fill` says so; what is in `to` is then of no use.
pub fn write(
    to: &mut [u8],
    record: &Record,
    fill: impl FnOnce(&mut [u8]) -> bool,
) -> Option<usize> {
    let captured = usize::try_from(record.captured).ok()?;
    let padded = captured.next_multiple_of(4);
    let options = if record.dropped > 0 {
        8 + 12 + 4
    } else {
        8 + 4
    };
    let bytes = BEFORE_DATA + padded + options + 4;
    let block = to.get_mut(..bytes)?;
    let length = u32::try_from(bytes).ok()?.to_le_bytes();
    let (head, rest) = block.split_at_mut_checked(BEFORE_DATA)?;
    let (data, rest) = rest.split_at_mut_checked(padded)?;
    let (data, padding) = data.split_at_mut_checked(captured)?;
    let mut head = Fields(head);
    head.put(&ENHANCED_PACKET.to_le_bytes())?;
    head.put(&length)?;
    // The only interface.
    head.put(&[0; 4])?;
    let [t0, t1, t2, t3, high @ ..] = record.time_ns.to_le_bytes();
    head.put(&high)?;
    head.put(&[t0, t1, t2, t3])?;
    head.put(&record.captured.to_le_bytes())?;
    head.put(&record.original.to_le_bytes())?;
    if !fill(data) {
        return None;
    }
    padding.fill(0);
    let mut rest = Fields(rest);
    let flags: u32 = match record.direction {
        Direction::Inbound => 1,
        Direction::Outbound => 2,
    };
    rest.option(EPB_FLAGS, &flags.to_le_bytes())?;
    if record.dropped > 0 {
        rest.option(EPB_DROPCOUNT, &record.dropped.to_le_bytes())?;
    }
    rest.option(END_OF_OPTIONS, &[])?;
    rest.put(&length)?;
    Some(bytes)
}

/// Bytes that fields are put into, one behind the other.
struct Fields<'a>(&'a mut [u8]);

impl Fields<'_> {
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let (field, rest) = std::mem::take(&mut self.0).split_at_mut_checked(bytes.len())?;
        field.copy_from_slice(bytes);
        self.0 = rest;
        Some(())
    }

    /// An option whose value is a multiple of four bytes.
    fn option(&mut self, code: u16, value: &[u8]) -> Option<()> {
        self.put(&code.to_le_bytes())?;
        self.put(&u16::try_from(value.len()).ok()?.to_le_bytes())?;
        self.put(value)
    }
}
