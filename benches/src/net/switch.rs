//! Guest to guest: through our switch, and through a `testpmd` that forwards between two `net_vhost` ports.
//!
//! The frontends of both guests are two ports of one `testpmd`, which sends on from each port what the other received
//! (`io`). [`BURSTS`] of frames go round in each direction, so that both ways are busy at once and no ring overflows:
//! nobody has to drop anything. `testpmd` forwards in the same mode: from port to port without a look at a frame, which is
//! the least that can be done. Our switch looks each destination up, learns each source, and copies once.
#![forbid(unsafe_code)]

use std::cell::RefCell;

use super::peers::{self, VHOST};
use super::rings::{Rings, SMALL, mac, sizes};
use super::row::{Case, row};
use super::turn::{Pair, Server, Traffic, side};
use crate::block::BlockError;
use crate::block::bench::Bench;
use crate::block::rounds;
use crate::figures::row::{Point, Row};

/// How many times as fast as `testpmd` small frames are to be.
const TARGET: f64 = 1.3;
/// Bursts of 32 frames in each direction.
const BURSTS: u32 = 4;

/// Measures all rings and sizes.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let mut rows = Vec::new();
    for rings in Rings::all(bench.quick) {
        let (theirs, sockets) = peers::testpmd(bench, "vhost", 2, &[])?;
        let theirs = Pair::connect(bench, Server::Testpmd(theirs), &sockets, rings)?;
        let theirs = RefCell::new(theirs);
        for &bytes in sizes(bench.quick) {
            eprintln!("switch {bytes}, {} ..", rings.name());
            rows.push(case(bench, rings, bytes, &theirs)?);
        }
    }
    Ok(rows)
}

fn case(
    bench: &Bench,
    rings: Rings,
    bytes: u32,
    theirs: &RefCell<Pair>,
) -> Result<Row, BlockError> {
    let ports = [0, 1].map(|number| format!("switch:lan,mac={}", mac(number)));
    let ours = peers::ours(bench, "ours", &ports)?;
    let sockets = ours.sockets.clone();
    let ours = RefCell::new(Pair::connect(bench, Server::Ours(ours), &sockets, rings)?);
    let traffic = Traffic::Round {
        bursts: BURSTS,
        bytes,
    };
    let mut sides = Vec::new();
    for pair in [&ours, theirs] {
        pair.borrow_mut().prepare(traffic)?;
        sides.push(side(bench, pair, traffic));
    }
    let rounds = rounds::take(bench, &mut sides)?;
    let case = Case {
        name: format!("switch, {bytes} B, {}", rings.name()),
        peer: VHOST,
        target: (bytes == SMALL).then_some(TARGET),
        point: Some(Point {
            panel: format!("guest to guest by bytes, {}", rings.name()),
            line: "Bulkhead".to_owned(),
            axis: "bytes",
            at: bytes as usize,
        }),
    };
    Ok(row(case, &rounds))
}
