//! Which descriptors are in rot's store, and when they come and go.
//!
//! A [`Place`] is a volume's part of the store. New descriptors are stored before the state that names them is written, and old ones are removed after it: a
//! state that can be read names nothing that is not there. What no state names is removed by the successor.
//!
//! A process that has no store (`serve`, tests) has places that keep nothing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::fd_store::{Store, StoreError};
use bulkhead_protocol::identity::InvalidName;
use bulkhead_protocol::workers::Workers;

use super::Fd;
use super::deaths::Deaths;
use super::file::FileError;
use super::inherited::{Inherited, Remains};
use super::kinds::Stored;
use super::names::{Name, SLOTS};
use super::place::{Kept, Place};
use super::volume::FdNumber;
use super::workers;
use crate::memory::SharedWords;

/// Why something is not remembered. What was remembered before still is.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// rot does not store it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It does not go into its memfd.
    #[error(transparent)]
    File(#[from] FileError),
    /// There are as many volumes as can be.
    #[error("there is no place for another volume: {SLOTS} are served")]
    NoPlace,
    /// The store is half full, and this volume has its share of the rest.
    #[error("its {0} descriptors are its share of rot's store, and the rest is for other volumes")]
    Share(usize),
    /// A number that is too long for a name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// What all places share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) store: Store,
    /// Slots that are somebody's.
    pub(super) taken: BTreeSet<u16>,
    /// Which volumes kill.
    pub(super) deaths: Deaths,
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This process's part of rot's store; a handle that may be cloned.
#[derive(Debug, Clone)]
pub struct Keeper {
    shared: Option<Arc<Mutex<Shared>>>,
}

/// What a predecessor left.
#[derive(Debug, Default)]
pub struct Found {
    /// What it served ([`Place::stored`]), by slot.
    pub places: Vec<Place>,
    /// The read ends of earlier processes' fences, with their generations. They stay stored.
    pub fences: Vec<(u64, OwnedFd)>,
    /// The workers that it had. They stay stored.
    pub workers: Option<Workers>,
    /// What can't be taken over, for the log. It is no longer stored.
    pub lost: Vec<String>,
}

impl Keeper {
    /// Keeps nothing.
    #[must_use]
    pub fn none() -> Self {
        Self { shared: None }
    }

    /// Takes over what the predecessor left. What no state names, and every state that can't be read, is
    /// removed from the store.
    ///
    /// # Errors
    /// [`KeepError::Store`]: rot is gone.
    pub fn take(store: Store) -> Result<(Self, Found), KeepError> {
        Inherited::of(store).take_over()
    }

    /// The same of what was sorted.
    pub(super) fn take_over(
        mut store: Store,
        mut remains: Remains,
    ) -> Result<(Self, Found), KeepError> {
        let shared = Shared {
            deaths: take_deaths(&mut store, remains.deaths.take())?,
            store,
            taken: BTreeSet::new(),
        };
        let shared = Arc::new(Mutex::new(shared));
        let mut found = Found {
            fences: remains.fences,
            workers: remains.workers,
            ..Found::default()
        };
        for (slot, fd) in remains.states {
            let fds = remains.numbered.remove(&slot).unwrap_or_default();
            match Kept::take(&shared, slot, fd, fds) {
                Ok((mut kept, trouble)) => {
                    kept.prepared = remains.prepared.remove(&slot);
                    found.places.push(Place(Some(Box::new(kept))));
                    found.lost.extend(trouble);
                }
                Err((reason, fds)) => {
                    found
                        .lost
                        .push(format!("the volume in slot {slot}: {reason}"));
                    let mut shared = lock(&shared);
                    shared.store.remove(Name::State(slot).name()?)?;
                    shared.remove_all(slot, fds)?;
                }
            }
        }
        let mut rest = lock(&shared);
        // Of slots without a state.
        for (slot, fds) in remains.numbered {
            rest.remove_all(slot, fds.into_keys())?;
        }
        for name in remains.unknown {
            rest.store.remove(name)?;
        }
        drop(rest);
        let shared = Some(shared);
        Ok((Self { shared }, found))
    }

    /// Which volumes kill; none where there is no store. ([`SharedWords`] is where threads blame one.)
    #[must_use]
    pub fn blamed(&self) -> Option<Arc<SharedWords>> {
        let shared = self.shared.as_ref();
        shared.map(|shared| lock(shared).deaths.words())
    }

    /// Another program goes on: what volumes did to the one before does not count.
    pub fn forgive_all(&self) {
        if let Some(shared) = &self.shared {
            lock(shared).deaths.forgive_all();
        }
    }

    /// Whether there is a store.
    #[must_use]
    pub fn keeps(&self) -> bool {
        self.shared.is_some()
    }

    /// A place for what is served from now on.
    ///
    /// # Errors
    /// [`KeepError`]; nothing of it is stored then.
    pub fn place(&self, stored: impl Into<Stored<Fd>>) -> Result<Place, KeepError> {
        let Some(shared) = &self.shared else {
            return Ok(Place::none());
        };
        let mut kept = Kept::new(shared, stored.into())?;
        match kept.begin() {
            Ok(()) => Ok(Place(Some(Box::new(kept)))),
            Err(error) => {
                kept.remove();
                Err(error)
            }
        }
    }

    /// Stores the read end of this process's fence.
    ///
    /// # Errors
    /// [`KeepError`]; it is not stored then.
    pub fn keep_fence(&self, generation: u64, read_end: BorrowedFd<'_>) -> Result<(), KeepError> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        let name = Name::Fence(generation).name()?;
        Ok(lock(shared).store.push(name, &[read_end])?)
    }

    /// Stores how many workers there are, in the place of what was stored of that.
    ///
    /// # Errors
    /// [`KeepError`]; nothing of it is stored then.
    pub fn keep_workers(&self, now: &Workers) -> Result<(), KeepError> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        let name = Name::Workers.name()?;
        let fd = workers::write(now).map_err(FileError::from)?;
        let mut shared = lock(shared);
        shared.store.remove(name)?;
        Ok(shared.store.push(name, &[fd.as_fd()])?)
    }

    /// Removes a fence that has hung up.
    ///
    /// # Errors
    /// [`KeepError`]; it stays stored then.
    pub fn remove_fence(&self, generation: u64) -> Result<(), KeepError> {
        let Some(shared) = &self.shared else {
            return Ok(());
        };
        let name = Name::Fence(generation).name()?;
        Ok(lock(shared).store.remove(name)?)
    }
}

/// The deaths that a predecessor left, counted; else none, where a successor finds them.
fn take_deaths(store: &mut Store, left: Option<OwnedFd>) -> Result<Deaths, KeepError> {
    let name = Name::Deaths.name()?;
    if let Some(fd) = left {
        match Deaths::open(fd) {
            Ok(deaths) => {
                deaths.count_all();
                return Ok(deaths);
            }
            Err(error) => {
                tracing::error!("which volumes have killed the process is not known: {error}");
                store.remove(name)?;
            }
        }
    }
    let deaths = Deaths::create().map_err(FileError::from)?;
    store.push(name, &[deaths.as_fd()])?;
    Ok(deaths)
}

impl Shared {
    /// Descriptors of a slot that nobody names any more.
    pub(super) fn remove_all(
        &mut self,
        slot: u16,
        numbers: impl IntoIterator<Item = FdNumber>,
    ) -> Result<(), KeepError> {
        for number in numbers {
            let name = Name::Numbered(slot, number).name()?;
            self.store.remove(name)?;
        }
        Ok(())
    }
}
