//! A child across an upgrade of rot: what the one rot leaves, and how the next takes it over.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use bulkhead_protocol::channel::Channel;
use bulkhead_protocol::fd_store::Keeper;

use super::{Child, HELLO_WITHIN, Running, State};
use crate::handoff::{Leaving, LeftChild, LeftProcess};
use crate::link::Link;
use crate::programs::Program;
use crate::replace::Inherited;

impl Child {
    /// Leaves it to the rot that is executed in the place of this one.
    ///
    /// # Errors
    /// Why not now.
    pub fn leave<'a>(&'a self, leaving: &mut Leaving<'a>) -> Result<LeftChild, String> {
        let process = match self.running() {
            None => None,
            Some(running) => {
                let link = running.link.as_ref();
                if link.is_some_and(|link| link.blocked_since().is_some()) {
                    return Err(format!("{} does not read: try again", self.role()));
                }
                Some(LeftProcess {
                    pid: running.pid,
                    pidfd: leaving.number(running.pidfd.as_fd()),
                    link: link.map(|link| leaving.number(link.as_fd())),
                    keeper: running.keeper.as_ref().map(|k| leaving.number(k.as_fd())),
                    hello: running.hello,
                })
            }
        };
        Ok(LeftChild {
            role: self.role(),
            generation: self.generation,
            vain_starts: self.vain_starts,
            binary: leaving.number(self.program.binary.as_fd()),
            process,
        })
    }

    /// Takes over what the rot before this one left. `program` has the binary that it left.
    ///
    /// # Errors
    /// A descriptor is not open.
    pub fn resumed(
        program: Program,
        left: &LeftChild,
        inherited: &mut Inherited,
        now: Instant,
    ) -> io::Result<Self> {
        let mut child = Self {
            generation: left.generation,
            vain_starts: left.vain_starts,
            ..Self::new(program, now)
        };
        if let Some(process) = &left.process {
            let link = process.link.map(|link| inherited.owned(link)).transpose()?;
            let link = link.map(|link| Link::new(Channel::from(link)));
            let keeper = process.keeper.map(|keeper| inherited.owned(keeper));
            child.state = State::Running(Box::new(Running {
                pid: process.pid,
                pidfd: Rc::new(inherited.owned(process.pidfd)?),
                link: link.transpose()?,
                keeper: keeper.transpose()?.map(Keeper::from),
                hello: process.hello,
                started: now,
                due: (now + HELLO_WITHIN, "it said no Hello"),
                // One that has closed its channel is given the same time by this rot.
                closed: process.link.is_none().then_some(now),
                condemned: false,
                complaints: 0,
            }));
        }
        Ok(child)
    }
}
