//! Where blocks live, and their encryption.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::{PoisonError, RwLock};

use bulkhead_crypto::xts::{KEY_BYTES, KeyError};
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

use crate::serve::devices::{Backing, DiskSpec, Xts};
use crate::serve::file::AlignedBuffer;

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes that a request moves at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Bytes of memory under one lock.
const SHARD_BYTES: usize = PIECE_BYTES;

/// Why a disk can't be served.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Its key.
    #[error("the key can't be used: {0}")]
    Key(#[from] KeyError),
    /// Its memory.
    #[error("no memory for the disk or its key: {0}")]
    Memory(io::Error),
    /// Not a storage of the baseline.
    #[error("--reference serves null:, ram: and file: only")]
    ForTests,
    /// Its thread.
    #[error("can't start a thread: {0}")]
    Start(io::Error),
}

/// A disk, shared by the threads of its queues.
#[derive(Debug)]
pub struct Disk {
    /// Size in bytes.
    pub bytes: u64,
    /// Logical block in bytes.
    pub block_bytes: u32,
    /// Queues.
    pub queues: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// What GET_ID answers.
    pub serial: [u8; 20],
    store: Store,
    cipher: Option<(DataUnit, XtsKey)>,
}

#[derive(Debug)]
enum Store {
    Null,
    /// Shards of [`SHARD_BYTES`], the last one shorter.
    Ram(Vec<RwLock<Box<[u8]>>>),
    File(File),
}

/// Buffers of one queue: what the store has, and what the guest sees.
#[derive(Debug)]
pub struct Scratch {
    stored: AlignedBuffer,
    clear: AlignedBuffer,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            stored: AlignedBuffer::new(PIECE_BYTES),
            clear: AlignedBuffer::new(PIECE_BYTES),
        }
    }
}

impl Disk {
    /// A disk.
    ///
    /// # Errors
    /// [`StoreError::Key`], [`StoreError::Memory`].
    pub fn new(spec: DiskSpec) -> Result<Self, StoreError> {
        Ok(Self {
            bytes: spec.backing.bytes(),
            block_bytes: spec.logical_block_bytes,
            queues: spec.queues,
            read_only: spec.read_only,
            serial: spec.serial,
            store: Store::new(spec.backing)?,
            cipher: spec.xts.map(expand).transpose()?,
        })
    }

    /// Size in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.bytes / SECTOR_BYTES
    }

    /// Reads `len` bytes at `offset`, which lie on the disk and are whole blocks, to the guest.
    ///
    /// # Errors
    /// What the store failed with; a short read is a failure.
    pub fn read(
        &self,
        offset: u64,
        len: usize,
        to: &mut impl Write,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        if self.cipher.is_none() && matches!(self.store, Store::Null) {
            return Ok(());
        }
        pieces(offset, len, |offset, len| {
            let stored = part(scratch.stored.bytes_mut(), len)?;
            self.store.read(offset, stored)?;
            let Some((unit, key)) = &self.cipher else {
                return to.write_all(stored);
            };
            let clear = part(scratch.clear.bytes_mut(), len)?;
            key.decrypt(*unit, offset / u64::from(unit.bytes()), stored, clear)
                .map_err(io::Error::other)?;
            to.write_all(clear)
        })
    }

    /// Writes `len` bytes from the guest at `offset`; the range is as in [`Disk::read`].
    ///
    /// # Errors
    /// What the store failed with; a short write is a failure.
    pub fn write(
        &self,
        offset: u64,
        len: usize,
        from: &mut impl Read,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        if self.cipher.is_none() && matches!(self.store, Store::Null) {
            return Ok(());
        }
        pieces(offset, len, |offset, len| {
            let stored = part(scratch.stored.bytes_mut(), len)?;
            if let Some((unit, key)) = &self.cipher {
                let clear = part(scratch.clear.bytes_mut(), len)?;
                from.read_exact(clear)?;
                key.encrypt(*unit, offset / u64::from(unit.bytes()), clear, stored)
                    .map_err(io::Error::other)?;
            } else {
                from.read_exact(stored)?;
            }
            self.store.write(offset, stored)
        })
    }

    /// Makes what was written stable.
    ///
    /// # Errors
    /// What `fdatasync` failed with.
    pub fn flush(&self) -> io::Result<()> {
        match &self.store {
            Store::File(file) => file.sync_data(),
            Store::Null | Store::Ram(_) => Ok(()),
        }
    }
}

impl Store {
    fn new(backing: Backing) -> Result<Self, StoreError> {
        match backing {
            Backing::Null { .. } => Ok(Self::Null),
            Backing::Ram { bytes } => Ok(Self::Ram(shards(bytes))),
            Backing::File { file, .. } => Ok(Self::File(file)),
            Backing::VolatileCache { .. }
            | Backing::Delay { .. }
            | Backing::Hang { .. }
            | Backing::Error { .. } => Err(StoreError::ForTests),
        }
    }

