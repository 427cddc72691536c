//! The name of stored descriptors.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::str::FromStr;

use crate::identity::InvalidName;

/// Longest name in bytes: thousands of them fit the one environment string in which systemd passes
/// names.
pub const MAX_NAME_BYTES: usize = 16;

/// 1 to [`MAX_NAME_BYTES`] printable ASCII characters without space and colon (which parts names
/// in `LISTEN_FDNAMES`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FdName {
    /// Zeroes behind the name.
    bytes: [u8; MAX_NAME_BYTES],
}

impl FdName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.bytes.iter().position(|&byte| byte == 0);
        let name = self.bytes.get(..end.unwrap_or(MAX_NAME_BYTES));
        // Made of ASCII alone, so this is never the empty text.
        name.and_then(|name| std::str::from_utf8(name).ok())
            .unwrap_or_default()
    }

    /// The name with zeroes behind it.
    #[must_use]
    pub fn padded(&self) -> [u8; MAX_NAME_BYTES] {
        self.bytes
    }

    /// From what [`Self::padded`] gave.
    ///
    /// # Errors
    /// It is no name with zeroes behind it.
    pub fn from_padded(bytes: &[u8; MAX_NAME_BYTES]) -> Result<Self, InvalidName> {
        let end = bytes.iter().position(|&byte| byte == 0);
        let (name, rest) = bytes.split_at(end.unwrap_or(MAX_NAME_BYTES));
        if rest.iter().any(|&byte| byte != 0) {
            return Err(invalid(bytes));
        }
        Self::try_from(name)
    }
}

/// The name under which rot stores, for the agent, what an interface is prepared for AF_XDP with: the map of its sockets and
/// the link of its program. None: the interface's name is too long for any.
#[must_use]
pub fn xdp_name(interface: &str) -> Option<FdName> {
    format!("{XDP}{interface}").parse().ok()
}

/// The interface of such a name; none: it is another one.
#[must_use]
pub fn xdp_interface(name: &FdName) -> Option<&str> {
    name.as_str().strip_prefix(XDP)
}

/// One character: an interface's name has up to 15.
const XDP: char = '+';

fn invalid(given: &[u8]) -> InvalidName {
    let given = String::from_utf8_lossy(given);
    InvalidName::new(
        "descriptor name",
        &given,
        "1 to 16 printable ASCII characters without space and colon",
    )
}

impl TryFrom<&[u8]> for FdName {
    type Error = InvalidName;

    fn try_from(name: &[u8]) -> Result<Self, InvalidName> {
        let printable = |byte: &u8| byte.is_ascii_graphic() && *byte != b':';
        let mut bytes = [0; MAX_NAME_BYTES];
        match bytes.get_mut(..name.len()) {
            Some(room) if !name.is_empty() && name.iter().all(printable) => {
                room.copy_from_slice(name);
                Ok(Self { bytes })
            }
            _ => Err(invalid(name)),
        }
    }
}

impl FromStr for FdName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::try_from(text.as_bytes())
    }
}

impl fmt::Display for FdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for FdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FdName({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kept_and_others_refused() {
        for good in ["a", "d255.kick-63", "sixteen=letters!"] {
            let name: FdName = good.parse().unwrap();
            assert_eq!(name.as_str(), good);
            assert_eq!(FdName::from_padded(&name.padded()), Ok(name));
        }
        for bad in ["", "seventeen-letters", "a b", "a:b", "a\n", "a\0", "ä"] {
            assert!(bad.parse::<FdName>().is_err(), "{bad:?}");
        }
        assert!(FdName::from_padded(b"a\0b\0\0\0\0\0\0\0\0\0\0\0\0\0").is_err());
        assert!(FdName::from_padded(&[0; 16]).is_err());
    }
}
