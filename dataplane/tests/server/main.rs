//! The control thread with real sockets and workers: who may connect, who waits, what a detach waits for,
//! and that nobody keeps the others from their turn.

mod balance;
mod fence;
mod freeze;
mod rig;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::server::{Access, DeviceStatus, Event};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::vhost_user::message::code;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use rig::{PATIENCE, Rig};

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

fn question(code: u32) -> Vec<u8> {
    [code, 1, 0].iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Asks for the number of queues.
fn is_answered(stream: &UnixStream) -> bool {
    let mut reply = [0; 20];
    let mut stream = stream;
    stream.write_all(&question(code::GET_QUEUE_NUM)).is_ok()
        && stream.read_exact(&mut reply).is_ok()
        && reply[12..] == 1u64.to_le_bytes()
}

fn is_closed(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0; 64]), Ok(0))
}

#[test]
fn only_the_allowed_uid_is_served() {
    let mut rig = Rig::new();
    let me = nix::unistd::geteuid().as_raw();
    let (_, others) = rig.attach(Some(me + 1));
    let (_, mine) = rig.attach(Some(me));
    let refused = connect(&others);
    assert!(is_closed(&refused));
    assert!(rig.quiet(), "it never was connected");
    assert!(is_answered(&connect(&mine)));
}

#[test]
fn a_second_frontend_waits_until_the_first_is_gone() {
    let mut rig = Rig::new();
    let (id, path) = rig.attach(None);
    let first = connect(&path);
    assert!(is_answered(&first));
    assert!(matches!(rig.event(), Event::Connected { .. }));
    let second = connect(&path);
    (&second)
        .write_all(&question(code::GET_QUEUE_NUM))
        .expect("it waits");
    assert!(rig.quiet());
    assert!(is_answered(&first), "it is not disturbed");
    drop(first);
    assert!(matches!(rig.event(), Event::Disconnected { .. }));
    assert!(matches!(rig.event(), Event::Connected { .. }));
    let mut reply = [0; 20];
    (&second).read_exact(&mut reply).expect("its turn has come");
    assert!(rig.status(id).connected);
}

/// The loop hears of the listener and of the frontend that left in one wait. The listener comes first: the connection
/// is looked at, found closed, and the next frontend accepted. What follows is about the one that left.
#[test]
fn what_is_heard_of_a_frontend_that_left_is_not_held_against_the_next() {
    const QUESTIONS: usize = 4000;
    let mut rig = Rig::new();
    let (_, path) = rig.attach(None);
    let mut frontend = connect(&path);
    assert!(is_answered(&frontend));
    for round in 0..5 {
        let (leaving, path) = (frontend, path.clone());
        frontend = rig.ask(move |_| {
            let next = connect(&path);
            leaving
                .shutdown(std::net::Shutdown::Both)
                .expect("connected");
            next
        });
        assert!(is_answered(&frontend), "round {round}");
        // More answers than its socket takes: it is owed some, which one that is gone is not.
        let questions = question(code::GET_QUEUE_NUM).repeat(QUESTIONS);
        (&frontend).write_all(&questions).expect("open");
        std::thread::sleep(std::time::Duration::from_millis(50));
        let mut answers = vec![0; 20 * QUESTIONS];
        (&frontend)
            .read_exact(&mut answers)
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

#[test]
fn a_detach_ends_the_connection_and_whoever_waits() {
    let mut rig = Rig::new();
    let (id, path) = rig.attach(None);
    let (_, other) = rig.attach(None);
    let frontends = [connect(&path), connect(&path)];
    assert!(is_answered(&frontends[0]));
    assert!(matches!(rig.event(), Event::Connected { .. }));
    rig.ask(move |server| server.detach(id));
    assert!(matches!(rig.event(), Event::Disconnected { .. }));
    assert!(matches!(rig.event(), Event::Detached { id: of } if of == id));
    assert!(is_closed(&frontends[0]));
    assert!(!is_answered(&frontends[1]));
    assert_eq!(rig.status(id), DeviceStatus::default());
    assert!(is_answered(&connect(&other)));
}

#[test]
fn a_detach_at_once_comes_after_the_attach() {
    let mut rig = Rig::new();
    for _ in 0..50 {
        let listener = UnixListener::bind(rig.dir.path().join("at-once")).expect("bind");
        let geometry = Geometry {
            logical_block_bytes: 512,
            read_only: false,
            serial: [0; 20],
            queues: 1,
            discard: false,
        };
        let device = BlkDevice::new(geometry, 8, StorageSpec::Null, None);
        let weak = std::sync::Arc::downgrade(&device);
        let id = rig.ask(move |server| {
            let anybody = Access { allowed_uid: None };
            let id = server.attach(&device, listener, anybody, "disk".to_owned());
            let id = id.expect("attach");
            server.detach(id);
            id
        });
        assert!(matches!(rig.event(), Event::Detached { id: of } if of == id));
        assert_eq!(weak.strong_count(), 0, "nobody holds it, nor its key");
        fs::remove_file(rig.dir.path().join("at-once")).expect("remove");
    }
    assert!(rig.quiet());
    rig.count += 1;
}

#[test]
fn new_frontends_wait_while_they_are_refused() {
    let mut rig = Rig::new();
    let (id, path) = rig.attach(None);
    rig.ask(move |server| server.refuse_new(id, true));
    let frontend = connect(&path);
    assert!(rig.quiet());
    rig.ask(move |server| server.refuse_new(id, false));
    assert!(matches!(rig.event(), Event::Connected { .. }));
    assert!(is_answered(&frontend));
}

/// A frontend never stops sending what needs no answer.
#[test]
fn everybody_has_a_turn() {
    let mut rig = Rig::new();
    let (_, busy) = rig.attach(None);
    let (_, path) = rig.attach(None);
    let loud = connect(&busy);
    loud.set_write_timeout(Some(PATIENCE)).expect("timeout");
    let (ended, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let many = question(code::SET_OWNER).repeat(1024);
            while !ended.load(Ordering::Relaxed) {
                (&loud).write_all(&many).expect("it is read");
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
        while sent.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        let since = Instant::now();
        let answered = (0..100).filter(|_| is_answered(&connect(&path))).count();
        ended.store(true, Ordering::Relaxed);
        assert_eq!(answered, 100);
        // Without turns each of them waited for a pause of the other's, a sixth of a second.
        assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
    });
}

/// Set in the process that runs out of descriptors.
const CHILD: &str = "BULKHEAD_TEST_CHILD";

#[test]
fn a_frontend_that_finds_no_descriptor_free_is_served_later() {
    let name = "a_frontend_that_finds_no_descriptor_free_is_served_later";
    if std::env::var_os(CHILD).is_none() {
        let this = std::env::current_exe().expect("this test");
        let mut child = std::process::Command::new(this);
        let run = child.args([name, "--exact", "--nocapture"]).env(CHILD, "1");
        let output = run.output().expect("run");
        let text = [output.stdout, output.stderr].concat();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&text)
        );
        return;
    }
    let mut rig = Rig::new();
    let (_, path) = rig.attach(None);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits");
    // Room for the frontend's own end, and none for ours.
    let lowest = fs::File::open("/dev/null").expect("open");
    let next = u64::try_from(lowest.as_raw_fd()).expect("a number");
    drop(lowest);
    setrlimit(Resource::RLIMIT_NOFILE, next + 1, hard).expect("limit");
    let frontend = connect(&path);
    assert!(rig.quiet());
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("limit");
    assert!(is_answered(&frontend));
}
