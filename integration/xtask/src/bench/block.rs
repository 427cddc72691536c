//! `cargo xtask bench block`: disks.

use std::error::Error;
use std::process::ExitCode;

use super::{Options, device};
use crate::packages::BLOCK;

/// Measures; `target/bench/block.json` and `block.svg`.
///
/// # Errors
/// As [`device::run`].
pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    device::run("block", BLOCK, options)
}
