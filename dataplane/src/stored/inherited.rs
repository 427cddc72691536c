//! What a predecessor has left, or is about to leave: a candidate of a live upgrade looks at it while the process
//! that serves goes on writing to it, and takes it over when it is told to.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::fd_store::{Change, FdName, Store, StoreError};
use bulkhead_protocol::process::StartError;
use bulkhead_protocol::workers::Workers;

use super::Fd;
use super::file::{FileError, look_at};
use super::keeper::{Found, KeepError, Keeper};
use super::kinds::Stored;
use super::names::{Name, SLOTS};
use super::volume::FdNumber;
use super::workers;
use crate::memory::Prepared;

/// How long guests' memory is entered ahead at most: 50 to 100 GiB of it.
const PREPARE_WITHIN: Duration = Duration::from_secs(10);

/// The store and what lies in it, before anything of it is taken over. Nothing here writes or removes. A process
/// that rot did not start has no store.
#[derive(Debug)]
pub struct Inherited {
    store: Option<Store>,
    there: Vec<(FdName, Fd)>,
    prepared: BTreeMap<u16, Prepared>,
}

impl Inherited {
    /// What rot gave this process. Belongs before the lock-in, and succeeds once.
    ///
    /// # Errors
    /// What rot hands over can't be read.
    pub fn take() -> Result<Self, StoreError> {
        match Store::inherited() {
            Ok(store) => Ok(Self::of(store)),
            Err(StoreError::Start(StartError::NotAChild)) => Ok(Self {
                store: None,
                there: Vec::new(),
                prepared: BTreeMap::new(),
            }),
            Err(error) => Err(error),
        }
    }

    /// What lies in this store.
    #[must_use]
    pub fn of(mut store: Store) -> Self {
        let there = store.taken().into_iter();
        let there = there.map(|(name, fd)| (name, Arc::new(fd))).collect();
        Self {
            store: Some(store),
            there,
            prepared: BTreeMap::new(),
        }
    }

    /// The store, readable when there is something to [`Inherited::follow`]; none where nothing is kept.
    #[must_use]
    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Whether a predecessor served volumes.
    #[must_use]
    pub fn has_volumes(&self) -> bool {
        let is_state = |name: FdName| matches!(Name::parse(name), Some(Name::State(_)));
        self.there.iter().any(|(name, _)| is_state(*name))
    }

    /// The workers that it had, or is to be followed with.
    #[must_use]
    pub fn workers(&self) -> Option<Workers> {
        let are = |name: FdName| Name::parse(name) == Some(Name::Workers);
        let stored = self.there.iter().rfind(|(name, _)| are(*name));
        stored.and_then(|(_, fd)| workers::read(fd))
    }

    /// Takes in what a predecessor that still serves has stored and removed meanwhile; whether it did anything.
    ///
    /// # Errors
    /// What rot hands over can't be read, or rot is gone.
    pub fn follow(&mut self) -> Result<bool, StoreError> {
        let mut changed = false;
        let Some(store) = &mut self.store else {
            return Ok(changed);
        };
        while let Some(change) = store.follow()? {
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

    /// Maps the memory of the guests that there are now, with its pages, so that it need not be done when they wait.
    /// To be called before the process locks itself in, and again when what is left has changed.
    pub fn prepare(&mut self) {
        let until = Instant::now() + PREPARE_WITHIN;
        let mut prepared = BTreeMap::new();
        for (slot, stored) in self.look() {
            let of: &mut Prepared = prepared.entry(slot).or_default();
            let memory = stored.connection().map(|connection| &connection.memory);
            for region in memory.into_iter().flatten() {
                // What can't be mapped now fails, or not, when the connection is taken over.
                if let Err(error) = of.add(&region.spec(), region.fd.as_fd(), until) {
                    tracing::warn!("guest memory is not mapped ahead: {error}");
                }
            }
        }
        // What was prepared before is let go of after it was taken once more.
        self.prepared = prepared;
    }

    /// What is served now, by slot, as far as they can be made out: the process that serves may be in the
    /// middle of a change. A descriptor that stays is the same value each time.
    #[must_use]
    pub fn look(&self) -> Vec<(u16, Stored<Fd>)> {
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
            let volume = look_at(fd.as_fd()).ok()?.try_map(&mut { find }).ok()?;
            Some((slot, volume))
        };
        states.into_iter().filter_map(volume).collect()
    }

    /// Takes it over ([`Keeper::take`]): nobody else may write or remove anything from now on.
    ///
    /// # Errors
    /// [`KeepError`]: rot is gone, or a descriptor can't be duplicated.
    pub fn take_over(self) -> Result<(Keeper, Found), KeepError> {
        let Some(store) = self.store else {
            return Ok((Keeper::none(), Found::default()));
        };
        let mut remains = Remains {
            prepared: self.prepared,
            ..Remains::default()
        };
        for (name, fd) in self.there {
            remains.sort(name, fd).map_err(FileError::from)?;
        }
        Keeper::take_over(store, remains)
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
    pub(super) deaths: Option<OwnedFd>,
    pub(super) prepared: BTreeMap<u16, Prepared>,
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
            Some(Name::Deaths) => self.deaths = Some(owned(fd)?),
            _ => self.unknown.push(name),
        }
        Ok(())
    }
}
