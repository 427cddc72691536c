//! The name of an interface as the kernel is asked about it, by a request and by a path. The type has nothing in it that the kernel
//! reads as a pattern or as another path.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::Path;

use bulkhead_protocol::net::InterfaceName;

/// A directory for each interface of the caller's network namespace.
const INTERFACES: &str = "/proc/sys/net/ipv4/conf";

const _: () = assert!(InterfaceName::MAX_BYTES == libc::IFNAMSIZ - 1);

/// As the kernel takes it in a `struct ifreq`: zeroes behind it, at least one.
pub(crate) fn in_request(name: &InterfaceName) -> [libc::c_char; libc::IFNAMSIZ] {
    let mut request = [0; libc::IFNAMSIZ];
    let bytes = name.as_str().bytes().take(InterfaceName::MAX_BYTES);
    for (to, from) in request.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

/// Whether the host has an interface of this name. It is looked up without opening anything and without a socket,
/// neither of which a process that is locked in may; none where there is no place to look at.
pub(crate) fn is_there(name: &InterfaceName) -> Option<bool> {
    let there = |name: &str| Path::new(INTERFACES).join(name).symlink_metadata().is_ok();
    there("lo").then(|| there(name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_name_and_zeroes() {
        let name: InterfaceName = "abcdefghijklmno".parse().expect("15 bytes");
        let request = in_request(&name);
        assert_eq!(request[14], libc::c_char::from_ne_bytes([b'o']));
        assert_eq!(request[15], 0);
    }
}
