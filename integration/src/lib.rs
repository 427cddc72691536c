//! What whole-system tests are made of: a vhost-user frontend and a virtio driver that share
//! no code with the data plane, processes that end with their test, and a complete host.
//!
//! - [`frontend`]: the vhost-user protocol, from the specification, down to raw bytes.
//! - [`driver`]: guest memory, split and packed virtqueues and virtio-blk requests, down to raw
//!   descriptors; and a slow packed device to compare others with.
//! - [`disk`]: both together: an attached block device.
//! - [`card`]: the same of a network card.
//! - [`doomed`]: frontends that are killed, and connections that come and go.
//! - [`arena`]: a `serve` process with two devices, and what must hold of it after any test.
//! - [`guest`]: a Linux guest in QEMU.
//! - [`host`]: a complete host, as an operator makes it.
//! - [`network`]: network namespaces and interfaces.
//! - [`packets`]: frames to send, and what must be true of one that arrives.
//! - [`processes`]: programs under test.
//! - [`survive`]: a verified load, and kills under it.
//! - [`transfer`]: bytes that a network carries, each compared.
//! - [`workload`]: what guests do with a disk, and what its file looks like afterwards.

pub mod aes_schedule;
pub mod arena;
pub mod card;
pub mod disk;
pub mod doomed;
pub mod driver;
pub mod frontend;
pub mod guest;
pub mod host;
pub mod network;
pub mod packets;
pub mod processes;
pub mod random;
pub mod survive;
pub mod transfer;
pub mod workload;
