//! What the C library's allocator may do behind the lock-in.
//!
//! UNSAFETY: `mallopt` takes two numbers; nothing has to be upheld.
#![expect(unsafe_code, reason = "mallopt")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Has the allocator keep the room at the end of a thread's heap. glibc opens
/// `/proc/sys/vm/overcommit_memory` before it gives that back for the first time, which ends a locked-in
/// process: a guest could have that done with a chain long enough. Large blocks are mappings of their own
/// and go back all the same.
pub(super) fn never_shrink() {
    // SAFETY: two numbers.
    let taken = unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) };
    debug_assert_eq!(taken, 1, "glibc takes any threshold");
}
