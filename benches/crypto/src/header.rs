//! What ran, and how: the header of the figures.
#![forbid(unsafe_code)]

use bulkhead_benches::figures::header;
use bulkhead_benches::figures::row::Header;
use bulkhead_benches::ratio::Pace;
use bulkhead_crypto::Kernel;
use serde_json::json;

use crate::peers::LIBRARIES;

/// Describes a run at `pace`.
#[must_use]
pub fn describe(pace: Pace, pinned_to: Option<usize>) -> Header {
    let peers = LIBRARIES
        .iter()
        .map(|library| (library.name, (library.version)()));
    let kernel = Kernel::chosen().name();
    let kernels: Vec<_> = Kernel::available().iter().map(|k| k.name()).collect();
    let more = [
        // The CPU that the measuring thread was kept on; none: wherever the system put it.
        ("pinned_to", json!(pinned_to)),
        // What volumes use on this CPU, and all that it can run.
        ("kernel", json!(kernel)),
        ("kernels", json!(kernels)),
    ];
    Header {
        cpu: header::cpu(),
        how: format!("kernel {kernel}, one core"),
        peers: peers.collect(),
        date: header::date(),
        quick: pace == Pace::QUICK,
        method: format!(
            "one core; the sides of a case take a sample of {} us in turns, {} rounds, after {} us of warm-up each; \
             figures are medians over the rounds, ratio is the median of each round's ratio",
            pace.sample.as_micros(),
            pace.rounds,
            pace.warm_up.as_micros()
        ),
        more: more
            .map(|(name, value)| (name.to_owned(), value))
            .into_iter()
            .collect(),
    }
}
