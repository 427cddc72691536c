//! A network card as every worker sees it: what never changes while it is attached, the little that does (its link),
//! and its counters.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::net::SpoofChecks;

use super::current::Current;
use super::metrics::Metrics;
use crate::hand::SharedHand;
use crate::log_limit::LogLimit;
use crate::port::mirror::MirrorFile;
use crate::port::{Guard, PortSpec};
use crate::qos::Qos;

/// Queue pairs of a card at most.
pub const MAX_QUEUE_PAIRS: u16 = 16;
/// The least MTU that a card can have: IPv4 needs it (RFC 791).
pub const MIN_MTU: u16 = 68;

/// Identity and shape of a card: what never changes while it is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Its address.
    pub mac: [u8; 6],
    /// Bytes of the longest packet in a frame, from [`MIN_MTU`] on, without the Ethernet header.
    pub mtu: u16,
    /// From 1 to [`MAX_QUEUE_PAIRS`]; a pair is a queue to receive from and one to send with.
    pub queue_pairs: u16,
}

/// A queue's part in its pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The guest receives: an even number.
    Rx,
    /// The guest sends: an odd one.
    Tx,
}

/// What queue `index` of a card is for, and in which pair (virtio 1.2, 5.1.2).
#[must_use]
#[inline]
pub fn part_of(index: u16) -> (Direction, u16) {
    let direction = if index.is_multiple_of(2) {
        Direction::Rx
    } else {
        Direction::Tx
    };
    (direction, index / 2)
}

/// An attached network card.
#[derive(Debug)]
pub struct NetDevice {
    /// Identity and shape.
    pub shape: Shape,
    /// What it is connected to.
    pub port: PortSpec,
    /// What its guest may send as.
    pub guard: Current<Guard>,
    /// Counters, written by the workers.
    pub metrics: Metrics,
    tx_qos: Qos,
    rx_qos: Qos,
    up: AtomicBool,
    /// How often the network is told where it is.
    announcements: LogLimit,
    /// Where its frames are copied to.
    mirror: Mutex<Option<Arc<MirrorFile>>>,
    /// What a thread that works for it has in hand.
    pub hand: SharedHand,
}

impl fmt::Display for NetDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.shape.mac;
        write!(
            f,
            "the card {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}"
        )
    }
}

impl NetDevice {
    /// A card whose frames go nowhere.
    #[must_use]
    pub fn new(shape: Shape) -> Arc<Self> {
        Self::with_port(
            shape,
            PortSpec::Null,
            Guard::new(shape.mac, &SpoofChecks::default()),
        )
    }

    /// A card on a port, with its link up.
    #[must_use]
    pub fn with_port(shape: Shape, port: PortSpec, guard: Guard) -> Arc<Self> {
        let queue_pairs = shape.queue_pairs.clamp(1, MAX_QUEUE_PAIRS);
        let shape = Shape {
            queue_pairs,
            ..shape
        };
        Arc::new(Self {
            shape,
            port,
            guard: Current::new(guard),
            metrics: Metrics::new(queue_pairs * 2),
            tx_qos: Qos::default(),
            rx_qos: Qos::default(),
            up: AtomicBool::new(true),
            announcements: LogLimit::new(),
            mirror: Mutex::new(None),
            hand: SharedHand::default(),
        })
    }

    /// Queues that are served here: of each pair one to receive and one to send.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.shape.queue_pairs * 2
    }

    /// How much its guest may send in a second.
    #[must_use]
    #[inline]
    pub fn tx_qos(&self) -> &Qos {
        &self.tx_qos
    }

    /// How much its guest may receive in a second.
    #[must_use]
    #[inline]
    pub fn rx_qos(&self) -> &Qos {
        &self.rx_qos
    }

    /// Whether its link is up: else nothing it sends goes anywhere, and nothing comes.
    #[must_use]
    #[inline]
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Takes its link up or down; the frontend still has to be told.
    pub fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Relaxed);
    }

    /// Where its frames are copied to, if they are.
    #[must_use]
    pub fn mirror(&self) -> Option<Arc<MirrorFile>> {
        self.lock_mirror().clone()
    }

    /// Has its frames copied there from now on, or no longer; the workers still have to be told
    /// ([`Server::set_mirror`](crate::server::Server::set_mirror)).
    pub(crate) fn set_mirror(&self, mirror: Option<Arc<MirrorFile>>) {
        *self.lock_mirror() = mirror;
    }

    /// Not on the way of a frame, and held for no more than a copy.
    fn lock_mirror(&self) -> MutexGuard<'_, Option<Arc<MirrorFile>>> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Device::told`](crate::device::Device::told).
    #[must_use]
    pub fn told(&self) -> u64 {
        u64::from(self.is_up())
    }

    /// SEND_RARP: whether the network is to be told where the card is. A frontend says it once for a guest that has
    /// come; each time costs a frame to every other card of its switch, which nobody is charged for, so that no more
    /// than a few a second go out.
    pub(crate) fn may_announce(&self) -> bool {
        self.announcements.allows()
    }

    /// NET_SET_MTU: what the frontend has told its guest.
    ///
    /// # Errors
    /// It is more than the card may have, or less than a network needs.
    pub fn check_mtu(&self, mtu: u64) -> Result<(), String> {
        let most = self.shape.mtu;
        if mtu < u64::from(MIN_MTU) || mtu > u64::from(most) {
            return Err(format!(
                "the frontend wants an MTU of {mtu}, and the card may have {MIN_MTU} to {most}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_queues_receive_and_odd_ones_send() {
        assert_eq!(part_of(0), (Direction::Rx, 0));
        assert_eq!(part_of(1), (Direction::Tx, 0));
        assert_eq!(part_of(6), (Direction::Rx, 3));
        assert_eq!(part_of(7), (Direction::Tx, 3));
    }

    #[test]
    fn a_frontend_may_want_no_more_than_the_card_has() {
        let device = NetDevice::new(Shape {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            queue_pairs: 1,
        });
        assert_eq!(device.check_mtu(1500), Ok(()));
        assert_eq!(device.check_mtu(68), Ok(()));
        for mtu in [0, 67, 1501, 9000, u64::MAX] {
            assert!(device.check_mtu(mtu).is_err(), "{mtu}");
        }
    }
}
