//! How much a volume, or a group of volumes, may do: rates with a burst (those of a network card are in
//! [`crate::net`]). The bundle carries them, keyd passes them on in its grants, and the data plane keeps to them.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;

use minicbor::{Decode, Encode};

use crate::identity::GroupName;

/// Most requests a second that a limit can be.
pub const MAX_REQUESTS_PER_SECOND: u64 = 1_000_000_000;
/// Fewest bytes a second that a limit can be: with less, one large request would take longer than a
/// guest waits for it.
pub const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
/// Most bytes a second that a limit can be: 1 TiB.
pub const MAX_BYTES_PER_SECOND: u64 = 1 << 40;
/// A burst is at most what the rate itself lets pass in so many seconds.
pub const MAX_BURST_SECONDS: u64 = 3600;
/// A burst that nobody asked for is what the rate lets pass in this part of a second.
pub const DEFAULT_BURST_FRACTION: u64 = 10;

/// A steady rate and a burst, both in the unit of what they limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Rate {
    /// What may pass in a second, on the average.
    #[n(0)]
    pub per_second: u64,
    /// What may pass at once after idleness, beyond the rate: the bucket's tokens.
    #[n(1)]
    pub burst: u64,
}

impl Rate {
    /// A rate with the burst that holds if nobody asks for another: a tenth of a second's worth, at
    /// least 1.
    #[must_use]
    pub fn with_default_burst(per_second: u64) -> Self {
        Self {
            per_second,
            burst: (per_second / DEFAULT_BURST_FRACTION).max(1),
        }
    }

    pub(crate) fn check(self, what: Unit) -> Result<(), LimitError> {
        let Self { per_second, burst } = self;
        if !(what.least..=what.most).contains(&per_second) {
            return Err(LimitError {
                field: what.field,
                problem: format!(
                    "{per_second} {} a second are not between {} and {}",
                    what.name, what.least, what.most
                ),
            });
        }
        let most = per_second.saturating_mul(MAX_BURST_SECONDS);
        if !(1..=most).contains(&burst) {
            return Err(LimitError {
                field: what.burst_field,
                problem: format!(
                    "a burst of {burst} {} is not between 1 and {most}, which is what passes in \
                     {MAX_BURST_SECONDS} seconds",
                    what.name
                ),
            });
        }
        Ok(())
    }
}

/// What is counted, and its bounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    pub(crate) name: &'static str,
    pub(crate) field: &'static str,
    pub(crate) burst_field: &'static str,
    pub(crate) least: u64,
    pub(crate) most: u64,
}

const REQUESTS: Unit = Unit {
    name: "requests",
    field: "requests",
    burst_field: "requests_burst",
    least: 1,
    most: MAX_REQUESTS_PER_SECOND,
};
const BYTES: Unit = Unit {
    name: "bytes",
    field: "bandwidth",
    burst_field: "bandwidth_burst",
    least: MIN_BYTES_PER_SECOND,
    most: MAX_BYTES_PER_SECOND,
};

/// Limits that make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct LimitError {
    /// Which of the source's fields, like `requests` or `bandwidth_burst`.
    pub field: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

/// What limits there are. All of them hold at once; what is none is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Limits {
    /// Requests of every kind.
    #[n(0)]
    pub requests: Option<Rate>,
    /// Bytes read and written.
    #[n(1)]
    pub bytes: Option<Rate>,
}

impl Limits {
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
        self.requests.map_or(Ok(()), |rate| rate.check(REQUESTS))?;
        self.bytes.map_or(Ok(()), |rate| rate.check(BYTES))
    }
}

