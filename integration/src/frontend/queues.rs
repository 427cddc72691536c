//! Starting a queue, message by message.

use std::os::fd::AsFd;

use nix::sys::eventfd::EventFd;

use super::message::{self, request};
use super::{Frontend, FrontendError};

/// The eventfds of a queue.
#[derive(Debug, Clone, Copy)]
pub struct Events<'a> {
    /// Device to driver: the queue failed.
    pub err: &'a EventFd,
    /// Device to driver.
    pub call: &'a EventFd,
    /// Driver to device.
    pub kick: &'a EventFd,
}

/// Where a queue's rings are, as the frontend has them in its own memory.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The descriptors.
    pub desc: u64,
    /// What the device writes.
    pub used: u64,
    /// What the driver writes.
    pub avail: u64,
}

impl Frontend {
    /// SET_VRING_NUM and SET_VRING_BASE.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn set_size_and_base(&self, index: u32, size: u16, base: u32) -> Result<(), FrontendError> {
        self.set_vring_state(request::SET_VRING_NUM, index, u32::from(size))?;
        self.set_vring_state(request::SET_VRING_BASE, index, base)
    }

    /// SET_VRING_ADDR.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn set_addresses(&self, index: u32, at: Addresses) -> Result<(), FrontendError> {
        let body = message::vring_addresses(index, at.desc, at.used, at.avail);
        self.set(request::SET_VRING_ADDR, &body, &[])
    }

    /// SET_VRING_ERR, SET_VRING_CALL and SET_VRING_KICK: the last of them starts the queue.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn give_events(&self, index: u32, events: Events<'_>) -> Result<(), FrontendError> {
        let index = u8::try_from(index).unwrap_or(u8::MAX);
        self.set_vring_fd(request::SET_VRING_ERR, index, Some(events.err.as_fd()))?;
        self.set_vring_fd(request::SET_VRING_CALL, index, Some(events.call.as_fd()))?;
        self.set_vring_fd(request::SET_VRING_KICK, index, Some(events.kick.as_fd()))
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn enable_queue(&self, index: u32, enabled: bool) -> Result<(), FrontendError> {
        self.set_vring_state(request::SET_VRING_ENABLE, index, u32::from(enabled))
    }
}
