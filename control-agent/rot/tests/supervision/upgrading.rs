//! Upgrades: what keyd approved runs, whatever fails is undone, and nothing that was stored is lost.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;

use bulkhead_protocol::release::{Component, ProgramStatus, Release};
use bulkhead_protocol::rot::{FromRot, Measurement, Role, ToRot};
use nix::sys::signal::Signal;

use crate::host::{Host, PATIENCE, Puppet, readable, wait_until};
use crate::puppet::{Order, Report, numbered_file};
use crate::storing::{names, numbers};
use crate::{Case, case};

pub const CASES: &[Case] = &[
    case("the_data_plane_is_upgraded_while_it_serves", live),
    case("upgrades_in_a_row", in_a_row),
    case("a_candidate_that_ends_is_none", candidate_ends),
    case(
        "a_candidate_that_breaks_the_order_is_killed",
        candidate_breaks,
    ),
    case("a_data_plane_that_can_not_freeze_goes_on", cannot_freeze),
    case(
        "a_data_plane_that_does_not_freeze_in_time_goes_on",
        slow_to_freeze,
    ),
    case(
        "a_data_plane_that_ends_meanwhile_is_followed_as_always",
        old_ends,
    ),
    case(
        "a_candidate_that_ends_once_it_took_over_is_followed_by_the_old_binary",
        new_ends,
    ),
    case("refused_what_keyd_did_not_approve", refused),
    case("keyd_and_agent_are_upgraded_by_a_restart", restarted),
    case(
        "a_new_keyd_that_does_not_come_up_is_followed_by_the_old_binary",
        restart_fails,
    ),
    case("rot_stops_in_the_middle_of_an_upgrade", stopped),
];

/// A host that is up, and an upgrade to do on it.
struct World {
    host: Host,
    keyd: Puppet,
    dataplane: Puppet,
    agent: Puppet,
    /// What its binaries measured at the start.
    before: Measurement,
}

/// The next message that is not about a peer.
#[track_caller]
pub fn next(puppet: &Puppet) -> FromRot {
    loop {
        match puppet.next().0 {
            FromRot::Peer { .. } => {}
            other => return other,
        }
    }
}

impl World {
    fn new() -> Self {
        let mut host = Host::new();
        let [keyd, dataplane, agent] = host.start_up();
        let mut world = Self {
            before: [0; 48].into(),
            host,
            keyd,
            dataplane,
            agent,
        };
        world.before = world.measured("bulkhead-dataplane");
        world
    }

    /// What a binary measures, as it lies on the disk.
    fn measured(&self, name: &str) -> Measurement {
        use sha2::Digest;
        let bytes = fs::read(self.host.path("bin").join(name)).expect("binary");
        let digest: [u8; 48] = sha2::Sha384::digest(bytes).into();
        digest.into()
    }

    /// Puts another binary in the place of a role's: the same with something behind its end.
    fn install(&self, role: Role) -> Measurement {
        let name = format!("bulkhead-{role}");
        let path = self.host.path("bin").join(&name);
        let own = std::env::current_exe().expect("own path");
        let aside = self.host.path("bin").join("aside");
        fs::copy(own, &aside).expect("copy");
        let file = fs::File::options().append(true).open(&aside);
        file.expect("open").write_all(b"another").expect("write");
        fs::rename(aside, path).expect("rename");
        self.measured(&name)
    }

    fn approve(&self, role: Role, version: u64, measurement: Measurement) {
        let component = Component::from(role);
        let release = Release {
            component,
            version,
            measurement,
        };
        self.keyd.say(ToRot::Approve { release });
        // It has said it when this is answered.
        self.keyd.obeys(Order::Barrier);
    }

    fn ask(&self, role: Role, request_id: u64) {
        let component = Component::from(role);
        self.agent.say(ToRot::Upgrade {
            request_id,
            component,
        });
    }

    /// Begins an upgrade of the data plane; gives the candidate.
    fn begin(&mut self, request_id: u64) -> Puppet {
        let new = self.install(Role::Dataplane);
        self.approve(Role::Dataplane, request_id, new);
        self.ask(Role::Dataplane, request_id);
        assert_eq!(next(&self.agent), FromRot::Upgrading { request_id });
        let candidate = self.host.puppet(Role::Dataplane);
        let environment = &candidate.started.environment;
        assert!(environment.contains(&"BULKHEAD_CANDIDATE=1".to_owned()));
        candidate
    }

