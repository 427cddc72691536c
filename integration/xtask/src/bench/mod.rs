//! `cargo xtask bench`: measurements that are stored, in `target/bench`.
//!
//! | module | owns |
//! | --- | --- |
//! | `block` | the data plane beside its floors and its peers |
//! | `crypto` | the ciphers beside libraries and the CPU's own limit |
//! | `net` | network cards beside DPDK |
//! | `device` | what both of these have in common |
//! | `ports` | which execution ports a loop fills, as a model of the CPU sees it |

mod block;
mod crypto;
mod device;
mod net;
mod ports;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::target;

/// How to measure.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Shows that everything can be measured, in seconds; the figures mean little
    #[arg(long)]
    quick: bool,
    /// block, net: only parts, or groups of cases, of this name (`null`, `file XTS`, `devices`, ...; `guest`, `switch`, ...)
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// block: beside the `serve` in this folder, in turns: what a change brought
    #[arg(long, value_name = "FOLDER", conflicts_with = "table")]
    against: Option<PathBuf>,
    /// block, net: writes the last run's tables and picture into docs/performance.md, instead of measuring
    #[arg(long)]
    table: bool,
}

/// A measurement.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn(&Options) -> Result<ExitCode, Box<dyn Error>>,
    /// Takes more options than `--quick`.
    options: bool,
}

/// All there are.
const BENCHES: &[Bench] = &[
    Bench {
        name: "block",
        about: "requests on null, ram, files and tmpfs, plain and encrypted, beside a floor, qemu-storage-daemon, fio and the stock crates; many devices; workers; eight minutes",
        run: block::run,
        options: true,
    },
    Bench {
        name: "crypto",
        about: "AES on one core in every shape of call, beside libraries and what the CPU's AES units allow; two minutes",
        run: crypto::run,
        options: false,
    },
    Bench {
        name: "net",
        about: "frames of one guest and between two, through rings, switch and TAP, beside DPDK's testpmd; fairness; five minutes",
        run: net::run,
        options: true,
    },
];

/// Runs the one of that name; without a name, lists them.
///
/// # Errors
/// When there is none of that name, or as it says itself.
pub fn run(name: Option<&str>, options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let Some(name) = name else {
        for bench in BENCHES {
            println!("{}: {}", bench.name, bench.about);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let bench = BENCHES.iter().find(|bench| bench.name == name);
    let bench = bench.ok_or_else(|| {
        let names: Vec<_> = BENCHES.iter().map(|bench| bench.name).collect();
        format!("there is no bench {name}; there are: {}", names.join(", "))
    })?;
    let plain = Options {
        quick: options.quick,
        only: None,
        against: None,
        table: false,
    };
    if !bench.options && *options != plain {
        return Err(format!("bench {name} has no option but --quick").into());
    }
    (bench.run)(options)
}

/// Where results are stored.
fn results() -> PathBuf {
    target().join("bench")
}
