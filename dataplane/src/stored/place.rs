//! A place in rot's store: what is to be remembered is put into it as a whole, and it sees for itself
//! which descriptors are new and which are no longer named.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use bulkhead_protocol::fd_store::StoreError;

use super::Fd;
use super::file::{FileError, StateFile};
use super::keeper::{KeepError, Shared, lock};
use super::kinds::Stored;
use super::names::{Name, SLOTS};
use super::nic::StoredNic;
use super::volume::{FdNumber, Step, StoredCache, StoredConnection, StoredVolume};
use crate::control::MAX_VOLUMES;
use crate::crash_point;
use crate::hand::Hand;
use crate::memory::{Prepared, SharedFlag};

/// Descriptors that a volume has in any store that has room for them: those of a guest with one queue, and some more.
const LEAST_SHARE: usize = 16;

/// A volume's place in the store. Dropping it leaves everything stored, for a successor.
#[derive(Debug)]
pub struct Place(pub(super) Option<Box<Kept>>);

impl Place {
    /// Keeps nothing.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// What is remembered; none: nothing is kept here.
    #[must_use]
    pub fn stored(&self) -> Option<&Stored<Fd>> {
        self.0.as_ref().map(|kept| &kept.stored)
    }

    /// The same of a volume.
    #[must_use]
    pub fn volume(&self) -> Option<&StoredVolume<Fd>> {
        match self.stored()? {
            Stored::Volume(volume) => Some(volume),
            Stored::Nic(_) | Stored::Switch(_) => None,
        }
    }

    /// The connection that is remembered, if there is one.
    #[must_use]
    pub fn connection(&self) -> Option<&StoredConnection<Fd>> {
        self.stored()?.connection()
    }

    /// Whether anything is kept here.
    #[must_use]
    pub fn keeps(&self) -> bool {
        self.0.is_some()
    }

    /// What a worker raises before it answers a flush that failed; a successor finds it raised.
    #[must_use]
    pub fn flush_failed(&self) -> Option<Arc<SharedFlag>> {
        self.0.as_ref().map(|kept| kept.file.flush_failed())
    }

    /// What a thread that works for the volume has in hand.
    #[must_use]
    pub fn hand(&self) -> Hand {
        let slot = self.0.as_ref().map(|kept| kept.slot);
        slot.map_or(Hand::NOTHING, Hand::of)
    }

    /// How often in a row the volume's work has killed the process.
    #[must_use]
    pub fn deaths(&self) -> u32 {
        let kept = self.0.as_ref();
        kept.map_or(0, |kept| lock(&kept.shared).deaths.of_slot(kept.slot))
    }

    /// Remembers something else of the volume: what was granted, its keys, whether it takes frontends.
    ///
    /// # Errors
    /// [`KeepError`]: what was remembered before still is.
    pub fn update(&mut self, change: impl FnOnce(&mut StoredVolume<Fd>)) -> Result<(), KeepError> {
        self.change(|stored| {
            if let Stored::Volume(volume) = stored {
                change(volume);
            }
        })
    }

    /// The same of a network card.
    ///
    /// # Errors
    /// As [`Place::update`].
    pub fn update_nic(&mut self, change: impl FnOnce(&mut StoredNic<Fd>)) -> Result<(), KeepError> {
        self.change(|stored| {
            if let Stored::Nic(nic) = stored {
                change(nic);
            }
        })
    }

    fn change(&mut self, change: impl FnOnce(&mut Stored<Fd>)) -> Result<(), KeepError> {
        let Some(kept) = &mut self.0 else {
            return Ok(());
        };
        let before = kept.stored.clone();
        change(&mut kept.stored);
        kept.write().inspect_err(|_| kept.stored = before)
    }

    /// Remembers the connection as it is now, or that there is none. If it can't be, a successor will
    /// find no connection, and the frontend has to come back: said in the log, once for each.
    pub fn put_connection(&mut self, cache: StoredCache, now: Option<StoredConnection<Fd>>) {
        let Some(kept) = &mut self.0 else {
            return;
        };
        if let Stored::Volume(volume) = &mut kept.stored {
            volume.cache = cache;
        }
        kept.prepared = None;
        if now.is_none() {
            kept.given_up = false;
        }
        let now = now.filter(|_| !kept.given_up);
        if let Some(connection) = kept.stored.connection_mut() {
            *connection = now;
        }
        if let Err(error) = kept.write() {
            kept.give_up(&error);
        }
    }

