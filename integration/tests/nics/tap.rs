//! A guest and the host it runs on, over a TAP in a network namespace of the test's own.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use bulkhead_integration::guest::{GuestNic, Machine};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_tap};
use bulkhead_integration::processes::{Process, binary};
use bulkhead_integration::transfer::Server;

use crate::Test;
use crate::pair::{MACS, PATIENCE, guest};
use crate::script;
use crate::support::{Outcome, ensure, folder, rounds};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "net_guest_over_a_tap_split",
        run: || over_a_tap("net_guest_over_a_tap_split", 1, false),
    },
    Test {
        name: "net_guest_over_a_tap_packed",
        run: || over_a_tap("net_guest_over_a_tap_packed", 2, true),
    },
];

/// The TAP of these tests.
const TAP: &str = "bh-tap0";

/// Streams and datagrams in both directions, whose bytes and whose checksums are looked at on both sides.
fn over_a_tap(test: &str, pairs: u16, packed: bool) -> Outcome {
    if !enter_namespace(test) || !has_taps(test) {
        return Ok(());
    }
    make_tap(TAP, 0);
    ip(&format!("addr add {}/24 dev {TAP}", script::SERVER));
    ip(&format!("addr add {}/64 dev {TAP} nodad", script::SERVER_6));
    let dir = folder()?;
    let socket = dir.path().join("card.sock");
    let card = format!(
        "{},tap:{TAP},mac={},pairs={pairs}",
        socket.display(),
        MACS[1]
    );
    let serve = Process::start(&binary("serve", "bulkhead-benches")?, &["--net", &card])?;
    if !serve.wait_for_log("listening on", Duration::from_secs(60)) {
        return Err(format!("serve is not ready:\n{}", serve.log()).into());
    }
    let any: SocketAddr = format!("[::]:{}", script::PORT).parse()?;
    let _server = Server::start(any)?;
    let nic = GuestNic {
        pairs,
        packed,
        ..GuestNic::new(socket, MACS[1])
    };
    let script = script::with_the_host(1 << rounds(20, 28));
    let mut guest = guest(&dir.path().join("guest"), nic, &script, Machine::default())?;
    let console = guest
        .finish(PATIENCE)
        .map_err(|e| format!("{e}\n--- serve:\n{}", serve.log()))?;
    ensure(guest.value("csum_errors").as_deref() == Some("0"), || {
        format!("the guest counts wrong checksums:\n{console}")
    })?;
    let wrong = wrong_checksums(&fs::read_to_string("/proc/thread-self/net/snmp")?);
    ensure(wrong == 0, || {
        format!("the host counts {wrong} wrong checksums")
    })
}

/// Packets whose checksum the kernel found to be wrong, of all protocols: each has a line with names and one with
/// numbers.
fn wrong_checksums(snmp: &str) -> u64 {
    let lines: Vec<Vec<&str>> = snmp.lines().map(|l| l.split(' ').collect()).collect();
    let both = lines.chunks_exact(2);
    let counters = both.flat_map(|pair| pair[0].iter().zip(&pair[1]));
    let wrong = counters.filter(|(name, _)| **name == "InCsumErrors");
    wrong
        .filter_map(|(_, number)| number.parse::<u64>().ok())
        .sum()
}
