//! What rot makes, refuses and takes from itself before it starts anything.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use bulkhead_protocol::rot::{FromRot, Role, ToRot};
use nix::sys::signal::Signal;

use crate::host::{Host, PATIENCE, Puppet, end_of};
use crate::puppet::Order;
use crate::{Case, case, root_case};

pub const CASES: &[Case] = &[
    case("command_lines_are_those_agreed", command_lines),
    case(
        "directories_and_admin_socket_have_owner_and_mode",
        directories,
    ),
    root_case("each_child_has_its_own_user", users),
    case("refused_second_instance", second_instance),
    case(
        "refused_run_directory_that_is_a_symbolic_link",
        linked_run_dir,
    ),
    case("refused_binary_with_a_dynamic_loader", dynamic_binary),
    case("refused_file_in_the_way_of_the_admin_socket", in_the_way),
    case("rot_is_locked_in", locked_in),
    root_case("without_root_it_works_with_one_warning", without_root),
    root_case("refused_another_user_without_root", other_user_without_root),
];

const SEPARATION: &str = "only their sandboxes keep them apart";

/// Runs rot, which must refuse; gives what it logged.
#[track_caller]
fn refused(host: &mut Host) -> String {
    host.start();
    let status = host.ended();
    assert_eq!(status.code(), Some(1), "{}", host.log());
    host.log()
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("there").mode() & 0o7777
}

fn command_lines() {
    let mut host = Host::new();
    let more = "--workers 2 --cpus 0-1 --volume-dir /v --keyd-trust /k.toml";
    host.more = more.split(' ').map(str::to_owned).collect();
    let [keyd, dataplane, agent] = host.start_up();
    let path = |name: &str| host.path(name).to_string_lossy().into_owned();
    let line = format!(
        "bulkhead-keyd --host h --state-dir {} --trust /k.toml",
        path("state/keyd")
    );
    assert_eq!(keyd.started.arguments.join(" "), line);
    let line = format!(
        "bulkhead-agent --host h --state-dir {} --trust {} --vhost-dir {} --volume-dir {} --volume-dir /v",
        path("state/agent"),
        path("trust.toml"),
        path("run/vhost"),
        path("volumes"),
    );
    assert_eq!(agent.started.arguments.join(" "), line);
    let line = "bulkhead-dataplane --workers 2 --cpus 0-1";
    assert_eq!(dataplane.started.arguments.join(" "), line);
    let mut environment = agent.started.environment.clone();
    environment.sort();
    let expected = ["BULKHEAD_LOG=info", "BULKHEAD_ROT=1", "FDSTORE=256"];
    assert_eq!(environment, expected);
}

fn directories() {
    let mut host = Host::new();
    host.start_up();
    for (name, expected) in [
        ("run", 0o755),
        ("run/vhost", 0o755),
        ("run/admin.sock", 0o600),
        ("state", 0o755),
        ("state/keyd", 0o700),
        ("state/agent", 0o700),
    ] {
        let own = nix::unistd::getuid().as_raw();
        let path = host.path(name);
        assert_eq!(mode(&path), expected, "{name}");
        assert_eq!(
            std::fs::metadata(&path).expect("there").uid(),
            own,
            "{name}"
        );
    }
}

/// The data plane can lock guest memory: the limit is lifted, or it kept the one capability. No
/// child of its own user has any other.
#[track_caller]
fn assert_memory_lock(puppet: &Puppet) {
    let proc = |file: &str| {
        let path = format!("/proc/{}/{file}", puppet.started.pid);
        std::fs::read_to_string(path).expect("proc")
    };
    let limits = proc("limits");
    let line = limits.lines().find(|l| l.starts_with("Max locked memory"));
    let unlimited = line.expect("there").matches("unlimited").count() == 2;
    let kept = puppet.role == Role::Dataplane && !unlimited;
    let expected = if kept { 1u64 << 14 } else { 0 };
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        let held = field(&proc("status"), set);
        let held = u64::from_str_radix(&held, 16).expect("hex");
        assert_eq!(held, expected, "{} {set}", puppet.role);
    }
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.expect("there").trim().to_owned()
}

fn users() {
    let mut host = Host::new();
    let more = "--keyd-uid 64001 --agent-uid 64002 --dataplane-uid 64003 --admin-uid 64004";
    host.more = more.split(' ').map(str::to_owned).collect();
    let puppets = host.start_up();
    for puppet in &puppets {
        let id = match puppet.role {
            Role::Keyd => 64001,
            Role::Agent => 64002,
            Role::Dataplane => 64003,
        };
        assert_eq!(puppet.started.ids, [id, id], "{}", puppet.role);
        assert_eq!(puppet.started.groups, 0, "{}", puppet.role);
        assert_eq!(puppet.started.descriptors, ["0", "1", "2", "3", "4"]);
        assert_memory_lock(puppet);
    }
    let uid = |name: &str| std::fs::metadata(host.path(name)).expect("there").uid();
    assert_eq!((uid("state/keyd"), uid("state/agent")), (64001, 64002));
    assert_eq!((uid("run/admin.sock"), uid("run/vhost")), (64004, 0));
    assert_eq!(host.logged(SEPARATION), 0);
    // With the few capabilities that it kept it can still end a child of another user, which
    // still ends with it.
    puppets[0].order(Order::CloseChannel);
    assert!(puppets[0].ends_within(PATIENCE));
    let again = host.puppet(puppets[0].role);
    let alive = || puppets[1..].iter().chain([&again]);
    alive().for_each(Puppet::stop_reading);
    host.signal(Signal::SIGKILL);
    host.ended();
    for puppet in alive() {
        assert!(puppet.ends_within(PATIENCE), "{} lives on", puppet.role);
    }
}

