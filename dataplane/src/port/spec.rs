//! What a network card is connected to, as the control thread and every worker know it: a worker that serves the
//! card opens the port itself, from this.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::afxdp::XdpQueue;
use super::interface::InterfaceCounters;
use super::switch::SwitchCounters;

/// Where a network card's frames go.
#[derive(Debug, Clone)]
pub enum PortSpec {
    /// Nowhere: what it sends is done at once, and nothing comes.
    Null,
    /// Nowhere, and frames of so many bytes come all the time: to measure with.
    Source(usize),
    /// To others on the same switch, and to its uplink.
    Switch(Arc<SwitchSpec>),
    /// Out of the host, by an interface of its own.
    Outside(OutsideSpec),
}

/// An interface of the host's.
#[derive(Debug, Clone)]
pub enum OutsideSpec {
    /// A TAP.
    Tap(Arc<TapSpec>),
    /// Queues of an interface, by AF_XDP.
    Xdp(Arc<XdpSpec>),
}

/// A TAP that is open.
#[derive(Debug)]
pub struct TapSpec {
    /// The interface.
    pub name: String,
    /// Its queues, one for each queue pair of the card; a switch's uplink has one.
    pub queues: Vec<OwnedFd>,
    /// What it counts.
    pub counters: Arc<InterfaceCounters>,
}

/// AF_XDP sockets that are set up.
#[derive(Debug)]
pub struct XdpSpec {
    /// The interface.
    pub name: String,
    /// A socket for each queue pair of the card (a switch's uplink has one), while no worker has it.
    queues: Vec<Mutex<Option<XdpQueue>>>,
    /// What it counts.
    pub counters: Arc<InterfaceCounters>,
    /// What keeps the program on the interface.
    _links: Vec<OwnedFd>,
}

impl XdpSpec {
    /// Sockets for queue pairs, in order, and what is to be kept open with them.
    #[must_use]
    pub fn new(name: String, queues: Vec<XdpQueue>, links: Vec<OwnedFd>) -> Arc<Self> {
        let queues = queues.into_iter().map(|queue| Mutex::new(Some(queue)));
        Arc::new(Self {
            name,
            queues: queues.collect(),
            counters: Arc::default(),
            _links: links,
        })
    }

    fn place(&self, pair: u16) -> Option<MutexGuard<'_, Option<XdpQueue>>> {
        let place = self.queues.get(usize::from(pair))?;
        Some(place.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The socket of a pair, for a worker; none: there is none, or another worker has it still.
    #[must_use]
    pub fn take(&self, pair: u16) -> Option<XdpQueue> {
        self.place(pair)?.take()
    }

    /// It is a port no longer.
    pub fn give_back(&self, pair: u16, queue: XdpQueue) {
        if let Some(mut place) = self.place(pair) {
            *place = Some(queue);
        }
    }
}

/// A switch: one worker serves all cards that are on it.
#[derive(Debug)]
pub struct SwitchSpec {
    /// Never used again within a process.
    number: u64,
    /// As the operator named it.
    pub name: String,
    /// Its way out of the host; none: it has none.
    pub uplink: Option<OutsideSpec>,
    /// What it has done.
    pub counters: Arc<SwitchCounters>,
}

impl SwitchSpec {
    /// A switch without anything on it.
    #[must_use]
    pub fn new(name: String, uplink: Option<OutsideSpec>) -> Arc<Self> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        Arc::new(Self {
            number,
            name,
            uplink,
            counters: Arc::default(),
        })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}
