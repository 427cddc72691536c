//! How much a network card may send and get: packets and bytes a second, each with a burst.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;

use minicbor::{Decode, Encode};

use crate::limits::{
    LimitError, MAX_BYTES_PER_SECOND, MAX_REQUESTS_PER_SECOND, MIN_BYTES_PER_SECOND, Rate, Unit,
    whole,
};

/// Limits of one direction. Both hold at once; what is none is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TrafficLimits {
    /// Frames, a segment that is cut later counted once for each packet that it becomes.
    #[n(0)]
    pub packets: Option<Rate>,
    /// Bytes of frames, from the Ethernet header on.
    #[n(1)]
    pub bytes: Option<Rate>,
}

impl TrafficLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    fn check(&self, [packets, bytes]: [Unit; 2]) -> Result<(), LimitError> {
        self.packets.map_or(Ok(()), |rate| rate.check(packets))?;
        self.bytes.map_or(Ok(()), |rate| rate.check(bytes))
    }
}

impl fmt::Display for TrafficLimits {
    /// In words, like `10000 packets/s (burst 1000), 100 MiB/s (burst 10 MiB)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let packets = self
            .packets
            .map(|Rate { per_second, burst }| format!("{per_second} packets/s (burst {burst})"));
        let bytes = self.bytes.map(|Rate { per_second, burst }| {
            format!("{}/s (burst {})", whole(per_second), whole(burst))
        });
        let said: Vec<String> = [packets, bytes].into_iter().flatten().collect();
        match said.is_empty() {
            true => f.write_str("none"),
            false => f.write_str(&said.join(", ")),
        }
    }
}

const fn packets(field: &'static str, burst_field: &'static str) -> Unit {
    Unit {
        name: "packets",
        field,
        burst_field,
        least: 1,
        most: MAX_REQUESTS_PER_SECOND,
    }
}

const fn bytes(field: &'static str, burst_field: &'static str) -> Unit {
    Unit {
        name: "bytes",
        field,
        burst_field,
        least: MIN_BYTES_PER_SECOND,
        most: MAX_BYTES_PER_SECOND,
    }
}

const TX: [Unit; 2] = [
    packets("tx_packets", "tx_packets_burst"),
    bytes("tx_bandwidth", "tx_bandwidth_burst"),
];
const RX: [Unit; 2] = [
    packets("rx_packets", "rx_packets_burst"),
    bytes("rx_bandwidth", "rx_bandwidth_burst"),
];

/// Limits of a network card; the directions are the guest's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct NicLimits {
    /// What the guest may send. What is over it waits in the guest's ring.
    #[n(0)]
    #[cbor(skip_if = "TrafficLimits::is_none")]
    pub tx: TrafficLimits,
    /// What the guest gets. What is over it is dropped, and counted.
    #[n(1)]
    #[cbor(skip_if = "TrafficLimits::is_none")]
    pub rx: TrafficLimits,
}

impl NicLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the bounds of each rate and burst.
    ///
    /// # Errors
    /// The first that is out of bounds.
    pub fn check(&self) -> Result<(), LimitError> {
        self.tx.check(TX)?;
        self.rx.check(RX)
    }
}

impl fmt::Display for NicLimits {
    /// In words, like `sends 100 MiB/s (burst 10 MiB); gets none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.tx.is_none(), self.rx.is_none()) {
            (true, true) => f.write_str("none"),
            (false, true) => write!(f, "sends {}", self.tx),
            (true, false) => write!(f, "gets {}", self.rx),
            (false, false) => write!(f, "sends {}; gets {}", self.tx, self.rx),
        }
    }
}
