//! The command line of `block-bench`.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Parser;

/// Measures the data plane beside its floors and its peers, on two CPUs.
#[derive(Debug, Clone, Parser)]
#[command(name = "block-bench")]
pub struct Arguments {
    /// Folder for block.json and block.svg; files that are measured lie there, too, for as long as it takes
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    pub out: PathBuf,
    /// Folder of a tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/dev/shm")]
    pub tmpfs: PathBuf,
    /// Folder of `serve` [default: that of this program]
    #[arg(long, value_name = "FOLDER")]
    pub bin: Option<PathBuf>,
    /// Beside the `serve` of this folder, and nothing else: what a change brought. Written to against.json
    #[arg(long, value_name = "FOLDER")]
    pub against: Option<PathBuf>,
    /// Only parts, or cases of the storages, whose name begins so: `devices`, `null`, `null XTS`, `file`, ...
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
    /// Measures nothing: writes the tables of block.json into this page
    #[arg(long, value_name = "FILE")]
    pub table: Option<PathBuf>,
    /// Shows that everything can be measured, in seconds; the figures mean little
    #[arg(long)]
    pub quick: bool,
}
