//! The vhost-user protocol, back-end side (QEMU, `docs/interop/vhost-user.rst`).
//!
//! [`framing`] cuts a byte stream with descriptors into messages and never blocks; [`message`] turns one
//! into a typed request with exactly the descriptors that belong to it; [`session`] is the state of
//! a connection and what a request does to it, driven by the server and by tests alike (it asks the kernel
//! for memory, for an in-flight region and for the volume's lock, and waits for none of them); `backend` is
//! the channel on which we begin.
//! The frontend is hostile: any bytes, in any pieces and order, with any descriptors.

mod backend;
pub mod framing;
pub mod message;
pub mod session;
mod vring;

pub use backend::BackendChannel;
pub use framing::{Framing, Incoming};
pub use message::{Message, ProtocolError};
pub(crate) use session::inflight_flags;
pub use session::{Facts, Outbox, Session};

/// virtio and vhost-user feature bits that this back-end knows, beside a device's own.
pub mod feature {
    /// VHOST_F_LOG_ALL: writes to guest memory are marked in the dirty log.
    pub const LOG_ALL: u64 = 1 << 26;
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_ACCESS_PLATFORM: addresses are what the platform says. Without an IOMMU of the guest's they
    /// are guest addresses, those of bounce buffers in a confidential guest among them.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// VIRTIO_F_RING_PACKED.
    pub const RING_PACKED: u64 = 1 << 34;
    /// VIRTIO_F_IN_ORDER.
    pub const IN_ORDER: u64 = 1 << 35;
    /// VIRTIO_F_RING_RESET: one queue is stopped and started anew while the others run.
    pub const RING_RESET: u64 = 1 << 40;
    /// What every device offers.
    pub const TRANSPORT: u64 = LOG_ALL
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1
        | ACCESS_PLATFORM
        | RING_PACKED
        | IN_ORDER
        | RING_RESET;
}

/// Protocol feature bits.
pub mod protocol_feature {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log as a shared file.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// SEND_RARP.
    pub const RARP: u64 = 1 << 2;
    /// Acknowledgements.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// NET_SET_MTU.
    pub const NET_MTU: u64 = 1 << 4;
    /// The backend channel.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG and SET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// The in-flight region.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory regions one by one.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// GET_STATUS and SET_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// What a disk offers.
    pub const OFFERED: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
    /// What a network card offers: its configuration space is the frontend's, which would warn of one that
    /// comes from here.
    pub const OFFERED_NET: u64 = (OFFERED & !CONFIG) | RARP | NET_MTU;
}
