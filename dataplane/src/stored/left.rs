//! What a predecessor has left, or is about to leave: a candidate of a live upgrade looks at it while the process
//! that serves goes on writing to it, and takes it over when it is told to.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use bulkhead_protocol::fd_store::{Change, FdName, Store, StoreError};
use bulkhead_protocol::workers::Workers;

use super::Fd;
use super::file::{FileError, look_at};
use super::keeper::{Found, KeepError, Keeper};
use super::names::{Name, SLOTS};
use super::volume::{FdNumber, StoredVolume};
use super::workers;

/// What is in the store, before anything of it is taken over. Nothing here writes or removes.
#[derive(Debug)]
pub struct Left {
    store: Store,
    there: Vec<(FdName, Fd)>,
}

impl AsFd for Left {
    /// Readable when there is something to [`Left::follow`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.store.as_fd()
    }
}

impl Left {
    /// What the store has now.
    #[must_use]
    pub fn new(mut store: Store) -> Self {
        let there = store.taken().into_iter();
        let there = there.map(|(name, fd)| (name, Arc::new(fd))).collect();
        Self { store, there }
    }

    /// Takes in what the process that serves has stored and removed meanwhile; whether it did anything.
    ///
    /// # Errors
    /// [`StoreError`]: rot is gone, or says what makes no sense.
    pub fn follow(&mut self) -> Result<bool, StoreError> {
        let mut changed = false;
        while let Some(change) = self.store.follow()? {
            changed = true;
            match change {
                Change::Stored(fds) => {
                    let fds = fds.into_iter();
                    self.there
                        .extend(fds.map(|(name, fd)| (name, Arc::new(fd))));
                }
                Change::Removed(name) => self.there.retain(|(other, _)| *other != name),
            }
        }
        Ok(changed)
    }

    /// The volumes that are served now, as far as they can be made out: the process that serves may be in the
    /// middle of a change. A descriptor that stays is the same value each time.
    #[must_use]
    pub fn look(&self) -> Vec<StoredVolume<Fd>> {
        let mut states = Vec::new();
        let mut numbered = BTreeMap::new();
        for (name, fd) in &self.there {
            match Name::parse(*name) {
                Some(Name::State(slot)) => states.push((slot, fd)),
                Some(Name::Numbered(slot, number)) => {
                    numbered.insert((slot, number), fd);
                }
                _ => {}
            }
        }
        let volume = |(slot, fd): (u16, &Fd)| {
            let find = |number: FdNumber| {
                let found = numbered.get(&(slot, number));
                found.map(|fd| Arc::clone(fd)).ok_or(())
            };
            look_at(fd.as_fd()).ok()?.try_map(&mut { find }).ok()
        };
        states.into_iter().filter_map(volume).collect()
    }

    /// Takes it over: nobody else may write or remove anything from now on. See [`Keeper::take`].
    ///
    /// # Errors
    /// [`KeepError`]: rot is gone, or a descriptor can't be duplicated.
    pub fn take(self) -> Result<(Keeper, Found), KeepError> {
        let mut remains = Remains::default();
        for (name, fd) in self.there {
            remains.sort(name, fd).map_err(FileError::from)?;
        }
        Keeper::take_over(self.store, remains)
    }
}

/// The only one, or one more if somebody else has it, too.
fn owned(fd: Fd) -> io::Result<OwnedFd> {
    Arc::try_unwrap(fd).or_else(|fd| fd.try_clone())
}

/// What was stored, by what it is.
#[derive(Debug, Default)]
pub(super) struct Remains {
    pub(super) states: BTreeMap<u16, OwnedFd>,
    pub(super) numbered: BTreeMap<u16, BTreeMap<FdNumber, Fd>>,
    pub(super) fences: Vec<(u64, OwnedFd)>,
    pub(super) workers: Option<Workers>,
    pub(super) unknown: Vec<FdName>,
}

impl Remains {
    fn sort(&mut self, name: FdName, fd: Fd) -> io::Result<()> {
        match Name::parse(name) {
            Some(Name::State(slot)) if slot < SLOTS => {
                self.states.insert(slot, owned(fd)?);
            }
            Some(Name::Numbered(slot, number)) if slot < SLOTS => {
                let slot = self.numbered.entry(slot).or_default();
                slot.insert(number, fd);
            }
            Some(Name::Fence(generation)) => self.fences.push((generation, owned(fd)?)),
            Some(Name::Workers) => self.workers = workers::read(&fd),
            _ => self.unknown.push(name),
        }
        Ok(())
    }
}
