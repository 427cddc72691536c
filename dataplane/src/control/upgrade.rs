//! A live upgrade, from both ends (the order stands in [`bulkhead_protocol::rot`]): this process stops so that a
//! candidate goes on, or serves again where none does; or it is the candidate, and waits until it may go on.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsFd;

use bulkhead_protocol::rot::{FromRot, ToRot};
use bulkhead_protocol::{Channel, ChannelError, Received};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Control;
use super::start::Start;
use crate::fence::Fence;
use crate::server::Server;
use crate::stored::Inherited;

impl Control {
    /// rot wants this process to stop for a candidate.
    pub(super) fn freeze(&mut self, server: &mut Server, attempt: Option<u64>) {
        self.attempt = attempt;
        let ready = match self.volumes.keeper.keeps() {
            true => server.freeze(),
            false => Err("nothing is stored with rot".to_owned()),
        };
        match ready {
            Ok(()) => self.frozen = true,
            Err(reason) => {
                tracing::warn!("it can't stop for another: {reason}");
                self.rot.send(ToRot::CantFreeze { reason, attempt });
            }
        }
    }

    /// The server has stopped, and everything that a successor needs is stored.
    pub(super) fn is_stopped(&mut self) {
        let attempt = self.attempt;
        self.rot.send(ToRot::Frozen { attempt });
    }

    /// No candidate goes on: this process does, with a fence of its own again.
    pub(super) fn thaw(&mut self, server: &mut Server) {
        if !self.frozen {
            return;
        }
        let number = self.fence + 1;
        let made = Fence::new().map_err(|e| e.to_string());
        let made = made.and_then(|(fence, end)| {
            let kept = self.volumes.keeper.keep_fence(number, end.as_fd());
            kept.map_err(|e| e.to_string()).map(|()| fence)
        });
        match made {
            Ok(fence) => server.thaw(Some(&fence)),
            Err(reason) => {
                let reason = format!("no fence can be made, and a successor needs one: {reason}");
                self.stop(server, reason);
            }
        }
    }

    /// The server serves again.
    pub(super) fn serves_again(&mut self, server: &mut Server) {
        self.frozen = false;
        // No ring has it any more.
        self.fence_is_gone(self.fence);
        self.fence += 1;
        for received in std::mem::take(&mut self.from_rot) {
            if let Err(problem) = self.on_rot(server, received) {
                tracing::warn!("a message from rot is dropped: {problem}");
            }
        }
        self.look_at_peers();
    }

    /// What rot says to a process that has stopped: whether it goes on. All else waits until then.
    pub(super) fn hear_frozen(&mut self, server: &mut Server, received: Received<FromRot>) {
        match received.message {
            FromRot::Thaw => {
                // Also of a freeze that came since, which waits here.
                self.from_rot
                    .retain(|received| !matches!(received.message, FromRot::Freeze { .. }));
                self.thaw(server);
            }
            FromRot::Stop => {
                self.ended = true;
                server.stop();
            }
            _ => self.from_rot.push(received),
        }
    }
}

impl Start {
    /// Maps what guests share, tells rot that everything is prepared, and waits until the process before this one has stopped and all that
    /// it stored is there.
    ///
    /// # Errors
    /// When rot is gone, or what it hands over makes no sense.
    pub fn wait_for_go(&mut self, inherited: &mut Inherited) -> Result<(), String> {
        let of_rot = |e: ChannelError| format!("the channel to rot: {e}");
        inherited.prepare();
        self.rot.send(&ToRot::Ready, &[]).map_err(of_rot)?;
        let set = self.rot.set_nonblocking(true);
        set.map_err(|e| format!("the channel to rot: {e}"))?;
        loop {
            wait(&self.rot, inherited)?;
            let changed = inherited.follow().map_err(|e| e.to_string())?;
            match self.rot.receive::<FromRot>() {
                Ok(received) if received.message == FromRot::Go => {
                    return inherited.follow().map(drop).map_err(|e| e.to_string());
                }
                Ok(received) if received.message == FromRot::Stop => {
                    self.stopped = true;
                    return Ok(());
                }
                Ok(received) => self.early.from_rot.push_back(received),
                // Not once guests wait for it.
                Err(ChannelError::WouldBlock) if changed => inherited.prepare(),
                Err(ChannelError::WouldBlock) => {}
                Err(error) => return Err(of_rot(error)),
            }
        }
    }
}

/// Waits until rot says something, or what is stored has changed.
fn wait(rot: &Channel, inherited: &Inherited) -> Result<(), String> {
    let store = inherited
        .store()
        .ok_or("a candidate has no descriptor store")?;
    let mut fds = [rot.as_fd(), store.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(format!("can't wait for rot: {error}")),
    }
}
