//! Out of the host by a TAP: ours, and a `testpmd` that bridges `net_vhost` and `net_tap`. What a guest sends ends in
//! the kernel, which has nobody at that address.
//!
//! Both interfaces are in a network namespace of this process, so that nothing else is on them, and they go with it.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::process::Command;

use super::peers;
use super::rings::{Rings, SMALL, Way, mac, sizes};
use super::row::{Case, row};
use super::turn::{Pair, Server, Traffic, side};
use crate::block::bench::Bench;
use crate::block::{BlockError, rounds};
use crate::figures::row::{Point, Row};

/// The peer's name in rows.
const TAP: &str = "testpmd net_vhost to net_tap";
/// Our interface.
const OURS: &str = "bench-ours";
/// The other one.
const THEIRS: &str = "bench-theirs";

/// Measures the sizes, in split rings.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        eprintln!("tap: left out: no network namespace of its own ({error})");
        return Ok(Vec::new());
    }
    ip(&[
        "tuntap",
        "add",
        "dev",
        OURS,
        "mode",
        "tap",
        "multi_queue",
        "vnet_hdr",
    ])?;
    ip(&["link", "set", OURS, "up"])?;
    let rings = Rings {
        packed: false,
        mergeable: true,
    };
    let others = [format!("net_tap0,iface={THEIRS}")];
    let (theirs, sockets) = peers::testpmd(bench, "vhost", 1, &others)?;
    ip(&["link", "set", THEIRS, "up"])?;
    let theirs = Pair::connect(bench, Server::Testpmd(theirs), &sockets, rings)?;
    let theirs = RefCell::new(theirs);
    let port = format!("tap:{OURS},mac={}", mac(0));
    let ours = peers::ours(bench, "ours", &[port])?;
    let sockets = ours.sockets.clone();
    let ours = RefCell::new(Pair::connect(bench, Server::Ours(ours), &sockets, rings)?);
    let mut rows = Vec::new();
    for &bytes in sizes(bench.quick) {
        eprintln!("tap tx {bytes} ..");
        let traffic = Traffic::Bridge(bytes);
        let mut sides = Vec::new();
        for pair in [&ours, &theirs] {
            pair.borrow_mut().prepare(traffic)?;
            sides.push(side(bench, pair, traffic));
        }
        let rounds = rounds::take(bench, &mut sides)?;
        let case = Case {
            name: format!("tap, {} {bytes} B, {}", Way::Tx.name(), rings.name()),
            peer: TAP,
            target: (bytes == SMALL).then_some(1.0),
            point: Some(Point {
                panel: "TAP by bytes".to_owned(),
                line: "Bulkhead".to_owned(),
                axis: "bytes",
                at: bytes as usize,
            }),
        };
        rows.push(row(case, &rounds));
    }
    Ok(rows)
}

fn ip(arguments: &[&str]) -> Result<(), BlockError> {
    let failed = |source| BlockError::Program {
        what: format!("ip {}", arguments.join(" ")),
        source,
    };
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(std::io::Error::other(said.trim().to_owned())))
}
