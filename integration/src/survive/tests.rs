//! That the verified load finds what it is for: a device that loses, doubles, tears and misplaces.
//!
//! The device here is the packed model over a vector of bytes, with one fault at a time.

use std::sync::Arc;
use std::time::Duration;

use super::content::{Mismatch, SECTOR};
use super::finding::{Problem, Report};
use super::journal::{Journal, Kind, Work};
use super::lane::{Lane, Place, QUEUE_SIZE};
use crate::driver::memory::GuestMemory;
use crate::driver::model::{Model, ModelChain};
use crate::driver::ring::Format;
use crate::driver::{kind, status};
use crate::random::Random;

const CONTROL: u64 = 0x10_0000;
const DATA: u64 = 0x100_0000;
const MOST_SECTORS: u32 = 16;
const SECTORS: u64 = 256;

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// It is taken and never completed.
    Swallow,
    /// It is acknowledged and not done.
    Skip,
    /// It is completed again with the next request.
    Twice,
    /// Its second half is not done.
    Tear,
    /// It is done one sector further on.
    Misplace,
    /// It is completed without a status.
    Silent,
    /// It fails.
    Fail,
    /// It is completed, and nobody is called.
    Quiet,
}

struct Device {
    memory: Arc<GuestMemory>,
    model: Model,
    bytes: Vec<u8>,
    /// A chain that is to be used once more.
    again: Option<ModelChain>,
}

struct Rig {
    device: Device,
    lane: Lane,
    journal: Journal,
    random: Random,
    report: Report,
}

impl Device {
    fn word(&self, at: u64, len: usize) -> u64 {
        let bytes = self.memory.read(at, len).expect("in memory");
        bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
    }

    fn gather(&self, segments: &[(u64, u32)]) -> Vec<u8> {
        let part = |&(at, len): &(u64, u32)| self.memory.read(at, len as usize).expect("memory");
        segments.iter().flat_map(part).collect()
    }

    fn scatter(&self, segments: &[(u64, u32)], mut bytes: &[u8]) {
        for &(at, len) in segments {
            let (now, rest) = bytes.split_at(len as usize);
            self.memory.write(at, now).expect("in memory");
            bytes = rest;
        }
    }

    fn use_chain(&mut self, chain: &ModelChain, len: u32) {
        let used = self.model.push_used(&self.memory, chain, len);
        used.expect("in memory");
    }

    /// Does one request.
    fn step(&mut self, fault: Fault) {
        let chain = self.model.pop(&self.memory).expect("a good driver");
        let chain = chain.expect("something was offered");
        if let Some(before) = self.again.take() {
            self.use_chain(&before, 1);
        }
        let header = chain.readable[0].0;
        let number = u32::try_from(self.word(header, 4)).expect("four bytes");
        let mut sector = usize::try_from(self.word(header + 8, 8)).expect("small");
        if fault == Fault::Misplace {
            sector += 1;
        }
        let (written, status_at) = self.act(number, sector, &chain, fault);
        let value = match fault {
            Fault::Silent => status::UNTOUCHED,
            Fault::Fail => status::IOERR,
            _ => status::OK,
        };
        self.memory.write(status_at, &[value]).expect("in memory");
        if fault == Fault::Swallow {
            return;
        }
        self.use_chain(&chain, written + 1);
        if fault == Fault::Twice {
            self.again = Some(chain);
        }
    }

    /// Reads or writes; the bytes it wrote into memory, and where the status belongs.
    fn act(&mut self, number: u32, sector: usize, chain: &ModelChain, fault: Fault) -> (u32, u64) {
        let at = sector * SECTOR;
        let last = chain.writable.len() - 1;
        let status_at = chain.writable[last].0;
        match number {
            kind::OUT => {
                let data = self.gather(&chain.readable[1..]);
                let done = match fault {
                    Fault::Skip => 0,
                    Fault::Tear => data.len() - SECTOR / 2,
                    _ => data.len(),
                };
                self.bytes[at..at + done].copy_from_slice(&data[..done]);
                (0, status_at)
            }
            kind::IN => {
                let segments = &chain.writable[..last];
                let len: u32 = segments.iter().map(|(_, len)| len).sum();
                if fault != Fault::Skip {
                    self.scatter(segments, &self.bytes[at..at + len as usize]);
                }
                (len, status_at)
            }
            _ => (0, status_at),
        }
    }
}

impl Rig {
    /// A disk that was written once.
    fn new() -> Self {
        let memory = GuestMemory::new(&[(CONTROL, 0x10_0000, 0), (DATA, 0x10_0000, 0)]);
        let memory = Arc::new(memory.expect("memory"));
        let place = Place {
            control: CONTROL,
            data: DATA,
            most_sectors: MOST_SECTORS,
        };
        let lane = Lane::new(&memory, place, Format::Packed, false).expect("a ring");
        let ring = &lane.ring;
        let model = Model::new(QUEUE_SIZE, ring.desc, ring.avail, ring.used);
        let device = Device {
            memory,
            model,
            // One sector more, for what is misplaced.
            bytes: vec![0; (usize::try_from(SECTORS).expect("small") + 1) * SECTOR],
            again: None,
        };
        let mut rig = Self {
            device,
            lane,
            journal: Journal::new(1, SECTORS, 1),
            random: Random::new(7),
            report: Report::default(),
        };
        while let Some(work) = rig.journal.in_order(Kind::Write, MOST_SECTORS) {
            rig.run(work, Fault::None).expect("a good device");
        }
        rig
    }

