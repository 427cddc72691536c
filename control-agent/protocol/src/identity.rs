//! The names of things that processes agree on: ids of volumes and NICs, names of sockets, groups and
//! switches, and the policies that travel with them. A value of these types is well-formed.

use std::fmt;
use std::str::FromStr;

use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use minicbor::{Decode, Encode};

/// A name or id that is not well-formed, with what is expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {given:?} is not valid: {expected}")]
pub struct InvalidName {
    /// What kind of name it was meant to be.
    pub what: &'static str,
    /// The text as given, cut to 80 characters.
    pub given: String,
    /// What a valid one looks like.
    pub expected: &'static str,
}

impl InvalidName {
    pub(crate) fn new(what: &'static str, given: &str, expected: &'static str) -> Self {
        Self {
            what,
            given: given.chars().take(80).collect(),
            expected,
        }
    }
}

/// 16 bytes as a UUID: 8-4-4-4-12 lower-case hex digits.
fn write_uuid(id: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (i, byte) in id.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

fn parse_uuid(what: &'static str, text: &str) -> Result<[u8; 16], InvalidName> {
    let invalid = || {
        InvalidName::new(
            what,
            text,
            "a UUID like 0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e90",
        )
    };
    let bytes = text.as_bytes();
    if bytes.len() != 36 {
        return Err(invalid());
    }
    let mut id = [0u8; 16];
    let mut digits = 0usize;
    for (i, &c) in bytes.iter().enumerate() {
        if matches!(i, 8 | 13 | 18 | 23) {
            if c != b'-' {
                return Err(invalid());
            }
            continue;
        }
        let value = match c {
            b'0'..=b'9' => c - b'0',
            b'a'..=b'f' => c - b'a' + 10,
            _ => return Err(invalid()),
        };
        if let Some(byte) = id.get_mut(digits / 2) {
            *byte = (*byte << 4) | value;
        }
        digits += 1;
    }
    Ok(id)
}

/// An id of 128 bits that is written as a UUID, and travels as a byte string.
macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_uuid(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                parse_uuid($what, text).map(Self)
            }
        }

        impl<C> Encode<C> for $name {
            fn encode<W: Write>(
                &self,
                e: &mut Encoder<W>,
                _: &mut C,
            ) -> Result<(), encode::Error<W::Error>> {
                e.bytes(&self.0)?.ok()
            }
        }

        impl<'b, C> Decode<'b, C> for $name {
            fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
                let bytes = d.bytes()?;
                bytes
                    .try_into()
                    .map(Self)
                    .map_err(|_| decode::Error::message(concat!("a ", $what, " has 16 bytes")))
            }
        }
    };
}

uuid_id!(
    /// Identity of a volume: 128 bits, written as a UUID (8-4-4-4-12 lower-case hex digits).
    VolumeId,
    "volume id"
);

uuid_id!(
    /// Identity of a network card: 128 bits, written as a UUID.
    NicId,
    "NIC id"
);

uuid_id!(
    /// Identity of one re-key of a volume: random, so that what an earlier re-key left in the file is
    /// not taken for this one's. Written as a UUID.
    RekeyId,
    "re-key id"
);

/// A name of 1 to 64 characters of `a-z 0-9 . _ -`, the first a letter or digit; it travels as text.
macro_rules! plain_name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// Longest name in bytes.
            pub const MAX_BYTES: usize = 64;

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                parse_name($what, text, Self::MAX_BYTES).map(Self)
            }
        }

        impl<C> Encode<C> for $name {
            fn encode<W: Write>(
                &self,
                e: &mut Encoder<W>,
                _: &mut C,
            ) -> Result<(), encode::Error<W::Error>> {
                e.str(&self.0)?.ok()
            }
        }

        impl<'b, C> Decode<'b, C> for $name {
            fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
                d.str()?
                    .parse()
                    .map_err(|e: InvalidName| decode::Error::message(e.to_string()))
            }
        }
    };
}

fn parse_name(what: &'static str, text: &str, most_bytes: usize) -> Result<String, InvalidName> {
    let first_ok = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let all_ok = text
        .chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'));
    if !first_ok || !all_ok || text.len() > most_bytes {
        return Err(InvalidName::new(
            what,
            text,
            "1 to 64 characters of a-z 0-9 . _ -, the first a letter or digit",
        ));
    }
    Ok(text.to_owned())
}

plain_name!(
    /// Name of a vhost-user socket: the listener is `<run dir>/vhost/<name>.sock`.
    ///
    /// 1 to 64 characters of `a-z 0-9 . _ -`, the first a letter or digit, so that it is
    /// one path component that can't climb, and fits `sockaddr_un`.
    SocketName,
    "socket name"
);

plain_name!(
    /// Name of a group of volumes that share limits: 1 to 64 characters of `a-z 0-9 . _ -`, the
    /// first a letter or digit.
    GroupName,
    "group name"
);

