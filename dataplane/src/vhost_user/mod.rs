//! The vhost-user protocol, back-end side (QEMU, `docs/interop/vhost-user.rst`).
//!
//! [`framing`] cuts a byte stream with descriptors into messages and never blocks; [`message`] turns one
//! into a typed request with exactly the descriptors that belong to it; [`session`] is the state of
//! a connection and what a request does to it: pure, driven by the server and by tests alike.
//! The frontend is hostile: any bytes, in any pieces and order, with any descriptors.

pub mod framing;
pub mod message;
pub mod session;
mod vring;

pub use framing::{Framing, Incoming};
pub use message::{Message, ProtocolError};
pub use session::{Facts, Outbox, Session};

/// virtio and vhost-user feature bits that this back-end knows, beside a device's own.
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// What every device offers.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1;
}

/// Protocol feature bits.
pub mod protocol_feature {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// Acknowledgements.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// GET_CONFIG and SET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// Memory regions one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// What is offered.
    pub const OFFERED: u64 = MQ | REPLY_ACK | CONFIG | CONFIGURE_MEM_SLOTS;
}
