//! The command line that rot starts keyd with.

use std::path::PathBuf;

use clap::Parser;

/// The key service; `bulkhead-rot` starts it.
#[derive(Debug, Clone, Parser)]
#[command(name = "bulkhead-keyd", version, about)]
pub struct Arguments {
    /// Name of this host, as bundles target it and keys are sealed to it
    #[arg(long, value_name = "NAME")]
    pub host: String,
    /// Where the host's secret key lies and keyd keeps its epoch floor; 0700, keyd's own
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// keyd's own trust root: whose signatures it takes, and how many
    #[arg(long, value_name = "FILE")]
    pub trust: PathBuf,
}
