//! The processes that rot has: one of each role, and, while the data plane is upgraded, the one that
//! is to take over and those that were taken over from.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::rot::Role;

use crate::child::Child;

/// The place of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seat {
    /// That of a role.
    Of(Role),
    /// The data plane that is to take over.
    Candidate,
    /// A data plane with this process id that serves no more, or never did: it only has to end.
    Retired(u32),
}

/// All of them.
#[derive(Debug)]
pub struct Children {
    keyd: Child,
    dataplane: Child,
    agent: Child,
    /// The data plane that is to take over.
    pub candidate: Option<Child>,
    /// Data planes that were taken over from, or failed to take over, and have not ended yet.
    pub retired: Vec<Child>,
}

impl Children {
    /// One of each role.
    #[must_use]
    pub fn new(keyd: Child, dataplane: Child, agent: Child) -> Self {
        Self {
            keyd,
            dataplane,
            agent,
            candidate: None,
            retired: Vec::new(),
        }
    }

    /// The one of a role.
    #[must_use]
    pub fn get(&self, role: Role) -> &Child {
        match role {
            Role::Keyd => &self.keyd,
            Role::Dataplane => &self.dataplane,
            Role::Agent => &self.agent,
        }
    }

    /// As [`Self::get`], to change it.
    pub fn get_mut(&mut self, role: Role) -> &mut Child {
        match role {
            Role::Keyd => &mut self.keyd,
            Role::Dataplane => &mut self.dataplane,
            Role::Agent => &mut self.agent,
        }
    }

    /// Who has this seat.
    #[must_use]
    pub fn at(&self, seat: Seat) -> Option<&Child> {
        match seat {
            Seat::Of(role) => Some(self.get(role)),
            Seat::Candidate => self.candidate.as_ref(),
            Seat::Retired(pid) => self.retired.iter().find(|child| child.pid() == Some(pid)),
        }
    }

    /// As [`Self::at`], to change it.
    pub fn at_mut(&mut self, seat: Seat) -> Option<&mut Child> {
        match seat {
            Seat::Of(role) => Some(self.get_mut(role)),
            Seat::Candidate => self.candidate.as_mut(),
            Seat::Retired(pid) => {
                let mut retired = self.retired.iter_mut();
                retired.find(|child| child.pid() == Some(pid))
            }
        }
    }

    /// Those of the roles.
    pub fn of_roles(&self) -> impl Iterator<Item = &Child> {
        Role::ALL.into_iter().map(|role| self.get(role))
    }

    /// Every seat that is taken.
    #[must_use]
    pub fn seats(&self) -> Vec<Seat> {
        let roles = Role::ALL.into_iter().map(Seat::Of);
        let candidate = self.candidate.iter().map(|_| Seat::Candidate);
        let retired = self
            .retired
            .iter()
            .filter_map(Child::pid)
            .map(Seat::Retired);
        roles.chain(candidate).chain(retired).collect()
    }

    /// Everybody.
    pub fn all(&self) -> impl Iterator<Item = &Child> {
        self.of_roles().chain(&self.candidate).chain(&self.retired)
    }

    /// The candidate takes the seat of the data plane; who had it is retired.
    pub fn take_over(&mut self) {
        if let Some(candidate) = self.candidate.take() {
            let old = std::mem::replace(&mut self.dataplane, candidate);
            self.retired.push(old);
        }
    }

    /// Drops who has ended and is followed by nobody.
    pub fn drop_ended(&mut self) {
        self.candidate.take_if(|child| child.pid().is_none());
        self.retired.retain(|child| child.pid().is_some());
    }
}
