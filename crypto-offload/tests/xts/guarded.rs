//! No byte outside a buffer is touched: buffers that end where memory ends, and begin where it begins.
//! (Sanitizers don't see what assembly reads and writes.)
//!
//! UNSAFETY: maps memory with inaccessible pages around it; whoever steps on these dies.
#![expect(unsafe_code, reason = "pages that can't be accessed")]

use std::ptr::{self, NonNull};

use bulkhead_crypto::DataUnit;

use crate::each_kernel;
use crate::expand;
use crate::oracle;
use crate::random::Random;

const PAGE: usize = 4096;
const ROOM: usize = 9 * PAGE;

/// Memory between two pages that can't be accessed.
struct Guarded(NonNull<u8>);

impl Guarded {
    fn new() -> Self {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: fresh memory at an address of the kernel's choice, of which only the middle is opened.
        let at = unsafe {
            let at = libc::mmap(
                ptr::null_mut(),
                ROOM + 2 * PAGE,
                libc::PROT_NONE,
                anonymous,
                -1,
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            let at = at.cast::<u8>().add(PAGE);
            let open = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(at.cast(), ROOM, open), 0);
            at
        };
        Self(NonNull::new(at).expect("mapped"))
    }

    /// A part at its end, or at its beginning.
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
    let (mut source, mut destination) = (Guarded::new(), Guarded::new());
    each_kernel("nothing_outside_the_buffers_is_touched", |kernel| {
        let mut random = Random::new(6);
        let key = random.key();
        let xts = expand(&key, kernel);
        for (unit, units) in [
            (DataUnit::B512, 1),
            (DataUnit::B512, 2),
            (DataUnit::B512, 67),
            (DataUnit::B4096, 1),
            (DataUnit::B4096, 9),
        ] {
            let bytes = units * unit.bytes() as usize;
            for at_end in [false, true] {
                let plain = source.part(bytes, at_end);
                random.fill(plain);
                let cipher = oracle::units(&key, unit, 3, plain, true);
                let output = destination.part(bytes, at_end);
                xts.encrypt(unit, 3, plain, output).expect("whole units");
                assert!(output == cipher, "{kernel}: {units} units");
                xts.decrypt(unit, 3, output, plain).expect("whole units");
                assert!(output == cipher, "{kernel}: the source was written");
                let again = oracle::units(&key, unit, 3, plain, true);
                assert!(again == cipher, "{kernel}: {units} units back");
            }
        }
    });
}
