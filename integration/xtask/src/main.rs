//! The project's commands: `cargo xtask demo`, `cargo xtask test`.
//!
//! | module | owns |
//! | --- | --- |
//! | `demo` | the main job, shown step by step |
//! | `test` | every check and test there is, counted |
//! | `packages` | Debian packages that both need, installed after saying so |
//! | `report` | lines with a tick, and progress while something takes long |

mod demo;
mod packages;
mod report;
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Command::Demo => demo::run(),
        Command::Test { filter } => test::run(filter.as_deref()),
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

/// Where a profile's binaries lie (`.cargo/config.toml` names the target).
fn binaries(profile: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    target.join("x86_64-unknown-linux-gnu").join(profile)
}
