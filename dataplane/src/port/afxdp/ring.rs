//! The rings that a socket shares with the kernel: one side puts entries in, the other takes them out, each moving its
//! own index on.
//!
//! UNSAFETY: indexes, flags and entries lie in a mapping of the socket's, at places that the kernel names and that are
//! held against the mapping's length once. The kernel changes its index and the flags at any time: they are only read
//! as atomics. Entries are only touched between the two indexes, on this side of them; an index of the kernel's that
//! can't be counts as one that says there is nothing.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// What an entry is.
pub(super) trait Entry: Copy {}
impl Entry for u64 {}
impl Entry for libc::xdp_desc {}

/// A mapped ring of `T`.
#[derive(Debug)]
struct Shared<T> {
    base: NonNull<u8>,
    bytes: NonZeroUsize,
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    entries: NonNull<T>,
    /// A power of two.
    count: u32,
}

// SAFETY: whoever has it is the only one on this side, on whichever thread; nothing in it belongs to a thread.
unsafe impl<T: Entry + Send> Send for Shared<T> {}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing else points into.
        let result = unsafe { munmap(self.base.cast(), self.bytes.get()) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}

impl<T: Entry> Shared<T> {
    /// Maps the ring that a socket has at `at`, of `count` entries.
    fn new(
        socket: BorrowedFd<'_>,
        at: i64,
        places: &libc::xdp_ring_offset,
        count: u32,
    ) -> io::Result<Self> {
        let odd = || io::Error::other("the kernel names a ring of no possible shape");
        if !count.is_power_of_two() {
            return Err(odd());
        }
        let place = |from: u64, bytes: usize, align: usize| {
            let from = usize::try_from(from).ok()?;
            let fits = from.is_multiple_of(align) && from < 1 << 20;
            fits.then(|| (from, from + bytes))
        };
        let index = |from: u64| place(from, 4, 4).ok_or_else(odd);
        let (producer, end_a) = index(places.producer)?;
        let (consumer, end_b) = index(places.consumer)?;
        let (flags, end_c) = index(places.flags)?;
        let bytes = count as usize * size_of::<T>();
        let (entries, end_d) = place(places.desc, bytes, align_of::<T>()).ok_or_else(odd)?;
        let bytes = end_a.max(end_b).max(end_c).max(end_d);
        let bytes = NonZeroUsize::new(bytes).ok_or_else(odd)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let kind = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a socket, which nobody can cut.
        let base = unsafe { mmap(None, bytes, protection, kind, socket, at) }?.cast::<u8>();
        // SAFETY: all four lie within the mapping, each aligned, as was just seen.
        unsafe {
            Ok(Self {
                base,
                bytes,
                producer: base.add(producer).cast(),
                consumer: base.add(consumer).cast(),
                flags: base.add(flags).cast(),
                entries: base.add(entries).cast(),
                count,
            })
        }
    }

    #[inline]
    fn producer(&self) -> &AtomicU32 {
        // SAFETY: it lies in the mapping, which lives as long as this.
        unsafe { self.producer.as_ref() }
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { self.consumer.as_ref() }
    }

    #[inline]
    fn entry(&self, index: u32) -> NonNull<T> {
        // SAFETY: below the count, for which the mapping has room.
        unsafe { self.entries.add((index & (self.count - 1)) as usize) }
    }

    #[inline]
    fn wants_wakeup(&self) -> bool {
        // SAFETY: it lies in the mapping.
        let flags = unsafe { self.flags.as_ref() };
        flags.load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }

    /// Entries between the indexes; none if there are more than the ring has, which can't be.
    #[inline]
    fn between(&self, producer: u32, consumer: u32) -> Option<u32> {
        let count = producer.wrapping_sub(consumer);
        (count <= self.count).then_some(count)
    }
}

/// A ring that this side puts into.
#[derive(Debug)]
pub(super) struct Producer<T: Entry> {
    shared: Shared<T>,
    /// Where the next goes; the kernel sees it with [`Producer::publish`].
    next: u32,
}

impl<T: Entry> Producer<T> {
    /// Maps a ring, see [`Shared::new`]; what is in it already stays.
    ///
    /// # Errors
    /// What `mmap` fails with.
    pub(super) fn new(
        socket: BorrowedFd<'_>,
        at: i64,
        places: &libc::xdp_ring_offset,
        count: u32,
    ) -> io::Result<Self> {
        let shared = Shared::new(socket, at, places, count)?;
        let next = shared.producer().load(Ordering::Relaxed);
        Ok(Self { shared, next })
    }

    /// Entries that the kernel has not taken out yet, published or not.
    #[inline]
    pub(super) fn used(&self) -> u32 {
        let consumer = self.shared.consumer().load(Ordering::Acquire);
        let used = self.shared.between(self.next, consumer);
        used.unwrap_or(self.shared.count)
    }

