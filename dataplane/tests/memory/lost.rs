//! A frontend that cuts the file behind its memory: zeroes are read, that memory is lost, and nothing
//! else is; a fault that is not guest memory's ends the process as it would without the handler.
#![expect(unsafe_code, reason = "a fault outside guest memory")]

use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_dataplane::memory::{Lease, sigbus};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ftruncate, getpid};

use super::{PAGE, buffer, lease, map_from, memfd, read, region};

#[test]
fn memory_that_went_away_reads_as_zeroes_and_takes_nothing_with_it() {
    let (cut, whole) = (memfd(4 * PAGE), memfd(4 * PAGE));
    for fd in [&cut, &whole] {
        nix::sys::uio::pwrite(fd, &[7; 16], 2 * 4096).expect("write");
    }
    let of = |fd| lease(map_from(&[region(0, 4 * PAGE, 0, 0)], fd).expect("map"));
    let (lost, other) = (of(&cut), of(&whole));
    assert_eq!(read(&lost, 2 * PAGE, 2), Some(vec![7; 2]));
    assert!(!lost.is_lost());
    ftruncate(&cut, 4096).expect("cut");
    assert_eq!(read(&lost, 2 * PAGE, 2), Some(vec![0; 2]));
    assert!(lost.is_lost());
    // From then on it is memory of nobody: writes go nowhere and don't fault.
    let write = buffer(&lost, &[(3 * PAGE, 4)]).expect("inside");
    assert!(write.copy_in(0, b"gone"));
    assert!(write.is_lost());
    assert!(!other.is_lost());
    assert_eq!(read(&other, 2 * PAGE, 2), Some(vec![7; 2]));
    assert_eq!(nix::sys::stat::fstat(&cut).expect("stat").st_size, 4096);
    // A memory that is made next is a new one, even if it gets the same place.
    drop(lost);
    drop(write);
    let next = of(&whole);
    assert_eq!(read(&next, 2 * PAGE, 2), Some(vec![7; 2]));
    assert!(!next.is_lost());
}

/// Faults on some threads while others map and unmap: no fault replaces the pages of another memory.
#[test]
fn memory_goes_away_while_other_memory_comes_and_goes() {
    let kept = memfd(64 * PAGE);
    nix::sys::uio::pwrite(&kept, &[9; 64 * 4096], 0).expect("fill");
    let spec = region(0, 64 * PAGE, 0, 0);
    let kept_memory = Arc::new(map_from(&[spec], &kept).expect("map"));
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let churn = || {
            while !ended.load(Ordering::Relaxed) {
                let sizes = [1, 3, 17].map(|n| region(0, n * PAGE, 0, 0));
                let maps = sizes.map(|spec| map_from(&[spec], &kept).expect("map"));
                assert!(maps.iter().all(|memory| !memory.is_lost()));
            }
        };
        scope.spawn(churn);
        scope.spawn(churn);
        for _ in 0..2000 {
            let fd = memfd(2 * PAGE);
            let memory = lease(map_from(&[region(0, 2 * PAGE, 0, 0)], &fd).expect("map"));
            ftruncate(&fd, 0).expect("cut");
            assert_eq!(read(&memory, PAGE, 1), Some(vec![0]));
            assert!(memory.is_lost());
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert!(!kept_memory.is_lost());
    let kept_memory = Lease::new(kept_memory);
    assert_eq!(read(&kept_memory, 0, 64 * 4096), Some(vec![9; 64 * 4096]));
}

/// Set in a process whose test is made to die.
const CHILD: &str = "BULKHEAD_TEST_CHILD";

/// Runs a test of this file in a process of its own, where it runs `die`.
fn outcome(test: &str, die: fn()) -> ExitStatus {
    if std::env::var_os(CHILD).is_some() {
        setrlimit(Resource::RLIMIT_CORE, 0, 0).expect("limit");
        die();
        panic!("it lives");
    }
    Command::new(std::env::current_exe().expect("this test"))
        .args([test, "--exact"])
        .env(CHILD, "1")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("run")
}

#[test]
fn a_fault_elsewhere_ends_the_process() {
    let status = outcome("lost::a_fault_elsewhere_ends_the_process", || {
        let fd = memfd(PAGE);
        // Guest memory on both sides makes sure that the handler looks and does not find.
        let _below = map_from(&[region(0, PAGE, 0, 0)], &fd).expect("map");
        let own = memfd(PAGE);
        let length = NonZeroUsize::new(4096).expect("not zero");
        let (read, shared) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let at = unsafe { mmap(None, length, read, shared, &own, 0) }.expect("mmap");
        let _above = map_from(&[region(0, PAGE, 0, 0)], &fd).expect("map");
        ftruncate(&own, 0).expect("cut");
        // SAFETY: a mapping of this test; that the access faults is its point.
        unsafe { at.cast::<u8>().read_volatile() };
    });
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

#[test]
fn a_signal_that_somebody_sent_ends_the_process() {
    let status = outcome("lost::a_signal_that_somebody_sent_ends_the_process", || {
        sigbus::install().expect("handler");
        kill(getpid(), Signal::SIGBUS).expect("kill");
    });
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
}
