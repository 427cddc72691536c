//! What the children store with rot: descriptors by role, in the order in which they came.
//!
//! rot holds them and hands them on, nothing else: it never polls, reads, writes or maps one, and
//! it never looks at what one is. (Closing one is what it can't avoid. A file that blocks its
//! closer, as FUSE can make one, would hold rot up: the data plane stores no such file.)
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use bulkhead_protocol::fd_store::FdName;
use bulkhead_protocol::fd_store::keeper::Received;
use bulkhead_protocol::fd_store::message::Notification;
use bulkhead_protocol::rot::Role;

use crate::handoff::{Handoff, Leaving, LeftStored, LeftSystemd};
use crate::replace::Inherited;
use crate::upstream::{Found, Mark, Upstream};

/// Most descriptors of the data plane: 256 devices with 64 each, which is one of 16 queues (three
/// eventfds each) with its file, key, state, connection, in-flight region and some guest memory.
const MOST_OF_DATAPLANE: u64 = 16_384;
/// Most descriptors of another role.
const MOST_OF_OTHERS: u64 = 256;

/// How many descriptors rot stores of a role if it may have `files` open: never so many that
/// none is left for what rot itself needs.
#[must_use]
pub fn limit(role: Role, files: u64) -> usize {
    let limit = match role {
        Role::Dataplane => MOST_OF_DATAPLANE.min(files / 2),
        Role::Keyd | Role::Agent => MOST_OF_OTHERS.min(files / 16),
    };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// What a message of a child's changed, for a candidate that follows it.
#[derive(Debug)]
pub enum Change {
    /// Nothing that is stored.
    Nothing,
    /// These were stored under a name.
    Stored(FdName, Vec<Rc<OwnedFd>>),
    /// Everything of a name was dropped.
    Removed(FdName),
}

/// One stored descriptor.
#[derive(Debug)]
struct Entry {
    name: FdName,
    fd: Rc<OwnedFd>,
    /// Where it stands in systemd's store.
    mark: Option<Mark>,
}

#[derive(Debug)]
struct RoleStore {
    role: Role,
    limit: usize,
    entries: Vec<Entry>,
}

/// The stores of all roles.
#[derive(Debug)]
pub struct Stores {
    roles: [RoleStore; 3],
    upstream: Option<Upstream>,
}

impl Stores {
    /// What an earlier rot left with systemd, or nothing. `files`: how many rot may have open.
    #[must_use]
    pub fn new(files: u64, upstream: Option<Upstream>, found: Vec<Found>) -> Self {
        let mut stores = Self {
            roles: Role::ALL.map(|role| RoleStore {
                role,
                limit: limit(role, files),
                entries: Vec::new(),
            }),
            upstream,
        };
        for Found {
            role,
            name,
            fd,
            mark,
        } in found
        {
            let mark = Some(mark);
            stores.of_mut(role).push(Entry { name, fd, mark });
        }
        stores
    }

    /// Leaves them to the rot that is executed in the place of this one.
    ///
    /// # Errors
    /// Why not now.
    pub fn leave<'a>(
        &'a self,
        leaving: &mut Leaving<'a>,
        handoff: &mut Handoff,
    ) -> Result<(), String> {
        for RoleStore { role, entries, .. } in &self.roles {
            // The others are found in systemd's table again.
            for entry in entries.iter().filter(|entry| entry.mark.is_none()) {
                handoff.stored.push(LeftStored {
                    role: *role,
                    name: entry.name.to_string(),
                    fd: leaving.number(entry.fd.as_fd()),
                });
            }
        }
        handoff.systemd = match &self.upstream {
            Some(upstream) if upstream.waits() => {
                return Err("systemd has not taken all that is stored: try again".to_owned());
            }
            Some(upstream) => Some(upstream.leave(leaving)),
            None => None,
        };
        Ok(())
    }

    /// Those that the rot before this one left.
    ///
    /// # Errors
    /// A descriptor is not open, or what it left makes no sense.
    pub fn resumed(
        files: u64,
        stored: Vec<LeftStored>,
        systemd: Option<LeftSystemd>,
        inherited: &mut Inherited,
    ) -> io::Result<Self> {
        let systemd = systemd.map(|left| Upstream::taken_over(left, inherited));
        let (upstream, found) = systemd.transpose()?.unzip();
        let mut stores = Self::new(files, upstream, found.unwrap_or_default());
        for LeftStored { role, name, fd } in stored {
            let name = name.parse().map_err(io::Error::other)?;
            let fd = inherited.shared(fd)?;
            stores.of_mut(role).push(Entry {
                name,
                fd,
                mark: None,
            });
        }
        Ok(stores)
    }

    fn of(&self, role: Role) -> &RoleStore {
        let [first, second, third] = &self.roles;
        match role {
            role if role == first.role => first,
            role if role == second.role => second,
            _ => third,
        }
    }

    fn of_mut(&mut self, role: Role) -> &mut Vec<Entry> {
        let [first, second, third] = &mut self.roles;
        let store = match role {
            role if role == first.role => first,
            role if role == second.role => second,
            _ => third,
        };
        &mut store.entries
    }

    /// What the next process of this role gets, in order.
    #[must_use]
    pub fn stored(&self, role: Role) -> Vec<(FdName, BorrowedFd<'_>)> {
        let entries = self.of(role).entries.iter();
        entries
            .map(|entry| (entry.name, entry.fd.as_fd()))
            .collect()
    }

    /// systemd's end, if rot runs under it.
    #[must_use]
    pub fn upstream(&self) -> Option<&Upstream> {
        self.upstream.as_ref()
    }

    /// Passes on to systemd what waits.
    pub fn flush(&mut self) {
        if let Some(upstream) = &mut self.upstream {
            upstream.flush();
        }
    }

    /// May the children's messages be read? Not while systemd has not taken what they caused, so
    /// that no queue grows without bound.
    #[must_use]
    pub fn takes(&self) -> bool {
        self.upstream.as_ref().is_none_or(Upstream::has_room)
    }

    /// Carries out a message.
    ///
    /// # Errors
    /// Why it is refused. Nothing has changed then, and what came with it is closed.
    pub fn handle(&mut self, role: Role, received: Received) -> Result<Change, String> {
        let Received { notification, fds } = received;
        match notification.map_err(|error| error.to_string())? {
            Notification::Store { name } => {
                let stored = self.store(role, name, fds)?;
                Ok(Change::Stored(name, stored))
            }
            Notification::Remove { name } => {
                self.remove(role, |entry| entry.name == name);
                Ok(Change::Removed(name))
            }
            Notification::Barrier => {
                // Without systemd everything before was handled: it closes here.
                if let Some(upstream) = &mut self.upstream {
                    fds.into_iter().for_each(|fd| upstream.barrier(fd));
                }
                Ok(Change::Nothing)
            }
        }
    }

    fn store(
        &mut self,
        role: Role,
        name: FdName,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<Rc<OwnedFd>>, String> {
        let RoleStore { limit, entries, .. } = self.of(role);
        let stored = entries.len();
        if stored.saturating_add(fds.len()) > *limit {
            return Err(format!(
                "the store is full: {stored} of at most {limit} descriptors, {} more of {name} are closed",
                fds.len()
            ));
        }
        let fds: Vec<Rc<OwnedFd>> = fds.into_iter().map(Rc::new).collect();
        for fd in &fds {
            let upstream = self.upstream.as_mut();
            let mark = upstream.and_then(|upstream| upstream.add(role, name, fd));
            let fd = Rc::clone(fd);
            self.of_mut(role).push(Entry { name, fd, mark });
        }
        Ok(fds)
    }

    fn remove(&mut self, role: Role, which: impl Fn(&Entry) -> bool) {
        let removed: Vec<Entry> = self
            .of_mut(role)
            .extract_if(.., |entry| which(entry))
            .collect();
        if let Some(upstream) = &mut self.upstream {
            for mark in removed.into_iter().filter_map(|entry| entry.mark) {
                upstream.remove(mark);
            }
        }
    }

    /// Stores something of rot's own for a role.
    ///
    /// # Errors
    /// The store is full; what was to be stored is closed.
    pub fn put(&mut self, role: Role, name: FdName, fds: Vec<OwnedFd>) -> Result<(), String> {
        self.store(role, name, fds).map(drop)
    }

    /// Drops what a role has of a name.
    pub fn forget(&mut self, role: Role, name: FdName) {
        self.remove(role, |entry| entry.name == name);
    }

    /// Drops all of a role's: no process of it can be started with them. Says how many there were.
    pub fn clear(&mut self, role: Role) -> usize {
        let stored = self.of(role).entries.len();
        self.remove(role, |_| true);
        stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_leave_rot_room() {
        assert_eq!(limit(Role::Dataplane, 524_288), 16_384);
        assert_eq!(limit(Role::Dataplane, 20_000), 10_000);
        assert_eq!(limit(Role::Dataplane, 1024), 512);
        assert_eq!(limit(Role::Keyd, 524_288), 256);
        assert_eq!(limit(Role::Agent, 1024), 64);
    }
}
