//! `bulkhead-rot`: parses its arguments and runs until a signal ends it; no logic.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use bulkhead_rot::{Arguments, run};
use clap::Parser;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    bulkhead_protocol::process::init_logging("rot");
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
