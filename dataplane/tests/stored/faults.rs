//! Real processes that die by a fault of one of their threads: the volume that it had in hand is blamed, where the next process
//! finds it; who is killed from outside blames nobody.
#![expect(unsafe_code, reason = "faults")]

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};

use bulkhead_dataplane::hand::{self, Hand};
use bulkhead_dataplane::stored::Deaths;
use nix::libc;

/// Names the way in which a process that this test starts dies. Its standard input is the memfd.
const DIES_OF: &str = "BULKHEAD_TEST_DIES_OF";
/// Whose work it has in hand then.
const SLOT: u16 = 5;

/// Uses up the stack.
fn recurse(depth: u64) -> u64 {
    let here = std::hint::black_box([depth; 64]);
    if depth == u64::MAX {
        return 0;
    }
    recurse(depth + 1) + here[(depth % 64) as usize]
}

fn die_of(what: &str) {
    match what {
        // SAFETY: none: this is the fault.
        "access" => unsafe {
            std::ptr::without_provenance::<u8>(4096).read_volatile();
        },
        // SAFETY: as above.
        "instruction" => unsafe { std::arch::asm!("ud2") },
        "division" => {
            // SAFETY: as above.
            unsafe {
                std::arch::asm!("div {0:e}", in(reg) 0u32, inout("eax") 1u32 => _, inout("edx") 0u32 => _)
            }
        }
        "stack" => drop(
            std::thread::spawn(|| {
                hand::take(Hand::of(SLOT));
                recurse(0)
            })
            .join(),
        ),
        // SAFETY: plain integers.
        "signal" => unsafe {
            libc::raise(libc::SIGSEGV);
        },
        // SAFETY: as above.
        "kill" => unsafe {
            libc::raise(libc::SIGKILL);
        },
        other => panic!("{other}"),
    }
}

/// What a process that this test starts does.
#[test]
fn has_something_in_hand() {
    let Ok(what) = std::env::var(DIES_OF) else {
        return;
    };
    let fd = std::io::stdin().as_fd().try_clone_to_owned().expect("dup");
    let deaths = Deaths::open(fd).expect("the memfd");
    hand::watch(deaths.words()).expect("handlers");
    hand::take(Hand::of(SLOT));
    die_of(&what);
}

/// How a process that dies of something ends, and how often the volume was blamed.
fn dies_of(what: &str) -> (ExitStatus, u32) {
    let deaths = Deaths::create().expect("a memfd");
    let theirs = deaths.as_fd().try_clone_to_owned().expect("dup");
    let status = Command::new(std::env::current_exe().expect("it runs"))
        .args(["--exact", "faults::has_something_in_hand"])
        .env(DIES_OF, what)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("started");
    deaths.count_all();
    (status, deaths.of_slot(SLOT))
}

#[test]
fn who_dies_of_a_volume_blames_it() {
    for (what, signal) in [
        ("access", libc::SIGSEGV),
        ("instruction", libc::SIGILL),
        ("division", libc::SIGFPE),
        ("stack", libc::SIGSEGV),
    ] {
        let (status, deaths) = dies_of(what);
        assert_eq!((status.signal(), deaths), (Some(signal), 1), "{what}");
    }
}

#[test]
fn who_is_killed_blames_nobody() {
    for (what, signal) in [("signal", libc::SIGABRT), ("kill", libc::SIGKILL)] {
        let (status, deaths) = dies_of(what);
        assert_eq!((status.signal(), deaths), (Some(signal), 0), "{what}");
    }
}
