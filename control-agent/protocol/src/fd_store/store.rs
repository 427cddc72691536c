//! The process's end of its store.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use nix::unistd::pipe2;

use super::message::{Followed, MAX_HAND_OVER_BYTES, Notification};
use super::name::FdName;
use super::{MAX_FDS, STORE_ENV};
use crate::datagram;
use crate::process::{self, StartError};

/// Words of control data: a header and [`MAX_FDS`] descriptors.
const CONTROL_WORDS: usize = 2 + MAX_FDS / 2;

/// Why something is not stored or not removed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// This process has no store, or took it before.
    #[error("the descriptor store: {0}")]
    Start(#[from] StartError),
    /// rot would refuse it; nothing was sent.
    #[error(
        "the descriptor store has {stored} of at most {limit} descriptors, {more} more don't fit; remove some"
    )]
    Full {
        /// Stored now.
        stored: usize,
        /// The most it takes.
        limit: usize,
        /// How many were to be stored.
        more: usize,
    },
    /// rot is gone, and with it what it stored, unless systemd gives that to the next rot.
    #[error("the descriptor store is closed: rot is gone")]
    Closed,
    /// What rot handed over can't be read.
    #[error("the descriptor store handed over what does not decode")]
    Malformed,
    /// Any other failure of a system call. ETOOMANYREFS: more descriptors are under way than
    /// `RLIMIT_NOFILE` allows; wait for a barrier.
    #[error("the descriptor store failed: {0}")]
    Io(#[from] io::Error),
}

/// What the process before a candidate did to the store.
#[derive(Debug)]
pub enum Change {
    /// It stored these, behind all others and in this order.
    Stored(Vec<(FdName, OwnedFd)>),
    /// It dropped every descriptor of that name.
    Removed(FdName),
}

/// The store. One thread uses it: what is sent is handled in that order.
#[derive(Debug)]
pub struct Store {
    socket: OwnedFd,
    limit: usize,
    /// How many of each name are stored.
    stored: BTreeMap<FdName, usize>,
    taken: Vec<(FdName, OwnedFd)>,
}

/// Closed by rot when it has handled everything that was sent before.
#[derive(Debug)]
pub struct Barrier {
    pipe: OwnedFd,
}

impl AsFd for Barrier {
    /// Polls as hung up (`POLLHUP`) once the barrier is reached or rot is gone; ask
    /// [`Store::reached`] which.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

impl Store {
    /// The store that rot gave this process, and what it holds. Succeeds once, never waits, and
    /// belongs before the lock-in.
    ///
    /// # Errors
    /// [`StoreError::Start`] if rot gave none: whoever started this process by hand.
    pub fn inherited() -> Result<Self, StoreError> {
        let socket = process::inherited_store()?;
        let limit = std::env::var(STORE_ENV).ok();
        let limit = limit.and_then(|limit| limit.parse().ok());
        Self::new(socket, limit.ok_or(StartError::NotAChild)?)
    }

    /// The same over a socket from [`super::Keeper::pair`].
    ///
    /// # Errors
    /// As [`Self::inherited`].
    pub fn new(socket: OwnedFd, limit: usize) -> Result<Self, StoreError> {
        let mut store = Self {
            socket,
            limit,
            stored: BTreeMap::new(),
            taken: Vec::new(),
        };
        while let Some(change) = store.follow()? {
            match change {
                Change::Stored(fds) => store.taken.extend(fds),
                Change::Removed(name) => store.taken.retain(|(taken, _)| *taken != name),
            }
        }
        Ok(store)
    }

    /// For a candidate: the next thing that the process before it has stored or removed since
    /// this one was started; none if there is nothing more for now. Poll [`Self::as_fd`] for input, and once
    /// [`crate::rot::FromRot::Go`] has come read to the end: everything is there then.
    ///
    /// # Errors
    /// [`StoreError::Malformed`], [`StoreError::Closed`] or [`StoreError::Io`].
    pub fn follow(&mut self) -> Result<Option<Change>, StoreError> {
        let mut buffer = [0u8; MAX_HAND_OVER_BYTES];
        let mut control = [0u64; CONTROL_WORDS];
        let flags = MsgFlags::MSG_DONTWAIT;
        let got = match datagram::receive(self.socket.as_fd(), &mut buffer, &mut control, flags) {
            Ok(got) if got.bytes == 0 => return Err(StoreError::Closed),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let followed = Followed::parse(buffer.get(..got.bytes).unwrap_or_default());
        match followed.filter(|_| !got.truncated) {
            Some(Followed::Stored(names)) if names.len() == got.fds.len() => {
                for name in &names {
                    *self.stored.entry(*name).or_default() += 1;
                }
                let fds = names.into_iter().zip(got.fds).collect();
                Ok(Some(Change::Stored(fds)))
            }
            Some(Followed::Removed(name)) if got.fds.is_empty() => {
                self.stored.remove(&name);
                Ok(Some(Change::Removed(name)))
            }
            _ => Err(StoreError::Malformed),
        }
    }

    /// What the processes before this one stored and did not remove, in the order in which it was
    /// stored. It stays stored: remove what you don't take over. Empty from the second call on.
    pub fn taken(&mut self) -> Vec<(FdName, OwnedFd)> {
        mem::take(&mut self.taken)
    }

    /// How many descriptors are stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stored.values().sum()
    }