fn second_instance() {
    let mut host = Host::new();
    let [_keyd, _dataplane, agent] = host.start_up();
    let log = host.path("second");
    let status = end_of(host.command(&log).spawn().expect("runs"));
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(log).expect("log");
    assert!(log.contains("another bulkhead-rot runs in"), "{log}");
    // The first is as it was, its sockets too.
    assert!(host.path("run/admin.sock").exists());
    let name = "vm".parse().expect("name");
    agent.say(ToRot::Unbind {
        request_id: 1,
        name,
    });
    assert_eq!(agent.next().0, FromRot::Unbound { request_id: 1 });
}

fn linked_run_dir() {
    let mut host = Host::new();
    std::fs::create_dir(host.path("elsewhere")).expect("mkdir");
    symlink(host.path("elsewhere"), host.path("run")).expect("symlink");
    let log = refused(&mut host);
    assert!(log.contains("symbolic link"), "{log}");
    let left = std::fs::read_dir(host.path("elsewhere")).expect("there");
    assert_eq!(left.count(), 0);
}

fn dynamic_binary() {
    let mut host = Host::new();
    std::fs::remove_file(host.path("bin/bulkhead-agent")).expect("remove");
    std::fs::copy("/bin/sh", host.path("bin/bulkhead-agent")).expect("copy");
    let log = refused(&mut host);
    assert!(log.contains("PT_INTERP"), "{log}");
    assert!(!log.contains("started"), "{log}");
}

fn in_the_way() {
    let mut host = Host::new();
    std::fs::create_dir(host.path("run")).expect("mkdir");
    std::fs::write(host.path("run/admin.sock"), "kept").expect("write");
    let log = refused(&mut host);
    assert!(log.contains("no socket"), "{log}");
    let kept = std::fs::read(host.path("run/admin.sock")).expect("read");
    assert_eq!(kept, b"kept");
}

fn locked_in() {
    let mut host = Host::new();
    host.start_up();
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.pid())).expect("proc");
    let field = |name: &str| field(&status, name);
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("Threads:"), "1");
    // CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID, SETPCAP, IPC_LOCK.
    let kept = 0b0100_0001_1110_1011_u64;
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        let held = u64::from_str_radix(&field(set), 16).expect("hex");
        if set != "CapBnd:" || nix::unistd::geteuid().is_root() {
            assert_eq!(held & !kept, 0, "{set} {held:x}");
        }
    }
}

/// A folder that belongs to the user rot will run as.
fn host_of(user: u32) -> Host {
    let mut host = Host::new();
    std::os::unix::fs::chown(host.path("."), Some(user), Some(user)).expect("chown");
    // What was built may lie where that user can't go.
    for role in Role::ALL {
        let file = host.path(&format!("bin/bulkhead-{role}"));
        std::fs::remove_file(&file).expect("remove");
        std::fs::copy(std::env::current_exe().expect("own path"), &file).expect("copy");
    }
    std::fs::copy(env!("CARGO_BIN_EXE_bulkhead-rot"), host.path("bin/rot")).expect("copy");
    host.user = Some(user);
    host
}

fn without_root() {
    let mut host = host_of(64020);
    let [_keyd, dataplane, agent] = host.start_up();
    assert_eq!(agent.started.ids, [64020, 64020]);
    agent.say(ToRot::Bind {
        request_id: 1,
        name: "vm".parse().expect("name"),
        uid: 64020,
        gid: 64020,
        mode: 0o600,
    });
    assert_eq!(agent.next().0, FromRot::Bound { request_id: 1 });
    assert!(matches!(dataplane.next().0, FromRot::Listener { .. }));
    // A socket for somebody else is beyond it, and nothing is left of the attempt.
    agent.say(ToRot::Bind {
        request_id: 2,
        name: "theirs".parse().expect("name"),
        uid: 64021,
        gid: 64021,
        mode: 0o600,
    });
    assert!(matches!(
        agent.next().0,
        FromRot::Failed { request_id: 2, .. }
    ));
    let left = std::fs::read_dir(host.path("run/vhost")).expect("folder");
    assert_eq!(left.count(), 1);
    // Not dumpable: what /proc shows of its memory is root's, not its own user's.
    let memory = std::fs::metadata(format!("/proc/{}/mem", host.pid())).expect("proc");
    assert_eq!(memory.uid(), 0);
    assert_eq!(host.logged(SEPARATION), 1);
    assert_eq!(host.logged(" WARN rot and its children"), 1);
}

fn other_user_without_root() {
    let mut host = host_of(64020);
    host.more = vec!["--keyd-uid".to_owned(), "64001".to_owned()];
    let log = refused(&mut host);
    assert!(log.contains("--keyd-uid needs root"), "{log}");
    assert!(!host.path("run").exists());
}
