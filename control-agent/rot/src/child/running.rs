//! A process that was started: what rot knows of it, and when it loses patience with it.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bulkhead_protocol::fd_store::Keeper;

use crate::link::Link;

/// How long a child may take to its `Hello`.
pub const HELLO_WITHIN: Duration = Duration::from_secs(15);
/// How long a candidate may take until it is ready: it maps and prefaults all guest memory, at up to
/// 210 ms/GiB.
pub const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long a candidate that was told to go may take to its `Hello`: guests wait.
pub const TAKE_OVER_WITHIN: Duration = Duration::from_secs(5);
/// How long a child may leave what waits for it unread.
pub const READ_WITHIN: Duration = Duration::from_secs(5);
/// How long a child may live on after it closed its channel.
pub const END_WITHIN: Duration = Duration::from_secs(1);
/// A process that was started and not reaped yet.
#[derive(Debug)]
pub struct Running {
    /// Its process id, for people to read.
    pub pid: u32,
    /// Readable once it has ended.
    pub pidfd: Rc<OwnedFd>,
    /// The channel; none once either side gave it up.
    pub link: Option<Link>,
    /// The end of its store; none once it closed its own.
    pub keeper: Option<Keeper>,
    /// It said so.
    pub hello: bool,
    pub(super) started: Instant,
    /// By when it must say its `Hello`, or be ready, and why it is killed if it doesn't.
    pub(super) due: (Instant, &'static str),
    /// When the channel was given up.
    pub(super) closed: Option<Instant>,
    /// SIGKILL was sent.
    pub(super) condemned: bool,
    pub(super) complaints: u32,
}

impl Running {
    /// The first moment at which it is killed if nothing changes, and why.
    pub(super) fn deadline(&self) -> Option<(Instant, &'static str)> {
        if self.condemned {
            return None;
        }
        let hello = (!self.hello).then_some(self.due);
        let closed = self
            .closed
            .map(|at| (at + END_WITHIN, "it closed its channel"));
        let unread = self.link.as_ref().and_then(Link::blocked_since);
        let unread = unread.map(|at| (at + READ_WITHIN, "it does not read what rot sends"));
        [hello, closed, unread]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::channel::Channel;
    use bulkhead_protocol::rot::FromRot;

    use super::*;

    fn running(started: Instant) -> (Running, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        let running = Running {
            pid: 1,
            pidfd: Rc::new(std::fs::File::open("/dev/null").unwrap().into()),
            link: Some(Link::new(ours).unwrap()),
            keeper: None,
            hello: false,
            started,
            due: (started + HELLO_WITHIN, "it said no Hello"),
            closed: None,
            condemned: false,
            complaints: 0,
        };
        (running, theirs)
    }

    #[test]
    fn the_first_deadline_counts_and_each_says_why() {
        let t = Instant::now();
        let (mut r, _theirs) = running(t);
        assert_eq!(r.deadline(), Some((t + HELLO_WITHIN, "it said no Hello")));
        r.hello = true;
        assert_eq!(r.deadline(), None);
        let link = r.link.as_mut().unwrap();
        while link.blocked_since().is_none() {
            link.send(FromRot::Stop, Vec::new(), t).unwrap();
        }
        let unread = "it does not read what rot sends";
        assert_eq!(r.deadline(), Some((t + READ_WITHIN, unread)));
        r.closed = Some(t);
        assert_eq!(
            r.deadline(),
            Some((t + END_WITHIN, "it closed its channel"))
        );
        r.condemned = true;
        assert_eq!(r.deadline(), None);
    }
}
