//! The command line: every command, option and example.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};

mod limits;
mod rekey;
mod release;
mod volume;

pub(crate) use rekey::VolumeRekey;
pub(crate) use release::{ReleaseCommand, ReleaseShow, ReleaseSign, Upgrade};
pub(crate) use volume::{VolumeCreate, VolumeExport, VolumeRecover, VolumeReseal, VolumeShred};

/// Where rot puts the agent's socket.
const ADMIN_SOCKET: &str = "/run/bulkhead/admin.sock";

const OVERVIEW: &str = "\
From nothing to a served volume:
  bulkhead operator new --name alice --out alice.key
  bulkhead trust new --operator alice.key.pub --out trust.toml
  bulkhead recovery new --out recovery.key            (then put it in a safe)
  bulkhead host init --name host-a --state-dir /var/lib/bulkhead      (on the host)
  bulkhead volume create --name disk --path disk.img --size 64MiB --file /srv/volumes/disk.img \\
      --host host.pub --recovery recovery.key.pub --socket vm1 --allowed-uid 1000 --out disk.toml
  bulkhead sign --bundle bundle.toml --key alice.key --out bundle.cose
  bulkhead apply bundle.cose                          (on the host)

Exit codes: 0 done, 1 refused or failed (the reason is on standard error), 2 usage.";

