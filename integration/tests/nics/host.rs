//! A whole host whose bundle has network cards: a guest and the host over a TAP, with what the guest may not send;
//! and streams between guests that go on while the data plane dies and is replaced.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestNic, Machine};
use bulkhead_integration::host::nics::{NicSpec, switch};
use bulkhead_integration::host::{BundleSpec, Host, own_binaries, uid_of};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_tap};
use bulkhead_integration::transfer::Server;

use crate::Test;
use crate::pair::{MACS, PATIENCE, guest};
use crate::script;
use crate::support::{Outcome, ensure, folder, rounds};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "net_host_over_a_tap",
        run: over_a_tap,
    },
    Test {
        name: "net_host_streams_through_kills_and_upgrades",
        run: streams_survive,
    },
];

/// The TAP of these tests, in a namespace of its own.
const TAP: &str = "bh-tap0";

/// The guest and the host talk; then the guest says that it is somebody else.
fn over_a_tap() -> Outcome {
    let test = "net_host_over_a_tap";
    if !enter_namespace(test) || !has_taps(test) {
        return Ok(());
    }
    make_tap(TAP, uid_of("agent"));
    ip(&format!("addr add {}/24 dev {TAP}", script::SERVER));
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    let card = NicSpec {
        pairs: 2,
        ..NicSpec::on_tap("card", MACS[1], TAP)
    };
    serve(&mut host, &card.stanza())?;
    let at: SocketAddr = format!("{}:{}", script::SERVER, script::PORT).parse()?;
    let _server = Server::start(at)?;
    let nic = GuestNic {
        pairs: 2,
        ..GuestNic::new(host.socket("card"), MACS[1])
    };
    let mut guest = guest(
        &dir.path().join("guest"),
        nic,
        &script::to_the_host(),
        Machine::default(),
    )?;
    let console = guest.finish(PATIENCE).map_err(|e| told(&e, &host))?;
    let value = |name: &str| guest.value(name);
    ensure(value("spoofed").as_deref() == Some("lost"), || {
        format!("packets with another address got through:\n{console}")
    })?;
    let dropped = host.tx_drops("card", "spoofed_mac")?;
    ensure(dropped >= 1, || {
        format!("nothing is counted: {:?}", host.nic("card"))
    })
}

/// Two streams between two guests go on through kills and upgrades of the data plane.
fn streams_survive() -> Outcome {
    let dir = folder()?;
    let mut host = Host::create_with(dir.path(), &own_binaries(dir.path())?)?;
    let mut network = switch("lan", None);
    for (name, mac) in ["server", "client"].into_iter().zip(MACS) {
        network.push_str(&NicSpec::on_switch(name, mac, "lan").stanza());
    }
    serve(&mut host, &network)?;
    let card = |index: usize, name: &str| GuestNic {
        packed: index == 1,
        ..GuestNic::new(host.socket(name), MACS[index])
    };
    let mut server = guest(
        &dir.path().join("s"),
        card(0, "server"),
        &script::server(),
        Machine::default(),
    )?;
    server.wait_for("server=ready", BOOT_PATIENCE)?;
    let mut client = guest(
        &dir.path().join("c"),
        card(1, "client"),
        &script::streams(),
        Machine::default(),
    )?;
    client.wait_for("received=", BOOT_PATIENCE)?;
    for number in 1..=rounds(2, 20) {
        go_on(&client, &host)?;
        host.kill("dataplane")?;
        go_on(&client, &host)?;
        host.upgrade("dataplane", u64::from(number))?;
    }
    go_on(&client, &host)?;
    ensure(!client.console().contains("guest-net-failed="), || {
        client.console()
    })
}

/// Both streams carry some more, each byte of which is compared.
fn go_on(client: &Guest, host: &Host) -> Outcome {
    const MORE: u64 = 1 << 20;
    let bytes = |name: &str| -> u64 {
        let value = client.value(name);
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let deadline = Instant::now() + PATIENCE;
    for name in ["sent", "received"] {
        let before = bytes(name);
        while bytes(name) < before + MORE {
            if client.console().contains("guest-net-failed=") || Instant::now() > deadline {
                let console = client.console();
                return Err(format!("{name} does not go on:\n{console}\n{}", host.log()).into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Starts the host with this network.
pub fn serve(host: &mut Host, network: &str) -> Outcome {
    let envelope = host.sign(&BundleSpec {
        more: network,
        host: host.name(),
        ..BundleSpec::new(1, &[])
    })?;
    host.start()?;
    host.apply(&envelope)?;
    Ok(())
}

fn told(error: &impl std::fmt::Display, host: &Host) -> String {
    format!("{error}\n--- host:\n{}", host.log())
}