    #[track_caller]
    fn fails(&self, request_id: u64, why: &str) {
        match next(&self.agent) {
            FromRot::Failed {
                request_id: r,
                reason,
            } => {
                assert_eq!(r, request_id);
                assert!(reason.contains(why), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }

    /// The data plane goes on as if nothing had been, and can be upgraded after all.
    fn goes_on(mut self) {
        let file = numbered_file(9);
        self.dataplane.push("later", &[file.as_fd()]);
        self.dataplane.obeys(Order::Barrier);
        let candidate = self.begin(99);
        let taken = candidate.taken();
        assert_eq!(taken.last().expect("stored").0, "later");
        candidate.say(ToRot::Ready);
        let attempt = told_to_freeze(&self.dataplane);
        self.dataplane.say(ToRot::Frozen { attempt });
        assert_eq!(next(&candidate), FromRot::Go);
        candidate.say(ToRot::Hello);
        assert_eq!(next(&self.agent), FromRot::Upgraded { request_id: 99 });
        assert_eq!(self.host.logged("started role=dataplane"), 1, "no restart");
    }
}

/// The number of the attempt to freeze that it hears of.
#[track_caller]
fn told_to_freeze(puppet: &Puppet) -> Option<u64> {
    match next(puppet) {
        FromRot::Freeze { attempt } => {
            assert!(attempt.is_some());
            attempt
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn followed(puppet: &Puppet) -> Vec<String> {
    puppet.order(Order::ReportFollowed);
    match puppet.report().0 {
        Report::Followed(followed) => followed,
        other => panic!("{other:?}"),
    }
}

/// Waits until rot has told the agent that this version runs.
#[track_caller]
pub fn runs(agent: &Puppet, component: Component, version: u64) -> ProgramStatus {
    let mut found = None;
    wait_until("that version runs", || {
        agent.order(Order::ReportPrograms);
        let (report, _) = agent.report();
        let Report::Programs(programs) = report else {
            panic!("{report:?}");
        };
        let is_it = |p: &ProgramStatus| p.component == component && p.version == Some(version);
        found = programs.into_iter().find(is_it);
        found.is_some()
    });
    found.expect("found")
}

fn live() {
    let mut world = World::new();
    let files = [0, 1, 2, 3].map(numbered_file);
    let old = &world.dataplane;
    old.push("a", &[files[0].as_fd()]);
    old.push("b", &[files[1].as_fd()]);
    old.obeys(Order::Barrier);
    let new = world.begin(7);
    let old = &world.dataplane;
    assert_eq!(names(&new.taken()), ["a", "b"]);
    old.push("c", &[files[2].as_fd(), files[2].as_fd()]);
    old.obeys(Order::Remove("a".to_owned()));
    old.obeys(Order::Barrier);
    assert_eq!(followed(&new), ["+c", "+c", "-a"]);
    assert!(!readable(old.control(), std::time::Duration::ZERO));

    new.say(ToRot::Ready);
    let attempt = told_to_freeze(old);
    old.push("d", &[files[3].as_fd()]);
    old.say(ToRot::Frozen { attempt });
    assert_eq!(next(&new), FromRot::Go);
    assert_eq!(followed(&new), ["+d"]);
    // Nobody hears of it before its Hello, and until then the old one is there.
    assert!(!old.ends_within(std::time::Duration::from_millis(50)));
    new.say(ToRot::Hello);
    assert!(old.ends_within(PATIENCE));
    let (peer, ..) = world.keyd.expect_peer(Role::Dataplane, 2);
    world.agent.expect_peer(Role::Dataplane, 2);
    new.expect_peer(Role::Keyd, 1);
    let measurement = world.measured("bulkhead-dataplane");
    assert!(matches!(peer, FromRot::Peer { measurement: m, .. } if m == measurement));
    assert_ne!(measurement, world.before);
    assert_eq!(next(&world.agent), FromRot::Upgraded { request_id: 7 });
    let component = Component::Dataplane;
    let program = runs(&world.agent, component, 7);
    assert_eq!((program.measurement, program.failed), (measurement, None));
    let release = Release {
        component,
        version: 7,
        measurement,
    };
    assert_eq!(next(&world.keyd), FromRot::Runs { release });
    // From now on it is the data plane.
    new.push("e", &[files[0].as_fd()]);
    new.kill();
    let after = world.host.puppet(Role::Dataplane);
    let environment = &after.started.environment;
    assert!(
        !environment
            .iter()
            .any(|e| e.starts_with("BULKHEAD_CANDIDATE"))
    );
    let taken = after.taken();
    assert_eq!(names(&taken), ["b", "c", "c", "d", "e"]);
    assert_eq!(numbers(&taken), [1, 2, 2, 3, 0]);
    after.say(ToRot::Hello);
    let (peer, ..) = world.keyd.expect_peer(Role::Dataplane, 3);
    assert!(matches!(peer, FromRot::Peer { measurement: m, .. } if m == measurement));
    // A keyd that is started anew hears it as well.
    world.keyd.kill();
    let keyd = world.host.puppet(Role::Keyd);
    keyd.say(ToRot::Hello);
    assert_eq!(next(&keyd), FromRot::Runs { release });
}

fn in_a_row() {
    let mut world = World::new();
    for request_id in 1..=8 {
        let candidate = world.begin(request_id);
        candidate.say(ToRot::Ready);
        let attempt = told_to_freeze(&world.dataplane);
        world.dataplane.say(ToRot::Frozen { attempt });
        assert_eq!(next(&candidate), FromRot::Go);
        candidate.say(ToRot::Hello);
        assert_eq!(next(&world.agent), FromRot::Upgraded { request_id });
        world.dataplane = candidate;
    }
}

fn candidate_ends() {
    let mut world = World::new();
    world.begin(1).order(Order::Exit(3));
    world.fails(1, "exit status 3");
    let candidate = world.begin(2);
    candidate.say(ToRot::Ready);
    let attempt = told_to_freeze(&world.dataplane);
    candidate.kill();
    world.fails(2, "killed by SIGKILL");
    assert_eq!(next(&world.dataplane), FromRot::Thaw);
    // It may have frozen just then.
    world.dataplane.say(ToRot::Frozen { attempt });
    world.host.wait_for_log("it froze, and nobody wanted that");
    world.goes_on();
}

fn candidate_breaks() {
    let mut world = World::new();
    let orders = [
        Order::Say(ToRot::Hello),
        Order::Say(ToRot::Frozen { attempt: None }),
        Order::StoreBytes(b"FDSTORE=1\nFDNAME=x\nFDPOLL=0".to_vec(), 1),
    ];
    for (request_id, order) in (1..).zip(orders) {
        let candidate = world.begin(request_id);
        candidate.order(order);
        let ended = candidate.ends_within(PATIENCE);
        assert!(ended, "{request_id}");
        world.fails(request_id, "the new one");
    }
    let candidate = world.begin(4);
    candidate.say(ToRot::Ready);
    told_to_freeze(&world.dataplane);
    candidate.say(ToRot::Ready);
    assert_eq!(next(&world.dataplane), FromRot::Thaw);
    world.fails(4, "order");
    world.goes_on();
}

fn cannot_freeze() {
    let mut world = World::new();
    let candidate = world.begin(1);
    candidate.say(ToRot::Ready);
    let attempt = told_to_freeze(&world.dataplane);
    let reason = "a request does not end".to_owned();
    world.dataplane.say(ToRot::CantFreeze { reason, attempt });
    world.fails(1, "a request does not end");
    assert!(candidate.ends_within(PATIENCE));
    assert_eq!(next(&world.dataplane), FromRot::Thaw);
    world.goes_on();
}

fn slow_to_freeze() {
    let mut world = World::new();
    let candidate = world.begin(1);
    candidate.say(ToRot::Ready);
    let late = told_to_freeze(&world.dataplane);
    world.fails(1, "did not freeze in time");
    assert!(candidate.ends_within(PATIENCE));
    assert_eq!(next(&world.dataplane), FromRot::Thaw);
    // What it says of that attempt later, it does not say of the next one.
    let candidate = world.begin(2);
    candidate.say(ToRot::Ready);
    let attempt = told_to_freeze(&world.dataplane);
    assert_ne!(attempt, late);
    world.dataplane.say(ToRot::Frozen { attempt: late });
    world.host.wait_for_log("it froze, and nobody wanted that");
    let reason = "too late".to_owned();
    let attempt = late;
    world.dataplane.say(ToRot::CantFreeze { reason, attempt });
    world.fails(2, "did not freeze in time");
    assert!(candidate.ends_within(PATIENCE));
    assert_eq!(next(&world.dataplane), FromRot::Thaw);
    world.goes_on();
}

fn old_ends() {
    let mut world = World::new();
    let file = numbered_file(1);
    world.dataplane.push("a", &[file.as_fd()]);
    for (request_id, freezes) in [(1, false), (2, true)] {
        let candidate = world.begin(request_id);
        if freezes {
            candidate.say(ToRot::Ready);
            told_to_freeze(&world.dataplane);
        }
        world.dataplane.kill();
        world.fails(request_id, "ended meanwhile");
        assert!(candidate.ends_within(PATIENCE));
        world.dataplane = world.host.puppet(Role::Dataplane);
        assert_eq!(names(&world.dataplane.taken()), ["a"]);
        world.dataplane.say(ToRot::Hello);
        let (peer, ..) = world.keyd.expect_peer(Role::Dataplane, request_id + 1);
        assert!(matches!(peer, FromRot::Peer { measurement, .. } if measurement == world.before));
    }
}

fn new_ends() {
    let mut world = World::new();
    let file = numbered_file(1);
    world.dataplane.push("a", &[file.as_fd()]);
    world.dataplane.obeys(Order::Barrier);
    let new = world.begin(1);
    new.say(ToRot::Ready);
    let attempt = told_to_freeze(&world.dataplane);
    world.dataplane.say(ToRot::Frozen { attempt });
    assert_eq!(next(&new), FromRot::Go);
    new.push("b", &[file.as_fd()]);
    new.kill();
    world.fails(1, "killed by SIGKILL");
    assert!(world.dataplane.ends_within(PATIENCE));
    let after = world.host.puppet(Role::Dataplane);
    assert_eq!(names(&after.taken()), ["a", "b"]);
    after.say(ToRot::Hello);
    let (peer, ..) = world.keyd.expect_peer(Role::Dataplane, 3);
    assert!(matches!(peer, FromRot::Peer { measurement, .. } if measurement == world.before));
}

fn refused() {
    let mut world = World::new();
    world.ask(Role::Dataplane, 1);
    world.fails(1, "keyd approved no release of dataplane");
    // It is another that lies there.
    world.approve(Role::Dataplane, 1, [7; 48].into());
    world.ask(Role::Dataplane, 2);
    world.fails(2, "is not what was released");
    // What keyd said holds once.
    world.ask(Role::Dataplane, 3);
    world.fails(3, "keyd approved no release");
    // And nobody else says it.
    let release = Release {
        component: Component::Dataplane,
        version: 1,
        measurement: world.before,
    };
    world.agent.say(ToRot::Approve { release });
    world.ask(Role::Dataplane, 4);
    world.fails(4, "keyd approved no release");
    world.dataplane.say(ToRot::Upgrade {
        request_id: 5,
        component: Component::Dataplane,
    });
    assert!(matches!(next(&world.dataplane), FromRot::Failed { .. }));
    let _candidate = world.begin(6);
    world.approve(Role::Keyd, 1, world.before);
    world.ask(Role::Keyd, 7);
    world.fails(7, "an upgrade of dataplane is under way");
}

fn restarted() {
    let mut world = World::new();
    let file = numbered_file(1);
    world.keyd.push("k", &[file.as_fd()]);
    let new = world.install(Role::Keyd);
    world.approve(Role::Keyd, 3, new);
    world.ask(Role::Keyd, 1);
    assert_eq!(next(&world.agent), FromRot::Upgrading { request_id: 1 });
    assert_eq!(next(&world.keyd), FromRot::Stop);
    assert!(world.keyd.ends_within(PATIENCE));
    world.keyd = world.host.puppet(Role::Keyd);
    assert_eq!(names(&world.keyd.taken()), ["k"]);
    world.keyd.say(ToRot::Hello);
    let (peer, ..) = world.dataplane.expect_peer(Role::Keyd, 2);
    assert!(matches!(peer, FromRot::Peer { measurement, .. } if measurement == new));
    assert_eq!(next(&world.agent), FromRot::Upgraded { request_id: 1 });

    // The agent that comes up hears that it is what was asked for.
    let new = world.install(Role::Agent);
    world.approve(Role::Agent, 5, new);
    world.ask(Role::Agent, 2);
    assert_eq!(next(&world.agent), FromRot::Upgrading { request_id: 2 });
    assert_eq!(next(&world.agent), FromRot::Stop);
    let agent = world.host.puppet(Role::Agent);
    agent.say(ToRot::Hello);
    assert_eq!(runs(&agent, Component::Agent, 5).measurement, new);
    runs(&agent, Component::Keyd, 3);
    assert_eq!(world.host.logged("started role=dataplane"), 1);
}

fn restart_fails() {
    let mut world = World::new();
    let new = world.install(Role::Keyd);
    world.approve(Role::Keyd, 3, new);
    world.ask(Role::Keyd, 1);
    assert_eq!(next(&world.agent), FromRot::Upgrading { request_id: 1 });
    world.host.puppet(Role::Keyd).order(Order::Exit(1));
    world.fails(1, "exit status 1");
    let keyd = world.host.puppet(Role::Keyd);
    keyd.say(ToRot::Hello);
    let (peer, ..) = world.dataplane.expect_peer(Role::Keyd, 3);
    assert!(matches!(peer, FromRot::Peer { measurement, .. } if measurement == world.before));
}

fn stopped() {
    let mut world = World::new();
    let candidate = world.begin(1);
    candidate.order(Order::IgnoreStop);
    world.host.signal(Signal::SIGTERM);
    assert!(candidate.ends_within(PATIENCE));
    assert!(world.host.ended().success());
}
