//! What a guest does to its disk in the tests of whole systems: random requests past the page cache,
//! each result held against a model. Linked static, so that it runs where there are no libraries.
//!
//! `check DEVICE THREADS OPERATIONS` writes, reads, zeroes, discards and flushes at random, each thread in
//! a part of its own, then reads all of it; `rounds DEVICE` does the like for ever and counts, says how long
//! the longest request took (`longest_ms=`), and keeps
//! much of what it has read in memory that nobody but the disk writes to, and looks at it again and again;
//! `fill DEVICE FROM BYTES SEED` writes a pattern that `expect` with the same words finds again;
//! `zeroes DEVICE FROM BYTES` expects zeroes; `reads DEVICE NAME` reads blocks for ever, one after the other,
//! and says every tenth of a second how many there were so far (`NAME=count`). Exit code 0: all was as it has to be.
//!
//! UNSAFETY: two ioctls take a pointer to two integers that live through the call.
#![expect(unsafe_code, reason = "BLKDISCARD and BLKZEROOUT")]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use bulkhead_integration::random::{Random, STAMP_BLOCK, stamp};

/// Unit of all that is done, in bytes.
const BLOCK: usize = STAMP_BLOCK;
/// Longest request in blocks.
const LONGEST: usize = 64;
/// `O_DIRECT` of x86-64.
const O_DIRECT: i32 = 0o40_000;
/// Blocks that `rounds` works on.
const ROUND_BLOCKS: usize = 2048;
/// Requests of a round.
const ROUND_OPERATIONS: usize = 100;
/// Reads that `rounds` keeps, and the blocks of each.
const KEPT: usize = 256;
const KEPT_BLOCKS: usize = 16;

nix::ioctl_write_ptr_bad!(
    /// `BLKDISCARD`: first byte and number of bytes.
    blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
nix::ioctl_write_ptr_bad!(
    /// `BLKZEROOUT`: the same.
    blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Anything: never written, or discarded.
    Any,
    /// Zeroes.
    Zero,
    /// The pattern of this stamp.
    Stamp(u64),
}

/// Memory that direct I/O takes.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(blocks: usize) -> Self {
        let bytes = vec![0; (blocks + 1) * BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start }
    }

    fn blocks(&mut self, count: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + count * BLOCK]
    }
}

/// A part of a device with the model of it.
struct Part {
    device: File,
    first: usize,
    model: Vec<Content>,
    random: Random,
    stamp: u64,
    buffer: Buffer,
}

/// What was read once, where only the disk has written, and what it has to be.
struct Kept {
    buffer: Buffer,
    first: usize,
    content: Vec<Content>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest-io-failed={error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> io::Result<()> {
    match *words {
        ["check", device, threads, operations] => {
            check(device, number(threads)?, number(operations)?)
        }
        ["rounds", device] => rounds(device),
        ["fill", device, from, bytes, seed] => {
            pattern(device, number(from)?, number(bytes)?, number(seed)?, true)
        }
        ["expect", device, from, bytes, seed] => {
            pattern(device, number(from)?, number(bytes)?, number(seed)?, false)
        }
        ["reads", device, name] => reads(device, name),
        ["zeroes", device, from, bytes] => zeroes(device, number(from)?, number(bytes)?),
        _ => Err(io::Error::other("the words are not understood")),
    }
}

fn number(word: &str) -> io::Result<usize> {
    word.parse().map_err(io::Error::other)
}

fn open(device: &str) -> io::Result<(File, usize)> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_DIRECT)
        .open(device)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    let blocks = usize::try_from(bytes).map_err(io::Error::other)? / BLOCK;
    Ok((file, blocks))
}

fn check(device: &str, threads: usize, operations: usize) -> io::Result<()> {
    let (_, blocks) = open(device)?;
    let length = blocks / threads;
    let one = |index: usize| -> io::Result<()> {
        let mut part = Part::open(device, index * length, length)?;
        for _ in 0..operations {
            part.operate()?;
        }
        part.device.sync_data()?;
        part.verify_all()
    };
    std::thread::scope(|scope| {
        let started: Vec<_> = (0..threads)
            .map(|index| scope.spawn(move || one(index)))
            .collect();
        started.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    })
}

fn rounds(device: &str) -> io::Result<()> {
    let mut part = Part::open(device, 0, ROUND_BLOCKS)?;
    let mut kept: Vec<Kept> = (0..KEPT).map(|_| Kept::new()).collect();
    let mut longest = Duration::ZERO;
    for round in 1_u64.. {
        for _ in 0..ROUND_OPERATIONS {
            let began = Instant::now();
            part.operate()?;
            longest = longest.max(began.elapsed());
            let which = part.random.index(KEPT);
            part.keep(&mut kept[which])?;
        }
        kept.iter_mut().try_for_each(Kept::verify)?;
        part.verify_all()?;
        println!("longest_ms={}", longest.as_millis());
        println!("round={round}");
    }
    Ok(())
}

fn reads(device: &str, name: &str) -> io::Result<()> {
    let (file, blocks) = open(device)?;
    let mut buffer = Buffer::new(1);
    let mut random = Random::new(1);
    let mut said = Instant::now();
    for count in 1_u64.. {
        let offset = (random.index(blocks) * BLOCK) as u64;
        file.read_exact_at(buffer.blocks(1), offset)?;
        if said.elapsed() >= Duration::from_millis(100) {
            said = Instant::now();
            println!("{name}={count}");
        }
    }
    Ok(())
}

