//! Are two descriptors the same open file? kcmp(2) says so, and gives an order to search by.
//!
//! UNSAFETY: one system call on plain integers.
#![expect(unsafe_code, reason = "kcmp is not wrapped by a crate")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cmp::Ordering;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `KCMP_FILE`, `include/uapi/linux/kcmp.h`.
const KCMP_FILE: libc::c_int = 0;

/// An order of open files that holds for as long as the machine runs; equal if they are the same.
/// A kernel without kcmp has them all different.
#[must_use]
pub fn order(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Ordering {
    let (a, b) = (a.as_raw_fd(), b.as_raw_fd());
    // SAFETY: plain integers: this process twice, and two live descriptors of it.
    let answer = unsafe {
        let own = libc::getpid();
        libc::syscall(libc::SYS_kcmp, own, own, KCMP_FILE, a, b)
    };
    match answer {
        0 => Ordering::Equal,
        1 => Ordering::Less,
        2 => Ordering::Greater,
        _ => a.cmp(&b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_duplicate_is_the_same_and_another_open_is_not() {
        let a = File::open("/dev/null").unwrap();
        let b = File::open("/dev/null").unwrap();
        let duplicate = a.try_clone().unwrap();
        assert_eq!(order(a.as_fd(), duplicate.as_fd()), Ordering::Equal);
        assert_ne!(order(a.as_fd(), b.as_fd()), Ordering::Equal);
        let back = order(b.as_fd(), a.as_fd());
        assert_eq!(order(a.as_fd(), b.as_fd()), back.reverse());
    }
}
