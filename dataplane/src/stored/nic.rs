//! What is remembered of a network card and of a switch: as of a volume, plain values and descriptors.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::SwitchName;
use bulkhead_protocol::net::{NicGrant, Uplink};
use minicbor::{Decode, Encode};

use super::volume::StoredConnection;

/// A network card that is served.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredNic<F> {
    /// What keyd granted. A successor serves the card as it says until keyd says otherwise.
    #[n(0)]
    pub grant: NicGrant,
    /// Where frontends connect.
    #[n(1)]
    pub listener: F,
    /// Its port, as the agent gave it.
    #[n(2)]
    pub port: StoredPort<F>,
    /// No new frontend is let in: its removal is prepared.
    #[n(3)]
    pub refuses_new: bool,
    /// Its frontend; none: nobody is connected.
    #[n(4)]
    pub connection: Option<StoredConnection<F>>,
}

/// A switch that is attached.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredSwitch<F> {
    /// Its name.
    #[n(0)]
    pub name: SwitchName,
    /// Its uplink, as the grants of its cards say it.
    #[n(1)]
    pub uplink: Option<Uplink>,
    /// The same, as the agent gave it.
    #[n(2)]
    pub port: StoredPort<F>,
}

/// What the agent gave for a port.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredPort<F> {
    /// Queues of a TAP, one for each queue pair; empty: the port needs none.
    #[n(0)]
    pub taps: Vec<F>,
    /// UDP segments may come from the TAP in one piece.
    #[n(1)]
    pub has_uso: bool,
}

impl<F> StoredPort<F> {
    /// A port that needs no descriptor.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            taps: Vec::new(),
            has_uso: false,
        }
    }

    fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<StoredPort<G>, E> {
        let taps = self.taps.into_iter().map(with);
        Ok(StoredPort {
            taps: taps.collect::<Result<_, E>>()?,
            has_uso: self.has_uso,
        })
    }
}

impl<F> StoredNic<F> {
    /// As [`StoredVolume::try_map`](super::StoredVolume::try_map).
    ///
    /// # Errors
    /// The first that `with` fails with.
    pub fn try_map<G, E>(
        self,
        with: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<StoredNic<G>, E> {
        Ok(StoredNic {
            grant: self.grant,
            listener: with(self.listener)?,
            port: self.port.try_map(with)?,
            refuses_new: self.refuses_new,
            connection: self.connection.map(|c| c.try_map(with)).transpose()?,
        })
    }
}

impl<F> StoredSwitch<F> {
    /// As [`StoredVolume::try_map`](super::StoredVolume::try_map).
    ///
    /// # Errors
    /// The first that `with` fails with.
    pub fn try_map<G, E>(
        self,
        with: &mut impl FnMut(F) -> Result<G, E>,
    ) -> Result<StoredSwitch<G>, E> {
        Ok(StoredSwitch {
            name: self.name,
            uplink: self.uplink,
            port: self.port.try_map(with)?,
        })
    }
}
