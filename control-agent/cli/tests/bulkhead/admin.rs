//! `apply` and `status` over a real admin socket: what is sent, and what each answer becomes. The
//! answers come from this test, so that every one of them can be given; the real agent's are in
//! the whole-system tests.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::thread::{self, JoinHandle};

use bulkhead_protocol::admin::{AdminReply, AdminRequest, HostStatus, ProcessStatus, VolumeEntry};
use bulkhead_protocol::control::{
    Latency, RekeyProgress, RekeyState, StorageState, StorageStatus, VolumeStatus, WorkerLoad,
    WorkersStatus,
};
use bulkhead_protocol::keys::{HostKeys, Shred, ShredState};
use bulkhead_protocol::limits::{GroupGrant, Limits, Rate};
use bulkhead_protocol::release::{Component, ProgramStatus, Release};
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{Channel, VolumeId, envelope};
use minicbor::bytes::ByteArray;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket,
};

use crate::{Ended, Folder};

/// What the program sent: its request, and the envelope's bytes if there was one.
type Asked = (AdminRequest, Option<Vec<u8>>);

/// Listens in the folder and answers one request; without an answer it hangs up.
fn answer_once(folder: &Folder, reply: Option<AdminReply>) -> JoinHandle<Asked> {
    answer_after(folder, reply, |_| ())
}

/// As [`answer_once`]; before it answers, it looks at the asking process.
fn answer_after(
    folder: &Folder,
    reply: Option<AdminReply>,
    look: impl FnOnce(i32) + Send + 'static,
) -> JoinHandle<Asked> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .expect("socket");
    let address = UnixAddr::new(&folder.path("admin.sock")).expect("address");
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).expect("bind");
    listen(&fd, Backlog::new(1).expect("backlog")).expect("listen");
    // std's listener accepts whatever kind of Unix socket it holds.
    let listener = UnixListener::from(fd);
    thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accept");
        let asking = getsockopt(&stream, PeerCredentials).expect("credentials");
        let channel = Channel::from(OwnedFd::from(stream));
        let mut received = channel.receive::<AdminRequest>().expect("request");
        let bytes = match received.message {
            AdminRequest::Apply { .. } | AdminRequest::Upgrade => {
                let [fd] = received.take_fds().expect("an envelope");
                Some(envelope::read_capped(fd.as_fd()).expect("readable"))
            }
            AdminRequest::Status | AdminRequest::Nics { .. } => {
                let [] = received.take_fds().expect("no descriptor");
                None
            }
        };
        look(asking.pid());
        if let Some(reply) = reply {
            channel.send(&reply, &[]).expect("reply");
        }
        (received.message, bytes)
    })
}

fn ask(line: &str, reply: Option<AdminReply>) -> (Ended, Asked) {
    let folder = Folder::new();
    folder.write("b.cose", "an envelope");
    let agent = answer_once(&folder, reply);
    let ended = folder.run(line, &["--admin", "admin.sock"]);
    (ended, agent.join().expect("agent"))
}

fn applied(steps: &[&str], pending: &[&str]) -> Option<AdminReply> {
    let texts = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
    Some(AdminReply::Applied {
        epoch: 8,
        steps: texts(steps),
        pending: texts(pending),
    })
}

#[test]
fn apply_hands_the_envelope_over_and_prints_the_steps() {
    let (ended, asked) = ask("apply b.cose", applied(&["attach disk", "bind vm1"], &[]));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(
        ended.stdout,
        "applied epoch 8\n  done: attach disk\n  done: bind vm1\n"
    );
    let (request, bytes) = asked;
    assert_eq!(request, AdminRequest::Apply { dry_run: false });
    assert_eq!(bytes.as_deref(), Some(b"an envelope".as_slice()));
}

#[test]
fn a_dry_run_says_what_would_be_done() {
    let (ended, asked) = ask("apply b.cose --dry-run", applied(&["attach disk"], &[]));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.stdout, "would apply epoch 8\n  would: attach disk\n");
    assert_eq!(asked.0, AdminRequest::Apply { dry_run: true });
}

