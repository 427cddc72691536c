//! The two peers that rot tells keyd of: the agent, known by its pidfd, and the data plane, with
//! the questions it has not answered.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_protocol::ChannelError;
use bulkhead_protocol::channel::same_process;
use bulkhead_protocol::keys::{DataplaneToKeyd, KeydToDataplane};
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{ServedId, VolumeId};

use crate::link::Link;

/// `PID_FS_MAGIC`, `include/uapi/linux/magic.h` (Linux 6.9).
const PID_FS_MAGIC: u64 = 0x5049_4446;

/// The agent's channel, and the process it is.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) link: Link,
    pidfd: OwnedFd,
}

impl Agent {
    /// The agent that rot told of.
    ///
    /// # Errors
    /// If the kernel can't say who sends a message, or the descriptor is none by which two
    /// processes can be told apart.
    pub(crate) fn new(link: Link, pidfd: OwnedFd) -> io::Result<Self> {
        if !tells_processes_apart(pidfd.as_fd())? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the agent's descriptor is no pidfd with an identity of its own (Linux 6.9)",
            ));
        }
        link.channel.ask_for_sender()?;
        Ok(Self { link, pidfd })
    }

    /// Whether a message came from the agent itself.
    ///
    /// # Errors
    /// Why not, for the log and the answer.
    pub(crate) fn check_sender(&self, sender: Option<&OwnedFd>) -> Result<(), String> {
        let sender = sender.ok_or("the kernel did not say who sent the request")?;
        match same_process(sender.as_fd(), self.pidfd.as_fd()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(
                "the sender of the request is not the process that rot started as the agent"
                    .to_owned(),
            ),
            Err(error) => Err(format!("the sender of the request can't be told: {error}")),
        }
    }
}

/// Before pidfs all pidfds share one inode, and any two would be the same process.
fn tells_processes_apart(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let kind = nix::sys::statfs::fstatfs(pidfd)?.filesystem_type().0;
    Ok(u64::try_from(kind).ok() == Some(PID_FS_MAGIC))
}

/// What the data plane was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// To hold a grant of a volume or a NIC.
    Grant(ServedId),
    /// To drop one.
    Revoke(ServedId),
    /// To have these workers.
    Workers,
}

impl Asked {
    /// The volume or NIC that it is about.
    pub(crate) fn served(self) -> Option<ServedId> {
        match self {
            Self::Grant(id) | Self::Revoke(id) => Some(id),
            Self::Workers => None,
        }
    }
}

/// A question that the data plane has not answered.
#[derive(Debug)]
struct Question {
    asked: Asked,
    /// Somebody still waits for the answer.
    wanted: bool,
}

/// The data plane's channel. Questions stay until they are answered, wanted or not: answers carry
/// no number, so that a late one could pass for that of a newer question about the same thing.
#[derive(Debug)]
pub(crate) struct Dataplane {
    pub(crate) link: Link,
    questions: Vec<Question>,
    /// The workers that it was told of last; none before the first time.
    told: Option<Option<Workers>>,
    /// Volumes whose keys it had when it began, and that it was not granted since.
    holds: BTreeSet<VolumeId>,
}

impl Dataplane {
    /// Most questions that wait for an answer at a time: at most twice as many key pages are on their
    /// way, and no buffer or descriptor limit of a socket is near.
    const MAX_QUESTIONS: usize = 8;

    /// The data plane that rot told of.
    pub(crate) fn new(link: Link) -> Self {
        Self {
            link,
            questions: Vec::new(),
            told: None,
            holds: BTreeSet::new(),
        }
    }

    /// Whether it has a volume's keys from the process before it. That is asked once: what becomes of them
    /// when it is granted something is not followed.
    pub(crate) fn has_keys_of(&mut self, volume: VolumeId) -> bool {
        self.holds.remove(&volume)
    }

    /// Tells it of the workers that a bundle asks for, unless it was told already.
    ///
    /// # Errors
    /// What sending fails with; then it was not told.
    pub(crate) fn tell_workers(&mut self, workers: Option<&Workers>) -> Result<(), ChannelError> {
        if self
            .told
            .as_ref()
            .is_some_and(|told| told.as_ref() == workers)
        {
            return Ok(());
        }
        let workers = workers.cloned();
        let message = KeydToDataplane::Workers {
            workers: workers.clone(),
        };
        self.link.channel.send(&message, &[])?;
        self.told = Some(workers);
        self.asked(Asked::Workers);
        Ok(())
    }

