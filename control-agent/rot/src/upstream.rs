//! systemd's descriptor store behind rot's, so that rot's own death loses nothing.
//!
//! systemd stores an open file once, under the first name it came with, in an order of its own.
//! So what rot needs to know about each (role, name, order, which file) stands in a [`table`], a
//! memfd that lies in systemd's store too; systemd's names say only which file it is:
//! `<role>.<number>`, and `rot.table`. The next rot takes both from its environment ([`found`]).
//!
//! Nothing waits for systemd: what its socket can't take yet is queued, and while the queue is
//! long rot reads no more of what its children store.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod found;
pub mod notify;
pub mod table;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bulkhead_protocol::fd_store::FdName;
use bulkhead_protocol::rot::Role;

use crate::handoff::{Leaving, LeftSystemd};
use crate::replace::Inherited;
use crate::same_file;
use notify::Notify;
use table::{Row, Table};

/// Messages that may wait for systemd before rot reads no more of its children's.
const LONG_QUEUE: usize = 64;

/// Name of the table in systemd's store.
const TABLE_NAME: &str = "rot.table";

/// Where a stored descriptor stands in systemd's store.
#[derive(Debug)]
pub struct Mark {
    /// Its row of the table.
    row: usize,
    /// Its file's number.
    file: u32,
}

/// A descriptor that an earlier rot stored.
#[derive(Debug)]
pub struct Found {
    /// Whose it is.
    pub role: Role,
    /// Its name.
    pub name: FdName,
    /// The descriptor.
    pub fd: Rc<OwnedFd>,
    /// Where it stands.
    pub mark: Mark,
}

/// An open file in systemd's store.
#[derive(Debug)]
struct File {
    number: u32,
    /// Of the role that stored it first.
    name: String,
    fd: Rc<OwnedFd>,
    uses: usize,
}

/// systemd's end.
#[derive(Debug)]
pub struct Upstream {
    notify: Notify,
    table: Table,
    /// In the order of [`same_file::order`].
    files: Vec<File>,
    next_file: u32,
    next_sequence: u64,
}

fn file_name(role: Role, number: u32) -> String {
    format!("{role}.{number:x}")
}

/// The number in a name of systemd's.
fn file_number(name: &str) -> Option<u32> {
    let (role, number) = name.split_once('.')?;
    Role::ALL.iter().find(|known| known.name() == role)?;
    u32::from_str_radix(number, 16).ok()
}

impl Upstream {
    /// Nothing is stored yet but the table.
    ///
    /// # Errors
    /// The table's memfd can't be made.
    pub fn new(notify: Notify) -> io::Result<Self> {
        let table = Table::new()?;
        let mut upstream = Self {
            notify,
            table,
            files: Vec::new(),
            next_file: 0,
            next_sequence: 1,
        };
        let memfd = Rc::new(upstream.table.as_fd().try_clone_to_owned()?);
        upstream.notify.store(TABLE_NAME, memfd);
        Ok(upstream)
    }

    /// Takes over what an earlier rot left: its table and the named files.
    #[must_use]
    pub fn resumed(
        notify: Notify,
        table: Table,
        given: Vec<(String, OwnedFd)>,
    ) -> (Self, Vec<Found>) {
        let mut upstream = Self {
            notify,
            table,
            files: Vec::new(),
            next_file: 0,
            next_sequence: 1,
        };
        for (name, fd) in given {
            match file_number(&name) {
                Some(number) => upstream.take_file(number, name, fd),
                None => upstream.notify.remove(&name),
            }
        }
        let found = upstream.take_rows();
        upstream.remove_unused();
        (upstream, found)
    }

