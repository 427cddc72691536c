//! The ring with real files: bytes there and back, transfers that end short, ranges given up and zeroed,
//! events that come, go and block nobody.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::storage::{Action, Buffer};
use crate::worker::staging::Staging;

struct Rig {
    staging: Staging,
    ring: Ring,
}

impl Rig {
    fn new() -> Self {
        let staging = Staging::new().expect("staging");
        let ring = Ring::new(&staging).expect("ring");
        Self { staging, ring }
    }

    fn completions(&mut self, count: usize) -> Vec<Completion> {
        let mut out = Vec::new();
        while out.len() < count {
            self.ring.wait(Some(Duration::from_secs(5)));
            out.extend(std::iter::from_fn(|| self.ring.reap()));
        }
        out
    }

    /// Runs a transfer of a chunk filled with `fill`: the transfer back, and what was done.
    fn run(
        &mut self,
        file: FixedFile,
        action: Action,
        range: (u64, u32),
        fill: u8,
    ) -> (Transfer, Done) {
        let (offset_bytes, bytes) = range;
        let mut chunk = self.staging.take(u64::from(bytes)).expect("free");
        assert!(chunk.copy_in(&vec![fill; bytes as usize]));
        let transfer = Transfer {
            action,
            offset_bytes,
            bytes: u64::from(bytes),
            buffer: Buffer::Staging(chunk),
            retries: 0,
        };
        self.ring.push(7, file, transfer).expect("room");
        let done = self.completions(1).remove(0);
        assert_eq!(done.token, 7);
        (done.transfer.expect("the transfer is back"), done.done)
    }

    fn bare(&mut self, file: FixedFile, action: Action, offset_bytes: u64, bytes: u64) -> Done {
        let transfer = Transfer {
            action,
            offset_bytes,
            bytes,
            buffer: Buffer::None,
            retries: 0,
        };
        self.ring.push(1, file, transfer).expect("room");
        self.completions(1).remove(0).done
    }
}

const WRITE: Action = Action::Write { durable: false };

#[test]
fn bytes_go_there_and_back() {
    let mut rig = Rig::new();
    let file = tempfile::tempfile().expect("file");
    let fixed = rig.ring.register_file(file.as_fd()).expect("register");
    for (durable, fill) in [(true, 0xa5), (false, 0x5a)] {
        let (back, done) = rig.run(fixed, Action::Write { durable }, (512, 4096), fill);
        assert_eq!(back.judge(done), Ok(()));
        let (back, done) = rig.run(fixed, Action::Read, (512, 4096), 0);
        assert_eq!((back.judge(done), done), (Ok(()), Ok(4096)));
        let mut bytes = [0; 4096];
        assert!(back.copy_out(&mut bytes));
        assert!(bytes.iter().all(|b| *b == fill));
    }
    assert_eq!(rig.bare(fixed, Action::Flush, 0, 0), Ok(0));
}

#[test]
fn a_transfer_that_the_kernel_cuts_short_is_a_failure() {
    let mut rig = Rig::new();
    // A read over the end of a file.
    let file = tempfile::tempfile().expect("file");
    file.set_len(4096 + 512).expect("length");
    let fixed = rig.ring.register_file(file.as_fd()).expect("register");
    let (back, done) = rig.run(fixed, Action::Read, (4096, 4096), 0);
    assert_eq!((done, back.judge(done)), (Ok(512), Err(libc::EIO)));
    let (back, done) = rig.run(fixed, Action::Read, (8192, 4096), 0);
    assert_eq!((done, back.judge(done)), (Ok(0), Err(libc::EIO)));
    // A write to a pipe with less room.
    let (_reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).expect("pipe");
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).expect("size");
    let fixed = rig.ring.register_file(writer.as_fd()).expect("register");
    let (back, done) = rig.run(fixed, WRITE, (0, 16_384), 1);
    assert_eq!((done, back.judge(done)), (Ok(4096), Err(libc::EIO)));
    // It came back as it was given: another try would write the same.
    let mut bytes = [0; 16_384];
    assert!(back.copy_out(&mut bytes) && bytes.iter().all(|b| *b == 1));
    assert_eq!(back.bytes, 16_384);
}

#[test]
fn an_error_comes_with_its_number() {
    let mut rig = Rig::new();
    let file = File::open("/dev/null").expect("open");
    let fixed = rig.ring.register_file(file.as_fd()).expect("register");
    let (_, done) = rig.run(fixed, WRITE, (0, 4096), 0);
    assert_eq!(done, Err(libc::EBADF), "it is open for reading");
}

