//! The table: what rot knows about each descriptor in systemd's store, in a memfd beside them.
//!
//! 64 bytes of head, then [`ROWS`] rows of 64 bytes. A row is written by one `pwrite`, so that
//! it is there or not, whenever rot is killed. All numbers are little-endian; what isn't named is zero.
//!
//! | bytes of a row | meaning |
//! | --- | --- |
//! | 0..8 | sequence: the order among all rows; 0: the row is free |
//! | 8..12 | number of the file, as in systemd's name `<role>.<number>` |
//! | 12 | role: 0 keyd, 1 agent, 2 dataplane |
//! | 16..32 | name, zeroes behind it |
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use bulkhead_protocol::fd_store::FdName;
use bulkhead_protocol::rot::Role;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Rows: more than all roles together may store.
pub const ROWS: usize = 20_480;
const ROW_BYTES: usize = 64;
/// The head's first bytes: what this is, and the version of its format.
const MAGIC: [u8; 8] = *b"BHFDTAB1";

/// One descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Its place in the order, from 1.
    pub sequence: u64,
    /// Its file's number.
    pub file: u32,
    /// Whose it is.
    pub role: Role,
    /// Its name.
    pub name: FdName,
}

/// The table.
#[derive(Debug)]
pub struct Table {
    memfd: File,
    free: BTreeSet<usize>,
}

const fn code(role: Role) -> u8 {
    match role {
        Role::Keyd => 0,
        Role::Agent => 1,
        Role::Dataplane => 2,
    }
}

impl Row {
    fn write(&self) -> [u8; ROW_BYTES] {
        let mut bytes = [0; ROW_BYTES];
        let fields: [(usize, &[u8]); 4] = [
            (0, &self.sequence.to_le_bytes()),
            (8, &self.file.to_le_bytes()),
            (12, &[code(self.role)]),
            (16, &self.name.padded()),
        ];
        for (at, field) in fields {
            if let Some(room) = bytes.get_mut(at..at + field.len()) {
                room.copy_from_slice(field);
            }
        }
        bytes
    }

    /// None: the row is free, or no version of rot wrote it.
    fn read(bytes: &[u8; ROW_BYTES]) -> Option<Self> {
        let sequence = u64::from_le_bytes(*bytes.first_chunk()?);
        let role = bytes.get(12)?;
        let role = Role::ALL.into_iter().find(|known| code(*known) == *role)?;
        (sequence != 0).then_some(Self {
            sequence,
            file: u32::from_le_bytes(*bytes.get(8..)?.first_chunk()?),
            role,
            name: FdName::from_padded(bytes.get(16..)?.first_chunk()?).ok()?,
        })
    }
}

fn offset(row: usize) -> u64 {
    ((row + 1) * ROW_BYTES) as u64
}

impl Table {
    /// An empty one of fixed size.
    ///
    /// # Errors
    /// No memfd.
    pub fn new() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let memfd = File::from(memfd_create("bulkhead-fd-table", flags)?);
        memfd.set_len(offset(ROWS))?;
        memfd.write_all_at(&MAGIC, 0)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(Self {
            memfd,
            free: (0..ROWS).collect(),
        })
    }

    /// One that an earlier rot left.
    ///
    /// # Errors
    /// It is of another version, or no table.
    pub fn adopt(memfd: OwnedFd) -> io::Result<Self> {
        let memfd = File::from(memfd);
        let mut magic = [0; MAGIC.len()];
        memfd.read_exact_at(&mut magic, 0)?;
        if magic != MAGIC || memfd.metadata()?.len() != offset(ROWS) {
            return Err(io::Error::other("it is no table of this version of rot"));
        }
        let mut table = Self {
            memfd,
            free: BTreeSet::new(),
        };
        for row in 0..ROWS {
            if table.row(row).is_none() {
                table.free.insert(row);
            }
        }
        Ok(table)
    }

    fn row(&self, at: usize) -> Option<Row> {
        let mut bytes = [0; ROW_BYTES];
        self.memfd.read_exact_at(&mut bytes, offset(at)).ok()?;
        Row::read(&bytes)
    }

    /// The rows that are used, with their places.
    #[must_use]
    pub fn rows(&self) -> Vec<(usize, Row)> {
        let rows = (0..ROWS).filter_map(|at| Some((at, self.row(at)?)));
        rows.collect()
    }

    /// Writes a row and says where.
    ///
    /// # Errors
    /// None is free, or out of memory.
    pub fn add(&mut self, row: &Row) -> io::Result<usize> {
        let at = self.free.pop_first();
        let at = at.ok_or_else(|| io::Error::other("the table of stored descriptors is full"))?;
        if let Err(error) = self.memfd.write_all_at(&row.write(), offset(at)) {
            self.free.insert(at);
            return Err(error);
        }
        Ok(at)
    }

    /// Frees a row.
    pub fn free(&mut self, at: usize) {
        if let Err(error) = self.memfd.write_all_at(&[0; ROW_BYTES], offset(at)) {
            tracing::error!("can't free row {at} of the table of stored descriptors: {error}");
            return;
        }
        self.free.insert(at);
    }
}

impl AsFd for Table {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(sequence: u64) -> Row {
        Row {
            sequence,
            file: 0x0102_0304,
            role: Role::Dataplane,
            name: "d7.mem".parse().unwrap(),
        }
    }

    /// What version 1 looks like, for good.
    #[test]
    fn the_bytes_of_a_row() {
        let bytes = row(9).write();
        let mut expected = [0u8; 64];
        expected[0] = 9;
        expected[8..12].copy_from_slice(&[4, 3, 2, 1]);
        expected[12] = 2;
        expected[16..22].copy_from_slice(b"d7.mem");
        assert_eq!(bytes, expected);
        assert_eq!(Row::read(&bytes), Some(row(9)));
    }

    #[test]
    fn rows_outlive_the_process_and_freed_ones_do_not() {
        let mut table = Table::new().unwrap();
        let places = [5, 3, 8].map(|sequence| table.add(&row(sequence)).unwrap());
        table.free(places[1]);
        let memfd = table.memfd.try_clone().unwrap();
        drop(table);
        let mut table = Table::adopt(memfd.into()).unwrap();
        let found: Vec<u64> = table.rows().iter().map(|(_, row)| row.sequence).collect();
        assert_eq!(found, [5, 8]);
        assert_eq!(table.add(&row(11)).unwrap(), places[1]);
        assert_eq!(table.free.len(), ROWS - 3);
    }

    #[test]
    fn a_full_table_says_so_and_foreign_bytes_are_refused_or_free_rows() {
        let mut table = Table::new().unwrap();
        for sequence in 1..=ROWS {
            table.add(&row(sequence as u64)).unwrap();
        }
        assert!(table.add(&row(1)).is_err());
        table
            .memfd
            .write_all_at(&[0xff; ROW_BYTES], offset(3))
            .unwrap();
        assert_eq!(table.rows().len(), ROWS - 1);
        let memfd = table.memfd.try_clone().unwrap();
        assert_eq!(Table::adopt(memfd.into()).unwrap().free.len(), 1);
        table.memfd.write_all_at(b"BHFDTAB2", 0).unwrap();
        assert!(Table::adopt(table.memfd.into()).is_err());
        assert!(Table::adopt(File::open("/dev/null").unwrap().into()).is_err());
    }
}
