//! What measures Bulkhead, and what serves disks to be measured: the library behind the binaries
//! of this crate.
//!
//! | module | owns |
//! | --- | --- |
//! | [`serve`] | disks on sockets from a command line, without bundle, keys service or root of trust |
#![forbid(unsafe_code)]

pub mod serve;
