//! `cargo xtask bench`: measurements that are stored, in `target/bench`.
//!
//! | module | owns |
//! | --- | --- |
//! | `crypto` | the ciphers beside libraries and the CPU's own limit |
//! | `ports` | which execution ports a loop fills, as a model of the CPU sees it |

mod crypto;
mod ports;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::target;

/// A measurement.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn(quick: bool) -> Result<ExitCode, Box<dyn Error>>,
}

/// All there are.
const BENCHES: &[Bench] = &[Bench {
    name: "crypto",
    about: "AES on one core in every shape of call, beside libraries and what the CPU's AES units allow; two minutes",
    run: crypto::run,
}];

/// Runs the one of that name; without a name, lists them.
///
/// # Errors
/// When there is none of that name, or as it says itself.
pub fn run(name: Option<&str>, quick: bool) -> Result<ExitCode, Box<dyn Error>> {
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
    (bench.run)(quick)
}

/// Where results are stored.
fn results() -> PathBuf {
    target().join("bench")
}
