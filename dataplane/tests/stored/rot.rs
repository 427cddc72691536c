//! rot's end of the store: keeps what is sent, and gives it to the next process.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_protocol::fd_store::message::Notification;
use bulkhead_protocol::fd_store::{self, FdName, Store};

/// What the first process stores, of whatever it serves.
pub const DEATHS: &str = "all.deaths";

/// A message and what came with it.
pub type Sent = (Notification, Vec<OwnedFd>);

pub fn copy(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().expect("dup")
}

pub struct Rot {
    socket: Option<fd_store::Keeper>,
    candidate: Option<fd_store::Keeper>,
    pub stored: Vec<(FdName, OwnedFd)>,
    pub limit: usize,
}

impl Rot {
    pub fn new() -> Self {
        Self {
            socket: None,
            candidate: None,
            stored: Vec::new(),
            limit: 4096,
        }
    }

    /// Takes what was sent; the messages, in words, but for [`DEATHS`].
    pub fn settle(&mut self) -> Vec<String> {
        let sent = self.receive();
        let said = sent.into_iter().map(|sent| self.apply(sent));
        said.filter(|said| !said.ends_with(DEATHS)).collect()
    }

    /// What was sent, before anything is done about it.
    pub fn receive(&mut self) -> Vec<Sent> {
        let mut sent = Vec::new();
        if let Some(socket) = &self.socket {
            while let Ok(Some(received)) = socket.receive() {
                sent.push((received.notification.expect("a message"), received.fds));
            }
        }
        sent
    }

    /// Does what a message says.
    pub fn apply(&mut self, (notification, fds): Sent) -> String {
        match notification {
            Notification::Store { name } => {
                if let Some(candidate) = &self.candidate {
                    let all: Vec<_> = fds.iter().map(|fd| (name, fd.as_fd())).collect();
                    candidate.hand_over(&all).expect("room");
                }
                self.stored.extend(fds.into_iter().map(|fd| (name, fd)));
                format!("+{name}")
            }
            Notification::Remove { name } => {
                if let Some(candidate) = &self.candidate {
                    candidate.hand_removal(name).expect("room");
                }
                self.stored.retain(|(other, _)| *other != name);
                format!("-{name}")
            }
            Notification::Barrier => "barrier".to_owned(),
        }
    }

    /// One that keeps the same.
    pub fn try_clone(&self) -> Self {
        Self {
            socket: None,
            candidate: None,
            stored: self.stored.iter().map(|(n, fd)| (*n, copy(fd))).collect(),
            limit: self.limit,
        }
    }

    /// The store of the next process.
    pub fn start(&mut self) -> Store {
        let limit = self.limit;
        Store::new(self.start_elsewhere(), limit).expect("a store")
    }

    /// The socket of its store.
    pub fn start_elsewhere(&mut self) -> OwnedFd {
        let (socket, theirs) = self.hand_over();
        self.socket = Some(socket);
        theirs
    }

    fn hand_over(&mut self) -> (fd_store::Keeper, OwnedFd) {
        self.settle();
        let (socket, theirs) = fd_store::Keeper::pair().expect("a pair");
        let all: Vec<_> = self.stored.iter().map(|(n, fd)| (*n, fd.as_fd())).collect();
        socket.hand_over(&all).expect("room");
        (socket, theirs)
    }

    /// The store of a process beside the one that serves, which hears of what that one does.
    pub fn start_candidate(&mut self) -> Store {
        let (socket, theirs) = self.hand_over();
        self.candidate = Some(socket);
        Store::new(theirs, self.limit).expect("a store")
    }

    /// The candidate takes over.
    pub fn promote(&mut self) {
        self.settle();
        self.socket = self.candidate.take();
    }

    /// The names of what is stored, but for [`DEATHS`].
    pub fn names(&mut self) -> Vec<String> {
        self.settle();
        let names = self.stored.iter().map(|(name, _)| name.to_string());
        let mut names: Vec<_> = names.filter(|name| name != DEATHS).collect();
        names.sort();
        names
    }
}