impl fmt::Display for Limits {
    /// In words, like `10000 requests/s (burst 1000), 100 MiB/s (burst 10 MiB)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let requests = self
            .requests
            .map(|Rate { per_second, burst }| format!("{per_second} requests/s (burst {burst})"));
        let bytes = self.bytes.map(|Rate { per_second, burst }| {
            format!("{}/s (burst {})", whole(per_second), whole(burst))
        });
        let said: Vec<String> = [requests, bytes].into_iter().flatten().collect();
        match said.is_empty() {
            true => f.write_str("none"),
            false => f.write_str(&said.join(", ")),
        }
    }
}

/// Bytes in the largest unit of which they are a whole number.
pub(crate) fn whole(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let mut fitting = units
        .iter()
        .filter(|(shift, _)| bytes.trailing_zeros() >= *shift);
    match fitting.next().filter(|_| bytes > 0) {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} B"),
    }
}

/// The group of a volume: its members share these limits, each beside its own.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct GroupGrant {
    /// Which group: volumes with the same name are in the same group.
    #[n(0)]
    pub name: GroupName,
    /// What its members may do together.
    #[n(1)]
    pub limits: Limits,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_nobody_asked_for_is_a_tenth_of_a_second() {
        assert_eq!(Rate::with_default_burst(10_000).burst, 1000);
        assert_eq!(Rate::with_default_burst(3).burst, 1);
    }

    #[test]
    fn what_is_out_of_bounds_is_refused_by_its_field() {
        let requests = |per_second, burst| Limits {
            requests: Some(Rate { per_second, burst }),
            bytes: None,
        };
        let bytes = |per_second, burst| Limits {
            requests: None,
            bytes: Some(Rate { per_second, burst }),
        };
        for good in [
            Limits::default(),
            requests(1, 1),
            requests(1, 3600),
            requests(MAX_REQUESTS_PER_SECOND, 1),
            bytes(MIN_BYTES_PER_SECOND, 1),
            bytes(MAX_BYTES_PER_SECOND, MAX_BYTES_PER_SECOND * 3600),
        ] {
            assert_eq!(good.check(), Ok(()));
        }
        for (bad, field) in [
            (requests(0, 1), "requests"),
            (requests(MAX_REQUESTS_PER_SECOND + 1, 1), "requests"),
            (requests(u64::MAX, u64::MAX), "requests"),
            (requests(1, 0), "requests_burst"),
            (requests(1, 3601), "requests_burst"),
            (bytes(MIN_BYTES_PER_SECOND - 1, 1), "bandwidth"),
            (bytes(MAX_BYTES_PER_SECOND + 1, 1), "bandwidth"),
            (bytes(MIN_BYTES_PER_SECOND, 0), "bandwidth_burst"),
            (bytes(MAX_BYTES_PER_SECOND, u64::MAX), "bandwidth_burst"),
        ] {
            assert_eq!(bad.check().map_err(|e| e.field), Err(field), "{bad:?}");
        }
    }

    #[test]
    fn limits_are_told_in_words() {
        let both = Limits {
            requests: Some(Rate::with_default_burst(10_000)),
            bytes: Some(Rate {
                per_second: 100 << 20,
                burst: 1000,
            }),
        };
        let words = "10000 requests/s (burst 1000), 100 MiB/s (burst 1000 B)";
        assert_eq!(both.to_string(), words);
        assert_eq!(Limits::default().to_string(), "none");
        assert_eq!([0, 1 << 40, 3 << 10].map(whole), ["0 B", "1 TiB", "3 KiB"]);
    }

    #[test]
    fn limits_travel_as_short_maps() {
        let limits = Limits {
            requests: None,
            bytes: Some(Rate {
                per_second: 1 << 20,
                burst: 7,
            }),
        };
        let bytes = minicbor::to_vec(limits).expect("encodes");
        assert_eq!(bytes, [0xa1, 1, 0xa2, 0, 0x1a, 0, 16, 0, 0, 1, 7]);
        assert_eq!(minicbor::decode::<Limits>(&bytes).expect("decodes"), limits);
        assert_eq!(
            minicbor::to_vec(Limits::default()).expect("encodes"),
            [0xa0]
        );
    }
}
