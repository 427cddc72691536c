//! What the root of trust is made of: measured binaries that it executes.

pub mod binary;
pub mod execute;