#[test]
fn a_bundle_that_changes_nothing_says_so() {
    let (ended, _) = ask("apply b.cose", applied(&[], &[]));
    assert_eq!(ended.code, 0);
    assert!(ended.stdout.contains("nothing to do"), "{ended:?}");
}

#[test]
fn pending_steps_are_shown_and_are_no_success() {
    let (ended, _) = ask("apply b.cose", applied(&["a"], &["attach disk: no file"]));
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stdout.contains("  pending: attach disk: no file\n"));
    assert!(
        ended.stderr.contains("accepted, but 1 step(s) failed"),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("bulkhead status"), "{ended:?}");
}

#[test]
fn a_refusal_is_printed_so_that_it_can_not_steer_the_terminal() {
    let reason = "epoch 3 is not above the floor\u{1b}[2J".to_owned();
    let (ended, _) = ask("apply b.cose", Some(AdminReply::Refused { reason }));
    assert_eq!(ended.code, 1);
    assert_eq!(
        ended.stderr,
        "bulkhead: refused, and nothing changed: epoch 3 is not above the floor\\u{1b}[2J\n"
    );
    assert_eq!(ended.stdout, "");
}

#[test]
fn what_is_open_is_neither_applied_nor_refused() {
    let reason = "keyd gave no answer".to_owned();
    let (ended, _) = ask("apply b.cose", Some(AdminReply::Open { reason }));
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert_eq!(
        ended.stderr,
        "bulkhead: not decided yet: keyd gave no answer\n"
    );
}

#[test]
fn an_agent_that_hangs_up_is_no_success() {
    let (ended, _) = ask("apply b.cose", None);
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("without an answer"), "{ended:?}");
}

#[test]
fn an_answer_to_another_question_is_no_success() {
    let (ended, _) = ask("status", applied(&[], &[]));
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("another version"), "{ended:?}");
    let status = AdminReply::Status { status: status() };
    let (ended, _) = ask("apply b.cose", Some(status));
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("another version"), "{ended:?}");
}

#[test]
fn a_missing_or_wrong_socket_is_explained() {
    let folder = Folder::new();
    folder.write("file", "");
    folder.refused("status --admin nowhere.sock", &["is bulkhead-rot running?"]);
    folder.refused("status --admin file", &["bulkhead-rot is not running"]);
    let _stream = UnixListener::bind(folder.path("stream.sock")).expect("bind");
    folder.refused("status --admin stream.sock", &["not the admin socket"]);
    folder.refused("apply missing.cose --admin nowhere.sock", &["missing.cose"]);
}

#[test]
fn the_process_can_not_be_dumped_or_traced() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: the_process_can_not_be_dumped_or_traced needs root, to be another uid");
        return;
    }
    let folder = Folder::new();
    let mine = |path: &std::path::Path| {
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(path, open).expect("chmod");
    };
    let program = folder.path("bulkhead");
    // By another process: a writing descriptor of ours, inherited by what other tests start at this
    // moment, would keep the copy from being executed (ETXTBSY).
    let copied = std::process::Command::new("cp")
        .args([env!("CARGO_BIN_EXE_bulkhead").as_ref(), program.as_os_str()])
        .status();
    assert!(copied.expect("cp").success());
    let reply = AdminReply::Status { status: status() };
    let agent = answer_after(&folder, Some(reply), |pid| {
        // The kernel gives these files to root when, and only when, the process is not dumpable
        // (proc_pid(5)).
        let owner = std::fs::metadata(format!("/proc/{pid}/mem")).expect("asking");
        assert_eq!(owner.uid(), 0, "the process is dumpable");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    });
    mine(&folder.path(""));
    mine(&folder.path("admin.sock"));
    let ended: Ended = std::process::Command::new(&program)
        .current_dir(folder.path(""))
        .args(["status", "--admin", "admin.sock"])
        .uid(4992)
        .output()
        .expect("run")
        .into();
    agent.join().expect("agent");
    assert_eq!(ended.code, 0, "{ended:?}");
}

