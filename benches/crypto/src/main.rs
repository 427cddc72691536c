//! `crypto-bench`: measures, writes `crypto.json` and `crypto.svg`, and shows a table. It ends with failure if two
//! ciphers differ or nothing can be written; a target that is missed is told of, since machines differ.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bulkhead_benches::figures::row::Report;
use bulkhead_benches::figures::{plot, table};
use bulkhead_benches::ratio::Pace;
use bulkhead_crypto_bench::{header, measure};
use clap::Parser;

/// Long enough for figures that repeat to one in a hundred.
const FULL: Pace = Pace {
    rounds: 101,
    sample: Duration::from_micros(500),
    warm_up: Duration::from_millis(20),
};

/// Measures the ciphers beside their peers on one core.
#[derive(Debug, Parser)]
#[command(name = "crypto-bench")]
struct Arguments {
    /// Folder for crypto.json and crypto.svg
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    out: PathBuf,
    /// Shows that everything can be measured, in seconds; the figures mean little
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crypto-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    let pace = if arguments.quick { Pace::QUICK } else { FULL };
    let (rows, pinned_to) = measure(pace)?;
    let report = Report {
        header: header::describe(pace, pinned_to),
        rows,
    };
    fs::create_dir_all(&arguments.out)?;
    let json = arguments.out.join("crypto.json");
    fs::write(&json, format!("{:#}\n", report.to_json()))?;
    let svg = arguments.out.join("crypto.svg");
    fs::write(&svg, plot::svg(&report)?)?;
    print!("{}", table::text(&report));
    println!("written: {}, {}", json.display(), svg.display());
    Ok(())
}
