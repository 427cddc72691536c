//! The command line of `volume rekey`.

use std::path::PathBuf;

use clap::Args;

const REKEY_HELP: &str = "\
Three steps, all while the guest runs:
  bulkhead volume rekey --volume disk.toml --host host.pub --recovery recovery.key.pub \\
      --file /srv/volumes/disk.img --out disk-2.toml
      then sign and apply a bundle with disk-2.toml in the place of disk.toml
  bulkhead status          REKEY shows how far it is, and then `done`
  bulkhead volume rekey --finish --volume disk-2.toml --out disk-3.toml
      then sign and apply a bundle with disk-3.toml
If --file lies elsewhere, leave it out, and there, before the bundle is applied:
  bulkhead volume rekey --prepare --volume disk-2.toml --file /srv/volumes/disk.img

The data plane reads, encrypts with the new key and writes back the whole volume, 1 MiB at a time; a crash at any
moment loses nothing. Until it is done both keys are needed: keep disk-2.toml and the recovery key. --file grows by a
record behind the volume's end, up to 3 MiB; a block device needs that room.";

#[derive(Debug, Args)]
#[command(after_help = REKEY_HELP)]
pub(crate) struct VolumeRekey {
    /// The volume's stanza, as it is now
    #[arg(long, value_name = "FILE")]
    pub(crate) volume: PathBuf,
    /// Public key of a host that may serve it; each that the key is sealed to now
    #[arg(
        long = "host",
        value_name = "FILE",
        required_unless_present_any = ["prepare", "finish"],
        conflicts_with_all = ["prepare", "finish"]
    )]
    pub(crate) hosts: Vec<PathBuf>,
    /// Public key of the recovery recipient
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["prepare", "finish"],
        conflicts_with_all = ["prepare", "finish"]
    )]
    pub(crate) recovery: Option<PathBuf>,
    /// A host that is to serve it no more: it gets neither key; may be given several times
    #[arg(
        long = "drop-host",
        value_name = "NAME",
        conflicts_with_all = ["prepare", "finish"]
    )]
    pub(crate) dropped: Vec<String>,
    /// The volume's file or block device, to be prepared for the re-key; it may be in use
    #[arg(long, value_name = "FILE", conflicts_with = "finish")]
    pub(crate) file: Option<PathBuf>,
    /// Only prepare --file for the re-key that the stanza has; refused once that is over
    #[arg(long, requires = "file", conflicts_with = "finish")]
    pub(crate) prepare: bool,
    /// Drop the previous key, once `bulkhead status` says that the re-key is done
    #[arg(long)]
    pub(crate) finish: bool,
    /// The stanza to write
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "prepare",
        conflicts_with = "prepare"
    )]
    pub(crate) out: Option<PathBuf>,
}
