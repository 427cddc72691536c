//! What measures Bulkhead, and what serves disks to be measured: the library behind the binaries
//! of this crate.
//!
//! | module | owns |
//! | --- | --- |
//! | [`block`] | the data plane beside its floors and its peers: `cargo xtask bench block` |
//! | [`figures`] | measurements as rows, tables and pictures |
//! | [`load`] | a vhost-user-blk frontend without a guest, and the floor under what it measures |
//! | [`net`] | network cards beside DPDK: `cargo xtask bench net` |
//! | [`placement`] | what a large request costs inline, and shared with a helper on another core |
//! | [`ratio`] | timing in turns, so that two ways of doing something can be divided |
//! | [`traffic`] | vhost-user-net frontends without guests |
//! | [`serve`] | disks on sockets from a command line, without bundle, keys service or root of trust |

pub mod block;
pub mod figures;
pub mod load;
pub mod net;
pub mod placement;
pub mod ratio;
pub mod serve;
pub mod traffic;
