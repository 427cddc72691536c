//! The release statement: which bytes are which program, and in which order releases follow.
//!
//! It travels in the same envelope as a bundle ([`crate::cose`]), signed by the same operators, with a
//! content type and a domain of its own. It names no host: a release is for every host that trusts
//! who signed it. `docs/formats/release.md`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::release::{Component, Release};
use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

/// Longest name of a release, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// What operators say of a binary.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ReleaseStatement {
    /// The program's name: `rot`, `keyd`, `agent` or `dataplane`.
    #[n(0)]
    pub component: String,
    /// A later release of the same program has a higher number. From 1.
    #[n(1)]
    pub version: u64,
    /// What people call it: 1 to [`MAX_NAME_BYTES`] visible ASCII characters.
    #[n(2)]
    pub name: String,
    /// SHA-384 of the binary's bytes.
    #[n(3)]
    pub sha384: ByteArray<48>,
}

impl ReleaseStatement {
    /// Is it one that a host takes?
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn validate(&self) -> Result<(), String> {
        if Component::named(&self.component).is_none() {
            return Err("its program is none of rot, keyd, agent and dataplane".to_owned());
        }
        if self.version == 0 {
            return Err("its version is 0: they begin with 1".to_owned());
        }
        let visible = self.name.bytes().all(|byte| byte.is_ascii_graphic());
        if !visible || self.name.is_empty() || self.name.len() > MAX_NAME_BYTES {
            return Err(format!(
                "its name is not of 1 to {MAX_NAME_BYTES} visible ASCII characters"
            ));
        }
        Ok(())
    }

    /// The release it speaks of; none if it names no program.
    #[must_use]
    pub fn release(&self) -> Option<Release> {
        Some(Release {
            component: Component::named(&self.component)?,
            version: self.version,
            measurement: self.sha384,
        })
    }

    /// The one encoding of it.
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Writing to a Vec can't fail, and none of its fields refuses to be encoded.
        minicbor::to_vec(self)
            .unwrap_or_else(|error| unreachable!("encoding a release failed: {error}"))
    }
}