plain_name!(
    /// Name of a switch between network cards: 1 to 64 characters of `a-z 0-9 . _ -`, the first a
    /// letter or digit.
    SwitchName,
    "switch name"
);

/// What has a socket of its own and is granted, attached and detached by itself.
///
/// A volume travels as its 16 bytes alone, as it did before there were NICs, a NIC as `[1, id]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServedId {
    /// A volume.
    Volume(VolumeId),
    /// A network card.
    Nic(NicId),
}

impl ServedId {
    /// The volume; none if it is something else.
    #[must_use]
    pub fn volume(self) -> Option<VolumeId> {
        match self {
            Self::Volume(id) => Some(id),
            Self::Nic(_) => None,
        }
    }

    /// The NIC; none if it is something else.
    #[must_use]
    pub fn nic(self) -> Option<NicId> {
        match self {
            Self::Volume(_) => None,
            Self::Nic(id) => Some(id),
        }
    }
}

impl From<VolumeId> for ServedId {
    fn from(id: VolumeId) -> Self {
        Self::Volume(id)
    }
}

impl From<NicId> for ServedId {
    fn from(id: NicId) -> Self {
        Self::Nic(id)
    }
}

impl fmt::Display for ServedId {
    /// As in `volume 0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e90`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Nic(id) => write!(f, "NIC {id}"),
        }
    }
}

impl fmt::Debug for ServedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "{id:?}"),
            Self::Nic(id) => write!(f, "{id:?}"),
        }
    }
}

/// Says of a [`ServedId`] on the wire that it is a NIC's.
const NIC_TAG: u8 = 1;

impl<C> Encode<C> for ServedId {
    fn encode<W: Write>(
        &self,
        e: &mut Encoder<W>,
        context: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        match self {
            Self::Volume(id) => id.encode(e, context),
            Self::Nic(id) => id.encode(e.array(2)?.u8(NIC_TAG)?, context),
        }
    }
}

impl<'b, C> Decode<'b, C> for ServedId {
    fn decode(d: &mut Decoder<'b>, context: &mut C) -> Result<Self, decode::Error> {
        if d.datatype()? == minicbor::data::Type::Bytes {
            return VolumeId::decode(d, context).map(Self::Volume);
        }
        match (d.array()?, d.u8()?) {
            (Some(2), NIC_TAG) => NicId::decode(d, context).map(Self::Nic),
            _ => Err(decode::Error::message("neither a volume nor a NIC")),
        }
    }
}

/// What a volume does with DISCARD. Discarding tells the storage which blocks are free;
/// under encryption that leaks the free map, so the bundle says which is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum DiscardPolicy {
    /// DISCARD is not offered to the guest.
    #[n(0)]
    Ignore,
    /// DISCARD reaches the storage.
    #[n(1)]
    Pass,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_id_text_round_trips() {
        let text = "0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e90";
        let id: VolumeId = text.parse().expect("valid");
        assert_eq!(id.to_string(), text);
    }

    #[test]
    fn volume_id_refuses_other_shapes() {
        for bad in [
            "",
            "0b5f6d1e9d4c4d0a8f5e2f6a1c3b7e90",
            "0B5F6D1E-9D4C-4D0A-8F5E-2F6A1C3B7E90",
            "0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e9g",
            "0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e901",
            "0b5f6d1e-9d4c-4d0a-8f5e+2f6a1c3b7e90",
        ] {
            assert!(bad.parse::<VolumeId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_volume_travels_as_it_did_before_there_were_nics() {
        let volume = VolumeId([7; 16]);
        let bytes = minicbor::to_vec(volume).expect("encodes");
        assert_eq!(
            minicbor::to_vec(ServedId::from(volume)).ok().as_ref(),
            Some(&bytes)
        );
        assert_eq!(
            minicbor::decode(&bytes).ok(),
            Some(ServedId::Volume(volume))
        );
        let nic = ServedId::from(NicId([7; 16]));
        let bytes = minicbor::to_vec(nic).expect("encodes");
        assert_eq!(bytes[..3], [0x82, 1, 0x50]);
        assert_eq!(minicbor::decode(&bytes).ok(), Some(nic));
        let mut other = bytes.clone();
        other[1] = 2;
        assert!(minicbor::decode::<ServedId>(&other).is_err());
        other[..2].copy_from_slice(&[0x83, 1]);
        assert!(minicbor::decode::<ServedId>(&other).is_err());
    }

    #[test]
    fn socket_name_is_one_safe_path_component() {
        for good in ["a", "vm-7.disk_0", "0"] {
            assert!(good.parse::<SocketName>().is_ok(), "{good}");
        }
        assert!("tenant-a".parse::<GroupName>().is_ok());
        let long = "a".repeat(65);
        for bad in ["", ".", "..", "a/b", "A", "-a", "a b", "a\0", long.as_str()] {
            assert!(bad.parse::<SocketName>().is_err(), "{bad:?}");
            assert!(bad.parse::<GroupName>().is_err(), "{bad:?}");
        }
    }
}
