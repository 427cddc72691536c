//! What a slot of the store is: a volume, a network card, or a switch.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;

use super::nic::{StoredNic, StoredSwitch};
use super::volume::{StoredConnection, StoredVolume};

/// What is remembered in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored<F> {
    /// A volume.
    Volume(StoredVolume<F>),
    /// A network card.
    Nic(StoredNic<F>),
    /// A switch.
    Switch(StoredSwitch<F>),
}

impl<F> From<StoredVolume<F>> for Stored<F> {
    fn from(volume: StoredVolume<F>) -> Self {
        Self::Volume(volume)
    }
}

impl<F> From<StoredNic<F>> for Stored<F> {
    fn from(nic: StoredNic<F>) -> Self {
        Self::Nic(nic)
    }
}

impl<F> From<StoredSwitch<F>> for Stored<F> {
    fn from(switch: StoredSwitch<F>) -> Self {
        Self::Switch(switch)
    }
}

impl<F> Stored<F> {
    /// Its frontend's connection; none: nobody is connected, or nobody ever is.
    #[must_use]
    pub fn connection(&self) -> Option<&StoredConnection<F>> {
        match self {
            Self::Volume(volume) => volume.connection.as_ref(),
            Self::Nic(nic) => nic.connection.as_ref(),
            Self::Switch(_) => None,
        }
    }

    /// The same, to be changed; none: it never has one.
    pub fn connection_mut(&mut self) -> Option<&mut Option<StoredConnection<F>>> {
        match self {
            Self::Volume(volume) => Some(&mut volume.connection),
            Self::Nic(nic) => Some(&mut nic.connection),
            Self::Switch(_) => None,
        }
    }

    /// Queues of the device; none: it is no device.
    #[must_use]
    pub fn queues(&self) -> Option<u16> {
        match self {
            Self::Volume(volume) => Some(volume.grant.queues),
            Self::Nic(nic) => nic.grant.queue_pairs.checked_mul(2),
            Self::Switch(_) => None,
        }
    }

    /// As [`StoredVolume::try_map`].
    ///
    /// # Errors
    /// The first that `with` fails with.
    pub fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<Stored<G>, E> {
        Ok(match self {
            Self::Volume(volume) => volume.try_map(with)?.into(),
            Self::Nic(nic) => nic.try_map(with)?.into(),
            Self::Switch(switch) => switch.try_map(with)?.into(),
        })
    }
}

/// For people.
impl<F> fmt::Display for Stored<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(volume) => write!(f, "volume {}", volume.grant.volume),
            Self::Nic(nic) => write!(f, "NIC {}", nic.grant.nic),
            Self::Switch(switch) => write!(f, "switch {}", switch.name),
        }
    }
}
