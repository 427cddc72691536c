//! Deterministic CBOR (RFC 8949 section 4.2.1) of the payload: one bundle has one encoding.
//! Decoding encodes again and compares, so that an unknown field, a longer form of a number, an
//! indefinite length, another order or bytes behind the end can't pass.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use minicbor::Decoder;

use crate::schema::HostBundle;

/// Why a payload is not a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DecodeError {
    Malformed(String),
    UnknownField(String),
    NotCanonical,
}

/// The one encoding of a bundle.
pub(crate) fn encode(bundle: &HostBundle) -> Vec<u8> {
    // Writing to a Vec can't fail, and no type of the schema refuses to be encoded.
    minicbor::to_vec(bundle)
        .unwrap_or_else(|error| unreachable!("encoding a bundle failed: {error}"))
}

/// The bundle with exactly this encoding.
pub(crate) fn decode(payload: &[u8]) -> Result<HostBundle, DecodeError> {
    // The walk first: it names a field that the derived decoder would skip or choke on.
    if let Ok(Some(path)) = unknown_in(&mut Decoder::new(payload), &BUNDLE, "") {
        return Err(DecodeError::UnknownField(path));
    }
    let bundle: HostBundle =
        minicbor::decode(payload).map_err(|e| DecodeError::Malformed(e.to_string()))?;
    if encode(&bundle) != payload {
        return Err(DecodeError::NotCanonical);
    }
    Ok(bundle)
}

/// Which keys a map of the schema has: one more than the highest, and which hold maps.
struct Shape {
    keys: u64,
    children: &'static [(u64, &'static str, &'static Shape)],
}

const BUNDLE: Shape = Shape {
    keys: 13,
    children: &[
        (5, "volumes", &VOLUME),
        (8, "groups", &GROUP),
        (9, "workers", &WORKERS),
        (10, "switches", &SWITCH),
        (11, "nics", &NIC),
    ],
};
/// Its uplink, like a NIC's port, is a list of a number and a map: a field too many in it is found by encoding
/// it again.
const SWITCH: Shape = Shape {
    keys: 2,
    children: &[],
};
const NIC: Shape = Shape {
    keys: 12,
    children: &[
        (6, "socket", &SOCKET),
        (9, "limits", &NIC_LIMITS),
        (10, "checks", &CHECKS),
        (11, "mirror", &MIRROR),
    ],
};
/// Both hold rates.
const NIC_LIMITS: Shape = Shape {
    keys: 2,
    children: &[(0, "tx", &LIMITS), (1, "rx", &LIMITS)],
};
const CHECKS: Shape = Shape {
    keys: 3,
    children: &[(2, "trusted", &TRUSTED)],
};
const TRUSTED: Shape = Shape {
    keys: 2,
    children: &[],
};
const MIRROR: Shape = Shape {
    keys: 3,
    children: &[],
};
const GROUP: Shape = Shape {
    keys: 2,
    children: &[(1, "limits", &LIMITS)],
};
const LIMITS: Shape = Shape {
    keys: 2,
    children: &[(0, "requests", &RATE), (1, "bytes", &RATE)],
};
const RATE: Shape = Shape {
    keys: 2,
    children: &[],
};
const WORKERS: Shape = Shape {
    keys: 2,
    children: &[],
};
const VOLUME: Shape = Shape {
    keys: 17,
    children: &[
        (10, "socket", &SOCKET),
        (13, "sealed_keys", &SEALED),
        (14, "rekey", &REKEY),
        (15, "limits", &LIMITS),
    ],
};
const REKEY: Shape = Shape {
    keys: 2,
    children: &[(1, "previous_keys", &SEALED)],
};
const SOCKET: Shape = Shape {
    keys: 4,
    children: &[],
};
const SEALED: Shape = Shape {
    keys: 4,
    children: &[],
};

/// The path of the first map key that the schema doesn't have.
fn unknown_in(
    d: &mut Decoder<'_>,
    shape: &Shape,
    path: &str,
) -> Result<Option<String>, minicbor::decode::Error> {
    let mut left = d.map()?;
    while more(d, &mut left)? {
        let key = d.u64()?;
        if key >= shape.keys {
            return Ok(Some(format!("{path}{key}")));
        }
        let Some((_, name, child)) = shape.children.iter().find(|child| child.0 == key) else {
            d.skip()?;
            continue;
        };
        if d.datatype()? != minicbor::data::Type::Array {
            if let Some(found) = unknown_in(d, child, &format!("{path}{name}."))? {
                return Ok(Some(found));
            }
            continue;
        }
        for index in 0..d.array()?.unwrap_or(0) {
            if let Some(found) = unknown_in(d, child, &format!("{path}{name}[{index}]."))? {
                return Ok(Some(found));
            }
        }
    }
    Ok(None)
}

/// Whether another entry follows, in a map of known or of indefinite length.
fn more(d: &mut Decoder<'_>, left: &mut Option<u64>) -> Result<bool, minicbor::decode::Error> {
    match left {
        Some(0) => Ok(false),
        Some(n) => {
            *n -= 1;
            Ok(true)
        }
        None if d.datatype()? == minicbor::data::Type::Break => {
            d.skip()?;
            Ok(false)
        }
        None => Ok(true),
    }
}
