//! The command line of `net-bench`.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Parser;

use crate::block::arguments as block;

/// Measures network cards beside DPDK's testpmd, on two CPUs.
#[derive(Debug, Clone, Parser)]
#[command(name = "net-bench")]
pub struct Arguments {
    /// Folder for net.json and net.svg; sockets lie there, too, for as long as it takes
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    pub out: PathBuf,
    /// Folder of `serve` [default: that of this program]
    #[arg(long, value_name = "FOLDER")]
    pub bin: Option<PathBuf>,
    /// Only this part: `guest`, `switch`, `segments`, `fairness`, `tap`
    #[arg(long, value_name = "NAME")]
    pub only: Option<String>,
    /// Measures nothing: writes the tables of net.json into this page
    #[arg(long, value_name = "FILE")]
    pub table: Option<PathBuf>,
    /// Shows that everything can be measured, in seconds; the figures mean little
    #[arg(long)]
    pub quick: bool,
}

impl Arguments {
    /// What a [`Bench`](crate::block::bench::Bench) needs of it.
    #[must_use]
    pub fn of_bench(&self) -> block::Arguments {
        block::Arguments {
            out: self.out.clone(),
            tmpfs: self.out.clone(),
            bin: self.bin.clone(),
            against: None,
            only: self.only.clone(),
            table: None,
            quick: self.quick,
        }
    }
}
