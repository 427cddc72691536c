//! An allocator that counts what one thread asks for, and the thread of a worker.
//!
//! UNSAFETY: the allocator passes everything on to the system's.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// The thread whose allocations are counted; 0: none.
static WATCHED: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Of the whole process.
pub struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    let watched = WATCHED.load(Ordering::Relaxed);
    if watched != 0 && nix::unistd::gettid().as_raw() == watched {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: passed on.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

/// How often a thread allocates or frees while something is done. One at a time: the count is the process's.
pub fn allocations_of(thread: i32, f: impl FnOnce()) -> u64 {
    ALLOCATIONS.store(0, Ordering::Relaxed);
    WATCHED.store(thread, Ordering::Relaxed);
    f();
    WATCHED.store(0, Ordering::Relaxed);
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// The counter counts.
pub fn assert_it_counts() {
    let thread = nix::unistd::gettid().as_raw();
    let count = allocations_of(thread, || drop(std::hint::black_box(vec![1u8; 100])));
    assert!(count >= 2);
}

/// The thread of the only worker.
pub fn worker_thread() -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
    let mut tids = tasks.map(|task| task.expect("task").file_name().into_string().expect("text"));
    let is_worker = |tid: &String| {
        let name = std::fs::read_to_string(format!("/proc/self/task/{tid}/comm"));
        name.is_ok_and(|name| name.trim() == "worker-0")
    };
    tids.find(is_worker)
        .expect("a worker")
        .parse()
        .expect("a number")
}
