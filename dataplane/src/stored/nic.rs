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

/// What a port is made of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredPort<F> {
    /// Queues of a TAP, one for each queue pair; empty: the port is none.
    #[n(0)]
    pub taps: Vec<F>,
    /// UDP segments may come from the TAP in one piece.
    #[n(1)]
    pub has_uso: bool,
    /// What an AF_XDP port has; none: the port is none.
    #[n(2)]
    pub xdp: Option<StoredXdp<F>>,
}

/// What an AF_XDP port has.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredXdp<F> {
    /// One for each queue pair.
    #[n(0)]
    pub queues: Vec<StoredXdpQueue<F>>,
    /// What keeps the program on the interface.
    #[n(1)]
    pub link: F,
}

/// A queue of an interface, set up and bound.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StoredXdpQueue<F> {
    /// Its socket.
    #[n(0)]
    pub socket: F,
    /// The memory that its frames lie in.
    #[n(1)]
    pub memory: F,
}

impl<F> StoredPort<F> {
    /// A port that needs no descriptor.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            taps: Vec::new(),
            has_uso: false,
            xdp: None,
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.taps.is_empty() && self.xdp.is_none()
    }

    fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<StoredPort<G>, E> {
        let taps = self.taps.into_iter().map(&mut *with);
        Ok(StoredPort {
            taps: taps.collect::<Result<_, _>>()?,
            has_uso: self.has_uso,
            xdp: self.xdp.map(|xdp| xdp.try_map(with)).transpose()?,
        })
    }
}

impl<F> StoredXdp<F> {
    fn try_map<G, E>(self, with: &mut impl FnMut(F) -> Result<G, E>) -> Result<StoredXdp<G>, E> {
        let queues = self.queues.into_iter().map(|queue| {
            Ok(StoredXdpQueue {
                socket: with(queue.socket)?,
                memory: with(queue.memory)?,
            })
        });
        Ok(StoredXdp {
            queues: queues.collect::<Result<_, _>>()?,
            link: with(self.link)?,
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
