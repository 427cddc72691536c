//! No byte outside a packet's buffers is touched: buffers that end where memory ends, and begin where it
//! begins. (Sanitizers don't see what assembly reads and writes.)
//!
//! UNSAFETY: maps memory with inaccessible pages around it; whoever steps on these dies.
#![expect(unsafe_code, reason = "pages that can't be accessed")]

use std::ptr::{self, NonNull};

use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{
    Kernel, OpenPacket, Opener, PacketKey, SealPacket, Sealer, Segment, TAG_BYTES,
};

const PAGE: usize = 4096;
const ROOM: usize = 3 * PAGE;

/// Memory between two pages that can't be accessed.
struct Guarded(NonNull<u8>);

impl Guarded {
    fn new() -> Self {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (whole, none) = (ROOM + 2 * PAGE, libc::PROT_NONE);
        // SAFETY: fresh memory at an address of the kernel's choice, of which only the middle is
        // opened.
        let middle = unsafe {
            let start = libc::mmap(ptr::null_mut(), whole, none, anonymous, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let middle = start.cast::<u8>().add(PAGE);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(middle.cast(), ROOM, access), 0);
            middle
        };
        Self(NonNull::new(middle).expect("mapped"))
    }

    /// So many bytes at its end, or at its beginning.
    fn part(&mut self, bytes: usize, at_end: bool) -> &mut [u8] {
        let skip = if at_end { ROOM - bytes } else { 0 };
        // SAFETY: inside the middle.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr().add(skip), bytes) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: all that was mapped, which nobody uses any more.
        unsafe { libc::munmap(self.0.as_ptr().sub(PAGE).cast(), ROOM + 2 * PAGE) };
    }
}

#[test]
fn nothing_outside_the_buffers_is_touched() {
    let [mut header, mut source, mut output] = [(); 3].map(|()| Guarded::new());
    for kernel in Kernel::available() {
        let arena = SecretArena::new(2).expect("arena");
        let key = || PacketKey::with_kernel(&arena, &[6; 32], kernel).expect("key");
        let (mut sealer, opener) = (Sealer::new(key(), [7; 4], 1), Opener::new(key(), [7; 4]));
        for length in (0..600).chain([1008, 1009, 1500, 9000]) {
            for at_end in [false, true] {
                let header = header.part(length % 37, at_end);
                let source = source.part(length, at_end);
                source.fill(0x5a);
                let segment = Segment {
                    address: source.as_ptr(),
                    bytes: length,
                };
                let sealed = output.part(length + TAG_BYTES, at_end);
                // SAFETY: the segment lives on and lies apart from the output.
                let packet = unsafe { SealPacket::from_segments(header, &[segment], sealed) };
                let number = sealer.seal_batch(&mut [packet.expect("packet")]);
                let number = number.expect("sealed");
                source.fill(0);
                let mut batch =
                    [OpenPacket::between(number, header, sealed, source).expect("packet")];
                opener.open_batch(&mut batch);
                let plain = batch[0].plaintext().expect("authentic");
                assert!(
                    plain.iter().all(|&byte| byte == 0x5a),
                    "{kernel}: {length} bytes"
                );
                sealed[length] ^= 1;
                let mut batch = [OpenPacket::in_place(number, header, sealed).expect("packet")];
                opener.open_batch(&mut batch);
                assert!(batch[0].plaintext().is_err(), "{kernel}: {length} bytes");
            }
        }
    }
}
