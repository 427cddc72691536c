//! A back-end's network card as its frontend sees it: connected, negotiated, given memory and queues.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_integration::card::net_feature;
use bulkhead_integration::disk::feature;
use bulkhead_integration::driver::packed::START;
use bulkhead_integration::frontend::message::{self, protocol_feature, request};
use bulkhead_integration::frontend::{Addresses, Frontend, FrontendError};

use super::slots::Slots;
use crate::load::LoadError;
use crate::load::device::Signals;
use crate::load::memory::{Memory, user_addr};
use crate::load::ring::Chains as _;

/// How long to try to connect.
const PATIENCE: Duration = Duration::from_secs(2);
/// What a guest with large segments negotiates.
const SEGMENTS: u64 =
    net_feature::CSUM | net_feature::GUEST_CSUM | net_feature::HOST_TSO4 | net_feature::GUEST_TSO4;

/// What is negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Packed rings.
    pub packed: bool,
    /// A frame may lie in several receive buffers.
    pub mergeable: bool,
    /// Large TCP segments go and come whole.
    pub segments: bool,
}

/// A connected card with one queue pair.
#[derive(Debug)]
pub struct Card {
    path: PathBuf,
    frontend: Frontend,
    features: u64,
}

/// The eventfds of a pair.
#[derive(Debug)]
pub struct Pair {
    /// Of the queue that receives.
    pub rx: Signals,
    /// Of the one that sends.
    pub tx: Signals,
}

impl Card {
    /// Connects and negotiates what is wanted.
    ///
    /// # Errors
    /// [`LoadError::Connect`], [`LoadError::Setup`], [`LoadError::Unfit`].
    pub fn open(path: &Path, wanted: Wanted) -> Result<Self, LoadError> {
        let connected = Frontend::connect(path, PATIENCE);
        let mut frontend = connected.map_err(|source| LoadError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let setup = |source| failed(path, "negotiating features", source);
        frontend.set(request::SET_OWNER, &[], &[]).map_err(setup)?;
        let offered = frontend.ask_u64(request::GET_FEATURES).map_err(setup)?;
        let features = choose(path, offered, wanted)?;
        negotiate(&mut frontend, features).map_err(setup)?;
        Ok(Self {
            path: path.to_owned(),
            frontend,
            features,
        })
    }

    /// Whether kicks go by index.
    #[must_use]
    pub fn event_idx(&self) -> bool {
        self.features & feature::EVENT_IDX != 0
    }

    /// Its socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Shares memory and starts both queues. Rings must be ready for the device.
    ///
    /// # Errors
    /// [`LoadError::Setup`], [`LoadError::System`].
    pub fn start(&self, memory: &Memory, rx: &Slots, tx: &Slots) -> Result<Pair, LoadError> {
        let setup = |source| failed(&self.path, "starting queues", source);
        self.frontend
            .set_memory_table(&[memory.region()], &[memory.file()])
            .map_err(setup)?;
        let pair = Pair {
            rx: Signals::new()?,
            tx: Signals::new()?,
        };
        self.start_queue(0, rx, &pair.rx).map_err(setup)?;
        self.start_queue(1, tx, &pair.tx).map_err(setup)?;
        for queue in [0, 1] {
            self.frontend
                .set_vring_state(request::SET_VRING_ENABLE, queue, 1)
                .map_err(setup)?;
        }
        Ok(pair)
    }

    fn start_queue(
        &self,
        index: u8,
        slots: &Slots,
        signals: &Signals,
    ) -> Result<(), FrontendError> {
        let (frontend, number) = (&self.frontend, u32::from(index));
        let base = if self.features & feature::RING_PACKED != 0 {
            u32::from(START) << 16 | u32::from(START)
        } else {
            0
        };
        frontend.set_size_and_base(number, slots.ring_size(), base)?;
        let rings = [slots.rings.desc, slots.rings.device, slots.rings.driver];
        let [desc, used, avail] = rings.map(user_addr);
        frontend.set_addresses(number, Addresses { desc, used, avail })?;
        frontend.give_events(number, signals.events())
    }

    /// Looks whether the back-end is still there and has given up no queue.
    ///
    /// # Errors
    /// [`LoadError::Closed`], [`LoadError::GaveUp`].
    pub fn watch(&self, pair: &Pair) -> Result<(), LoadError> {
        for (queue, signals) in [(0, &pair.rx), (1, &pair.tx)] {
            if signals.err.read().is_ok() {
                return Err(LoadError::GaveUp {
                    path: self.path.clone(),
                    queue,
                });
            }
        }
        if self.frontend.closes_within(Duration::ZERO) {
            return Err(LoadError::Closed(self.path.clone()));
        }
        Ok(())
    }

    /// Stops the queues: afterwards the device touches their memory no more.
    ///
    /// # Errors
    /// [`LoadError::Setup`].
    pub fn stop(&self) -> Result<(), LoadError> {
        for queue in [0, 1] {
            let base = self.frontend.get_vring_base(queue);
            base.map_err(|source| failed(&self.path, "stopping a queue", source))?;
        }
        Ok(())
    }
}

fn failed(path: &Path, step: &'static str, source: FrontendError) -> LoadError {
    LoadError::Setup {
        path: path.to_owned(),
        step,
        source,
    }
}

/// What of the offered features is taken.
fn choose(path: &Path, offered: u64, wanted: Wanted) -> Result<u64, LoadError> {
    let needs = [
        (true, feature::VERSION_1, "virtio 1"),
        (true, feature::PROTOCOL_FEATURES, "protocol features"),
        (wanted.packed, feature::RING_PACKED, "packed rings"),
        (
            wanted.mergeable,
            net_feature::MRG_RXBUF,
            "mergeable buffers",
        ),
        (wanted.segments, SEGMENTS, "large TCP segments"),
    ];
    let mut features = feature::EVENT_IDX;
    for (needed, bits, what) in needs {
        if needed && offered & bits != bits {
            return Err(LoadError::Unfit {
                path: path.to_owned(),
                what: format!("the back-end does not offer {what}"),
            });
        }
        features |= if needed { bits } else { 0 };
    }
    Ok(features & offered)
}

fn negotiate(frontend: &mut Frontend, features: u64) -> Result<(), FrontendError> {
    let known = frontend.ask_u64(request::GET_PROTOCOL_FEATURES)?;
    let wanted = (protocol_feature::MQ | protocol_feature::REPLY_ACK) & known;
    let words = message::words(&[wanted]);
    frontend.set(request::SET_PROTOCOL_FEATURES, &words, &[])?;
    frontend.protocol_features = wanted;
    frontend.set(request::SET_FEATURES, &message::words(&[features]), &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_wanted_is_not_taken_and_what_is_missing_is_said() {
        let wanted = Wanted {
            packed: false,
            mergeable: true,
            segments: false,
        };
        let path = Path::new("s");
        let all = choose(path, u64::MAX, wanted).expect("all there");
        assert_eq!(all & (feature::RING_PACKED | SEGMENTS), 0);
        assert_ne!(all & net_feature::MRG_RXBUF, 0);
        let error = choose(path, !net_feature::MRG_RXBUF, wanted).expect_err("needed");
        assert!(error.to_string().contains("mergeable buffers"), "{error}");
        let left = choose(path, !feature::EVENT_IDX, wanted).expect("does without");
        assert_eq!(left & feature::EVENT_IDX, 0);
    }
}