    /// Leaves it to the rot that is executed in the place of this one.
    pub fn leave<'a>(&'a self, leaving: &mut Leaving<'a>) -> LeftSystemd {
        let files = self.files.iter();
        LeftSystemd {
            notify: leaving.number(self.notify.as_fd()),
            table: leaving.number(self.table.as_fd()),
            files: files
                .map(|file| (file.name.clone(), leaving.number(file.fd.as_fd())))
                .collect(),
        }
    }

    /// What the rot before this one left, as [`Self::resumed`].
    ///
    /// # Errors
    /// A descriptor is not open, or the table is of another version.
    pub fn taken_over(
        left: LeftSystemd,
        inherited: &mut Inherited,
    ) -> io::Result<(Self, Vec<Found>)> {
        let notify = Notify::from(inherited.owned(left.notify)?);
        let table = Table::adopt(inherited.owned(left.table)?)?;
        let mut given = Vec::new();
        for (name, number) in left.files {
            given.push((name, inherited.owned(number)?));
        }
        Ok(Self::resumed(notify, table, given))
    }

    fn take_file(&mut self, number: u32, name: String, fd: OwnedFd) {
        self.next_file = self.next_file.max(number.saturating_add(1));
        let fd = Rc::new(fd);
        let (Ok(at) | Err(at)) = self.place(fd.as_fd());
        let file = File {
            number,
            name,
            fd,
            uses: 0,
        };
        self.files.insert(at, file);
    }

    fn take_rows(&mut self) -> Vec<Found> {
        let mut rows = self.table.rows();
        rows.sort_by_key(|(_, row)| row.sequence);
        let mut found = Vec::new();
        for (at, row) in rows {
            self.next_sequence = self.next_sequence.max(row.sequence.saturating_add(1));
            let file = self.files.iter_mut().find(|file| file.number == row.file);
            let Some(file) = file else {
                tracing::warn!(role = %row.role, name = %row.name, "lost: systemd had not stored it when rot died");
                self.table.free(at);
                continue;
            };
            file.uses += 1;
            found.push(Found {
                role: row.role,
                name: row.name,
                fd: Rc::clone(&file.fd),
                mark: Mark {
                    row: at,
                    file: row.file,
                },
            });
        }
        found
    }

    /// What was removed, or added, while rot died.
    fn remove_unused(&mut self) {
        for file in self.files.extract_if(.., |file| file.uses == 0) {
            self.notify.remove(&file.name);
        }
    }

    fn place(&self, fd: BorrowedFd<'_>) -> Result<usize, usize> {
        self.files
            .binary_search_by(|file| same_file::order(file.fd.as_fd(), fd))
    }

    /// Stores a descriptor there too. None: rot alone has it, which was logged.
    pub fn add(&mut self, role: Role, name: FdName, fd: &Rc<OwnedFd>) -> Option<Mark> {
        let (number, known) = match self.place(fd.as_fd()) {
            Ok(at) => (self.files.get(at)?.number, Ok(at)),
            Err(at) => (self.next_file, Err(at)),
        };
        let row = Row {
            sequence: self.next_sequence,
            file: number,
            role,
            name,
        };
        let row = match self.table.add(&row) {
            Ok(row) => row,
            Err(error) => {
                tracing::error!(%role, %name, "would not outlive rot: {error}");
                return None;
            }
        };
        self.next_sequence += 1;
        match known {
            Ok(at) => self.files.get_mut(at)?.uses += 1,
            Err(at) => {
                self.next_file = self.next_file.wrapping_add(1);
                let stored = file_name(role, number);
                self.notify.store(&stored, Rc::clone(fd));
                let file = File {
                    number,
                    name: stored,
                    fd: Rc::clone(fd),
                    uses: 1,
                };
                self.files.insert(at, file);
            }
        }
        Some(Mark { row, file: number })
    }

    /// Drops it there too, and its file with the last that used it.
    pub fn remove(&mut self, mark: Mark) {
        self.table.free(mark.row);
        let at = self.files.iter().position(|file| file.number == mark.file);
        if let Some(at) = at
            && let Some(file) = self.files.get_mut(at)
        {
            file.uses -= 1;
            if file.uses == 0 {
                let file = self.files.remove(at);
                self.notify.remove(&file.name);
            }
        }
    }

    /// systemd closes it when it has handled everything before.
    pub fn barrier(&mut self, fd: OwnedFd) {
        self.notify.barrier(fd);
    }

    /// Sends what waits, as far as systemd has room.
    pub fn flush(&mut self) {
        self.notify.flush();
    }

    /// Is there something to be sent?
    #[must_use]
    pub fn waits(&self) -> bool {
        self.notify.waiting() > 0
    }

    /// May more be stored?
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.notify.waiting() < LONG_QUEUE
    }
}

impl AsFd for Upstream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_read_back_and_others_are_none() {
        for role in Role::ALL {
            assert_eq!(file_number(&file_name(role, 0x1f)), Some(0x1f));
        }
        for other in ["rot.table", "dataplane", "dataplane.x", "stored", ""] {
            assert_eq!(file_number(other), None, "{other}");
        }
    }
}