/// Ranges that are given up and zeroed read as zeroes, and the file is as long as before. Skipped by what
/// the file system here can't do.
#[test]
fn ranges_are_given_up_and_zeroed() {
    let mut rig = Rig::new();
    let file = tempfile::tempfile_in(".").expect("file");
    let length = 16 * 65_536;
    let fixed = rig.ring.register_file(file.as_fd()).expect("register");
    let actions = [
        Action::Discard,
        Action::Zero { unmap: true },
        Action::Zero { unmap: false },
    ];
    for action in actions {
        file.write_all_at(&vec![0xee; length], 0).expect("write");
        file.sync_all().expect("sync");
        let before = file.metadata().expect("stat").blocks();
        match rig.bare(fixed, action, 65_536, 4 * 65_536) {
            Err(libc::EOPNOTSUPP) => continue,
            done => assert_eq!(done, Ok(0), "{action:?}"),
        }
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0).expect("read");
        let (front, rest) = bytes.split_at(65_536);
        let (zeroes, back) = rest.split_at(4 * 65_536);
        assert!(zeroes.iter().all(|b| *b == 0), "{action:?}");
        assert!(front.iter().chain(back).all(|b| *b == 0xee), "{action:?}");
        let given_up = file.metadata().expect("stat").blocks() < before;
        assert_eq!(
            given_up,
            action != Action::Zero { unmap: false },
            "{action:?}"
        );
        // Over the end: nothing grows.
        let _ = rig.bare(fixed, action, length as u64, 65_536);
        assert_eq!(file.metadata().expect("stat").len(), length as u64);
    }
}

#[test]
fn a_full_ring_gives_the_transfer_back_and_a_drop_waits() {
    let mut rig = Rig::new();
    let event = EventFd::new().expect("eventfd");
    let fixed = rig.ring.register_file(event.as_fd()).expect("register");
    for token in 0..u64::from(MAX_IN_FLIGHT) {
        rig.ring
            .push_event(token, fixed, Event::Wait)
            .expect("room");
        // Events of queues are refused long before transfers are.
        assert_eq!(rig.ring.takes_kick(), token + 1 < 2048, "{token}");
        assert_eq!(rig.ring.takes_call(), token + 1 < 3072, "{token}");
    }
    assert!(rig.ring.push_event(0, fixed, Event::Wait).is_none());
    let back = rig.ring.push(0, fixed, Transfer::flush());
    assert_eq!(back.expect_err("no room").action, Action::Flush);
    assert_eq!(rig.ring.in_flight(), 0);
    event.write(1).expect("write");
    assert_eq!(rig.completions(1)[0].done, Ok(8));
    rig.ring
        .push_event(0, fixed, Event::Wait)
        .expect("room again");
    drop(rig);
}

#[test]
fn storage_that_ran_dry_gets_what_there_is_in_growing_batches() {
    let mut rig = Rig::new();
    let file = tempfile::tempfile().expect("file");
    let fixed = rig.ring.register_file(file.as_fd()).expect("register");
    for round in 0..3 {
        let queued = (0..18).map(|_| {
            rig.ring.push(1, fixed, Transfer::flush()).expect("room");
            rig.ring.uring.submission().len()
        });
        let expected = [0, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2];
        assert!(queued.eq(expected), "round {round}");
        assert_eq!(rig.completions(18).len(), 18);
    }
    // An eventfd that is waited for keeps no storage busy.
    let event = EventFd::new().expect("eventfd");
    let waited = rig.ring.register_file(event.as_fd()).expect("register");
    rig.ring.push_event(0, waited, Event::Wait).expect("room");
    rig.ring.push(1, fixed, Transfer::flush()).expect("room");
    assert!(rig.ring.uring.submission().is_empty());
    assert_eq!(rig.completions(1).len(), 1);
}

#[test]
fn an_event_can_be_cancelled() {
    let mut rig = Rig::new();
    let event = EventFd::new().expect("eventfd");
    let file = rig.ring.register_file(event.as_fd()).expect("register");
    let id = rig.ring.push_event(9, file, Event::Wait).expect("room");
    rig.ring.turn();
    rig.ring.cancel(id);
    assert_eq!(rig.completions(1)[0].done, Err(libc::ECANCELED));
    rig.ring.forget_file(file);
}

#[test]
fn a_signal_goes_to_the_file_it_was_meant_for() {
    let mut rig = Rig::new();
    let event = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let (first, second) = (event(), event());
    let file = rig.ring.register_file(first.as_fd()).expect("register");
    rig.ring.push_event(1, file, Event::Signal).expect("room");
    rig.ring.forget_file(file);
    let again = rig.ring.register_file(second.as_fd()).expect("register");
    assert_eq!(again, file, "the number is used again");
    assert_eq!(rig.completions(1)[0].done, Ok(8));
    assert_eq!(first.read(), Ok(1));
    assert_eq!(second.read(), Err(Errno::EAGAIN));
}

#[test]
fn a_signal_that_can_not_be_given_blocks_nobody_and_ends_when_cancelled() {
    let mut rig = Rig::new();
    for flags in [EfdFlags::empty(), EfdFlags::EFD_NONBLOCK] {
        let full = EventFd::from_flags(flags).expect("eventfd");
        full.write(u64::MAX - 1).expect("fill");
        let file = rig.ring.register_file(full.as_fd()).expect("register");
        let id = rig.ring.push_event(1, file, Event::Signal).expect("room");
        rig.ring.turn();
        assert_eq!(rig.ring.in_flight(), 0, "nobody waits for it");
        rig.ring.cancel(id);
        rig.ring.forget_file(file);
        assert!(rig.completions(1)[0].done.is_err());
        assert_eq!(full.read(), Ok(u64::MAX - 1));
    }
}
