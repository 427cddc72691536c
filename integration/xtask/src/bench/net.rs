//! `cargo xtask bench net`: network cards.

use std::error::Error;
use std::process::ExitCode;

use super::{Options, device};
use crate::packages::NET;

/// Measures; `target/bench/net.json` and `net.svg`.
///
/// # Errors
/// When there is an option that only disks have, and as [`device::run`].
pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    if options.against.is_some() {
        return Err("bench net has no --against: run it in both trees, in turns".into());
    }
    device::run("net", NET, options)
}
