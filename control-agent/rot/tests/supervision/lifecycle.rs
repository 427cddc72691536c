//! The ends: a signal, a second one, a child that won't stop, a killed rot.

use std::time::{Duration, Instant};

use bulkhead_protocol::rot::{FromRot, Role};
use nix::sys::signal::Signal;

use crate::host::{Host, PATIENCE, Puppet};
use crate::puppet::Order;
use crate::{Case, case};

pub const CASES: &[Case] = &[
    case("sigterm_stops_all_and_removes_the_sockets", sigterm),
    case("sigint_stops_while_a_child_waits_for_its_restart", sigint),
    case("a_child_that_does_not_stop_is_killed_after_5_s", stubborn),
    case("a_second_signal_does_not_wait", second_signal),
    case("sigkill_of_rot_ends_every_child", sigkill),
    case(
        "a_child_that_opens_the_network_dies_and_is_restarted",
        network,
    ),
];

fn sigterm() {
    let mut host = Host::new();
    let puppets = host.start_up();
    host.signal(Signal::SIGTERM);
    for puppet in &puppets {
        assert_eq!(puppet.next().0, FromRot::Stop);
        assert!(puppet.ends_within(PATIENCE));
    }
    assert!(host.ended().success());
    assert!(!host.path("run/admin.sock").exists());
    assert_eq!(host.logged("ended: exit status 0"), 3);
    assert_eq!(host.logged("started"), 3, "nothing is restarted");
}

fn sigint() {
    let mut host = Host::new();
    host.start();
    for _ in 0..5 {
        host.puppet(Role::Keyd).order(Order::Exit(1));
    }
    host.wait_for_log("next start in 800ms");
    host.signal(Signal::SIGINT);
    assert!(host.ended().success());
    assert_eq!(host.logged("started role=keyd"), 5);
}

fn stubborn() {
    let mut host = Host::new();
    let [keyd, dataplane, _agent] = host.start_up();
    dataplane.order(Order::IgnoreStop);
    let begin = Instant::now();
    host.signal(Signal::SIGTERM);
    assert!(keyd.ends_within(PATIENCE));
    assert!(host.ended().success());
    assert!(begin.elapsed() >= Duration::from_secs(5));
    assert!(dataplane.ends_within(Duration::ZERO));
    assert_eq!(host.logged("killing it: it did not stop in time"), 1);
    assert_eq!(host.logged("ended: killed by SIGKILL"), 1);
}

fn second_signal() {
    let mut host = Host::new();
    let [keyd, _dataplane, _agent] = host.start_up();
    keyd.order(Order::IgnoreStop);
    let begin = Instant::now();
    host.signal(Signal::SIGTERM);
    assert_eq!(keyd.next().0, FromRot::Stop);
    host.signal(Signal::SIGTERM);
    assert!(host.ended().success());
    assert!(begin.elapsed() < Duration::from_secs(4));
    assert_eq!(host.logged("not waiting any longer"), 1);
}

fn sigkill() {
    let mut host = Host::new();
    let puppets = host.start_up();
    // They don't see the channel close: the kernel ends them, not they themselves.
    puppets.iter().for_each(Puppet::stop_reading);
    host.signal(Signal::SIGKILL);
    host.ended();
    for puppet in &puppets {
        assert!(puppet.ends_within(PATIENCE), "{} lives on", puppet.role);
    }
}

fn network() {
    let mut host = Host::new();
    let [keyd, _dataplane, _agent] = host.start_up();
    keyd.order(Order::MakeInternetSocket);
    host.wait_for_log("ended: killed by SIGSYS");
    host.puppet(Role::Keyd);
}