    /// The message that lies first in the connection's socket is somewhere else now; all else is as it was
    /// put last.
    pub fn mark(&mut self, step: Step) {
        let Some(kept) = &mut self.0 else {
            return;
        };
        if let Some(Some(connection)) = kept.stored.connection_mut() {
            connection.step = step;
            if let Err(error) = kept.write() {
                kept.give_up(&error);
            }
        }
    }

    /// A worker is about to serve a queue that was stopped: from now on its ring and in-flight region say where
    /// it is. To be said before the worker is told.
    pub fn begins(&mut self, queue: u16) {
        let Some(kept) = &mut self.0 else {
            return;
        };
        let Some(Some(connection)) = kept.stored.connection_mut() else {
            return;
        };
        let Some(vring) = connection.vrings.get_mut(usize::from(queue)) else {
            return;
        };
        vring.anew = false;
        if let Err(error) = kept.write() {
            kept.give_up(&error);
        }
    }

    /// The volume is served no more: nothing of it is remembered.
    pub fn remove(mut self) {
        if let Some(kept) = &mut self.0 {
            kept.remove();
        }
    }
}

/// What is behind a place.
#[derive(Debug)]
pub(super) struct Kept {
    shared: Arc<Mutex<Shared>>,
    slot: u16,
    file: StateFile,
    stored: Stored<Fd>,
    /// As it stands in the file.
    written: Option<Stored<FdNumber>>,
    /// Its descriptors in the store, by where the value lies.
    there: BTreeMap<usize, (FdNumber, Fd)>,
    /// The next number.
    next: u32,
    /// This connection could not be remembered, and is not from then on.
    given_up: bool,
    /// Its guest's memory, mapped ahead, until the connection goes on.
    pub(super) prepared: Option<Prepared>,
}

fn key(fd: &Fd) -> usize {
    Arc::as_ptr(fd).addr()
}

impl Kept {
    pub(super) fn new(shared: &Arc<Mutex<Shared>>, stored: Stored<Fd>) -> Result<Self, KeepError> {
        let file = StateFile::create().map_err(FileError::from)?;
        let mut free = lock(shared);
        let slot = (0..SLOTS).find(|slot| !free.taken.contains(slot));
        let slot = slot.ok_or(KeepError::NoPlace)?;
        free.taken.insert(slot);
        free.deaths.forgive(slot);
        drop(free);
        Ok(Self {
            shared: Arc::clone(shared),
            slot,
            file,
            stored,
            written: None,
            there: BTreeMap::new(),
            next: 0,
            given_up: false,
            prepared: None,
        })
    }

    /// The first state; its file is stored last, so that one that is found was written.
    pub(super) fn begin(&mut self) -> Result<(), KeepError> {
        self.write()?;
        let name = Name::State(self.slot).name()?;
        Ok(lock(&self.shared).store.push(name, &[self.file.as_fd()])?)
    }

    /// A predecessor's. If something of its connection is not there, the connection is lost, and why.
    ///
    /// # Errors
    /// Why the volume can't be taken over, and the numbers of what was stored for it.
    pub(super) fn take(
        shared: &Arc<Mutex<Shared>>,
        slot: u16,
        fd: OwnedFd,
        fds: BTreeMap<FdNumber, Fd>,
    ) -> Result<(Self, Option<String>), (String, Vec<FdNumber>)> {
        let numbers = || fds.keys().copied().collect::<Vec<_>>();
        let (file, mut written) =
            StateFile::open(fd).map_err(|error| (error.to_string(), numbers()))?;
        let find = |number: FdNumber| {
            let missing = || format!("its descriptor {} is not stored", number.0);
            fds.get(&number).cloned().ok_or_else(missing)
        };
        let mut trouble = None;
        if let Some(Some(connection)) = written.connection_mut().map(Option::take) {
            match connection.clone().try_map(&mut { find }) {
                Ok(_) => written
                    .connection_mut()
                    .into_iter()
                    .for_each(|place| *place = Some(connection.clone())),
                Err(reason) => {
                    trouble = Some(format!(
                        "the connection of {written} in slot {slot}: {reason}"
                    ));
                }
            }
        }
        let stored = written.clone().try_map(&mut { find });
        let stored = stored.map_err(|reason| (reason, numbers()))?;
        let next = fds
            .keys()
            .next_back()
            .map_or(0, |last| last.0.wrapping_add(1));
        lock(shared).taken.insert(slot);
        let mut kept = Self {
            shared: Arc::clone(shared),
            slot,
            file,
            stored,
            written: trouble.is_none().then_some(written),
            there: fds
                .iter()
                .map(|(n, fd)| (key(fd), (*n, Arc::clone(fd))))
                .collect(),
            next,
            given_up: false,
            prepared: None,
        };
        match kept.write() {
            Ok(()) => Ok((kept, trouble)),
            Err(error) => Err((error.to_string(), numbers())),
        }
    }

