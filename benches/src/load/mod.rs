//! `load`: a vhost-user-blk frontend without a guest, made to cost so little that what it measures is
//! the back-end; and a back-end that does nothing, whose figures are the floor under all others.
//!
//! All requests are prepared before the first is sent; a driving thread polls used rings and writes
//! avail rings, nothing else. What a back-end does wrong ends the run with an error.
//!
//! | module | owns |
//! | --- | --- |
//! | [`arguments`] | the command line |
//! | [`run`] | from there to figures |
//! | [`device`] | connecting to a back-end: features, memory, queues |
//! | [`memory`] | memory that is shared with it |
//! | [`requests`] | where requests lie in that, and what their descriptors say |
//! | [`ring`] | the driver's side of split and packed rings |
//! | [`source`] | which request comes next |
//! | [`stamp`], [`verify`] | what verified sectors hold, and what each block must hold |
//! | [`lane`] | one queue under load |
//! | [`engine`] | threads, phases, and the watch over them |
//! | [`echo`] | the device's side that does nothing |
//! | [`pingpong`] | how far two CPUs are apart |
//! | [`report`] | figures as text and JSON |
//! | [`error`] | what can go wrong |
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod arguments;
pub mod device;
pub mod echo;
pub mod engine;
pub mod error;
pub mod lane;
pub mod memory;
pub mod pingpong;
pub mod report;
pub mod requests;
pub mod ring;
pub mod run;
pub mod source;
pub mod stamp;
pub mod verify;

pub use error::LoadError;

#[cfg(target_endian = "big")]
compile_error!("rings are little-endian, and `load` writes them as the machine does");
