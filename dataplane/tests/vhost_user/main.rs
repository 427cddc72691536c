//! The vhost-user protocol: streams in pieces, and a session without sockets and workers.

mod configuration;
mod framing;
mod in_flight;
mod messages;
mod negotiation;
mod queues;
mod record;
mod remembered;
mod rig;
mod shared;
