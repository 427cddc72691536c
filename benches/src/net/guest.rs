//! One guest and one port: what a frame costs to take from a guest and to give to it, beside `net_vhost`.
//!
//! The frontend, `testpmd` with `net_virtio_user`, and the instrument, its own counters, are the same for both sides.
//! What the guest sends, both back-ends take and throw away (`null`; `rxonly`); what it receives, both make themselves,
//! each frame from a template that they hold (`source`; `txonly`). So nothing but the rings and one copy is compared.
//! (One difference is left: for what it throws away, `testpmd` copies the whole frame into a packet of its own, while
//! `null` only looks at its head. The rows with 1500 bytes say more of that than of rings.)
#![forbid(unsafe_code)]

use std::cell::RefCell;

use super::peers::{self, VHOST};
use super::rings::{Rings, SMALL, Way, mac, sizes};
use super::row::{Case, row};
use super::turn::{Pair, Server, Traffic, side};
use crate::block::BlockError;
use crate::block::bench::Bench;
use crate::block::rounds;
use crate::figures::row::{Point, Row};

/// How many times as fast as `net_vhost` small frames are to be.
const TARGET: f64 = 1.1;

/// Measures all rings, ways and sizes.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let mut rows = Vec::new();
    for rings in Rings::all(bench.quick) {
        let (theirs, sockets) = peers::testpmd(bench, "vhost", 1, &[])?;
        let theirs = Pair::connect(bench, Server::Testpmd(theirs), &sockets, rings)?;
        let theirs = RefCell::new(theirs);
        for way in Way::ALL {
            for &bytes in sizes(bench.quick) {
                eprintln!("guest {} {bytes}, {} ..", way.name(), rings.name());
                rows.push(case(bench, rings, way, bytes, &theirs)?);
            }
        }
    }
    Ok(rows)
}

fn case(
    bench: &Bench,
    rings: Rings,
    way: Way,
    bytes: u32,
    theirs: &RefCell<Pair>,
) -> Result<Row, BlockError> {
    let port = match way {
        Way::Tx => "null".to_owned(),
        Way::Rx => format!("source:{bytes}"),
    };
    let port = format!("{port},mac={}", mac(0));
    let ours = peers::ours(bench, "ours", &[port])?;
    let sockets = ours.sockets.clone();
    let ours = RefCell::new(Pair::connect(bench, Server::Ours(ours), &sockets, rings)?);
    let traffic = Traffic::OneWay(way, bytes);
    let mut sides = Vec::new();
    for pair in [&ours, theirs] {
        pair.borrow_mut().prepare(traffic)?;
        sides.push(side(bench, pair, traffic));
    }
    let rounds = rounds::take(bench, &mut sides)?;
    let case = Case {
        name: format!("guest, {} {bytes} B, {}", way.name(), rings.name()),
        peer: VHOST,
        target: (bytes == SMALL).then_some(TARGET),
        point: Some(Point {
            panel: format!("guest {} by bytes, {}", way.name(), rings.name()),
            line: "Bulkhead".to_owned(),
            axis: "bytes",
            at: bytes as usize,
        }),
    };
    Ok(row(case, &rounds))
}
