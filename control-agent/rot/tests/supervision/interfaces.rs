//! Interfaces that rot prepares for AF_XDP: what the agent finds, what it may, and what nobody else may.

use bulkhead_integration::network::{enter_namespace, ip};
use bulkhead_interfaces::InterfaceName;
use bulkhead_interfaces::xdp::Prepared;
use bulkhead_protocol::rot::Role;

use crate::host::{Host, wait_until};
use crate::storing::names;
use crate::{Case, root_case};

pub const CASES: &[Case] = &[
    root_case("interfaces_are_prepared_for_every_agent_there_is", prepared),
    root_case(
        "an_interface_that_is_not_there_is_named_and_the_rest_serves",
        missing,
    ),
];

/// CAP_NET_RAW.
const NET_RAW: u64 = 1 << 13;

/// The capabilities that a process has under its own user.
fn capabilities_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("proc");
    let line = status.lines().find(|line| line.starts_with("CapEff:"));
    let digits = line.expect("there").split_whitespace().nth(1);
    u64::from_str_radix(digits.expect("a number"), 16).expect("hex")
}

fn has_program(interface: &str) -> bool {
    ip(&format!("link show dev {interface}")).contains("xdp")
}

fn prepared() {
    if !enter_namespace("interfaces_are_prepared_for_every_agent_there_is") {
        return;
    }
    ip("link add v0 type veth peer name v1");
    let mut host = Host::new();
    let more = "--keyd-uid 64001 --agent-uid 64002 --dataplane-uid 64003 --xdp v0";
    host.more = more.split(' ').map(str::to_owned).collect();
    let [keyd, dataplane, mut agent] = host.start_up();
    assert!(has_program("v0"));
    assert_eq!(capabilities_of(agent.started.pid), NET_RAW);
    for other in [&keyd, &dataplane] {
        assert_eq!(capabilities_of(other.started.pid) & NET_RAW, 0);
        assert!(names(&other.taken()).is_empty());
    }
    // A socket for a queue can be made with what is there, by one agent after the other.
    for _ in 0..2 {
        let taken = agent.taken();
        assert_eq!(names(&taken), ["+v0", "+v0"]);
        let mut fds = taken.into_iter().map(|(_, fd)| fd);
        let (map, link) = (fds.next().expect("two"), fds.next().expect("two"));
        let name: InterfaceName = "v0".parse().expect("a name");
        let prepared = Prepared::from_descriptors(name, map, link).expect("it is one");
        assert_eq!(prepared.socket(0).expect("a socket").queue, 0);
        agent.kill();
        agent = host.puppet(Role::Agent);
        agent.say(bulkhead_protocol::rot::ToRot::Hello);
    }
    drop(host);
    wait_until("the program goes with rot", || !has_program("v0"));
}

fn missing() {
    if !enter_namespace("an_interface_that_is_not_there_is_named_and_the_rest_serves") {
        return;
    }
    let mut host = Host::new();
    host.more = vec!["--xdp".to_owned(), "none".to_owned()];
    let [_, _, agent] = host.start_up();
    host.wait_for_log("--xdp none: there is no interface none");
    assert!(names(&agent.taken()).is_empty());
}
