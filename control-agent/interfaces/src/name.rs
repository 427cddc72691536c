//! The name of an interface: what the kernel takes, and nothing that it reads as a pattern or a path.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// Bytes of a name at most: `IFNAMSIZ` less its zero.
pub const MOST_BYTES: usize = libc::IFNAMSIZ - 1;

/// A directory for each interface of the caller's network namespace.
const INTERFACES: &str = "/proc/sys/net/ipv4/conf";

/// The name of a network interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(String);

/// What is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of an interface: it has 1 to {MOST_BYTES} of the characters a-z, A-Z, 0-9, '.', '_' and '-', \
     and is not '.' or '..'"
)]
pub struct NameError(String);

impl FromStr for InterfaceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // The kernel takes more; '%' is a pattern to it, ':' an alias, '/' a path in sysfs.
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let ok = (1..=MOST_BYTES).contains(&text.len())
            && text.bytes().all(fine)
            && !matches!(text, "." | "..");
        ok.then(|| Self(text.to_owned()))
            .ok_or_else(|| NameError(text.to_owned()))
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl InterfaceName {
    /// Its text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As the kernel takes it in a `struct ifreq`: zeroes behind it, at least one.
    pub(crate) fn in_request(&self) -> [libc::c_char; libc::IFNAMSIZ] {
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(self.0.bytes().take(MOST_BYTES)) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        name
    }

    /// Whether the host has an interface of this name. It is looked up without opening anything and without a socket,
    /// neither of which a process that is locked in may; none where there is no place to look at.
    pub(crate) fn is_there(&self) -> Option<bool> {
        let there = |name: &str| Path::new(INTERFACES).join(name).symlink_metadata().is_ok();
        there("lo").then(|| there(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_something_else_to_the_kernel_are_refused() {
        for good in ["tap0", "vm-7.a_b", "x", "abcdefghijklmno"] {
            assert_eq!(good.parse::<InterfaceName>().expect(good).as_str(), good);
        }
        let long = "abcdefghijklmnop";
        for bad in [
            "", ".", "..", "tap%d", "a/b", "eth0:1", "a b", "ä", "a\0", long,
        ] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_request_has_the_name_and_zeroes() {
        let name: InterfaceName = "abcdefghijklmno".parse().expect("15 bytes");
        let request = name.in_request();
        assert_eq!(request[14], libc::c_char::from_ne_bytes([b'o']));
        assert_eq!(request[15], 0);
    }
}
