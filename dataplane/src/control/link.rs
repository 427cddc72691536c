//! A channel to another process: what it says, as far as it comes from that process and makes sense, and
//! what it has not read yet. Nothing here blocks.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bulkhead_protocol::channel::same_process;
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{Channel, ChannelError, Received};
use minicbor::{Decode, Encode};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

use super::spare::{MOST_OF_AGENT, MOST_OF_OTHERS, Spare};
use crate::log_limit::LogLimit;

/// Messages in a row that make no sense before a peer loses its channel.
const MAX_GARBAGE: u32 = 16;

/// What came of reading.
#[derive(Debug)]
pub(super) enum Read<M> {
    /// A message.
    Message(Received<M>),
    /// Nothing more for now.
    Later,
    /// The peer is gone, or sent too much that makes no sense.
    Broken(String),
}

/// A channel, with the messages of type `Out` that the peer has not taken.
#[derive(Debug)]
pub(super) struct Link<Out> {
    channel: Channel,
    /// Who must have sent what arrives (pidfd); none: whoever has the other end (rot).
    peer: Option<OwnedFd>,
    name: &'static str,
    pub(super) generation: u64,
    unsent: VecDeque<Out>,
    garbage: u32,
    spare: Spare,
}

impl<Out: Encode<()>> Link<Out> {
    /// Watches a channel, which is made non-blocking.
    ///
    /// # Errors
    /// What `fcntl` or `epoll_ctl` fails with.
    pub(super) fn new(
        channel: Channel,
        peer: Option<OwnedFd>,
        name: &'static str,
        generation: u64,
        (registry, token): (&Registry, Token),
    ) -> io::Result<Self> {
        channel.set_nonblocking(true)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        registry.register(&mut SourceFd(&channel.as_raw_fd()), token, interest)?;
        let mut spare = Spare::new(if name == Role::Agent.name() {
            MOST_OF_AGENT
        } else {
            MOST_OF_OTHERS
        });
        spare.take_back(channel.as_fd());
        Ok(Self {
            channel,
            peer,
            name,
            generation,
            unsent: VecDeque::new(),
            garbage: 0,
            spare,
        })
    }

    /// No longer watches it, before it drops.
    pub(super) fn close(self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.channel.as_raw_fd()));
    }

    /// Has the loop look at it again, though nothing new happened to it.
    pub(super) fn look_again(&self, registry: &Registry, token: Token) {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let fd = self.channel.as_raw_fd();
        if let Err(error) = registry.reregister(&mut SourceFd(&fd), token, interest) {
            tracing::error!("the channel to {} can't be watched: {error}", self.name);
        }
    }

    /// The next message. None is read while the peer does not read ours, so that they don't pile up.
    pub(super) fn read<In: for<'b> Decode<'b, ()>>(&mut self) -> Read<In> {
        loop {
            if let Err(error) = self.flush() {
                return Read::Broken(error.to_string());
            }
            if !self.unsent.is_empty() {
                return Read::Later;
            }
            let problem = match self.receive() {
                Ok(Ok(received)) => {
                    self.garbage = 0;
                    return Read::Message(received);
                }
                Ok(Err(problem)) => problem,
                Err(ChannelError::WouldBlock) => return Read::Later,
                Err(error @ (ChannelError::Closed | ChannelError::Io(_))) => {
                    return Read::Broken(error.to_string());
                }
                Err(error) => error.to_string(),
            };
            if !self.tolerate(&problem) {
                return Read::Broken(format!("{MAX_GARBAGE} messages in a row make no sense"));
            }
        }
    }

    /// A message, however few descriptors are free; or what is wrong with its sender.
    fn receive<In: for<'b> Decode<'b, ()>>(
        &mut self,
    ) -> Result<Result<Received<In>, String>, ChannelError> {
        // Making room takes two system calls for each descriptor: not for nothing, which is what there is most of the time.
        if self.is_empty() {
            return Err(ChannelError::WouldBlock);
        }
        self.spare.make_room();
        let received = self.channel.receive();
        let checked = received.map(|mut received| {
            let checked = self.check_sender(&received);
            // It has been looked at, and would take the room of another.
            received.sender = None;
            checked.map(|()| received)
        });
        self.spare.take_back(self.channel.as_fd());
        checked
    }

    /// Whether nothing is there to be received, as can be told without any descriptor.
    fn is_empty(&self) -> bool {
        let mut first = [0];
        let mut bytes = [IoSliceMut::new(&mut first)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let looked = recvmsg::<()>(self.channel.as_raw_fd(), &mut bytes, None, flags);
        matches!(looked, Err(Errno::EAGAIN))
    }

    /// Drops a message that makes no sense; false if it was one too many.
    pub(super) fn tolerate(&mut self, problem: &str) -> bool {
        static LIMIT: LogLimit = LogLimit::new();
        self.garbage += 1;
        if LIMIT.allows() {
            tracing::warn!("a message from {} is dropped: {problem}", self.name);
        }
        self.garbage < MAX_GARBAGE
    }

    /// A channel could be handed on; the process that rot named must have sent the message itself.
    fn check_sender<In>(&self, received: &Received<In>) -> Result<(), String> {
        let Some(peer) = &self.peer else {
            return Ok(());
        };
        let sender = received.sender.as_ref();
        let sender = sender.ok_or("the kernel does not say who sent it")?;
        match same_process(sender.as_fd(), peer.as_fd()) {
            Ok(true) => Ok(()),
            Ok(false) => Err("another process sent it".to_owned()),
            Err(error) => Err(format!("its sender can't be told: {error}")),
        }
    }

    /// Sends a message, or keeps it until the peer takes it.
    pub(super) fn send(&mut self, message: Out) {
        self.unsent.push_back(message);
        if let Err(error) = self.flush() {
            // The peer is gone: the next read says so, too.
            tracing::debug!("a message to {} is lost: {error}", self.name);
            self.unsent.clear();
        }
    }

    fn flush(&mut self) -> Result<(), ChannelError> {
        while let Some(message) = self.unsent.front() {
            match self.channel.send(message, &[]) {
                Ok(()) => {}
                Err(ChannelError::WouldBlock) => return Ok(()),
                Err(error @ (ChannelError::TooLarge | ChannelError::Malformed(_))) => {
                    tracing::error!("a message to {} can't be sent: {error}", self.name);
                }
                Err(error) => return Err(error),
            }
            self.unsent.pop_front();
        }
        Ok(())
    }
}
