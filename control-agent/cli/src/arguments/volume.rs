//! The command line of `volume`: making one, sealing its key anew, recovering its key or its bytes.

use std::path::PathBuf;

use bulkhead_bundle::source::parse_size;
use bulkhead_protocol::{DiscardPolicy, SocketName};
use clap::error::ErrorKind;
use clap::{Args, ValueEnum};

use super::limits::LimitArguments;

/// The data units there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DataUnit {
    /// 4096 bytes
    #[value(name = "4096")]
    FourKib,
    /// 512 bytes
    #[value(name = "512")]
    Sector,
    /// A plain volume, not encrypted
    #[value(name = "none")]
    Plain,
}

impl DataUnit {
    /// In bytes; none for a plain volume.
    pub(crate) fn bytes(self) -> Option<u32> {
        match self {
            Self::FourKib => Some(4096),
            Self::Sector => Some(512),
            Self::Plain => None,
        }
    }
}

/// What `--discard` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Discard {
    /// DISCARD is not offered to the guest
    Ignore,
    /// DISCARD reaches the storage, which then knows what is free
    Pass,
}

impl From<Discard> for DiscardPolicy {
    fn from(discard: Discard) -> Self {
        match discard {
            Discard::Ignore => Self::Ignore,
            Discard::Pass => Self::Pass,
        }
    }
}

const CREATE_HELP: &str = "\
Example:
  bulkhead volume create --name disk --path disk.img --size 64MiB --file /srv/volumes/disk.img \\
      --owner-uid 991 --host host.pub --recovery recovery.key.pub \\
      --socket vm1 --allowed-uid 1000 --out disk.toml

The stanza goes into a bundle by `include = [\"disk.toml\"]`. Its key is in no file: it is sealed to
each --host and to --recovery, and gone from memory. The file is reserved in full; where the file
system can't do that it is left sparse, with a warning: a full disk then fails the guest's writes.
A new encrypted volume reads as random bytes until the guest has written to it.";

