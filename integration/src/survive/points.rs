//! Arms a point of the data plane at which it is to die (`dataplane/src/crash.rs`): from outside, in its memory,
//! since nothing else of this machine reaches into its sandbox.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;

/// What the switch begins with.
const MAGIC: [u64; 2] = [0x6872_616d_7469_6d62, 0x9e1f_c4a5_d2b7_3880];
/// Where its fields lie.
const ARMED_AT: u64 = 16;
const BEFORE_AT: u64 = 24;
const WHOSE_AT: u64 = 32;
/// A mapping that has more bytes than this is none of a program's variables.
const MOST_BYTES: u64 = 16 << 20;

/// Points along the way of a request.
pub const REQUEST_POINTS: &[&str] = &[
    "fetch.taken",
    "submit.begun",
    "submit.turn",
    "complete.came",
    "complete.landed",
    "publish.noted",
    "publish.shown",
    "publish.clearing",
    "publish.cleared",
    "publish.done",
    "call.made",
    "flush.begun",
    "flush.done",
];

/// Points along the way of a vhost-user message.
pub const MESSAGE_POINTS: &[&str] = &[
    "message.looked",
    "message.applied",
    "state.stored",
    "message.recorded",
    "message.sent",
    "message.marked",
    "message.taken",
];

/// Points along the way of a successor, until it serves.
pub const SUCCESSOR_POINTS: &[&str] = &[
    "start.taken",
    "start.offered",
    "fence.gone",
    "recover.found",
    "recover.taken",
    "start.resumed",
];

/// The switch of a running process.
#[derive(Debug)]
pub struct Switch {
    memory: File,
    at: u64,
}

impl Switch {
    /// Finds it.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if the process has none: a release build; and what opening its memory fails
    /// with, for which one has to be root.
    pub fn find(pid: u32) -> io::Result<Self> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        for line in maps.lines() {
            let Some((from, bytes)) = writable(line) else {
                continue;
            };
            let mut content = vec![0; bytes];
            // Secret memory and device pages can't be read, by nobody.
            if memory.read_exact_at(&mut content, from).is_err() {
                continue;
            }
            if let Some(offset) = position(&content) {
                let at = from + offset as u64;
                return Ok(Self { memory, at });
            }
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("process {pid} has no crash points: it is a release build"),
        ))
    }

    /// Has the process die at the point of this name, after it was passed so many times.
    ///
    /// # Errors
    /// What writing to its memory fails with.
    pub fn arm(&self, point: &str, before: u64) -> io::Result<()> {
        self.set(point, before, 0)
    }

    /// Has the process die at the point of this name when it works for the volume in this slot of its store, as if by a
    /// fault of its own.
    ///
    /// # Errors
    /// What writing to its memory fails with.
    pub fn arm_for(&self, point: &str, slot: u16) -> io::Result<()> {
        self.set(point, 0, u64::from(slot) + 1)
    }

    fn set(&self, point: &str, before: u64, whose: u64) -> io::Result<()> {
        let write = |value: u64, at| self.memory.write_all_at(&value.to_le_bytes(), self.at + at);
        // Nothing is armed while the count is another one's.
        write(0, ARMED_AT)?;
        write(before, BEFORE_AT)?;
        write(whose, WHOSE_AT)?;
        write(hash(point), ARMED_AT)
    }
}

/// Where a private writable mapping begins, and its bytes.
fn writable(line: &str) -> Option<(u64, usize)> {
    let mut words = line.split_whitespace();
    let (range, access) = (words.next()?, words.next()?);
    if !access.starts_with("rw") || !access.ends_with('p') {
        return None;
    }
    let (from, to) = range.split_once('-')?;
    let from = u64::from_str_radix(from, 16).ok()?;
    let bytes = u64::from_str_radix(to, 16).ok()?.checked_sub(from)?;
    let bytes = (bytes <= MOST_BYTES).then_some(bytes)?;
    Some((from, usize::try_from(bytes).ok()?))
}

fn position(content: &[u8]) -> Option<usize> {
    let magic: Vec<u8> = MAGIC.iter().flat_map(|word| word.to_le_bytes()).collect();
    let words = (0..content.len()).step_by(8);
    let is_magic = |at: &usize| content.get(*at..).is_some_and(|c| c.starts_with(&magic));
    words.into_iter().find(is_magic)
}

/// Hash of a point's name (FNV-1a).
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_and_what_is_in_them() {
        let line = "7f00-8f00 rw-p 00001000 00:01 5 /memfd:bulkhead-dataplane";
        assert_eq!(writable(line), Some((0x7f00, 0x1000)));
        assert_eq!(writable("7f00-8f00 r--p 0 0:1 5 /x"), None);
        assert_eq!(writable("7f00-8f00 rw-s 0 0:1 5 /memfd:guest"), None);
        let mut content = vec![0u8; 64];
        assert_eq!(position(&content), None);
        for (i, word) in MAGIC.iter().enumerate() {
            content[24 + 8 * i..32 + 8 * i].copy_from_slice(&word.to_le_bytes());
        }
        assert_eq!(position(&content), Some(24));
        assert_eq!(hash("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
