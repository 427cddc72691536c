//! A device that grows while requests are checked against its capacity.

use bulkhead_loom::explore;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use std::sync::Arc;

const BEFORE: u64 = 8;
const AFTER: u64 = 16;

/// What is done wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The capacity is stored before the storage is known to be that long.
    CapacityFirst,
    /// Each range of a request is checked against the capacity as it is then.
    CapacityTwice,
}

struct Device {
    capacity: AtomicU64,
    storage: AtomicU64,
}

impl Device {
    /// `BlkDevice::resize`: the storage's length, then the capacity.
    fn resize(&self, broken: Broken) {
        if broken == Broken::CapacityFirst {
            self.capacity.store(AFTER, Ordering::Release);
        }
        // Whoever grows the file; its length is the kernel's and needs no ordering of ours.
        self.storage.store(AFTER, Ordering::Relaxed);
        self.capacity.store(AFTER, Ordering::Release);
    }

    /// `request::ranges`: the capacity is read once for the request, all of whose ranges are done or none.
    fn check(&self, ends: [u64; 2], broken: Broken) -> [bool; 2] {
        let capacity = self.capacity.load(Ordering::Acquire);
        ends.map(|end| {
            let again = broken == Broken::CapacityTwice;
            end <= if again {
                self.capacity.load(Ordering::Acquire)
            } else {
                capacity
            }
        })
    }
}

fn grow(broken: Broken) {
    explore(move || {
        let device = Arc::new(Device {
            capacity: AtomicU64::new(BEFORE),
            storage: AtomicU64::new(BEFORE),
        });
        let control = Arc::clone(&device);
        let control = thread::spawn(move || control.resize(broken));
        // The worker: two ranges of the same place, which only the grown device has.
        let [first, second] = device.check([AFTER, AFTER], broken);
        assert_eq!(first, second, "half of a request is right");
        if first {
            let storage = device.storage.load(Ordering::Relaxed);
            assert_eq!(storage, AFTER, "a request past the storage's end");
        }
        control.join().expect("it grows");
    });
}

#[test]
fn a_request_sees_one_capacity_that_the_storage_has() {
    grow(Broken::Nothing);
}

#[test]
#[should_panic(expected = "a request past the storage's end")]
fn a_capacity_before_its_storage_lets_a_request_past_the_end() {
    grow(Broken::CapacityFirst);
}

#[test]
#[should_panic(expected = "half of a request is right")]
fn a_capacity_that_is_read_for_each_range_tears_a_request() {
    grow(Broken::CapacityTwice);
}
