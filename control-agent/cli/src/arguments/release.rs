//! `release` and `upgrade` on the command line.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Admin;

#[derive(Debug, Subcommand)]
pub(crate) enum ReleaseCommand {
    /// Sign that a binary is a release of a program
    Sign(ReleaseSign),
    /// What a release statement says, and who signed
    Show(ReleaseShow),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead release sign --binary target/release/bulkhead-dataplane --program dataplane \\\n      --version 41 --name 0.4.1 --key alice.key --out dataplane-41.release\n\nHosts that were upgraded to a version take no lower one of that program any more. To go back to an\nolder binary, sign it again with a higher version."
)]
pub(crate) struct ReleaseSign {
    /// The binary, as it will be installed
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: PathBuf,
    /// Which program it is: rot, keyd, agent or dataplane
    #[arg(long)]
    pub(crate) program: String,
    /// Number of the release, from 1: a later one of the same program is higher
    #[arg(long, value_name = "N")]
    pub(crate) version: u64,
    /// What people call it
    #[arg(long)]
    pub(crate) name: String,
    /// An operator's secret key; as many as the hosts' trust root demands
    #[arg(long = "key", value_name = "FILE", required = true)]
    pub(crate) keys: Vec<PathBuf>,
    /// The statement to write; one that is there is replaced
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead release show dataplane-41.release --trust trust.toml --binary /usr/lib/bulkhead/bulkhead-dataplane"
)]
pub(crate) struct ReleaseShow {
    /// The statement
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Verify the statement's signatures against this trust root
    #[arg(long, value_name = "FILE")]
    pub(crate) trust: Option<PathBuf>,
    /// Compare this binary with the statement
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example, on the host:\n  install -m 755 bulkhead-dataplane /usr/lib/bulkhead/\n  bulkhead upgrade dataplane-41.release\n\nThe data plane is upgraded while guests do I/O. If anything fails, the one that runs goes on, or the\nbinary that ran before is started again; the exit code is 1."
)]
pub(crate) struct Upgrade {
    /// The release statement; the binary must lie in the --bin-dir of bulkhead-rot already
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) admin: Admin,
}
