//! The names of a data plane's descriptors in rot's store, at most 16 characters each.
//!
//! | name | what |
//! | --- | --- |
//! | `v<slot>.state` | a volume's state memfd |
//! | `v<slot>.<number>` | a descriptor that this state names |
//! | `fence.<generation>` | the read end of a process's fence |
//! | `all.workers` | how many workers the process has |
//! | `all.deaths` | how often each volume has killed the process |
//!
//! A slot is a small number, not the volume's id: it is free again when the volume is served no more.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::fd_store::FdName;
use bulkhead_protocol::identity::InvalidName;

use super::volume::FdNumber;

/// Slots; more than volumes that can be granted.
pub(super) const SLOTS: u16 = 1000;

/// A name, understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    State(u16),
    Numbered(u16, FdNumber),
    Fence(u64),
    Workers,
    Deaths,
}

impl Name {
    /// None: another's name, or one of a later version.
    pub(super) fn parse(name: FdName) -> Option<Self> {
        let parsed = match name.as_str().split_once('.')? {
            ("all", "workers") => Self::Workers,
            ("all", "deaths") => Self::Deaths,
            ("fence", generation) => Self::Fence(generation.parse().ok()?),
            (slot, what) => {
                let slot = slot.strip_prefix('v')?.parse().ok()?;
                match what {
                    "state" => Self::State(slot),
                    number => Self::Numbered(slot, FdNumber(number.parse().ok()?)),
                }
            }
        };
        // No other spelling of it: each descriptor has one name.
        (parsed.name().ok()? == name).then_some(parsed)
    }

    /// As the store has it.
    ///
    /// # Errors
    /// A slot of more than three digits, a generation of more than ten.
    pub(super) fn name(self) -> Result<FdName, InvalidName> {
        match self {
            Self::State(slot) => format!("v{slot}.state"),
            Self::Numbered(slot, FdNumber(number)) => format!("v{slot}.{number}"),
            Self::Fence(generation) => format!("fence.{generation}"),
            Self::Workers => "all.workers".to_owned(),
            Self::Deaths => "all.deaths".to_owned(),
        }
        .parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_fits_and_reads_back() {
        let last = FdNumber(u32::MAX);
        for name in [
            Name::State(0),
            Name::State(SLOTS - 1),
            Name::Numbered(SLOTS - 1, last),
            Name::Numbered(0, FdNumber(0)),
            Name::Fence(0),
            Name::Workers,
            Name::Deaths,
            Name::Fence(9_999_999_999),
        ] {
            let text = name.name().expect("16 characters are enough");
            assert_eq!(Name::parse(text), Some(name));
        }
        assert!(Name::Fence(u64::MAX).name().is_err());
    }

    #[test]
    fn other_names_are_not_ours() {
        for other in [
            "v",
            "v1",
            "v.state",
            "v01.state",
            "v1.",
            "v1.+1",
            "v1.01",
            "w1.state",
            "v99999.state",
            "fence.",
            "fence.-1",
            "v1.4294967296",
            "fencE.1",
        ] {
            assert_eq!(Name::parse(other.parse().expect("a name")), None, "{other}");
        }
    }
}