fn status() -> HostStatus {
    let limits = Limits {
        requests: Some(Rate::with_default_burst(10_000)),
        bytes: None,
    };
    let volume = |number: u8, state| VolumeEntry {
        volume: VolumeId([number; 16]),
        name: format!("disk{number}"),
        socket: format!("vm{number}").parse().expect("name"),
        socket_path: format!("/run/bulkhead/vhost/vm{number}.sock"),
        state,
        key_bytes: (number == 1).then_some(3 << 39),
        limits: if number == 1 {
            limits
        } else {
            Limits::default()
        },
        group: (number == 2).then(|| "tenant-a".parse().expect("name")),
    };
    let serving = VolumeStatus {
        volume: VolumeId([1; 16]),
        attached: true,
        connected: true,
        encrypted: true,
        running_queues: 4,
        retired_queues: 1,
        requests_ok: 12,
        requests_failed: 3,
        read_bytes: 8192,
        written_bytes: 1 << 20,
        fault: None,
        capacity_bytes: 64 << 20,
        holds_volume: true,
        waits_for_volume: false,
        rekey: Some(RekeyProgress {
            done_bytes: 24 << 20,
            total_bytes: 64 << 20,
            state: RekeyState::Running,
        }),
        storage: Some(StorageStatus {
            state: StorageState::Fine,
            old_requests: 0,
            oldest_ms: 0,
            slow_after_ms: 1000,
            slow_total: 2,
            latency: Some(Latency {
                median_us: 64,
                p99_us: 256,
                p999_us: 1024,
            }),
        }),
        throttled_ms: 61_299,
    };
    let failed = VolumeStatus {
        volume: VolumeId([2; 16]),
        fault: Some("the file \"shrank\"\n".to_owned()),
        holds_volume: false,
        waits_for_volume: true,
        rekey: Some(RekeyProgress {
            done_bytes: 1,
            total_bytes: 2,
            state: RekeyState::Failed {
                reason: "at byte 7:\nno".to_owned(),
            },
        }),
        storage: Some(StorageStatus {
            state: StorageState::Hung,
            old_requests: 12,
            oldest_ms: 14_321,
            slow_after_ms: 1000,
            slow_total: 40,
            latency: None,
        }),
        ..serving.clone()
    };
    HostStatus {
        host: "host-a".to_owned(),
        epoch: Some(7),
        epoch_floor: 7,
        digest: Some(ByteArray::from([0xab; 48])),
        processes: vec![ProcessStatus {
            role: Role::Keyd,
            pid: 4242,
            generation: 2,
            measurement: ByteArray::from([0x11; 48]),
        }],
        volumes: vec![
            volume(1, Some(serving)),
            volume(2, Some(failed)),
            volume(3, None),
        ],
        pending: vec!["attach disk3: no such file".to_owned()],
        keys: None,
        groups: vec![GroupGrant {
            name: "tenant-a".parse().expect("name"),
            limits: Limits {
                requests: None,
                bytes: Some(Rate::with_default_burst(80 << 20)),
            },
        }],
        workers: Some(Box::new(WorkersStatus {
            workers: Workers::new(None, vec![2, 9]).expect("workers"),
            by_host: false,
            pending: Workers::new(Some(4), Vec::new()).ok(),
            problem: Some("CPU 9 is\nnot there".to_owned()),
            loads: vec![
                WorkerLoad {
                    cpu: Some(2),
                    busy_permille: 346,
                    queues: 5,
                },
                WorkerLoad {
                    cpu: None,
                    busy_permille: 1000,
                    queues: 1,
                },
            ],
            queue_moves: 12,
            queue_moves_given_up: 1,
        })),
        programs: vec![
            ProgramStatus {
                component: Component::Dataplane,
                measurement: [0x22; 48].into(),
                version: Some(41),
                failed: None,
            },
            ProgramStatus {
                component: Component::Keyd,
                measurement: [0x11; 48].into(),
                version: None,
                failed: Some("it\nended".to_owned()),
            },
        ],
        nics: None,
    }
}