#[derive(Debug, Args)]
#[command(after_help = CREATE_HELP)]
pub(crate) struct VolumeCreate {
    /// The volume's name
    #[arg(long)]
    pub(crate) name: String,
    /// Its file or block device, as the agent opens it: absolute, or within a --volume-dir of rot
    #[arg(long)]
    pub(crate) path: String,
    /// Its capacity: a number of bytes, or of KiB, MiB, GiB, TiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: u64,
    /// Make and reserve the file here (mode 0600); refused if it exists
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// --file exists and is used as it is, if it is large enough
    #[arg(long, requires = "file")]
    pub(crate) existing: bool,
    /// Who is to own --file: the uid that bulkhead-agent runs as
    #[arg(long, value_name = "N", requires = "file")]
    pub(crate) owner_uid: Option<u32>,
    /// What is encrypted as one unit, in bytes; none for a plain volume
    #[arg(long, value_enum, default_value = "4096")]
    pub(crate) data_unit: DataUnit,
    /// The guest's block in bytes, 512 or 4096 [default: 512, or the data unit if that is larger]
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    pub(crate) logical_block: Option<String>,
    /// Refuse writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The disk's serial, at most 20 characters [default: the first 20 digits of the volume's id]
    #[arg(long)]
    pub(crate) serial: Option<String>,
    /// What DISCARD does
    #[arg(long, value_enum, default_value = "ignore")]
    pub(crate) discard: Discard,
    /// Request queues, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) queues: u16,
    /// Public key of a host that may serve it; may be given several times
    #[arg(long = "host", value_name = "FILE")]
    pub(crate) hosts: Vec<PathBuf>,
    /// Public key of the recovery recipient
    #[arg(long, value_name = "FILE")]
    pub(crate) recovery: Option<PathBuf>,
    /// Its listener: the socket is <run dir>/vhost/NAME.sock
    #[arg(long, value_name = "NAME")]
    pub(crate) socket: SocketName,
    /// The only uid whose frontend (VMM) may connect
    #[arg(long, value_name = "N")]
    pub(crate) allowed_uid: u32,
    /// Owner of the socket file [default: --allowed-uid]
    #[arg(long, value_name = "N")]
    pub(crate) socket_uid: Option<u32>,
    /// Group of the socket file
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) socket_gid: u32,
    /// Permissions of the socket file, octal
    #[arg(long, value_name = "MODE", default_value = "0660", value_parser = parse_mode)]
    pub(crate) socket_mode: u32,
    #[command(flatten)]
    pub(crate) limits: LimitArguments,
    /// The stanza to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  bulkhead volume recover --bundle bundle.cose --volume disk --recovery recovery.key --out disk.key\n\nPrints the cryptsetup line; wipe disk.key (`shred -u disk.key`) when you are done. Of a volume whose re-key was\ninterrupted (give --file), the lines for both parts, with the previous key in disk.key.previous."
)]
pub(crate) struct VolumeRecover {
    /// An envelope, a bundle's source, or the volume's stanza
    #[arg(long, value_name = "FILE")]
    pub(crate) bundle: PathBuf,
    /// The volume's name or id
    #[arg(long, value_name = "NAME")]
    pub(crate) volume: String,
    /// The recovery key (or a host's key, if the volume is sealed to that)
    #[arg(long, value_name = "FILE")]
    pub(crate) recovery: PathBuf,
    /// The volume's file or block device, in which it stands how far a re-key is
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// The key file to make: 64 bytes, mode 0600
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

const EXPORT_HELP: &str = "\
Examples:
  bulkhead volume export --bundle bundle.cose --volume disk --recovery recovery.key \\
      --file /srv/volumes/disk.img --out disk.raw
  bulkhead volume export --bundle disk.toml --volume disk --recovery recovery.key \\
      --file /srv/volumes/disk.img | zstd > disk.raw.zst

While it runs the volume is locked: a guest that starts meanwhile waits for its disk. What the
guest never wrote of an encrypted volume comes out as random bytes.";

#[derive(Debug, Args)]
#[command(after_help = EXPORT_HELP)]
pub(crate) struct VolumeExport {
    /// An envelope, a bundle's source, or the volume's stanza
    #[arg(long, value_name = "FILE")]
    pub(crate) bundle: PathBuf,
    /// The volume's name or id
    #[arg(long, value_name = "NAME")]
    pub(crate) volume: String,
    /// The recovery key (or a host's key, if the volume is sealed to that); a plain volume needs none
    #[arg(long, value_name = "FILE")]
    pub(crate) recovery: Option<PathBuf>,
    /// The volume's file or block device
    #[arg(long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Where the bytes go: a file of mode 0600, sparse where they are zero; - is standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub(crate) out: PathBuf,
    /// Overwrite --out, and read the volume even while it is in use
    #[arg(long)]
    pub(crate) force: bool,
}

const RESEAL_HELP: &str = "\
Examples:
  for a further host, to migrate a guest there:
  bulkhead volume reseal --volume disk.toml --recovery recovery.key --host host-b.pub --out disk-2.toml
  for a greater size, which the guest sees at the next `bulkhead apply`:
  bulkhead volume reseal --volume disk.toml --recovery recovery.key --host host-a.pub \\
      --size 128MiB --grow-file /srv/volumes/disk.img --out disk-2.toml

The key stays the same, and so do the volume's bytes. A sealed key holds for one size: with --size,
each host of the volume has to be given again (or dropped).";

#[derive(Debug, Args)]
#[command(after_help = RESEAL_HELP)]
pub(crate) struct VolumeReseal {
    /// The volume's stanza, as it is now
    #[arg(long, value_name = "FILE")]
    pub(crate) volume: PathBuf,
    /// The recovery key; a plain volume needs none
    #[arg(long, value_name = "FILE")]
    pub(crate) recovery: Option<PathBuf>,
    /// Its new capacity, not below the one it has
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: Option<u64>,
    /// Public key of a host that may serve it; may be given several times
    #[arg(long = "host", value_name = "FILE")]
    pub(crate) hosts: Vec<PathBuf>,
    /// A host that the key is sealed to no more; may be given several times
    #[arg(long = "drop-host", value_name = "NAME")]
    pub(crate) dropped: Vec<String>,
    /// Enlarge this, the volume's file, to its new size
    #[arg(long, value_name = "FILE")]
    pub(crate) grow_file: Option<PathBuf>,
    /// The stanza to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

const SHRED_HELP: &str = "\
Example:
  bulkhead volume shred --volume disk.toml                     (what is to be signed; nothing ends)
  bulkhead sign --bundle bundle.toml --key alice.key --out bundle.cose      (with the line printed)
  bulkhead apply bundle.cose                                                (on each host)
  bulkhead status                                              (there: the volume is destroyed)
  bulkhead volume shred --volume disk.toml --copy bundle-6.cose --yes

A host that applies the line destroys its own key and the volume's with it, goes on serving its other
volumes under a new key, and never takes the volume's id again. There is no way back.";

#[derive(Debug, Args)]
#[command(after_help = SHRED_HELP)]
pub(crate) struct VolumeShred {
    /// The volume's stanza, which is destroyed
    #[arg(long, value_name = "FILE")]
    pub(crate) volume: PathBuf,
    /// Another stanza, or an envelope, that names the volume and is destroyed too; several times
    #[arg(long = "copy", value_name = "FILE")]
    pub(crate) copies: Vec<PathBuf>,
    /// The volume's own file or block device: its bytes are discarded, and the file is removed
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Do it; without, nothing ends and what would is printed
    #[arg(long)]
    pub(crate) yes: bool,
}

impl VolumeCreate {
    /// Who gets the key. By hand, because clap's conditional requirements don't see default values.
    pub(super) fn check_recipients(&self) -> Result<(), (ErrorKind, &'static str)> {
        let encrypted = self.data_unit != DataUnit::Plain;
        if !encrypted && (!self.hosts.is_empty() || self.recovery.is_some()) {
            return Err((
                ErrorKind::ArgumentConflict,
                "a plain volume (--data-unit none) has no key to seal: \
                 leave out --host and --recovery, or choose --data-unit 4096",
            ));
        }
        if encrypted && self.hosts.is_empty() {
            return Err((
                ErrorKind::MissingRequiredArgument,
                "--host is missing: the public key (host.pub) of each host that may serve the volume",
            ));
        }
        if encrypted && self.recovery.is_none() {
            return Err((
                ErrorKind::MissingRequiredArgument,
                "--recovery is missing: a volume whose host is lost could never be read again; \
                 make a recovery key with `bulkhead recovery new`",
            ));
        }
        Ok(())
    }
}

/// Permission bits in octal, with or without a leading `0` or `0o`.
fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text.strip_prefix("0o").unwrap_or(text), 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("must be octal permission bits, like 0660".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(parse_mode("0660"), Ok(0o660));
        assert_eq!(parse_mode("0o600"), Ok(0o600));
        for bad in ["", "8", "1777", "-1", "rw"] {
            assert!(parse_mode(bad).is_err(), "{bad:?}");
        }
    }
}
