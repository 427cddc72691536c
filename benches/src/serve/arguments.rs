//! The command line of `serve`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::PathBuf;

use bulkhead_crypto::DataUnit;
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::limits::Limits;
use clap::Parser;

use super::limits;
use super::net::{NetSpec, UplinkSpec};
use super::spec::BlkSpec;

/// Most queues of a device: the reference names a queue by its bit in 64.
pub const MAX_QUEUES: u16 = 64;

const EXAMPLES: &str = "\
Examples:
  serve --socket /tmp/a.sock --blk null:1GiB
      a disk that forgets, to measure everything but storage
  serve --socket /tmp/a.sock --blk file:disk.img --xts --key-file volume.key
      a file, encrypted; `cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 \\
      --sector-size 4096 --iv-large-sectors --key-file volume.key disk.img NAME` opens it without us
  serve --socket /tmp/a.sock --blk file:a.img --socket /tmp/b.sock --blk ram:256MiB --queues 4
      two disks with four queues each
  serve --net /tmp/a.sock,switch:lan --net /tmp/b.sock,switch:lan,pairs=2
      two network cards on one switch, one of them with two queue pairs

Whoever may connect to a socket has what is there: put it into a folder that only they can enter.
A signal ends it; the sockets stay, and the next start replaces them. BULKHEAD_LOG sets what is logged (error, warn, info, debug, trace).";

/// Serves disks over vhost-user-blk and network cards over vhost-user-net, one on each socket.
#[derive(Debug, Parser)]
#[command(name = "serve", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// Where to listen; give one --blk for each
    #[arg(long, value_name = "PATH", required_unless_present = "net")]
    pub socket: Vec<PathBuf>,

    /// What to serve there: null:SIZE (reads nothing, writes nothing), ram:SIZE (memory, gone at the end) or
    /// file:PATH (a file or block device). SIZE is in bytes, or with KiB, MiB, GiB or TiB. For tests:
    /// volatile-cache:PATH (a file behind a write cache that is lost when serve ends), delay=US:SPEC (another
    /// one, each transfer up to so many microseconds later), hang=AFTER/FOR:SPEC (another
    /// one that begins no transfer from AFTER milliseconds after the start on, for so many milliseconds or for
    /// `ever`) and error=KIND/ERRNO/N:SPEC (another one of which
    /// every Nth read, write, flush, discard, zero or any transfer fails with ERRNO, or is short)
    #[arg(long, value_name = "SPEC", required_unless_present = "net")]
    pub blk: Vec<BlkSpec>,

    /// A network card: where to listen, what it is connected to (null, source:BYTES, which makes
    /// frames to measure with, switch:NAME with all others that name it,
    /// tap:INTERFACE, or xdp:INTERFACE/QUEUE), and mac=ADDRESS, mtu=BYTES, pairs=N (queue pairs), guard=off (it
    /// may send as anybody), tx-requests=RATE, tx-bytes=RATE, rx-requests=RATE, rx-bytes=RATE, all with commas
    /// between
    #[arg(
        long,
        value_name = "PATH,PORT[,OPTION...]",
        conflicts_with = "reference"
    )]
    pub net: Vec<NetSpec>,

    /// A switch's way out of the host: SWITCH=tap:INTERFACE, or SWITCH=xdp:INTERFACE/QUEUE
    #[arg(long, value_name = "SWITCH=PORT", requires = "net")]
    pub uplink: Vec<UplinkSpec>,

    /// Encrypt with AES-256-XTS, under a random key for each disk unless there is a --key-file
    #[arg(long)]
    pub xts: bool,

    /// Bytes that share a tweak, and the disk's logical block: 512 or 4096
    #[arg(long, value_name = "BYTES", requires = "xts", default_value = "4096", value_parser = data_unit)]
    pub data_unit: DataUnit,

    /// Key of every disk: 64 raw bytes, data key then tweak key
    #[arg(long, value_name = "FILE", requires = "xts")]
    pub key_file: Option<PathBuf>,

    /// Re-key every disk while it is served, from the key in this file to that of --key-file. How far it is
    /// stands in the disk's file: the disk is two MiB smaller than that, and the next start with the same
    /// options goes on
    #[arg(long, value_name = "FILE", requires_all = ["key_file", "rekey_id"],
          conflicts_with_all = ["reference", "read_only"])]
    pub rekey_from: Option<PathBuf>,

    /// Which re-key that is: a UUID, another one for each
    #[arg(long, value_name = "UUID", requires = "rekey_from")]
    pub rekey_id: Option<RekeyId>,

    /// Queues of each disk
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub queues: u16,

    /// A worker on this CPU; repeat it for more workers [default: one worker on any CPU]
    #[arg(long, value_name = "N")]
    pub cpu: Vec<usize>,

    /// So many workers, on any CPU
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with_all = ["cpu", "reference"],
          value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,

    /// For tests: move a queue to another worker every so many milliseconds
    #[arg(long, value_name = "MS", conflicts_with = "reference", value_parser = clap::value_parser!(u16).range(1..))]
    pub shuffle: Option<u16>,

    /// Serve with the stock crates vhost-user-backend and virtio-queue instead: the baseline
    #[arg(long)]
    pub reference: bool,

    /// Refuse writes, and open files for reading only
    #[arg(long)]
    pub read_only: bool,

    /// Bytes of the disks' logical block, 512 or 4096 [default: the data unit, 512 of plain disks]
    #[arg(long, value_name = "BYTES", value_parser = logical_block)]
    pub logical_block: Option<u32>,

    /// How much a disk may do in a second: requests=RATE, bytes=RATE or both with a comma; RATE/BURST says how
    /// much more at once after idleness [default: a tenth of a second's]. Give one for all disks, or one for each
    #[arg(long, value_name = "LIMIT", value_parser = limits::parse, conflicts_with = "reference")]
    pub limit: Vec<Limits>,

    /// How much all disks may do together, as in --limit: each has an equal part, if it can use it
    #[arg(long, value_name = "LIMIT", value_parser = limits::parse, conflicts_with = "reference")]
    pub group: Option<Limits>,

    /// Offer DISCARD, and give blocks up that the guest discards
    #[arg(long, conflicts_with = "reference")]
    pub discard: bool,
}