    /// Whether it has yet to say that it heard of its workers.
    pub(crate) fn owes_workers(&self) -> bool {
        self.questions.iter().any(|q| q.asked == Asked::Workers)
    }

    /// Whether another question may be asked.
    pub(crate) fn has_room(&self) -> bool {
        self.questions.len() < Self::MAX_QUESTIONS
    }

    /// A question was sent.
    pub(crate) fn asked(&mut self, asked: Asked) {
        self.questions.push(Question {
            asked,
            wanted: true,
        });
    }

    /// Whether an answer is waited for.
    pub(crate) fn is_asked(&self) -> bool {
        self.questions.iter().any(|question| question.wanted)
    }

    /// Nobody waits any longer. Returns what was waited for.
    pub(crate) fn abandon(&mut self) -> Vec<ServedId> {
        let wanted = self.questions.iter_mut().filter(|q| q.wanted);
        let abandon = |question: &mut Question| {
            question.wanted = false;
            question.asked.served()
        };
        wanted.filter_map(abandon).collect()
    }

    /// Takes an answer to the oldest question it fits: whether it is still wanted; none if nobody
    /// asked.
    pub(crate) fn answered(&mut self, answer: &DataplaneToKeyd) -> Option<bool> {
        let asked = match answer {
            DataplaneToKeyd::Granted { id } | DataplaneToKeyd::GrantRefused { id, .. } => {
                Asked::Grant(*id)
            }
            DataplaneToKeyd::Revoked { id } => Asked::Revoke(*id),
            DataplaneToKeyd::WorkersHeard { .. } => Asked::Workers,
        };
        let index = self.questions.iter().position(|q| q.asked == asked)?;
        if let DataplaneToKeyd::WorkersHeard { holds, .. } = answer {
            self.holds = holds.iter().copied().collect();
        }
        Some(self.questions.remove(index).wanted)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use bulkhead_protocol::rot::Role;
    use bulkhead_protocol::{Channel, VolumeId};

    use super::*;

    fn dataplane() -> Dataplane {
        let (ours, _) = Channel::pair().expect("pair");
        Dataplane::new(Link::to_peer(ours, Role::Dataplane, 1).expect("link"))
    }

    #[test]
    fn a_late_answer_does_not_pass_for_that_of_a_newer_question() {
        let id = VolumeId([1; 16]).into();
        let granted = DataplaneToKeyd::Granted { id };
        let mut peer = dataplane();
        peer.asked(Asked::Grant(id));
        assert_eq!(peer.abandon(), [id]);
        peer.asked(Asked::Grant(id));
        assert_eq!(peer.answered(&granted), Some(false));
        assert!(peer.is_asked());
        assert_eq!(peer.answered(&granted), Some(true));
        assert_eq!(peer.answered(&granted), None);
    }

    #[test]
    fn an_answer_fits_one_kind_of_question() {
        let id = VolumeId([1; 16]).into();
        let mut peer = dataplane();
        peer.asked(Asked::Grant(id));
        assert_eq!(peer.answered(&DataplaneToKeyd::Revoked { id }), None);
        let reason = "no room".to_owned();
        let refused = DataplaneToKeyd::GrantRefused { id, reason };
        assert_eq!(peer.answered(&refused), Some(true));
    }

    #[test]
    fn a_silent_data_plane_is_asked_no_more_at_some_point() {
        let mut peer = dataplane();
        for n in 0..Dataplane::MAX_QUESTIONS {
            assert!(peer.has_room(), "{n}");
            peer.asked(Asked::Grant(VolumeId([1; 16]).into()));
            peer.abandon();
        }
        assert!(!peer.has_room());
    }

    #[test]
    fn what_is_no_pidfd_names_no_agent() {
        let (ours, _theirs) = Channel::pair().expect("pair");
        let link = Link::to_peer(ours, Role::Agent, 1).expect("link");
        let null = File::open("/dev/null").expect("open");
        assert!(Agent::new(link, null.into()).is_err());
    }
}
