//! A back-end's disk as its frontend sees it: connected, negotiated, given memory and queues.
//!
//! Messages and descriptors are those of the test frontend in `integration`, which shares nothing
//! with the data plane either.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_integration::disk::feature;
use bulkhead_integration::driver::packed::START;
use bulkhead_integration::frontend::message::{self, protocol_feature, request};
use bulkhead_integration::frontend::{Addresses, Events, Frontend, FrontendError};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::LoadError;
use super::memory::{Memory, user_addr};
use super::requests::{Layout, Shape};

/// How long to try to connect: a back-end that was just started needs a moment.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of the configuration space that are needed: up to `num_queues`. Always from its start:
/// there are back-ends that don't look at the offset.
const CONFIG_BYTES: u32 = 36;

/// What is needed of a disk.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Packed rings.
    pub packed: bool,
    /// Indirect descriptors.
    pub indirect: bool,
    /// Kicks and calls by index where the back-end has that.
    pub event_idx: bool,
    /// Queues.
    pub queues: u16,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Writes are among the requests.
    pub writes: bool,
}

/// The eventfds of a queue.
#[derive(Debug)]
pub struct Signals {
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver.
    pub call: EventFd,
    /// Device to driver: the queue failed.
    pub err: EventFd,
}

/// A connected disk.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    frontend: Frontend,
    features: u64,
    capacity_bytes: u64,
}

