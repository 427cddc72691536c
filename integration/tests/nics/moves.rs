//! A guest moves from one host to another. Both are on one bridge, which sends what is for the guest to where the
//! guest last sent from: so it has to be told, though the guest says nothing.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_integration::guest::qmp::Qmp;
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestNic, Machine};
use bulkhead_integration::host::nics::{NicSpec, switch};
use bulkhead_integration::host::{Host, uid_of};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_tap};
use bulkhead_integration::transfer::{Wish, carry, connect};

use crate::Test;
use crate::host::serve;
use crate::pair::{MACS, PATIENCE, guest};
use crate::script;
use crate::support::{Outcome, ensure, folder};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "net_host_migration_is_announced",
    run: migrates,
}];

const BRIDGE: &str = "bh-bridge";
/// Each host's way out of its switch.
const TAPS: [&str; 2] = ["bh-a", "bh-b"];

fn migrates() -> Outcome {
    let test = "net_host_migration_is_announced";
    if !enter_namespace(test) || !has_taps(test) {
        return Ok(());
    }
    bridge();
    let dir = folder()?;
    let mut source = Host::create(&dir.path().join("a"))?;
    let mut target = source.beside("host-2", &dir.path().join("b"))?;
    for (host, tap) in [&mut source, &mut target].into_iter().zip(TAPS) {
        let card = NicSpec::on_switch("card", MACS[1], "lan").stanza();
        serve(host, &format!("{}{card}", switch("lan", Some(tap))))?;
    }
    let (mut here, mut qmp) = start(&source, None)?;
    here.wait_for("silent=1", BOOT_PATIENCE)?;
    ensure(reaches_guest(Duration::from_secs(60))?, || {
        format!("the guest is not there:\n{}", here.console())
    })?;
    // A connection from before, that is used after.
    let to: SocketAddr = format!("{}:{}", script::CLIENT, script::PORT).parse()?;
    let connection = connect(to)?;
    let incoming = target.path("incoming.sock");
    let (there, _target_qmp) = start(&target, Some(&incoming))?;
    qmp.migrate(&incoming)?;
    qmp.wait_for_migration("completed", PATIENCE)?;
    // The bridge forgets where the guest was after five minutes, and would then ask everywhere.
    ensure(reaches_guest(Duration::from_secs(60))?, || {
        let (console, log) = (there.console(), target.log());
        let cards = [&source, &target].map(|host| host.nic("card"));
        format!(
            "nothing tells the bridge where the guest is now: {cards:?}\n{console}\n--- host:\n{log}"
        )
    })?;
    let both = [true, false].map(|to_server| Wish {
        to_server,
        seed: 5,
        bytes: 1 << 20,
    });
    carry(&connection, both[0], |_| ())?;
    carry(&connect(to)?, both[1], |_| ())?;
    Ok(())
}

/// Both TAPs on a bridge, on which the host has its address. It knows the guest's: it need not ask.
fn bridge() {
    ip(&format!("link add {BRIDGE} type bridge"));
    ip(&format!("addr add {}/24 dev {BRIDGE}", script::SERVER));
    ip(&format!("link set dev {BRIDGE} up"));
    for tap in TAPS {
        make_tap(tap, uid_of("agent"));
        ip(&format!("link set dev {tap} master {BRIDGE}"));
    }
    let (guest, mac) = (script::CLIENT, MACS[1]);
    ip(&format!(
        "neigh add {guest} lladdr {mac} dev {BRIDGE} nud permanent"
    ));
}

fn start(host: &Host, incoming: Option<&Path>) -> Result<(Guest, Qmp), Box<dyn std::error::Error>> {
    let socket = host.path("qmp.sock");
    let machine = Machine {
        qmp: Some(socket.clone()),
        incoming: incoming.map(Path::to_owned),
        ..Machine::default()
    };
    let nic = GuestNic::new(host.socket("card"), MACS[1]);
    let guest = guest(&host.path("guest"), nic, &script::silent(), machine)?;
    let qmp = Qmp::connect(&socket).map_err(|e| format!("{e}\n{}", guest.console()))?;
    Ok((guest, qmp))
}

/// Whether the guest answers within this time.
fn reaches_guest(patience: Duration) -> std::io::Result<bool> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let ping = ["ping", "-c", "1", "-W", "1", script::CLIENT];
        if Command::new("busybox")
            .args(ping)
            .output()?
            .status
            .success()
        {
            return Ok(true);
        }
    }
    Ok(false)
}
