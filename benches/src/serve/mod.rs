//! `serve`: disks and network cards on sockets, from a command line: for tests, benchmarks and a first look.
//!
//! No bundle and no key service: whoever may connect to a socket has what is there.
//!
//! | module | owns |
//! | --- | --- |
//! | [`arguments`] | the command line, parsed and checked as far as that goes without opening anything |
//! | [`spec`] | what a disk is made of |
//! | [`devices`] | from there to opened files, keys in secret memory and listeners |
//! | [`net`] | network cards, from the command line to listeners |
//! | [`file`] | a disk's file |
//! | [`rekey`] | a disk's re-key without a key service |
//! | [`cpus`] | CPUs to serve on |
//! | [`limits`] | how much disks may do in a second |
//! | [`socket`] | a listener at a path: stale sockets replaced, live ones refused |
//! | [`dataplane`] | serving with Bulkhead's data plane |
//! | [`reference`] | the baseline: the stock vhost-user crates |
#![forbid(unsafe_code)]

pub mod arguments;
pub mod cpus;
pub mod dataplane;
pub mod devices;
pub mod file;
pub mod limits;
pub mod net;
pub mod reference;
pub mod rekey;
pub mod socket;
pub mod spec;
