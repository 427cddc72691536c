//! The project's commands: `cargo xtask demo`, `test`, `fuzz`, `soak`, `bench`, `coverage`.
//!
//! | module | owns |
//! | --- | --- |
//! | `demo` | the main job, shown step by step |
//! | `test` | every check and test there is, counted |
//! | `fuzz` | fuzz targets, for as long as one likes |
//! | `soak` | the tests that have full numbers, with these |
//! | `bench` | measurements that are stored |
//! | `nightly` | the compiler that has sanitizers, and its flags |
//! | `coverage` | which lines the data plane's tests run |
//! | `previous` | the data plane with the state format before this one |
//! | `packages` | Debian packages that both need, installed after saying so |
//! | `report` | lines with a tick, and progress while something takes long |

mod bench;
mod coverage;
mod demo;
mod fuzz;
mod nightly;
mod packages;
mod previous;
mod report;
mod soak;
mod test;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The project's commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Builds everything, makes keys, signs a configuration, starts a host and boots a guest that uses it
    Demo,
    /// Runs everything CI runs; ends with `N passed, N failed`
    Test {
        /// Only packages whose name contains this (`integration`, `rot`, ...); checks are left out then
        filter: Option<String>,
    },
    /// Runs a fuzz target; without a name, lists them
    Fuzz {
        /// Which
        name: Option<String>,
        /// For how long
        #[arg(long, value_name = "N", default_value_t = 60)]
        seconds: u32,
        /// Puts what it finds into the corpus, if nothing failed
        #[arg(long)]
        keep: bool,
    },
    /// Runs the tests that do something many times as often as they are meant to: for hours
    Soak {
        /// Only tests whose name contains this (`net`: guests with network cards); `survive`: kills and upgrades under a verified load, one table
        name: Option<String>,
        #[command(flatten)]
        survive: soak::Survive,
    },
    /// Measures speed beside peers and limits, and stores the figures in target/bench; without a name, lists what there is
    Bench {
        /// Which
        name: Option<String>,
        #[command(flatten)]
        options: bench::Options,
    },
    /// Measures which lines of the data plane its tests run; fails below 95 % of virtqueue, vhost_user or blk
    Coverage {
        /// Lists the lines that no test runs, of those three or of PART (`worker`, `server`, ...)
        #[arg(long, value_name = "PART", num_args = 0..=1, default_missing_value = "")]
        uncovered: Option<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Demo => demo::run(),
        Command::Test { filter } => test::run(filter.as_deref()),
        Command::Fuzz {
            name,
            seconds,
            keep,
        } => fuzz::run(name.as_deref(), seconds, keep),
        Command::Soak { name, survive } => soak::run(name.as_deref(), &survive),
        Command::Bench { name, options } => bench::run(name.as_deref(), &options),
        Command::Coverage { uncovered } => coverage::run(uncovered.as_deref()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder.
fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// What is built for (`.cargo/config.toml`).
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Cargo's target folder.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Where a profile's binaries lie.
fn binaries(profile: &str) -> PathBuf {
    target().join(TARGET).join(profile)
}