/// What keyd says after two shreds, of which it tells one.
fn keys(state: ShredState, unfinished: Option<&str>) -> HostKeys {
    HostKeys {
        fingerprint: [0xf2; 48].into(),
        shreds: vec![Shred {
            volume: VolumeId([9; 16]),
            epoch: 7,
            time_s: 1_709_251_200,
            destroyed_key: [0xf1; 48].into(),
            new_key: [0xf2; 48].into(),
            state,
        }],
        shreds_total: 2,
        unfinished: unfinished.map(str::to_owned),
    }
}

fn status_with(keys: HostKeys) -> Option<AdminReply> {
    let status = HostStatus {
        keys: Some(Box::new(keys)),
        ..status()
    };
    Some(AdminReply::Status { status })
}

#[test]
fn status_shows_what_was_shredded() {
    let reply = || status_with(keys(ShredState::Done, None));
    let (ended, _) = ask("status", reply());
    let table = format!(
        "\nkey     {}\n|\nshredded\n\
         \x20 VOLUME                                STATE      EPOCH  WHEN                     OLD HOST KEY      NEW HOST KEY\n\
         \x20 09090909-0909-0909-0909-090909090909  destroyed  7      2024-03-01 00:00:00 UTC  f1f1f1f1f1f1f1f1  f2f2f2f2f2f2f2f2\n\
         \x20 and 1 before them\n",
        "f2".repeat(48)
    );
    for part in table.split('|') {
        assert!(ended.stdout.contains(part), "{part:?}: {}", ended.stdout);
    }
    let (ended, _) = ask("status --json", reply());
    let json = format!(
        r#""keys":{{"fingerprint":"{new}","shreds":[{{"volume":"09090909-0909-0909-0909-090909090909","epoch":7,"time_s":1709251200,"destroyed_key":"{old}","new_key":"{new}","state":"destroyed"}}],"shreds_total":2,"unfinished":null}},"#,
        old = "f1".repeat(48),
        new = "f2".repeat(48)
    );
    assert!(ended.stdout.contains(&json), "{}", ended.stdout);
}

#[test]
fn status_does_not_call_destroyed_what_may_be_there() {
    for (state, words) in [
        (ShredState::HeldByDataplane, "held by the data plane"),
        (ShredState::KeyOnDisk, "old host key on disk"),
    ] {
        let (ended, _) = ask("status", status_with(keys(state, Some("host.key:\nno"))));
        assert!(ended.stdout.contains(words), "{}", ended.stdout);
        assert!(!ended.stdout.contains("destroyed"), "{}", ended.stdout);
        let reason = "the files of the host's key are not in order: host.key:\\nno\n";
        assert!(ended.stdout.contains(reason), "{}", ended.stdout);
    }
}

