//! One and four queue pairs, split and packed rings, with offloads and without: a guest talks to another through
//! the switch, its card goes away and comes back, and it reboots. The guest that answers has rings of the other
//! format, so that two of these tests see all four combinations.

use crate::Test;
use crate::pair::{Card, PATIENCE, Pair};
use crate::script::{self, Amount};
use crate::support::{Outcome, ensure, rounds};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "net_guest_one_pair_split",
        run: || talks(1, false, false),
    },
    Test {
        name: "net_guest_four_pairs_packed",
        run: || talks(4, true, false),
    },
    Test {
        name: "net_guest_without_offloads",
        run: || talks(1, true, true),
    },
    Test {
        name: "net_guest_reboots",
        run: reboots,
    },
];

fn talks(pairs: u16, packed: bool, bare: bool) -> Outcome {
    let amount = Amount {
        bytes: 1 << rounds(20, 28),
        datagrams: rounds(20, 1000),
        seconds: rounds(1, 10),
        turns: rounds(2, 100),
    };
    through(
        Card {
            pairs,
            packed,
            bare,
        },
        amount,
    )
}

fn through(card: Card, amount: Amount) -> Outcome {
    let pair = Pair::start(card)?;
    let mut client = pair.client(card, &script::client(amount), false)?;
    let console = client
        .finish(PATIENCE)
        .map_err(|e| format!("{e}\n--- server:\n{}", pair.server.console()))?;
    let number = |name: &str| client.value(name).and_then(|v| v.parse::<f64>().ok());
    let is = |name: &str, wanted: &str| {
        let value = client.value(name);
        ensure(value.as_deref() == Some(wanted), || {
            format!("{name} is {value:?}, not {wanted}:\n{console}")
        })
    };
    is("queues", &card.pairs.to_string())?;
    is("packed", if card.packed { "1" } else { "0" })?;
    is("tso_on", if card.bare { "off" } else { "on" })?;
    is("tso_off", "off")?;
    is("downs", &amount.turns.to_string())?;
    is("rebinds", &amount.turns.to_string())?;
    is("csum_errors", "0")?;
    let at_server = pair.server.value("csum_errors");
    ensure(at_server.as_deref() == Some("0"), || {
        format!("the server counts {at_server:?} wrong checksums")
    })?;
    for name in ["send_on", "receive_on", "send_off", "receive_off"] {
        let speed = number(&format!("iperf_{name}"));
        ensure(speed.is_some_and(|speed| speed > 0.0), || {
            format!("iperf3 {name} carried {speed:?} Mbit/s:\n{console}")
        })?;
    }
    let echoed = number("echoed");
    ensure(echoed.is_some_and(|n| n >= 1.0), || {
        format!("{echoed:?} datagrams came back:\n{console}")
    })
}

/// The guest's own reboot, after which the card is there again.
fn reboots() -> Outcome {
    let card = Card {
        pairs: 1,
        packed: true,
        bare: false,
    };
    let wanted = rounds(1, 20);
    let pair = Pair::start(card)?;
    let mut client = pair.client(card, &script::rebooting(wanted), true)?;
    let console = client
        .finish(PATIENCE)
        .map_err(|e| format!("{e}\n--- server:\n{}", pair.server.console()))?;
    let boots = console.matches("through_after_boot=").count();
    ensure(boots == wanted as usize + 1, || {
        format!("{boots} boots got through, not {}:\n{console}", wanted + 1)
    })
}
