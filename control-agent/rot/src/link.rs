//! rot's end of the channel to one child: it never blocks, and it queues what a child that is
//! slow to read can't take yet.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use bulkhead_protocol::channel::{Channel, ChannelError, Received};
use bulkhead_protocol::rot::{FromRot, ToRot};

/// The channel and what waits to be sent.
#[derive(Debug)]
pub struct Link {
    channel: Channel,
    queue: VecDeque<(FromRot, Vec<Rc<OwnedFd>>)>,
    blocked_since: Option<Instant>,
}

impl Link {
    /// Takes rot's end.
    ///
    /// # Errors
    /// What `fcntl` fails with.
    pub fn new(channel: Channel) -> io::Result<Self> {
        channel.set_nonblocking(true)?;
        Ok(Self {
            channel,
            queue: VecDeque::new(),
            blocked_since: None,
        })
    }

    /// Sends a message after those that wait.
    ///
    /// # Errors
    /// See [`Link::flush`].
    pub fn send(
        &mut self,
        message: FromRot,
        fds: Vec<Rc<OwnedFd>>,
        now: Instant,
    ) -> Result<(), ChannelError> {
        self.queue.push_back((message, fds));
        self.flush(now)
    }

    /// Sends what waits, as far as the child has room.
    ///
    /// # Errors
    /// The channel is closed or failed; the rest of the queue is of no use any more.
    pub fn flush(&mut self, now: Instant) -> Result<(), ChannelError> {
        while let Some((message, fds)) = self.queue.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match self.channel.send(message, &fds) {
                Ok(()) => {
                    self.queue.pop_front();
                    self.blocked_since = None;
                }
                Err(ChannelError::WouldBlock) => {
                    self.blocked_since.get_or_insert(now);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One message of the child's.
    ///
    /// # Errors
    /// [`ChannelError::WouldBlock`] if there is none; else see [`Channel::receive`].
    pub fn receive(&self) -> Result<Received<ToRot>, ChannelError> {
        self.channel.receive()
    }

    /// Since when the child has taken nothing of what waits; none if nothing waits.
    #[must_use]
    pub fn blocked_since(&self) -> Option<Instant> {
        self.blocked_since
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_full_child_cannot_take_waits_in_order() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut link = Link::new(ours).unwrap();
        let now = Instant::now();
        let mut sent = 0;
        while link.blocked_since().is_none() {
            let bound = FromRot::Bound { request_id: sent };
            link.send(bound, Vec::new(), now).unwrap();
            sent += 1;
        }
        for expected in 0..sent {
            let got = theirs.receive::<FromRot>().unwrap().message;
            assert_eq!(
                got,
                FromRot::Bound {
                    request_id: expected
                }
            );
            link.flush(now).unwrap();
        }
        assert!(link.blocked_since().is_none());
        drop(theirs);
        let error = link.send(FromRot::Stop, Vec::new(), now).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{error}");
    }
}
