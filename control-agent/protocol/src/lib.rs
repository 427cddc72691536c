//! Every message and file descriptor that crosses one of Bulkhead's process
//! boundaries, and the little that each process does the same way at its start.
//!
//! Four processes talk over `SOCK_SEQPACKET` socketpairs that the root of trust
//! makes: one CBOR message per datagram, descriptors as `SCM_RIGHTS` beside it.
//!
//! | edge | messages |
//! | --- | --- |
//! | rot -> any child | [`rot::FromRot`] |
//! | any child -> rot | [`rot::ToRot`] |
//! | agent -> keyd | [`keys::AgentToKeyd`] |
//! | keyd -> agent | [`keys::KeydToAgent`] |
//! | keyd -> data plane | [`keys::KeydToDataplane`] |
//! | data plane -> keyd | [`keys::DataplaneToKeyd`] |
//! | agent -> data plane | [`control::AgentToDataplane`] |
//! | data plane -> agent | [`control::DataplaneToAgent`] |
//! | CLI -> agent | [`admin::AdminRequest`] |
//! | agent -> CLI | [`admin::AdminReply`] |
//!
//! The doc of each variant names the descriptors that travel with it; a receiver
//! takes exactly that many ([`channel::Received::take_fds`]) and closes any other.
//! The agent links this crate and so never links the data path.
//!
//! Beside its channel each child of rot has a socket to rot's [`fd_store`], in systemd's words.
//!
//! [`rekey`] is what crosses by way of a volume's own file: the record of an unfinished re-key.

pub mod admin;
pub mod channel;
pub mod control;
mod datagram;
pub mod envelope;
pub mod fd_store;
pub mod identity;
pub mod keys;
pub mod limits;
pub mod net;
pub mod process;
pub mod rekey;
pub mod release;
pub mod rot;
pub mod workers;

pub use channel::{Channel, ChannelError, Received};
pub use identity::{
    DiscardPolicy, GroupName, InvalidName, NicId, RekeyId, ServedId, SocketName, SwitchName,
    VolumeId,
};