    /// Puts an entry in; false if it is full.
    #[inline]
    pub(super) fn put(&mut self, entry: T) -> bool {
        if self.used() >= self.shared.count {
            return false;
        }
        // SAFETY: a place behind what the kernel may look at, until it is published.
        unsafe { self.shared.entry(self.next).write(entry) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Shows the kernel what was put in.
    #[inline]
    pub(super) fn publish(&self) {
        self.shared.producer().store(self.next, Ordering::Release);
    }

    /// Whether the kernel has to be told to look.
    #[inline]
    pub(super) fn wants_wakeup(&self) -> bool {
        self.shared.wants_wakeup()
    }

    /// Calls `f` for each published entry that the kernel has not taken out yet.
    pub(super) fn each_waiting(&self, mut f: impl FnMut(T)) {
        let consumer = self.shared.consumer().load(Ordering::Acquire);
        for number in 0..self.shared.between(self.next, consumer).unwrap_or(0) {
            let at = self.shared.entry(consumer.wrapping_add(number));
            // SAFETY: this side wrote it, and the kernel only reads.
            f(unsafe { at.read() });
        }
    }
}

/// A ring that this side takes out of.
#[derive(Debug)]
pub(super) struct Consumer<T: Entry> {
    shared: Shared<T>,
    /// What is taken next; the kernel sees it with [`Consumer::release`].
    next: u32,
}

impl<T: Entry> Consumer<T> {
    /// Maps a ring, see [`Shared::new`]; what is in it already is taken out first.
    ///
    /// # Errors
    /// What `mmap` fails with.
    pub(super) fn new(
        socket: BorrowedFd<'_>,
        at: i64,
        places: &libc::xdp_ring_offset,
        count: u32,
    ) -> io::Result<Self> {
        let shared = Shared::new(socket, at, places, count)?;
        let next = shared.consumer().load(Ordering::Relaxed);
        Ok(Self { shared, next })
    }

    /// Entries that can be taken.
    #[inline]
    pub(super) fn waiting(&self) -> u32 {
        let producer = self.shared.producer().load(Ordering::Acquire);
        self.shared.between(producer, self.next).unwrap_or(0)
    }

    /// Takes one of those that [`Consumer::waiting`] has counted since the last release.
    #[inline]
    pub(super) fn take(&mut self) -> Option<T> {
        let entry = self.peek(0)?;
        self.next = self.next.wrapping_add(1);
        Some(entry)
    }

    /// The entry that is `ahead` of the next.
    #[inline]
    pub(super) fn peek(&self, ahead: u32) -> Option<T> {
        if ahead >= self.waiting() {
            return None;
        }
        let at = self.shared.entry(self.next.wrapping_add(ahead));
        // SAFETY: the kernel has published it and does not write there before it is released.
        Some(unsafe { at.read() })
    }

    /// Gives the kernel the places of what was taken.
    #[inline]
    pub(super) fn release(&self) {
        self.shared.consumer().store(self.next, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    const PLACES: libc::xdp_ring_offset = libc::xdp_ring_offset {
        producer: 0,
        consumer: 64,
        desc: 192,
        flags: 128,
    };

    /// A file in the place of a socket: the test is the kernel.
    fn kernel() -> File {
        let file = tempfile::tempfile().expect("file");
        file.set_len(4096).expect("length");
        file
    }

    fn index(file: &File, at: u64, value: u32) {
        file.write_all_at(&value.to_ne_bytes(), at)
            .expect("written");
    }

    #[test]
    fn what_is_put_in_is_seen_when_it_is_published_and_the_ring_is_never_overrun() {
        let file = kernel();
        index(&file, PLACES.producer, u32::MAX - 1);
        index(&file, PLACES.consumer, u32::MAX - 1);
        let mut ring = Producer::<u64>::new(file.as_fd(), 0, &PLACES, 4).expect("mapped");
        assert!((0..4).all(|entry| ring.put(entry)));
        assert!(!ring.put(4), "full");
        let mut seen = [0; 4];
        file.read_exact_at(&mut seen, PLACES.producer)
            .expect("read");
        assert_eq!(u32::from_ne_bytes(seen), u32::MAX - 1);
        ring.publish();
        file.read_exact_at(&mut seen, PLACES.producer)
            .expect("read");
        assert_eq!(u32::from_ne_bytes(seen), 2);
        index(&file, PLACES.consumer, 0);
        let mut waiting = Vec::new();
        ring.each_waiting(|entry| waiting.push(entry));
        assert_eq!((ring.used(), waiting), (2, vec![2, 3]));
        index(&file, PLACES.flags, 1);
        assert!(ring.wants_wakeup());
        // An index that can't be.
        index(&file, PLACES.consumer, 3);
        assert!(!ring.put(9));
    }

    #[test]
    fn what_is_taken_out_was_put_in_and_no_index_leads_further() {
        let file = kernel();
        let mut ring = Consumer::<u64>::new(file.as_fd(), 0, &PLACES, 4).expect("mapped");
        assert_eq!((ring.waiting(), ring.take()), (0, None));
        for entry in 0..4_u64 {
            let at = PLACES.desc + entry * 8;
            file.write_all_at(&(entry + 7).to_ne_bytes(), at)
                .expect("written");
        }
        for impossible in [5, u32::MAX] {
            index(&file, PLACES.producer, impossible);
            assert_eq!((ring.waiting(), ring.take()), (0, None), "{impossible}");
        }
        index(&file, PLACES.producer, 2);
        assert_eq!(ring.peek(1), Some(8));
        assert_eq!(
            [ring.take(), ring.take(), ring.take()],
            [Some(7), Some(8), None]
        );
        let mut seen = [0; 4];
        file.read_exact_at(&mut seen, PLACES.consumer)
            .expect("read");
        assert_eq!(seen, [0; 4]);
        ring.release();
        file.read_exact_at(&mut seen, PLACES.consumer)
            .expect("read");
        assert_eq!(u32::from_ne_bytes(seen), 2);
    }

    #[test]
    fn a_ring_of_no_possible_shape_is_refused() {
        let file = kernel();
        let places = |producer, desc| libc::xdp_ring_offset {
            producer,
            desc,
            ..PLACES
        };
        for (places, count) in [
            (places(0, 192), 3),
            (places(0, 192), 0),
            (places(2, 192), 4),
            (places(u64::MAX, 192), 4),
            (places(0, 196), 4),
        ] {
            let ring = Consumer::<u64>::new(file.as_fd(), 0, &places, count);
            assert!(ring.is_err(), "{places:?} {count}");
        }
    }
}