fn pattern(device: &str, from: usize, bytes: usize, seed: usize, write: bool) -> io::Result<()> {
    let mut part = Part::open(device, from / BLOCK, bytes / BLOCK)?;
    part.model.fill(Content::Stamp(seed as u64));
    if write {
        for at in (0..part.model.len()).step_by(LONGEST) {
            let count = LONGEST.min(part.model.len() - at);
            part.write(at, count, seed as u64)?;
        }
        part.device.sync_data()?;
    }
    part.verify_all()
}

fn zeroes(device: &str, from: usize, bytes: usize) -> io::Result<()> {
    let mut part = Part::open(device, from / BLOCK, bytes / BLOCK)?;
    part.model.fill(Content::Zero);
    part.verify_all()
}

impl Kept {
    fn new() -> Self {
        Self {
            buffer: Buffer::new(KEPT_BLOCKS),
            first: 0,
            content: vec![Content::Any; KEPT_BLOCKS],
        }
    }

    fn verify(&mut self) -> io::Result<()> {
        compare(self.buffer.blocks(KEPT_BLOCKS), self.first, &self.content)
    }
}

/// Holds blocks against what they have to be.
fn compare(bytes: &[u8], first: usize, content: &[Content]) -> io::Result<()> {
    let mut expected = [0; BLOCK];
    for (index, (block, content)) in bytes.chunks_exact(BLOCK).zip(content).enumerate() {
        match content {
            Content::Any => continue,
            Content::Zero => expected.fill(0),
            Content::Stamp(with) => stamp(&mut expected, first + index, *with),
        }
        if block != expected {
            let number = first + index;
            return Err(io::Error::other(format!(
                "block {number} is not what was written last, {content:?}"
            )));
        }
    }
    Ok(())
}

impl Part {
    fn open(device: &str, first: usize, length: usize) -> io::Result<Self> {
        let (file, blocks) = open(device)?;
        if first + length > blocks || length == 0 {
            return Err(io::Error::other(format!("{device} has {blocks} blocks")));
        }
        Ok(Self {
            device: file,
            first,
            model: vec![Content::Any; length],
            random: Random::new(first as u64),
            stamp: first as u64,
            buffer: Buffer::new(LONGEST),
        })
    }

    /// One request at random.
    fn operate(&mut self) -> io::Result<()> {
        let count = 1 + self.random.index(LONGEST.min(self.model.len()));
        let at = self.random.index(self.model.len() - count + 1);
        match self.random.below(20) {
            0..10 => {
                self.stamp += 1 << 32;
                self.write(at, count, self.stamp)
            }
            10..15 => self.verify(at, count),
            15..17 => self.zero(at, count),
            17..19 => self.discard(at, count),
            _ => self.device.sync_data(),
        }
    }

    fn offset(&self, at: usize) -> u64 {
        ((self.first + at) * BLOCK) as u64
    }

    fn write(&mut self, at: usize, count: usize, with: u64) -> io::Result<()> {
        let (offset, first) = (self.offset(at), self.first + at);
        let bytes = self.buffer.blocks(count);
        stamp(bytes, first, with);
        self.device.write_all_at(bytes, offset)?;
        self.model[at..at + count].fill(Content::Stamp(with));
        Ok(())
    }

    fn zero(&mut self, at: usize, count: usize) -> io::Result<()> {
        let range = [self.offset(at), (count * BLOCK) as u64];
        // SAFETY: the request reads two integers, and `range` has them.
        unsafe { blkzeroout(self.device.as_raw_fd(), &raw const range) }?;
        self.model[at..at + count].fill(Content::Zero);
        Ok(())
    }

    fn discard(&mut self, at: usize, count: usize) -> io::Result<()> {
        let range = [self.offset(at), (count * BLOCK) as u64];
        // SAFETY: as above.
        match unsafe { blkdiscard(self.device.as_raw_fd(), &raw const range) } {
            Ok(_) => self.model[at..at + count].fill(Content::Any),
            // Not every disk does it: all is as it was.
            Err(Errno::EOPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn verify(&mut self, at: usize, count: usize) -> io::Result<()> {
        let offset = self.offset(at);
        let bytes = self.buffer.blocks(count);
        self.device.read_exact_at(bytes, offset)?;
        compare(bytes, self.first + at, &self.model[at..at + count])
    }

    /// Looks at what was kept, and reads something else in its place.
    fn keep(&mut self, kept: &mut Kept) -> io::Result<()> {
        kept.verify()?;
        let at = self.random.index(self.model.len() - KEPT_BLOCKS + 1);
        self.device
            .read_exact_at(kept.buffer.blocks(KEPT_BLOCKS), self.offset(at))?;
        kept.first = self.first + at;
        kept.content
            .copy_from_slice(&self.model[at..at + KEPT_BLOCKS]);
        Ok(())
    }

    fn verify_all(&mut self) -> io::Result<()> {
        (0..self.model.len())
            .step_by(LONGEST)
            .try_for_each(|at| self.verify(at, LONGEST.min(self.model.len() - at)))
    }
}
