//! `block-bench`: measures, writes `block.json` and `block.svg`, and shows a table. It ends with failure if something
//! can't be measured or written; a target that is missed is told of, since machines differ.
#![forbid(unsafe_code)]

use std::error::Error;
use std::process::ExitCode;

use bulkhead_benches::block::arguments::Arguments;
use bulkhead_benches::block::bench::Bench;
use bulkhead_benches::block::{header, measure};
use bulkhead_benches::figures::row::Report;
use bulkhead_benches::figures::store;
use clap::Parser as _;

/// What its files are called.
const NAME: &str = "block";
/// The picture beside the page that quotes a run.
const PICTURE: &str = "performance.svg";

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("block-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    if let Some(page) = &arguments.table {
        return store::refresh(&arguments.out, NAME, page, PICTURE);
    }
    let bench = Bench::new(arguments)?;
    let rows = measure(&bench)?;
    let report = Report {
        header: header::describe(&bench),
        rows,
    };
    let name = if bench.against.is_some() {
        "against"
    } else {
        NAME
    };
    store::write(&report, &arguments.out, name)
}
