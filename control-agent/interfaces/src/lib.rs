//! The host's network interfaces that NICs are connected to, as descriptors for the data plane, which can open
//! neither: [`tap`] opens the queues of a TAP, [`xdp`] prepares an interface for AF_XDP and makes sockets for its queues.
//!
//! A crate of its own because privilege differs: the agent, locked in, opens TAPs that the operator made for its user;
//! what loads and attaches a program is done by whoever still has the right to, before it locks itself in
//! (ADR 0035). Neither links the data path.

mod bpf;
mod name;
pub mod tap;
pub mod xdp;

pub use bulkhead_protocol::net::InterfaceName;
