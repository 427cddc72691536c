//! What a verified load finds wrong.

use std::fmt;
use std::time::Duration;

use super::journal::{Work, Wrong};
use crate::disk::DiskError;
use crate::driver::DriverError;

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// A read did not find what was acknowledged.
    #[error("{0}")]
    Wrong(#[from] Wrong),
    /// The device used a chain that it does not have: it was done already.
    #[error("a completion for {id:#x}, which is not under way: it was completed twice")]
    Doubled {
        /// Head or id of the chain.
        id: u32,
    },
    /// The device used a chain without a word about how the request went.
    #[error("{work:?} was completed without a status: its completion is another request's")]
    NoStatus {
        /// The request.
        work: Work,
    },
    /// The device failed a request.
    #[error("{work:?} failed with status {status}")]
    Failed {
        /// The request.
        work: Work,
        /// How.
        status: u8,
    },
    /// The used length is not what the device wrote.
    #[error("{work:?} was completed with {given} bytes, not {expected}")]
    Length {
        /// The request.
        work: Work,
        /// What the device says.
        given: u32,
        /// What it is.
        expected: u32,
    },
    /// A request is under way for too long.
    #[error("{work:?} was not completed within {age:?}: it is lost")]
    Lost {
        /// The request.
        work: Work,
        /// Since when.
        age: Duration,
    },
    /// A completion came without the call that was asked for.
    #[error("a completion without the call that was asked for")]
    NoCall,
    /// The used index is one that can't be.
    #[error(transparent)]
    Ring(DriverError),
    /// A message was refused, or answered wrongly or never.
    #[error("a message: {0}")]
    Message(DiskError),
    /// The device did not come back.
    #[error("the connection did not come back: {0}")]
    Connection(DiskError),
    /// The connection ended although it was to be kept.
    #[error("the connection ended ({0})")]
    Disconnected(String),
}

impl From<DriverError> for Problem {
    fn from(error: DriverError) -> Self {
        match error {
            DriverError::NotInFlight(used) => Self::Doubled { id: used.id },
            other => Self::Ring(other),
        }
    }
}

impl From<crate::driver::memory::OutOfMemory> for Problem {
    fn from(error: crate::driver::memory::OutOfMemory) -> Self {
        Self::Ring(error.into())
    }
}

/// What is wrong, and where.
#[derive(Debug)]
pub struct Finding {
    /// Which disk.
    pub disk: u16,
    /// What.
    pub problem: Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {}: {}", self.disk, self.problem)
    }
}

/// What a load has done and found.
#[derive(Debug, Default)]
pub struct Report {
    /// Requests that were completed and are right.
    pub reads: u64,
    /// As above.
    pub writes: u64,
    /// As above.
    pub flushes: u64,
    /// vhost-user messages that were sent while requests ran, and answered.
    pub messages: u64,
    /// Connections that ended and were made again.
    pub disconnects: u64,
    /// The longest time for which a disk completed nothing although it was asked to.
    pub longest_pause: Duration,
    /// What is wrong; a load ends early when it is much.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Requests in all.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.reads + self.writes + self.flushes
    }

    /// How many findings are of a request that was lost, or whose acknowledged data is.
    #[must_use]
    pub fn lost(&self) -> usize {
        let lost = |problem: &Problem| match problem {
            Problem::Lost { .. } | Problem::NoCall => true,
            Problem::Wrong(wrong) => {
                use super::content::Mismatch::{Stale, Zeroes};
                matches!(wrong.found, Stale { .. } | Zeroes)
            }
            _ => false,
        };
        self.count(lost)
    }

    /// How many are of a request that was completed twice.
    #[must_use]
    pub fn doubled(&self) -> usize {
        self.count(|problem| matches!(problem, Problem::Doubled { .. } | Problem::NoStatus { .. }))
    }

    /// How many are anything else: corrupt data, failed requests, connections that ended.
    #[must_use]
    pub fn others(&self) -> usize {
        self.findings.len() - self.lost() - self.doubled()
    }

    fn count(&self, of: impl Fn(&Problem) -> bool) -> usize {
        self.findings.iter().filter(|f| of(&f.problem)).count()
    }

    /// All findings, a line each; empty if there are none.
    #[must_use]
    pub fn problems(&self) -> String {
        let lines: Vec<String> = self.findings.iter().map(Finding::to_string).collect();
        lines.join("\n")
    }
}
