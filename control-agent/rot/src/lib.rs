//! What the root of trust is made of: measured binaries that it executes.
#![forbid(unsafe_code)]

pub mod binary;