    fn offer(&mut self, work: Work) {
        let memory = &self.device.memory;
        self.lane
            .offer(memory, &self.journal, work, &mut self.random)
            .expect("room");
        self.lane.ring.publish(memory).expect("in memory");
    }

    fn reap(&mut self) -> Result<usize, Problem> {
        let memory = &self.device.memory;
        self.lane.reap(memory, &mut self.journal, &mut self.report)
    }

    fn run(&mut self, work: Work, fault: Fault) -> Result<usize, Problem> {
        self.offer(work);
        self.device.step(fault);
        if fault != Fault::Quiet {
            self.lane.ring.call.write(1).expect("an eventfd");
        }
        self.reap()
    }

    fn anywhere(&mut self, kind: Kind) -> Work {
        self.journal
            .anywhere(kind, MOST_SECTORS, &mut self.random)
            .expect("something is free")
    }

    /// Reads everything; the first problem.
    fn sweep(&mut self) -> Result<(), Problem> {
        self.journal.rewind();
        while let Some(work) = self.journal.in_order(Kind::Read, MOST_SECTORS) {
            self.run(work, Fault::None)?;
        }
        assert!(self.journal.is_through());
        Ok(())
    }

    fn write_with(&mut self, fault: Fault) -> Result<usize, Problem> {
        let work = self.anywhere(Kind::Write);
        self.run(work, fault)
    }
}

#[test]
fn a_good_device_has_no_findings() {
    let mut rig = Rig::new();
    for _ in 0..2000 {
        let kind = if rig.random.below(2) == 0 {
            Kind::Read
        } else {
            Kind::Write
        };
        let work = rig.anywhere(kind);
        rig.run(work, Fault::None).expect("a good device");
    }
    rig.sweep().expect("a good device");
    assert_eq!(rig.lane.under_way(), 0);
    assert!(
        rig.report.reads > 500 && rig.report.writes > 500,
        "{:?}",
        rig.report
    );
}

#[test]
fn a_lost_request_is_found() {
    let mut rig = Rig::new();
    assert_eq!(rig.write_with(Fault::Swallow).expect("nothing yet"), 0);
    assert_eq!(rig.write_with(Fault::None).expect("another one"), 1);
    let lost = rig.lane.overdue(Duration::ZERO);
    assert!(matches!(lost, Some(Problem::Lost { .. })), "{lost:?}");
    assert!(rig.lane.overdue(Duration::from_secs(3600)).is_none());
}

#[test]
fn a_lost_write_is_found() {
    let mut rig = Rig::new();
    rig.write_with(Fault::Skip).expect("it was acknowledged");
    let problem = rig.sweep().expect_err("it was not done");
    let Problem::Wrong(wrong) = problem else {
        panic!("{problem}");
    };
    assert!(matches!(wrong.found, Mismatch::Stale { .. }), "{wrong}");
}

#[test]
fn a_read_that_was_not_done_is_found() {
    let mut rig = Rig::new();
    let work = rig.anywhere(Kind::Read);
    rig.run(work, Fault::None).expect("a good one");
    let problem = rig.run(work, Fault::Skip).expect_err("nothing was read");
    assert!(matches!(problem, Problem::Wrong(_)), "{problem}");
}

#[test]
fn old_data_over_new_is_found() {
    let mut rig = Rig::new();
    let before = rig.device.bytes.clone();
    rig.write_with(Fault::None).expect("a good one");
    rig.device.bytes = before;
    let problem = rig.sweep().expect_err("it came back");
    assert!(problem.to_string().contains("older"), "{problem}");
}

#[test]
fn a_second_completion_is_found() {
    let mut rig = Rig::new();
    rig.write_with(Fault::Twice).expect("the first is good");
    let problem = rig.write_with(Fault::None).expect_err("and then again");
    assert!(matches!(problem, Problem::Doubled { .. }), "{problem}");
}

#[test]
fn torn_and_misplaced_writes_are_found() {
    for fault in [Fault::Tear, Fault::Misplace] {
        let mut rig = Rig::new();
        rig.write_with(fault).expect("it was acknowledged");
        let problem = rig.sweep().expect_err("it was not done");
        assert!(matches!(problem, Problem::Wrong(_)), "{fault:?}: {problem}");
    }
}

#[test]
fn failures_are_found() {
    let mut rig = Rig::new();
    let problem = rig.write_with(Fault::Silent).expect_err("no status");
    assert!(matches!(problem, Problem::NoStatus { .. }), "{problem}");
    let problem = rig.write_with(Fault::Fail).expect_err("it failed");
    assert!(
        matches!(problem, Problem::Failed { status: 1, .. }),
        "{problem}"
    );
}

#[test]
fn a_missing_call_is_found() {
    let mut rig = Rig::new();
    let _ = rig.lane.ring.call.read();
    rig.lane.was_asked();
    rig.lane.call_patience = Duration::from_millis(10);
    rig.write_with(Fault::Quiet).expect("it may come yet");
    std::thread::sleep(Duration::from_millis(20));
    let problem = rig.reap().expect_err("no call");
    assert!(matches!(problem, Problem::NoCall), "{problem}");
}
