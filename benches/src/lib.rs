//! What measures Bulkhead, and what serves disks to be measured: the library behind the binaries
//! of this crate.
//!
//! | module | owns |
//! | --- | --- |
//! | [`ratio`] | timing in turns, so that two ways of doing something can be divided |
//! | [`serve`] | disks on sockets from a command line, without bundle, keys service or root of trust |
#![forbid(unsafe_code)]

pub mod ratio;
pub mod serve;
