//! Batches allocate nothing in Rust: counted by this program's allocator.
//!
//! UNSAFETY: the allocator passes everything on to the system's.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{Kernel, OpenPacket, Opener, PacketKey, SealPacket, Sealer};

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn round(sealer: &mut Sealer, opener: &Opener, buffers: &mut [[u8; 316]; 8]) {
    let mut batch = buffers
        .each_mut()
        .map(|buffer| SealPacket::in_place(b"header", buffer).expect("packet"));
    let first = sealer.seal_batch(&mut batch).expect("sealed");
    let mut sequence = first..;
    let mut batch = buffers.each_mut().map(|buffer| {
        let sequence = sequence.next().expect("endless");
        OpenPacket::in_place(sequence, b"header", buffer).expect("packet")
    });
    opener.open_batch(&mut batch);
    assert!(batch.iter_mut().all(|packet| packet.plaintext().is_ok()));
}

#[test]
fn batches_allocate_nothing() {
    for kernel in Kernel::available() {
        let arena = SecretArena::new(2).expect("arena");
        let key = || PacketKey::with_kernel(&arena, &[1; 32], kernel).expect("key");
        let (mut sealer, opener) = (Sealer::new(key(), [2; 4], 1), Opener::new(key(), [2; 4]));
        let mut buffers = [[0x5a; 316]; 8];
        round(&mut sealer, &opener, &mut buffers);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..50 {
            round(&mut sealer, &opener, &mut buffers);
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before, "{kernel:?}");
    }
}