/// A mistake on the command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// A logical block that splits data units.
    #[error("--logical-block {block} is smaller than --data-unit {unit}: make it {unit}")]
    LogicalBlock {
        /// As given.
        block: u32,
        /// Of the data unit.
        unit: u32,
    },
    /// Neither of the data units, which are also the logical blocks.
    #[error("{0:?} is not a data unit or logical block: write 512 or 4096")]
    DataUnit(String),
    /// Sockets and disks that don't pair.
    #[error("{sockets} --socket and {disks} --blk: give one --blk for each --socket, in order")]
    Pairs {
        /// How many sockets.
        sockets: usize,
        /// How many disks.
        disks: usize,
    },
    /// Limits that are neither one for all nor one for each.
    #[error(
        "{limits} --limit and {disks} disks: give one --limit for all disks, or one for each, in order"
    )]
    Limits {
        /// How many limits.
        limits: usize,
        /// How many disks.
        disks: usize,
    },
    /// One path twice.
    #[error("the socket {0} is given twice: each device needs its own")]
    SocketTwice(PathBuf),
}

impl Arguments {
    /// Each socket with its disk, in the order given.
    ///
    /// # Errors
    /// [`ArgumentError::Pairs`], [`ArgumentError::Limits`], [`ArgumentError::SocketTwice`].
    pub fn pairs(&self) -> Result<Vec<(PathBuf, BlkSpec)>, ArgumentError> {
        if self.socket.len() != self.blk.len() {
            return Err(ArgumentError::Pairs {
                sockets: self.socket.len(),
                disks: self.blk.len(),
            });
        }
        if self.limit.len() > 1 && self.limit.len() != self.blk.len() {
            return Err(ArgumentError::Limits {
                limits: self.limit.len(),
                disks: self.blk.len(),
            });
        }
        let mut seen = std::collections::BTreeSet::new();
        let cards = self.net.iter().map(|net| &net.socket);
        if let Some(twice) = self
            .socket
            .iter()
            .chain(cards)
            .find(|path| !seen.insert(*path))
        {
            return Err(ArgumentError::SocketTwice(twice.clone()));
        }
        let disks = self.blk.iter().cloned();
        Ok(self.socket.iter().cloned().zip(disks).collect())
    }

    /// The data unit, where disks are encrypted.
    #[must_use]
    pub fn encryption(&self) -> Option<DataUnit> {
        self.xts.then_some(self.data_unit)
    }

    /// The logical block in bytes: as given, else the data unit of an encrypted disk, else a sector.
    ///
    /// # Errors
    /// [`ArgumentError::LogicalBlock`].
    pub fn logical_block_bytes(&self) -> Result<u32, ArgumentError> {
        let unit = self.encryption().map_or(512, DataUnit::bytes);
        match self.logical_block {
            None => Ok(unit),
            Some(block) if block < unit => Err(ArgumentError::LogicalBlock { block, unit }),
            Some(block) => Ok(block),
        }
    }
}

fn logical_block(text: &str) -> Result<u32, ArgumentError> {
    data_unit(text).map(DataUnit::bytes)
}

