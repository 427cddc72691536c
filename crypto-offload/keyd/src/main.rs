//! `bulkhead-keyd`: parses its arguments, starts, and runs until rot says stop; no logic.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use bulkhead_keyd::{Arguments, run};
use clap::Parser;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    bulkhead_protocol::process::init_logging("keyd");
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}