    /// Stores what is new, writes the state if it is another, removes what it does not name.
    fn write(&mut self) -> Result<(), KeepError> {
        let stored = self.stored.clone();
        let numbered = stored.try_map(&mut |fd| self.number(&fd));
        let written = numbered.and_then(|numbered| {
            if self.written.as_ref() != Some(&numbered) {
                crash_point!("state.stored");
                self.file.write(&numbered)?;
                self.written = Some(numbered);
            }
            Ok(())
        });
        // What is not named: of a state that was written the old, else the new.
        let result = self.remove_unnamed();
        written.and(result)
    }

    /// Its number; it is stored if it was not.
    fn number(&mut self, fd: &Fd) -> Result<FdNumber, KeepError> {
        if let Some((number, _)) = self.there.get(&key(fd)) {
            return Ok(*number);
        }
        self.check_share()?;
        let number = self.free_number();
        let name = Name::Numbered(self.slot, number).name()?;
        lock(&self.shared).store.push(name, &[fd.as_fd()])?;
        self.there.insert(key(fd), (number, Arc::clone(fd)));
        Ok(number)
    }

    /// A number that is nobody's. One that was somebody's comes again after four billion others.
    fn free_number(&mut self) -> FdNumber {
        loop {
            let number = FdNumber(self.next);
            self.next = self.next.wrapping_add(1);
            if self.there.values().all(|(other, _)| *other != number) {
                return number;
            }
        }
    }

    /// Half of the store is shared out among all volumes that there can be; who needs more has it from the other half,
    /// for as long as there is some. So no frontend takes away what another one needs to be remembered.
    fn check_share(&self) -> Result<(), KeepError> {
        let shared = lock(&self.shared);
        let half = shared.store.limit() / 2;
        let share = (half / MAX_VOLUMES).max(LEAST_SHARE);
        if self.there.len() < share || shared.store.len() < half {
            return Ok(());
        }
        Err(KeepError::Share(self.there.len()))
    }

    fn remove_unnamed(&mut self) -> Result<(), KeepError> {
        let mut named = BTreeSet::new();
        if let Some(written) = self.written.clone() {
            let _: Result<_, ()> = written.try_map(&mut |number| Ok(named.insert(number)));
        }
        let mut gone = Vec::new();
        self.there.retain(|_, (number, _)| {
            let stays = named.contains(number);
            if !stays {
                gone.push(*number);
            }
            stays
        });
        lock(&self.shared).remove_all(self.slot, gone)
    }

    /// The connection is not remembered any more; a state that says so names no new descriptor.
    fn give_up(&mut self, error: &KeepError) {
        if self.given_up {
            return;
        }
        if matches!(error, KeepError::Store(StoreError::Closed)) {
            end_with_rot();
        }
        tracing::error!(
            "{}: its frontend's connection will not outlive this process: {error}",
            self.stored
        );
        self.given_up = true;
        if let Some(connection) = self.stored.connection_mut() {
            *connection = None;
        }
        if let Err(error) = self.write() {
            tracing::error!("{}: {error}", self.stored);
        }
    }

    /// The state first: it must not name what is gone.
    pub(super) fn remove(&mut self) {
        let slot = self.slot;
        let remove = || -> Result<(), KeepError> {
            let mut shared = lock(&self.shared);
            shared.store.remove(Name::State(slot).name()?)?;
            let numbers = self.there.values().map(|(number, _)| *number);
            shared.remove_all(slot, numbers.collect::<Vec<_>>())?;
            shared.taken.remove(&slot);
            Ok(())
        };
        if let Err(error) = remove() {
            tracing::error!("what is served no more stays in the store: {error}");
        }
    }
}

/// rot is gone, and the kernel is about to end this process with it. What it did until then its successor, which
/// may find everything else in systemd's store, would not know: so it does nothing more.
fn end_with_rot() -> ! {
    tracing::error!("rot is gone: this process ends as it is");
    std::process::exit(1)
}