#[test]
fn status_is_a_table() {
    let (ended, asked) = ask("status", Some(AdminReply::Status { status: status() }));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(asked.0, AdminRequest::Status);
    let expected = format!(
        "host    host-a\nepoch   7 (the next is above 7)\ndigest  {digest}\n\
         workers 2 on CPUs 2,9\n\
         \x20       restart pending: 4 in the bundle, from the data plane's next start on\n\
         \x20       CPU 9 is\\nnot there\n\
         \x20       CPU 2: 34 % busy, 5 queues\n\
         \x20       worker 1: 100 % busy, 1 queue\n\
         \x20       queues moved from one to another: 12 (1 given up)\n\n\
         processes\n  ROLE  PID   GENERATION  MEASUREMENT\n  keyd  4242  2           1111111111111111\n\n\
         programs\n  PROGRAM    RELEASE  MEASUREMENT\n\
         \x20 dataplane  41       2222222222222222\n\
         \x20 keyd       -        1111111111111111\n\
         \x20 keyd: its upgrade came to nothing: it\\nended\n\n\
         volumes\n\
         \x20 NAME   STATE      HELD   SIZE    KEY   UNDER KEY  REKEY         QUEUES         OK  FAILED  READ   WRITTEN  SOCKET\n\
         \x20 disk1  connected  yes    64 MiB  held  1.5 TiB    37 %          4 (1 retired)  12  3       8 KiB  1 MiB    /run/bulkhead/vhost/vm1.sock\n\
         \x20 disk2  failed     waits  64 MiB  held  -          50 % stopped  4 (1 retired)  12  3       8 KiB  1 MiB    /run/bulkhead/vhost/vm2.sock\n\
         \x20 disk3  unknown    ?      ?       ?     ?          ?             ?              ?   ?       ?      ?        /run/bulkhead/vhost/vm3.sock\n\
         \x20 disk2: the file \"shrank\"\\n\n\
         \x20 disk2: storage hung: 12 requests older than 1 s, oldest 14 s\n\
         \x20 disk2: its re-key stopped: at byte 7:\\nno\n\n\
         limits\n\
         \x20 NAME         GROUP     THROTTLED  LIMITS\n\
         \x20 disk1        -         61.2 s     10000 requests/s (burst 1000)\n\
         \x20 disk2        tenant-a  61.2 s     none\n\
         \x20 (all of it)  tenant-a  -          80 MiB/s (burst 8 MiB)\n\n\
         pending: failed, and tried again\n  attach disk3: no such file\n",
        digest = "ab".repeat(48)
    );
    assert_eq!(ended.stdout, expected);
}

#[test]
fn a_host_without_a_bundle_says_so() {
    let status = HostStatus {
        epoch: None,
        digest: None,
        epoch_floor: 0,
        volumes: Vec::new(),
        pending: Vec::new(),
        ..status()
    };
    let (ended, _) = ask("status", Some(AdminReply::Status { status }));
    assert!(
        ended.stdout.contains("no bundle was applied yet"),
        "{ended:?}"
    );
    assert!(ended.stdout.contains("volumes\n  none\n"), "{ended:?}");
}