/// Keys, volumes and signed bundles for Bulkhead hosts
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, after_help = OVERVIEW, subcommand_required = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Keys that sign bundles
    #[command(subcommand)]
    Operator(OperatorCommand),
    /// The file that tells a host whose signatures count
    #[command(subcommand)]
    Trust(TrustCommand),
    /// The offline key that can open every volume
    #[command(subcommand)]
    Recovery(RecoveryCommand),
    /// A host's own key
    #[command(subcommand)]
    Host(HostCommand),
    /// Volumes and their keys
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Check a bundle's source and sign it
    Sign(Sign),
    /// What an envelope or a bundle's source says, and who signed
    Show(Show),
    /// Make this host what an envelope says
    Apply(Apply),
    /// What runs on this host
    Status(Status),
    /// Statements that a binary is a release of Bulkhead
    #[command(subcommand)]
    Release(ReleaseCommand),
    /// Run a released binary in the place of the one that runs
    Upgrade(Upgrade),
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperatorCommand {
    /// Make an operator's keys: FILE (secret, mode 0600) and FILE.pub
    New(OperatorNew),
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrustCommand {
    /// Make a trust root from operators' public keys
    New(TrustNew),
}

#[derive(Debug, Subcommand)]
pub(crate) enum RecoveryCommand {
    /// Make the recovery key: FILE (secret, mode 0600) and FILE.pub
    New(RecoveryNew),
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Make this host's key: DIR/keyd/host.key (secret, mode 0600) and DIR/host.pub
    Init(HostInit),
    /// The host's public key as it is now, for `volume create` and `volume reseal`
    Public(HostPublic),
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make a volume: a random key sealed to its hosts and to recovery, its file, its stanza
    Create(Box<VolumeCreate>),
    /// Seal a volume's key anew: to further hosts, or for a greater size
    Reseal(VolumeReseal),
    /// Give a volume another key, while it is served
    Rekey(VolumeRekey),
    /// Without any Bulkhead running: a volume's key, and the cryptsetup line that opens it
    Recover(VolumeRecover),
    /// Without any Bulkhead running: a volume's bytes, decrypted, to a stream or a file
    Export(VolumeExport),
    /// Destroy a volume for good: the lines to sign, and the end of its sealed copies here
    Shred(VolumeShred),
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead operator new --name alice --out alice.key\n\nGive alice.key.pub to whoever makes the trust root; keep alice.key to yourself."
)]
pub(crate) struct OperatorNew {
    /// Who it is, for people
    #[arg(long)]
    pub(crate) name: String,
    /// The secret key file to make; the public one is FILE.pub
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead trust new --operator alice.key.pub --operator bob.key.pub --threshold 2 --out trust.toml"
)]
pub(crate) struct TrustNew {
    /// An operator's public key; may be given several times
    #[arg(long = "operator", value_name = "FILE", required = true)]
    pub(crate) operators: Vec<PathBuf>,
    /// How many operators have to sign [default: all of them]
    #[arg(long, value_name = "N")]
    pub(crate) threshold: Option<usize>,
    /// The trust root to make
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead recovery new --out recovery.key\n\nVolumes are sealed to recovery.key.pub. recovery.key belongs offline, in a safe: it opens them all."
)]
pub(crate) struct RecoveryNew {
    /// The secret key file to make; the public one is FILE.pub
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example, on the host:\n  bulkhead host init --name host-a --state-dir /var/lib/bulkhead --uid 990\n\nVolumes are sealed to DIR/host.pub; host.key never leaves the host."
)]
pub(crate) struct HostInit {
    /// The host's name, as bundles target it
    #[arg(long)]
    pub(crate) name: String,
    /// The state directory that bulkhead-rot is started with
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// The uid that bulkhead-keyd runs as [default: yours]
    #[arg(long, value_name = "N")]
    pub(crate) uid: Option<u32>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example, on the host, as root:\n  bulkhead host public --state-dir /var/lib/bulkhead > host-a.pub\n\nThe host gets another key whenever a volume is shredded. DIR/host.pub is brought up to date."
)]
pub(crate) struct HostPublic {
    /// The state directory that bulkhead-rot is started with
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead sign --bundle bundle.toml --key alice.key --key bob.key --out bundle.cose\n\nA bundle.toml:\n  host = \"host-a\"\n  epoch = 1                              # higher with every bundle of this host\n  not_before = 2026-01-01T00:00:00Z\n  expires = 2026-02-01T00:00:00Z         # a host takes no new bundle after this\n  include = [\"disk.toml\"]                # as `bulkhead volume create` wrote it"
)]
pub(crate) struct Sign {
    /// The bundle's source
    #[arg(long, value_name = "FILE")]
    pub(crate) bundle: PathBuf,
    /// An operator's secret key; as many as the host's trust root demands
    #[arg(long = "key", value_name = "FILE", required = true)]
    pub(crate) keys: Vec<PathBuf>,
    /// The envelope to write; one that is there is replaced
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bulkhead show bundle.cose --trust trust.toml    (verifies the signatures)\n  bulkhead show bundle.toml                       (checks the source)"
)]
pub(crate) struct Show {
    /// An envelope, a bundle's source, or a volume's stanza
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Verify the envelope's signatures against this trust root
    #[arg(long, value_name = "FILE")]
    pub(crate) trust: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  bulkhead apply bundle.cose --dry-run     (what would it do?)\n  bulkhead apply bundle.cose\n\nIf the bundle was accepted but a step of it failed, the host tries that again by itself; the exit code is 1."
)]
pub(crate) struct Apply {
    /// The envelope
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// Only verify and plan; nothing changes
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  bulkhead status\n  bulkhead status --json")]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) admin: Admin,
    /// As one JSON object, for programs
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the agent listens.
#[derive(Debug, Args)]
pub(crate) struct Admin {
    /// The agent's socket: admin.sock in the --run-dir of bulkhead-rot
    #[arg(long = "admin", value_name = "PATH", default_value = ADMIN_SOCKET)]
    pub(crate) socket: PathBuf,
}

impl Arguments {
    /// The command line of this process. Help, version and mistakes end it here, with clap's exit codes.
    pub(crate) fn from_process() -> Self {
        let arguments = Self::parse();
        if let Command::Volume(VolumeCommand::Create(create)) = &arguments.command
            && let Err((kind, problem)) = create.check_recipients()
        {
            let mut command = Self::command();
            command.build(); // so that the usage line names the whole command
            let create = command
                .find_subcommand_mut("volume")
                .and_then(|volume| volume.find_subcommand_mut("create"));
            match create {
                Some(create) => create.error(kind, problem).exit(),
                None => command.error(kind, problem).exit(),
            }
        }
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
