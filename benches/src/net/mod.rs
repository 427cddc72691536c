//! Network cards beside DPDK: `cargo xtask bench net`.
//!
//! As with disks, everything that is compared is measured in turns, within moments of each other
//! ([`rounds`](crate::block::rounds)); two CPUs are told near or far around each turn. One CPU serves, one drives.
//!
//! | module | owns |
//! | --- | --- |
//! | [`arguments`] | the command line of `net-bench` |
//! | [`testpmd`] | DPDK's `testpmd`, told what to do |
//! | [`rings`] | what frontends negotiate, and what is sent |
//! | [`peers`] | back-ends: ours, and `testpmd` |
//! | [`turn`] | a back-end and its frontend, for a turn |
//! | [`row`] | rounds as rows |
//! | [`guest`] | one guest, both ways |
//! | [`switch`] | guest to guest |
//! | [`segments`] | large segments from guest to guest |
//! | [`fairness`] | what a guest that floods leaves to others |
//! | [`tap`] | out of the host |
//! | [`header`] | what ran, and how |

pub mod arguments;
pub mod fairness;
pub mod guest;
pub mod header;
pub mod peers;
pub mod rings;
pub mod row;
pub mod segments;
pub mod switch;
pub mod tap;
pub mod testpmd;
pub mod turn;

use crate::block::BlockError;
use crate::block::bench::Bench;
use crate::figures::row::Row;

/// A part that is measured.
struct Part {
    name: &'static str,
    measure: fn(&Bench) -> Result<Vec<Row>, BlockError>,
    /// Nothing without `testpmd`.
    testpmd: bool,
}

/// All of them, in the order of the table.
const PARTS: &[Part] = &[
    Part {
        name: "guest",
        measure: guest::measure,
        testpmd: true,
    },
    Part {
        name: "switch",
        measure: switch::measure,
        testpmd: true,
    },
    Part {
        name: "segments",
        measure: segments::measure,
        testpmd: false,
    },
    Part {
        name: "fairness",
        measure: fairness::measure,
        testpmd: false,
    },
    // The last one: this process leaves the network.
    Part {
        name: "tap",
        measure: tap::measure,
        testpmd: true,
    },
];

/// Measures all that the command line wants.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let mut rows = Vec::new();
    for part in PARTS.iter().filter(|part| bench.wants_part(part.name)) {
        if part.testpmd && !testpmd::is_installed() {
            eprintln!(
                "{}: left out: {} is not installed (Debian: dpdk-dev)",
                part.name,
                testpmd::PROGRAM
            );
            continue;
        }
        rows.extend((part.measure)(bench)?);
    }
    Ok(rows)
}