#[test]
fn status_is_json_for_programs() {
    let (ended, _) = ask(
        "status --json",
        Some(AdminReply::Status { status: status() }),
    );
    assert_eq!(ended.code, 0);
    let volume = |number: u8, state: &str| {
        let key_bytes = if number == 1 { "1649267441664" } else { "null" };
        let requests = if number == 1 {
            r#"{"per_second":10000,"burst":1000}"#
        } else {
            "null"
        };
        let group = if number == 2 { r#""tenant-a""# } else { "null" };
        format!(
            r#"{{"id":"{}","name":"disk{number}","socket":"vm{number}","socket_path":"/run/bulkhead/vhost/vm{number}.sock","state":{state},"key_bytes":{key_bytes},"limits":{{"requests":{requests},"bytes":null}},"group":{group}}}"#,
            VolumeId([number; 16])
        )
    };
    let state = |fault: &str, holds: bool, waits: bool, rekey: &str, storage: &str| {
        format!(
            r#"{{"attached":true,"connected":true,"capacity_bytes":67108864,"holds_volume":{holds},"waits_for_volume":{waits},"encrypted":true,"running_queues":4,"retired_queues":1,"requests_ok":12,"requests_failed":3,"read_bytes":8192,"written_bytes":1048576,"fault":{fault},"rekey":{rekey},"storage":{storage},"throttled_ms":61299}}"#
        )
    };
    let fine = r#"{"state":"fine","old_requests":0,"oldest_ms":0,"slow_after_ms":1000,"slow_total":2,"latency":{"median_us":64,"p99_us":256,"p999_us":1024}}"#;
    let hung = r#"{"state":"hung","old_requests":12,"oldest_ms":14321,"slow_after_ms":1000,"slow_total":40,"latency":null}"#;
    let running =
        r#"{"state":"running","done_bytes":25165824,"total_bytes":67108864,"reason":null}"#;
    let failed =
        r#"{"state":"failed","done_bytes":1,"total_bytes":2,"reason":"at byte 7:\u000ano"}"#;
    let programs = format!(
        r#"{{"program":"dataplane","release":41,"measurement":"{}","failed":null}},{{"program":"keyd","release":null,"measurement":"{}","failed":"it\u000aended"}}"#,
        "22".repeat(48),
        "11".repeat(48)
    );
    let expected = format!(
        r#"{{"host":"host-a","epoch":7,"epoch_floor":7,"digest":"{}","processes":[{{"role":"keyd","pid":4242,"generation":2,"measurement":"{}"}}],"volumes":[{},{},{}],"pending":["attach disk3: no such file"],"keys":null,"groups":[{{"name":"tenant-a","limits":{{"requests":null,"bytes":{{"per_second":83886080,"burst":8388608}}}}}}],"workers":{{"workers":{{"count":2,"cpus":[2,9]}},"by_host":false,"pending":{{"count":4,"cpus":[]}},"problem":"CPU 9 is\u000anot there","loads":[{{"cpu":2,"busy_permille":346,"queues":5}},{{"cpu":null,"busy_permille":1000,"queues":1}}],"queue_moves":12,"queue_moves_given_up":1}},"programs":[{programs}],"nics":[],"switches":[]}}"#,
        "ab".repeat(48),
        "11".repeat(48),
        volume(1, &state("null", true, false, running, fine)),
        volume(
            2,
            &state(r#""the file \"shrank\"\u000a""#, false, true, failed, hung)
        ),
        volume(3, "null"),
    );
    assert_eq!(ended.stdout, format!("{expected}\n"));
}

#[test]
fn upgrade_hands_the_statement_over_and_says_how_it_ended() {
    let release = Release {
        component: Component::Dataplane,
        version: 41,
        measurement: [7; 48].into(),
    };
    let (ended, asked) = ask("upgrade b.cose", Some(AdminReply::Upgraded { release }));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.stdout, "upgraded dataplane to version 41\n");
    assert_eq!(asked.0, AdminRequest::Upgrade);
    assert_eq!(asked.1.as_deref(), Some(b"an envelope".as_slice()));
    let reason = "it ended\nearly".to_owned();
    let (ended, _) = ask("upgrade b.cose", Some(AdminReply::Refused { reason }));
    assert_eq!(ended.code, 1);
    let expected = "bulkhead: not upgraded, what ran goes on: it ended\\nearly\n";
    assert_eq!(ended.stderr, expected);
}

/// The agent says that it ends, and the next one says what it is.
fn upgrade_of_the_agent(then: ProgramStatus) -> Ended {
    let folder = Folder::new();
    folder.write("b.cose", "a statement");
    let release = Release {
        component: Component::Agent,
        version: 41,
        measurement: [7; 48].into(),
    };
    let first = answer_once(&folder, Some(AdminReply::UpgradeBegun { release }));
    thread::scope(|scope| {
        let agent = scope.spawn(|| {
            first.join().expect("agent");
            std::fs::remove_file(folder.path("admin.sock")).expect("remove");
            let status = HostStatus {
                programs: vec![then],
                ..status()
            };
            answer_once(&folder, Some(AdminReply::Status { status })).join()
        });
        let ended = folder.run("upgrade b.cose", &["--admin", "admin.sock"]);
        agent.join().expect("joined").expect("agent");
        ended
    })
}

#[test]
fn the_upgrade_of_the_agent_ends_when_the_next_one_says_what_it_is() {
    let new = ProgramStatus {
        component: Component::Agent,
        measurement: [7; 48].into(),
        version: Some(41),
        failed: None,
    };
    let ended = upgrade_of_the_agent(new.clone());
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.stdout, "upgraded agent to version 41\n");
    let ended = upgrade_of_the_agent(ProgramStatus {
        version: None,
        failed: Some("exit status 1".to_owned()),
        ..new
    });
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("exit status 1"), "{ended:?}");
}