    /// No longer than a piece, at a multiple of one or within one.
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Null => Ok(()),
            Self::File(file) => file.read_exact_at(to, offset),
            Self::Ram(shards) => each_shard(shards, offset, to.len(), |shard, within, at| {
                let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
                let from = shard.get(within).ok_or(io::ErrorKind::UnexpectedEof)?;
                let to = to.get_mut(at).ok_or(io::ErrorKind::UnexpectedEof)?;
                to.copy_from_slice(from);
                Ok(())
            }),
        }
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        match self {
            Self::Null => Ok(()),
            Self::File(file) => file.write_all_at(from, offset),
            Self::Ram(shards) => each_shard(shards, offset, from.len(), |shard, within, at| {
                let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
                let to = shard.get_mut(within).ok_or(io::ErrorKind::WriteZero)?;
                to.copy_from_slice(from.get(at).ok_or(io::ErrorKind::WriteZero)?);
                Ok(())
            }),
        }
    }
}

fn expand(xts: Xts) -> Result<(DataUnit, XtsKey), StoreError> {
    let arena = SecretArena::new(1).map_err(StoreError::Memory)?;
    let key: &[u8; KEY_BYTES] = xts
        .key
        .as_bytes()
        .try_into()
        .map_err(|_| StoreError::Memory(io::ErrorKind::InvalidData.into()))?;
    Ok((xts.unit, XtsKey::new(&arena, key)?))
}

fn shards(bytes: u64) -> Vec<RwLock<Box<[u8]>>> {
    let shard = SHARD_BYTES as u64;
    (0..bytes.div_ceil(shard))
        .map(|i| shard.min(bytes - i * shard))
        .map(|len| vec![0; usize::try_from(len).unwrap_or(SHARD_BYTES)])
        .map(|bytes| RwLock::new(bytes.into_boxed_slice()))
        .collect()
}

/// Calls `run` for each shard that a range touches, with the range within the shard and that within
/// the buffer.
fn each_shard(
    shards: &[RwLock<Box<[u8]>>],
    offset: u64,
    len: usize,
    mut run: impl FnMut(&RwLock<Box<[u8]>>, Range<usize>, Range<usize>) -> io::Result<()>,
) -> io::Result<()> {
    let offset = usize::try_from(offset).map_err(io::Error::other)?;
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let within = at % SHARD_BYTES;
        let count = (SHARD_BYTES - within).min(len - done);
        let shard = shards.get(at / SHARD_BYTES);
        let shard = shard.ok_or(io::ErrorKind::UnexpectedEof)?;
        run(shard, within..within + count, done..done + count)?;
        done += count;
    }
    Ok(())
}

/// Calls `run` for each piece of a range.
fn pieces(
    offset: u64,
    len: usize,
    mut run: impl FnMut(u64, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let count = PIECE_BYTES.min(len - done);
        run(offset + done as u64, count)?;
        done += count;
    }
    Ok(())
}

fn part(buffer: &mut [u8], len: usize) -> io::Result<&mut [u8]> {
    let part = buffer.get_mut(..len);
    part.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use bulkhead_crypto::SecretMemory;

    use super::*;

    const BYTES: u64 = 3 << 20;

    fn disk(backing: Backing, encrypted: bool) -> Disk {
        let mut key = SecretMemory::new(KEY_BYTES).expect("secret memory");
        key.as_mut_bytes()[..32].fill(1);
        let spec = DiskSpec {
            backing,
            xts: encrypted.then_some(Xts {
                unit: DataUnit::B4096,
                key,
                rekey: None,
            }),
            logical_block_bytes: 4096,
            queues: 1,
            read_only: false,
            discard: false,
            serial: [0; 20],
        };
        Disk::new(spec).expect("disk")
    }

    fn file() -> Backing {
        let file = tempfile::tempfile().expect("file");
        file.set_len(BYTES).expect("size");
        Backing::File {
            file,
            bytes: BYTES,
            direct: false,
        }
    }

    /// Across pieces and shards, at an offset that is a multiple of neither.
    #[test]
    fn what_was_written_is_read() {
        for backing in [file, || Backing::Ram { bytes: BYTES }] {
            for encrypted in [false, true] {
                let disk = disk(backing(), encrypted);
                let mut scratch = Scratch::default();
                let (offset, len) = (0xf_f000, (1 << 20) + 0x2000);
                let data: Vec<u8> = (0u8..=255).cycle().take(len).collect();
                disk.write(offset, len, &mut Cursor::new(&data), &mut scratch)
                    .expect("write");
                let mut back = Vec::new();
                disk.read(offset, len, &mut back, &mut scratch)
                    .expect("read");
                assert!(back == data, "{disk:?}");
                let mut stored = vec![0; len];
                disk.store.read(offset, &mut stored[..4096]).expect("read");
                assert_eq!(stored[..4096] == data[..4096], !encrypted);
            }
        }
    }

    #[test]
    fn past_the_end_is_an_error() {
        for backing in [file, || Backing::Ram { bytes: BYTES }] {
            let disk = disk(backing(), false);
            let mut scratch = Scratch::default();
            let mut back = Vec::new();
            let read = disk.read(BYTES - 4096, 8192, &mut back, &mut scratch);
            assert!(read.is_err());
        }
    }
}
