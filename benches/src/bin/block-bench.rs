//! `block-bench`: measures, writes `block.json` and `block.svg`, and shows a table. It ends with failure if something
//! can't be measured or written; a target that is missed is told of, since machines differ.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use bulkhead_benches::block::arguments::Arguments;
use bulkhead_benches::block::bench::Bench;
use bulkhead_benches::block::{header, measure};
use bulkhead_benches::figures::row::Report;
use bulkhead_benches::figures::{markdown, plot, table};
use clap::Parser as _;

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
        return refresh(&arguments.out, page);
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
        "block"
    };
    let json = arguments.out.join(format!("{name}.json"));
    fs::write(&json, format!("{:#}\n", report.to_json()))?;
    let svg = arguments.out.join(format!("{name}.svg"));
    fs::write(&svg, plot::svg(&report)?)?;
    print!("{}", table::text(&report));
    println!("written: {}, {}", json.display(), svg.display());
    Ok(())
}

/// Writes the tables of the last run into a page, and its picture beside it.
fn refresh(out: &Path, page: &Path) -> Result<(), Box<dyn Error>> {
    let json = out.join("block.json");
    let text =
        fs::read_to_string(&json).map_err(|e| format!("{}: {e}: measure first", json.display()))?;
    let report = serde_json::from_str(&text)?;
    let old = fs::read_to_string(page).map_err(|e| format!("{}: {e}", page.display()))?;
    let new = markdown::refresh(&old, &report);
    let new = new.ok_or_else(|| {
        format!(
            "{} has no lines {} and {}: tables go between them",
            page.display(),
            markdown::BEGIN,
            markdown::END
        )
    })?;
    fs::write(page, new)?;
    let picture = page.with_extension("svg");
    fs::copy(out.join("block.svg"), &picture)?;
    println!("written: {}, {}", page.display(), picture.display());
    Ok(())
}
