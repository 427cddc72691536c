//! Ports: where a network card's frames go, and where those for it come from.
//!
//! | module | owns |
//! | --- | --- |
//! | [`reason`] | why a frame was dropped |
#![forbid(unsafe_code)]

pub mod reason;

pub use reason::DropReason;
