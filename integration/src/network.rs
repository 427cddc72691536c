//! Network interfaces for tests: each test has a network namespace of its own, which goes with its thread.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread an empty network namespace, which every process that it starts and every socket that it
/// makes is in. False, after a line that says so, where that isn't allowed.
#[must_use]
pub fn enter_namespace(test: &str) -> bool {
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => {
            ip("link set dev lo up");
            true
        }
        Err(error) => {
            println!("skipped: {test}: no network namespace can be made here ({error})");
            false
        }
    }
}

/// Runs `ip` with these words and gives what it says.
///
/// # Panics
/// It is not there, or fails.
pub fn ip(words: &str) -> String {
    let output = Command::new("ip")
        .args(words.split_whitespace())
        .output()
        .expect("ip, of Debian's iproute2");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Makes a TAP, up, as an operator makes one for the agent: with many queues, virtio headers, and the user who may
/// open it.
///
/// # Panics
/// See [`ip`].
pub fn make_tap(name: &str, user: u32) {
    ip(&format!(
        "tuntap add dev {name} mode tap multi_queue vnet_hdr user {user}"
    ));
    ip(&format!("link set dev {name} up"));
}

/// Whether there can be TAPs here; says so where not.
#[must_use]
pub fn has_taps(test: &str) -> bool {
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    if let Err(error) = &opened {
        println!("skipped: {test}: /dev/net/tun can't be opened ({error})");
    }
    opened.is_ok()
}

/// Makes a pair of interfaces, up: `near`, whose frames go past the host's stack, and `far`, which is the host's, completes
/// every checksum itself and has this address and prefix.
///
/// # Panics
/// See [`ip`]; also without ethtool.
pub fn make_pair(near: &str, far: &str, mac: &str, address: &str) {
    ip(&format!("link add {near} type veth peer name {far}"));
    let output = Command::new("ethtool")
        .args(["-K", far, "tx", "off", "txvlan", "off"])
        .output()
        .expect("ethtool");
    assert!(output.status.success(), "{output:?}");
    ip(&format!("link set dev {far} address {mac}"));
    ip(&format!("addr add {address} dev {far}"));
    ip(&format!("link set dev {near} up"));
    ip(&format!("link set dev {far} up"));
}