fn data_unit(text: &str) -> Result<DataUnit, ArgumentError> {
    text.parse()
        .ok()
        .and_then(DataUnit::new)
        .ok_or_else(|| ArgumentError::DataUnit(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("serve").chain(line.split_whitespace()))
    }

    #[test]
    fn two_disks_pair_up_in_order() {
        let line =
            "--socket a --blk null:1GiB --socket b --blk file:x:y --queues 4 --cpu 1 --cpu 0";
        let arguments = parse(line).expect("parses");
        let pairs = arguments.pairs().expect("pairs");
        assert_eq!(
            pairs,
            [
                ("a".into(), BlkSpec::Null { bytes: 1 << 30 }),
                ("b".into(), BlkSpec::File { path: "x:y".into() }),
            ]
        );
        assert_eq!((arguments.queues, &arguments.cpu), (4, &vec![1, 0]));
        assert_eq!(arguments.encryption(), None);
        assert_eq!(arguments.logical_block_bytes(), Ok(512));
        assert!(!arguments.reference && !arguments.read_only && !arguments.discard);
    }

    #[test]
    fn sockets_and_disks_must_pair() {
        let one_more = parse("--socket a --blk null:1GiB --socket b").expect("parses");
        let error = one_more.pairs().expect_err("two sockets, one disk");
        assert_eq!(
            error,
            ArgumentError::Pairs {
                sockets: 2,
                disks: 1
            }
        );
        let three =
            "--socket a --blk null:1MiB --socket b --blk null:1MiB --socket c --blk null:1MiB";
        let limits = |limits: &str| {
            let arguments = parse(&format!("{three} {limits}")).expect("parses");
            arguments.pairs().map(|_| arguments.limit.len())
        };
        assert_eq!(limits("--limit requests=5 --group bytes=1GiB/1MiB"), Ok(1));
        assert_eq!(
            limits("--limit requests=5 --limit bytes=1MiB"),
            Err(ArgumentError::Limits {
                limits: 2,
                disks: 3
            })
        );
        let twice = parse("--socket a --blk null:1GiB --socket a --blk null:1GiB").expect("parses");
        let error = twice.pairs().expect_err("one socket twice");
        assert_eq!(error, ArgumentError::SocketTwice("a".into()));
        let twice = parse("--socket a --blk null:1GiB --net a,null").expect("parses");
        let error = twice.pairs().expect_err("one socket twice");
        assert_eq!(error, ArgumentError::SocketTwice("a".into()));
        let cards = parse("--net a,null --net b,switch:lan").expect("parses");
        assert_eq!((cards.pairs(), cards.net.len()), (Ok(Vec::new()), 2));
        assert!(parse("--socket a").is_err());
        assert!(parse("--blk null:1GiB").is_err());
    }

    #[test]
    fn encryption_sets_the_logical_block() {
        let line = "--socket a --blk null:1GiB --xts";
        assert_eq!(parse(line).expect("parses").logical_block_bytes(), Ok(4096));
        let small = parse(&format!("{line} --data-unit 512")).expect("parses");
        assert_eq!(small.encryption(), Some(DataUnit::B512));
        assert_eq!(small.logical_block_bytes(), Ok(512));
        let large = parse("--socket a --blk null:1GiB --logical-block 4096").expect("parses");
        assert_eq!(large.logical_block_bytes(), Ok(4096));
        let both = parse(&format!("{line} --logical-block 512")).expect("parses");
        let error = both
            .logical_block_bytes()
            .expect_err("it splits data units");
        assert!(error.to_string().contains("make it 4096"), "{error}");
        let error = parse(&format!("{line} --data-unit 1024")).expect_err("not a data unit");
        assert!(error.to_string().contains("write 512 or 4096"), "{error}");
    }

    #[test]
    fn options_of_encryption_need_it() {
        for option in ["--data-unit 512", "--key-file k"] {
            let error = parse(&format!("--socket a --blk null:1GiB {option}"))
                .expect_err("encryption was not asked for");
            assert!(error.to_string().contains("--xts"), "{error}");
        }
    }

    #[test]
    fn a_re_key_needs_both_keys_and_its_id() {
        let line = "--socket a --blk file:d --xts";
        let id = "--rekey-id 0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e90";
        let all = format!("{line} --key-file b --rekey-from a {id}");
        let arguments = parse(&all).expect("parses");
        assert_eq!(arguments.rekey_from, Some("a".into()));
        assert!(arguments.rekey_id.is_some());
        let cases = [
            (format!("{line} --key-file b --rekey-from a"), "--rekey-id"),
            (format!("{line} --rekey-from a {id}"), "--key-file"),
            (format!("{line} --key-file b {id}"), "--rekey-from"),
            (format!("{all} --reference"), "--reference"),
            (format!("{all} --read-only"), "--read-only"),
            (all.replace("0b5f", "0B5F"), "a UUID like"),
        ];
        for (line, expected) in cases {
            let error = parse(&line).expect_err(&line).to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn queues_are_from_1_to_64() {
        for bad in ["0", "65", "-1", "x"] {
            assert!(parse(&format!("--socket a --blk null:1GiB --queues={bad}")).is_err());
        }
        assert!(parse("--socket a --blk null:1GiB --queues 64").is_ok());
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }
}
