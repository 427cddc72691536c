//! What a frontend has said about one queue.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::feature;
use super::message::VringAddresses;
use crate::memory::GuestMemory;
use crate::stored::Fd;
use crate::virtqueue::{QueueFeatures, Virtqueue};
use crate::worker::message::RingLayout;

/// Entries of the largest queue (virtio 1.2, 2.7).
const MAX_SIZE: u32 = 32768;

/// Base of a packed ring at its beginning: index 0 on both sides, and both wrap counters 1.
const PACKED_START: u32 = 0x8000_8000;

/// Where a queue is between its first message and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// No worker has it.
    #[default]
    Stopped,
    /// A worker has it, or is about to.
    Running,
    /// A worker has it, and takes nothing: the driver broke it.
    Retired,
}

/// A queue.
#[derive(Debug, Default)]
pub struct Vring {
    /// SET_VRING_NUM; 0: not said yet.
    pub size: u16,
    /// SET_VRING_ADDR.
    pub addresses: Option<VringAddresses>,
    /// SET_VRING_BASE, or where it was stopped; none: at its beginning.
    pub base: Option<u32>,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// SET_VRING_KICK, while a worker has it.
    pub kick: Option<Fd>,
    /// SET_VRING_CALL.
    pub call: Option<Fd>,
    /// SET_VRING_ERR.
    pub error: Option<Fd>,
    /// Where it is.
    pub phase: Phase,
    /// Where its ring lies, while a worker has it.
    pub running: Option<RingLayout>,
    /// It was stopped on this connection: nothing of it is in flight, and `base` counts.
    pub anew: bool,
    /// When it started, its in-flight region had something of whoever served it before.
    pub owes: bool,
    /// It is not served for as long as its ring is in no region of the memory.
    pub rests: bool,
    /// A predecessor's worker had it, and none of ours does: before its ring is in a region again, or for good
    /// if it is retired.
    pub dormant: bool,
}

impl Vring {
    /// Whether a worker has it.
    #[must_use]
    pub fn is_started(&self) -> bool {
        self.phase != Phase::Stopped
    }

    /// Whether requests are to be taken from it. Without VHOST_USER_F_PROTOCOL_FEATURES every queue is
    /// enabled from the start.
    #[must_use]
    pub fn is_served(&self, features: u64) -> bool {
        let always = features & feature::PROTOCOL_FEATURES == 0;
        (always || self.enabled) && !self.rests
    }

    /// Whether the ring that a worker serves lies in this memory.
    #[must_use]
    pub fn ring_is_in(&self, memory: &GuestMemory, features: u64) -> bool {
        let features = QueueFeatures::of(features);
        self.running
            .is_some_and(|layout| Virtqueue::check_place(memory, &layout, features).is_ok())
    }

    /// SET_VRING_NUM.
    ///
    /// # Errors
    /// A size that can't be, or another one while it runs.
    pub fn set_size(&mut self, size: u32, features: u64) -> Result<(), String> {
        let packed = features & feature::RING_PACKED != 0;
        if size == 0 || size > MAX_SIZE || !(packed || size.is_power_of_two()) {
            let kind = if packed { "number" } else { "power of two" };
            return Err(format!(
                "the queue size {size} is not a {kind} from 1 to {MAX_SIZE}"
            ));
        }
        // At most 2^15.
        let size = u16::try_from(size).unwrap_or(0);
        if self.is_started() && size != self.size {
            return Err("the size of a running queue can't change".to_owned());
        }
        self.size = size;
        Ok(())
    }

    /// SET_VRING_ADDR.
    ///
    /// # Errors
    /// Others than it has, while it runs. (Whether it logs may change.)
    pub fn set_addresses(&mut self, addresses: VringAddresses) -> Result<(), String> {
        let same = |old: VringAddresses| {
            VringAddresses {
                log: addresses.log,
                ..old
            } == addresses
        };
        if self.is_started() && !self.addresses.is_some_and(same) {
            return Err("the addresses of a running queue can't change".to_owned());
        }
        self.addresses = Some(addresses);
        Ok(())
    }

    /// SET_VRING_BASE.
    ///
    /// # Errors
    /// While it runs, or of a split ring past 16 bits.
    pub fn set_base(&mut self, base: u32, features: u64) -> Result<(), String> {
        if self.is_started() {
            return Err("the index of a running queue can't be set".to_owned());
        }
        if features & feature::RING_PACKED == 0 && base > u32::from(u16::MAX) {
            return Err(format!("the index {base} has more than 16 bits"));
        }
        self.base = Some(base);
        Ok(())
    }

    /// Where it goes on.
    #[must_use]
    pub fn base(&self, features: u64) -> u32 {
        let packed = features & feature::RING_PACKED != 0;
        self.base.unwrap_or(if packed { PACKED_START } else { 0 })
    }

    /// Where its ring lies in guest memory.
    ///
    /// # Errors
    /// Says what is missing or not in guest memory.
    pub fn layout(&self, memory: &GuestMemory) -> Result<RingLayout, String> {
        if self.size == 0 {
            return Err("the queue has no size yet".to_owned());
        }
        let addresses = self.addresses.ok_or("the queue has no addresses yet")?;
        let guest = |part: &str, user: u64| {
            memory
                .guest_addr_of(user)
                .ok_or_else(|| format!("the {part} at {user:#x} is not in guest memory"))
        };
        Ok(RingLayout {
            size: self.size,
            desc: guest("descriptor table", addresses.desc)?,
            avail: guest("avail ring", addresses.avail)?,
            used: guest("used ring", addresses.used)?,
        })
    }
}