    /// Is nothing stored?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty()
    }

    /// The most that rot stores for this process.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Stores descriptors behind all others, in this order (they are duplicated; the caller keeps
    /// its own). Several of the same name stay apart and are removed together. Waits while rot has
    /// no time to read.
    ///
    /// # Errors
    /// [`StoreError::Full`] before anything is sent. After another error [`Self::remove`] the
    /// name: of more than [`MAX_FDS`] descriptors the first may be stored.
    pub fn push(&mut self, name: FdName, fds: &[BorrowedFd<'_>]) -> Result<(), StoreError> {
        let (stored, limit, more) = (self.len(), self.limit, fds.len());
        if stored.saturating_add(more) > limit {
            return Err(StoreError::Full {
                stored,
                limit,
                more,
            });
        }
        for part in fds.chunks(MAX_FDS) {
            self.send(Notification::Store { name }, part)?;
            *self.stored.entry(name).or_default() += part.len();
        }
        Ok(())
    }

    /// Drops every descriptor of that name; nothing happens if there is none.
    ///
    /// # Errors
    /// [`StoreError::Closed`] or [`StoreError::Io`]: it stays stored then.
    pub fn remove(&mut self, name: FdName) -> Result<(), StoreError> {
        if self.stored.contains_key(&name) {
            self.send(Notification::Remove { name }, &[])?;
            self.stored.remove(&name);
        }
        Ok(())
    }

    /// Drops everything that is stored and not yet taken over: the start from nothing.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_all(&mut self) -> Result<(), StoreError> {
        self.taken.clear();
        let names: Vec<FdName> = self.stored.keys().copied().collect();
        names.into_iter().try_for_each(|name| self.remove(name))
    }

    /// Asks rot to say when everything sent so far is in its hands, and in systemd's if rot runs
    /// under it. Needed only against the death of rot itself.
    ///
    /// # Errors
    /// [`StoreError::Closed`] or [`StoreError::Io`].
    pub fn barrier(&self) -> Result<Barrier, StoreError> {
        let (pipe, for_rot) = pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
        self.send(Notification::Barrier, &[for_rot.as_fd()])?;
        Ok(Barrier { pipe })
    }

    /// Is the barrier reached within `wait`? A zero `wait` asks without waiting.
    ///
    /// # Errors
    /// [`StoreError::Closed`] if rot is gone: nobody knows what it had handled.
    pub fn reached(&self, barrier: &Barrier, wait: Duration) -> Result<bool, StoreError> {
        if !hung_up(barrier.as_fd(), wait)? {
            return Ok(false);
        }
        if hung_up(self.socket.as_fd(), Duration::ZERO)? {
            return Err(StoreError::Closed);
        }
        Ok(true)
    }

    fn send(&self, what: Notification, fds: &[BorrowedFd<'_>]) -> Result<(), StoreError> {
        let text = what.text();
        datagram::send(self.socket.as_fd(), text.as_bytes(), fds, MsgFlags::empty()).map_err(
            |error| match error.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => StoreError::Closed,
                _ => StoreError::Io(error),
            },
        )
    }
}

impl AsFd for Store {
    /// Polls as hung up (`POLLHUP`) once rot is gone. Input arrives at a candidate alone
    /// ([`Store::follow`]).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn hung_up(fd: BorrowedFd<'_>, wait: Duration) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, PollFlags::empty())];
    poll(
        &mut fds,
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX),
    )?;
    let [fd] = fds;
    Ok(fd
        .revents()
        .is_some_and(|flags| flags.contains(PollFlags::POLLHUP)))
}
