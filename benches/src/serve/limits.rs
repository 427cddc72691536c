//! Limits of disks, as the command line of `serve` says them.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use bulkhead_dataplane::blk::BlkDevice;
use bulkhead_dataplane::qos::Group;
use bulkhead_protocol::limits::{LimitError, Limits, Rate};

use super::spec;

/// Not limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not `requests=` or `bytes=`, or one of them twice.
    #[error(
        "{0:?} is no limit: write requests=RATE, bytes=RATE or both with a comma, where RATE is what may \
         pass in a second, and RATE/BURST says how much more at once, as in requests=10000/100,bytes=50MiB"
    )]
    Limit(String),
    /// Out of bounds.
    #[error(transparent)]
    Bounds(#[from] LimitError),
}

/// Parses `requests=RATE[/BURST],bytes=RATE[/BURST]`.
///
/// # Errors
/// See [`ParseError`].
pub fn parse(text: &str) -> Result<Limits, ParseError> {
    let wrong = || ParseError::Limit(text.to_owned());
    let mut limits = Limits::default();
    for part in text.split(',') {
        let (of, value) = part.split_once('=').ok_or_else(wrong)?;
        let (place, number): (_, fn(&str) -> Option<u64>) = match of {
            "requests" => (&mut limits.requests, |text| text.parse().ok()),
            "bytes" => (&mut limits.bytes, |text| spec::bytes(text).ok()),
            _ => return Err(wrong()),
        };
        let rate = rate(value, number).ok_or_else(wrong)?;
        if place.replace(rate).is_some() {
            return Err(wrong());
        }
    }
    limits.check()?;
    Ok(limits)
}

fn rate(text: &str, number: fn(&str) -> Option<u64>) -> Option<Rate> {
    match text.split_once('/') {
        None => Some(Rate::with_default_burst(number(text)?)),
        Some((per_second, burst)) => Some(Rate {
            per_second: number(per_second)?,
            burst: number(burst)?,
        }),
    }
}

/// Limits the disks: each by what was given for it, or all by the only one that was; and all together.
pub fn set<'a>(
    disks: impl IntoIterator<Item = &'a BlkDevice>,
    each: &[Limits],
    together: Option<&Limits>,
) {
    if each.is_empty() && together.is_none() {
        return;
    }
    let group = together.map(Group::new);
    for (at, disk) in disks.into_iter().enumerate() {
        let limits = each.get(at).or_else(|| each.last()).copied();
        let limits = limits.unwrap_or_default();
        disk.qos().set(&limits, group.as_ref().map(Arc::clone));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_with_and_without_bursts() {
        let limits = parse("requests=10000/100,bytes=50MiB").expect("limits");
        assert_eq!(
            limits.requests,
            Some(Rate {
                per_second: 10_000,
                burst: 100
            })
        );
        assert_eq!(limits.bytes, Some(Rate::with_default_burst(50 << 20)));
        let bytes = parse("bytes=1MiB/64KiB").expect("limits");
        assert_eq!(bytes.requests, None);
        assert_eq!(bytes.bytes.map(|rate| rate.burst), Some(64 << 10));
    }

    #[test]
    fn what_is_none_is_refused() {
        for bad in [
            "",
            "10000",
            "requests",
            "requests=",
            "requests=-1",
            "requests=1k",
            "requests=1/",
            "requests=1,requests=2",
            "iops=1",
            "bytes=1MB",
        ] {
            assert_eq!(parse(bad), Err(ParseError::Limit(bad.to_owned())), "{bad}");
        }
        for bad in ["requests=0", "bytes=1", "requests=1/99999"] {
            assert!(matches!(parse(bad), Err(ParseError::Bounds(_))), "{bad}");
        }
    }
}
