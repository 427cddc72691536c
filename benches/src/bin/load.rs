//! `load`: how fast a vhost-user-blk disk is. See `load --help` and `docs/benchmarks.md`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use bulkhead_benches::load::arguments::Arguments;
use bulkhead_benches::load::run::run;
use clap::Parser as _;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(report) => {
            if !report.huge_pages {
                eprintln!(
                    "load: no huge pages are free, so memory lies in ordinary ones: `echo 128 > /proc/sys/vm/nr_hugepages` gives 256 MiB"
                );
            }
            if arguments.json {
                println!("{}", report.json());
            } else {
                print!("{report}");
            }
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("load: {e}");
            ExitCode::FAILURE
        }
    }
}
