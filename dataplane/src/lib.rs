//! The data plane: disks and network cards served to virtual machines over vhost-user, from polled
//! io_uring workers, encrypted on the way.
//!
//! **A block request** in at most six steps, each a function that can be named:
//! 1. a worker sees that the avail index moved and takes up to 16 chains as checked buffers
//!    ([`virtqueue::Virtqueue::pop`]);
//! 2. the chain is parsed once into a typed operation ([`blk::request::parse`]): every range, length
//!    and permission is decided there;
//! 3. it begins ([`blk::pipeline::Pipeline::begin`]): plain and aligned, the kernel transfers guest
//!    memory itself; else through staging, where a write is encrypted in the same pass
//!    ([`blk::transform::store`]);
//! 4. one submission a turn gives everything to the kernel ([`worker::ring::Ring::turn`]), and storage that runs
//!    dry gets what there is before that ([`worker::ring::Ring::push`]);
//! 5. a completion comes back with its buffer ([`blk::pipeline::Pipeline::land`]); a read is decrypted
//!    into guest memory in one pass ([`blk::transform::load`]) and the status byte written;
//! 6. the used ring is shown every few requests and published once a batch, with at most one call ([`virtqueue::Virtqueue::publish`]).
//!
//! **A frame** from one guest to another, likewise:
//! 1. a worker takes up to 32 chains of a queue that sends, as far as its port has room ([`port::Port::room`],
//!    [`virtqueue::Virtqueue::pop`]);
//! 2. header and head are copied once, and what the header asks for is held against the frame ([`net::Frame::of_chain`]);
//! 3. what the frame claims to be is held against what its card may be ([`port::Guard::check`]);
//! 4. the switch decides where it goes, once for a flow ([`port::switch::bridge::Bridge::decide`]);
//! 5. one copy puts it into the receiver's buffers, cut or completed if the receiver takes it in no other way
//!    ([`net::receive::deliver`]);
//! 6. each queue that gave or got something is published once a turn ([`virtqueue::Virtqueue::publish`]).
//!
//! | module | owns |
//! | --- | --- |
//! | [`server`] | the control thread: listeners, connections, workers' answers |
//! | [`vhost_user`] | the protocol: bytes and descriptors to typed requests, a connection's state |
//! | [`fds`] | descriptors from a frontend |
//! | [`fence`] | how a process knows that the last request of the one before it has ended |
//! | [`memory`] | guest memory and the only ways to its bytes |
//! | [`virtqueue`] | rings: from what a driver wrote to checked buffers |
//! | [`blk`] | virtio-blk: device, configuration space, requests, pipeline |
//! | [`control`] | what rot, keyd and the agent say becomes what is served |
//! | [`device`] | a device of either kind, as those see it that serve both |
//! | [`net`] | virtio-net: network cards, and how their queues are served |
//! | [`port`] | where a network card's frames go: a switch, an interface of the host, nowhere |
//! | [`crash`] | where tests have the process die |
//! | [`storage`] | where blocks live |
//! | [`qos`] | how much a volume, and a group of volumes, may do in a second |
//! | [`rekey`] | another key for a volume, zone by zone, while it is served |
//! | [`stored`] | what survives this process, in rot's descriptor store |
//! | [`sandbox`] | how the process and its threads lock themselves in |
//! | [`worker`] | a thread on a core: its queues, its ring, polling |
//! | [`log_limit`] | how often a guest can make us log |

pub mod blk;
pub mod control;
pub mod crash;
pub mod device;
pub mod fds;
pub mod fence;
pub mod hand;
pub mod log_limit;
pub mod memory;
pub mod net;
pub mod port;
pub mod qos;
pub mod rekey;
pub mod sandbox;
pub mod serve;
pub mod server;
pub mod storage;
pub mod stored;
pub mod vhost_user;
pub mod virtqueue;
pub mod worker;
