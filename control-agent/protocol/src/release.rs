//! What can be upgraded on a host, and what keyd vouches for: a release that operators signed.
#![forbid(unsafe_code)]

use minicbor::{Decode, Encode};

use crate::rot::{Measurement, Role};

/// A program of the host that is released and upgraded on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Component {
    /// `bulkhead-keyd`.
    #[n(0)]
    Keyd,
    /// `bulkhead-agent`.
    #[n(1)]
    Agent,
    /// `bulkhead-dataplane`.
    #[n(2)]
    Dataplane,
    /// `bulkhead-rot`.
    #[n(3)]
    Rot,
}

impl Component {
    /// Every component, rot first.
    pub const ALL: [Self; 4] = [Self::Rot, Self::Keyd, Self::Dataplane, Self::Agent];

    /// The name, as it stands in file names, release statements and status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rot => "rot",
            Self::Keyd => Role::Keyd.name(),
            Self::Agent => Role::Agent.name(),
            Self::Dataplane => Role::Dataplane.name(),
        }
    }

    /// The component of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// The role of its process; none for rot.
    #[must_use]
    pub fn role(self) -> Option<Role> {
        match self {
            Self::Rot => None,
            Self::Keyd => Some(Role::Keyd),
            Self::Agent => Some(Role::Agent),
            Self::Dataplane => Some(Role::Dataplane),
        }
    }
}

impl From<Role> for Component {
    fn from(role: Role) -> Self {
        match role {
            Role::Keyd => Self::Keyd,
            Role::Agent => Self::Agent,
            Role::Dataplane => Self::Dataplane,
        }
    }
}

impl std::fmt::Display for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A binary that operators released: keyd verified who signed this, and that it is no older than
/// what ran before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Release {
    /// Which program it is.
    #[n(0)]
    pub component: Component,
    /// Its number: a later release of the same program has a higher one.
    #[n(1)]
    pub version: u64,
    /// What it measures.
    #[n(2)]
    pub measurement: Measurement,
}

/// A program as it runs on the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProgramStatus {
    /// Which.
    #[n(0)]
    pub component: Component,
    /// What rot measured.
    #[n(1)]
    pub measurement: Measurement,
    /// Number of the release that it was upgraded to; none since rot was started anew, which
    /// takes what lies in its `--bin-dir`.
    #[n(2)]
    pub version: Option<u64>,
    /// Why the last upgrade of it came to nothing, if it did.
    #[n(3)]
    pub failed: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_roles_go_both_ways() {
        for component in Component::ALL {
            assert_eq!(Component::named(component.name()), Some(component));
            if let Some(role) = component.role() {
                assert_eq!(Component::from(role), component);
                assert_eq!(role.name(), component.name());
            }
        }
        assert_eq!(Component::named("fetch"), None);
    }
}
