//! Where a large request is encrypted: rows of [`bulkhead_benches::placement`], whose decision is ADR 0016.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::time::Duration;

use bulkhead_benches::placement::{self, Wait};
use bulkhead_benches::ratio::Pace;
use bulkhead_crypto::{SecretArena, XtsKey};

use crate::Differ;
use crate::xts::key_bytes;
use crate::xts::shape::size;
use bulkhead_benches::figures::row::{Placement, Row, Unit};

/// How long each figure takes in the full form.
const SAMPLE: Duration = Duration::from_millis(150);

/// Each size both ways, as two rows: inline beside the pool, and the pool beside inline. None where there is
/// one CPU only.
///
/// # Errors
/// None; that both make the same bytes is tested where they are measured.
pub fn measure(pace: Pace) -> Result<Vec<Row>, Differ> {
    let arena = SecretArena::new(1).expect("secret memory for one key");
    let key = XtsKey::new(&arena, &key_bytes()).expect("the halves differ");
    let sample = if pace == Pace::QUICK {
        Duration::from_millis(2)
    } else {
        SAMPLE
    };
    let measured = placement::measure(&key, sample);
    Ok(measured.iter().flat_map(rows).collect())
}

fn rows(one: &placement::Placement) -> Vec<Row> {
    let wait = match one.wait {
        Wait::Spinning => "spins",
        Wait::Sleeping => "sleeps",
    };
    let case = |what| format!("placement {}, helper {wait}, {what}", size(one.bytes));
    let (inline, pool) = (one.inline_ns, one.pool_ns);
    let latency = both(
        case("one request alone"),
        Unit::NanosecondsPerRequest,
        inline,
        pool,
    );
    let (inline, pool) = (one.inline_rate, one.pool_rate);
    let rate = both(
        case("both cores busy"),
        Unit::RequestsPerSecond,
        inline,
        pool,
    );
    latency.into_iter().chain(rate).collect()
}

/// Both points of view of a comparison.
fn both(case: String, unit: Unit, inline: f64, pool: f64) -> [Row; 2] {
    let row = |ours: f64, peer: &'static str, theirs: f64, placement| Row {
        case: case.clone(),
        unit,
        ours,
        peer: Cow::Borrowed(peer),
        theirs,
        ratio: if unit.more_is_better() {
            ours / theirs
        } else {
            theirs / ours
        },
        target: None,
        placement,
        point: None,
    };
    [
        row(inline, "pool of one helper", pool, Placement::Inline),
        row(pool, "inline", inline, Placement::Pool),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_better_has_the_larger_ratio() {
        let [inline, pool] = both(String::new(), Unit::NanosecondsPerRequest, 10.0, 20.0);
        assert!(
            inline.ratio > 1.9 && pool.ratio < 0.6,
            "{inline:?} {pool:?}"
        );
        let [inline, pool] = both(String::new(), Unit::RequestsPerSecond, 10.0, 20.0);
        assert!(
            inline.ratio < 0.6 && pool.ratio > 1.9,
            "{inline:?} {pool:?}"
        );
    }
}