impl Device {
    /// Connects and negotiates what is wanted.
    ///
    /// # Errors
    /// [`LoadError::Connect`], [`LoadError::Setup`], [`LoadError::NotOffered`], [`LoadError::Unfit`].
    pub fn open(path: &Path, wanted: &Wanted) -> Result<Self, LoadError> {
        let connected = Frontend::connect(path, PATIENCE);
        let mut frontend = connected.map_err(|source| LoadError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let offered = greet(path, &frontend)?;
        let features = choose(path, offered, wanted)?;
        negotiate(&mut frontend, features).map_err(setup(path, "negotiating features"))?;
        let config = frontend.get_config(0, CONFIG_BYTES);
        let config = config.map_err(setup(path, "reading the configuration space"))?;
        let device = Self {
            path: path.to_owned(),
            features,
            capacity_bytes: field(&config, 0, 8).saturating_mul(512),
            frontend,
        };
        device.check_size(&config, wanted)?;
        device.check_queues(&config, wanted)?;
        Ok(device)
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Whether kicks and calls go by index.
    #[must_use]
    pub fn event_idx(&self) -> bool {
        self.features & feature::EVENT_IDX != 0
    }

    /// Its socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check_size(&self, config: &[u8], wanted: &Wanted) -> Result<(), LoadError> {
        let logical = match field(config, 20, 4) {
            0 => 512,
            logical => logical,
        };
        let block = u64::from(wanted.block_bytes);
        if !block.is_multiple_of(logical) {
            return Err(self.unfit(format!(
                "its logical block has {logical} bytes: make --block-size a multiple of that"
            )));
        }
        if self.capacity_bytes < block * u64::from(wanted.queues) {
            return Err(self.unfit(format!(
                "the disk has {} bytes only, less than one request for each queue",
                self.capacity_bytes
            )));
        }
        Ok(())
    }

    fn check_queues(&self, config: &[u8], wanted: &Wanted) -> Result<(), LoadError> {
        let has = if self.features & feature::BLK_MQ != 0 {
            field(config, 34, 2)
        } else {
            1
        };
        if u64::from(wanted.queues) > has {
            return Err(self.unfit(format!(
                "it has {has} queues: make --queues no more than that"
            )));
        }
        Ok(())
    }

    fn unfit(&self, what: String) -> LoadError {
        LoadError::Unfit {
            path: self.path.clone(),
            what,
        }
    }

    /// Shares memory and starts a queue for each layout. Rings must be ready for the device.
    ///
    /// # Errors
    /// [`LoadError::Setup`], [`LoadError::System`].
    pub fn start(
        &self,
        memory: &Memory,
        layouts: &[Layout],
        shape: &Shape,
    ) -> Result<Vec<Signals>, LoadError> {
        let table = self
            .frontend
            .set_memory_table(&[memory.region()], &[memory.file()]);
        table.map_err(setup(&self.path, "sharing memory"))?;
        let mut all = Vec::new();
        for (index, layout) in (0u8..).zip(layouts) {
            let signals = Signals::new()?;
            self.start_queue(index, layout, shape, &signals)
                .map_err(setup(&self.path, "starting a queue"))?;
            all.push(signals);
        }
        Ok(all)
    }

    fn start_queue(
        &self,
        index: u8,
        layout: &Layout,
        shape: &Shape,
        signals: &Signals,
    ) -> Result<(), FrontendError> {
        let (frontend, number) = (&self.frontend, u32::from(index));
        let base = if self.features & feature::RING_PACKED != 0 {
            u32::from(START) << 16 | u32::from(START)
        } else {
            0
        };
        frontend.set_size_and_base(number, shape.ring_size, base)?;
        let [desc, used, avail] = [layout.desc, layout.device, layout.driver].map(user_addr);
        frontend.set_addresses(number, Addresses { desc, used, avail })?;
        frontend.give_events(number, signals.events())?;
        frontend.enable_queue(number, true)
    }

    /// Looks whether the back-end is still there and has given up no queue.
    ///
    /// # Errors
    /// [`LoadError::Closed`], [`LoadError::GaveUp`].
    pub fn watch(&self, signals: &[Signals]) -> Result<(), LoadError> {
        for (queue, signals) in (0u16..).zip(signals) {
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
    pub fn stop(&self, queues: u16) -> Result<(), LoadError> {
        for queue in 0..queues {
            self.frontend
                .get_vring_base(u32::from(queue))
                .map_err(setup(&self.path, "stopping a queue"))?;
        }
        Ok(())
    }
}

impl Signals {
    /// As a frontend gives them away.
    #[must_use]
    pub fn events(&self) -> Events<'_> {
        Events {
            err: &self.err,
            call: &self.call,
            kick: &self.kick,
        }
    }

    /// Three of them.
    ///
    /// # Errors
    /// [`LoadError::System`].
    pub fn new() -> Result<Self, LoadError> {
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(|e| {
                LoadError::System {
                    what: "making an eventfd",
                    source: e.into(),
                }
            })
        };
        Ok(Self {
            kick: event()?,
            call: event()?,
            err: event()?,
        })
    }

    /// Calls since the last look.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }
}

fn setup(path: &Path, step: &'static str) -> impl FnOnce(FrontendError) -> LoadError {
    let path = path.to_owned();
    move |source| LoadError::Setup { path, step, source }
}

fn greet(path: &Path, frontend: &Frontend) -> Result<u64, LoadError> {
    let owned = frontend.set(request::SET_OWNER, &[], &[]);
    owned
        .and_then(|()| frontend.ask_u64(request::GET_FEATURES))
        .map_err(setup(path, "asking for features"))
}

/// What of the offered features is taken.
fn choose(path: &Path, offered: u64, wanted: &Wanted) -> Result<u64, LoadError> {
    let needs = [
        (
            true,
            feature::VERSION_1,
            "virtio 1 (VERSION_1)",
            "it is too old for `load`",
        ),
        (
            true,
            feature::PROTOCOL_FEATURES,
            "protocol features",
            "without them it can't say how large the disk is",
        ),
        (
            wanted.packed,
            feature::RING_PACKED,
            "packed rings",
            "leave --packed out",
        ),
        (
            wanted.indirect,
            feature::INDIRECT_DESC,
            "indirect descriptors",
            "leave --indirect out",
        ),
    ];
    let missing = |&&(needed, bit, ..): &&(bool, u64, &str, &str)| needed && offered & bit == 0;
    if let Some(&(_, _, what, instead)) = needs.iter().find(missing) {
        return Err(LoadError::NotOffered {
            path: path.to_owned(),
            what,
            instead,
        });
    }
    if wanted.writes && offered & feature::BLK_RO != 0 {
        return Err(LoadError::Unfit {
            path: path.to_owned(),
            what: "the disk is read-only: use --mix read, without --verify".to_owned(),
        });
    }
    let mut features = feature::VERSION_1
        | feature::PROTOCOL_FEATURES
        | feature::BLK_RO
        | feature::BLK_SIZE
        | feature::BLK_MQ
        // Without it a back-end has to write through.
        | feature::BLK_FLUSH;
    let optional = [
        (wanted.packed, feature::RING_PACKED),
        (wanted.indirect, feature::INDIRECT_DESC),
        (wanted.event_idx, feature::EVENT_IDX),
    ];
    for (_, bit) in optional.iter().filter(|(wanted, _)| *wanted) {
        features |= bit;
    }
    Ok(features & offered)
}

fn negotiate(frontend: &mut Frontend, features: u64) -> Result<(), FrontendError> {
    let known = frontend.ask_u64(request::GET_PROTOCOL_FEATURES)?;
    let wanted = protocol_feature::MQ | protocol_feature::REPLY_ACK | protocol_feature::CONFIG;
    let wanted = wanted & known;
    frontend.set(
        request::SET_PROTOCOL_FEATURES,
        &message::words(&[wanted]),
        &[],
    )?;
    frontend.protocol_features = wanted;
    frontend.set(request::SET_FEATURES, &message::words(&[features]), &[])
}

/// A little-endian number in the configuration space.
fn field(config: &[u8], at: usize, len: usize) -> u64 {
    let bytes = config.get(at..at + len).unwrap_or_default();
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted = Wanted {
        packed: true,
        indirect: true,
        event_idx: true,
        queues: 1,
        block_bytes: 4096,
        writes: true,
    };

    #[test]
    fn what_is_not_offered_is_refused_or_left_out() {
        let path = Path::new("s");
        let all = !feature::BLK_RO;
        let features = choose(path, all, &WANTED).expect("all there");
        assert_eq!(features & feature::IN_ORDER, 0, "not wanted");
        let without = |bit: u64| choose(path, all & !bit, &WANTED);
        let left = without(feature::EVENT_IDX).expect("does without");
        assert_eq!(left, features & !feature::EVENT_IDX);
        for (bit, said) in [
            (feature::VERSION_1, "too old"),
            (feature::PROTOCOL_FEATURES, "how large"),
            (feature::RING_PACKED, "leave --packed out"),
            (feature::INDIRECT_DESC, "leave --indirect out"),
        ] {
            let error = without(bit).expect_err("needed").to_string();
            assert!(error.contains(said), "{error}");
        }
        let error = choose(path, u64::MAX, &WANTED)
            .expect_err("read-only")
            .to_string();
        assert!(error.contains("--mix read"), "{error}");
    }

    #[test]
    fn fields_are_little_endian_and_zero_outside() {
        assert_eq!(field(&[1, 2, 3, 4], 1, 2), 0x0302);
        assert_eq!(field(&[1, 2], 1, 2), 0);
    }
}
