//! Frames that come in, and what becomes of them, looked at by a checker that shares no code with it.

mod claims;
mod frame;
mod offload;
mod parse;
mod receive;
mod rig;
mod roles;
mod usual;

use std::sync::Arc;

use bulkhead_integration::packets::Packet;

use super::HashKey;
use super::frame::{Frame, HeadBuffer};
use super::header::{GSO_NONE, GSO_TCPV4, Header, HeaderSize, NEEDS_CSUM};
use crate::memory::{GuestBuffer, Lease, anonymous};
use crate::port::DropReason;

/// Any key.
fn key() -> HashKey {
    HashKey::new(0x0123_4567_89ab_cdef)
}

/// The header of a frame that is to be cut, and the frame.
fn segment(packet: &Packet, gso_type: u8, mss: u16) -> (Header, Vec<u8>) {
    let (bytes, csum_start, csum_offset) = packet.partial();
    let header = Header {
        flags: NEEDS_CSUM,
        gso_type,
        gso_size: mss,
        // A hint, which may be anything.
        hdr_len: 9999,
        csum_start,
        csum_offset,
        num_buffers: 0,
    };
    (header, bytes)
}

/// The header of a frame whose checksum is left, and the frame.
fn unsummed(packet: &Packet) -> (Header, Vec<u8>) {
    segment(packet, GSO_NONE, 0)
}

/// Numbers that tell where they are.
fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| u8::try_from(at * 31 % 251).expect("small"))
        .collect()
}

/// Guest memory with frames in it.
struct Guest {
    file: std::fs::File,
    lease: Lease,
}

impl Guest {
    fn new() -> Self {
        let (memory, file) = anonymous(1 << 20).expect("memory");
        Self {
            lease: Lease::new(Arc::new(memory)),
            file: file.into(),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        std::os::unix::fs::FileExt::write_all_at(&self.file, bytes, at).expect("inside");
    }

    /// A buffer of these lengths, with gaps between them, that has these bytes.
    fn buffer(&self, bytes: &[u8], pieces: &[usize]) -> GuestBuffer {
        let mut buffer = GuestBuffer::default();
        buffer.reset(&self.lease);
        let (mut at, mut done) = (0x1000, 0);
        for piece in pieces.iter().copied().chain([usize::MAX]) {
            let here = piece.min(bytes.len() - done);
            self.write(at, &bytes[done..done + here]);
            let length = u32::try_from(here).expect("small");
            buffer.push(at, length).expect("inside");
            at += here as u64 + 24;
            done += here;
        }
        buffer
    }
}

/// What is made of a header and a frame in guest memory, cut into these pieces.
fn of_guest<T>(
    header: &Header,
    bytes: &[u8],
    pieces: &[usize],
    see: impl FnOnce(Result<Frame<'_>, DropReason>) -> T,
) -> T {
    let guest = Guest::new();
    let all = [&header.bytes()[..], bytes].concat();
    let buffer = guest.buffer(&all, pieces);
    let mut copy = HeadBuffer::default();
    see(Frame::of_chain(&buffer, HeaderSize::Long, key(), &mut copy))
}

/// A TCP packet with so many bytes of payload.
fn tcp(payload: usize) -> Packet {
    Packet::v4(bulkhead_integration::packets::TCP, &pattern(payload))
}

/// The same to be cut.
fn tcp_segment(payload: usize, mss: u16) -> (Header, Vec<u8>) {
    segment(&tcp(payload), GSO_TCPV4, mss)
}
