//! The command line of `serve`.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::PathBuf;
use std::str::FromStr;

use bulkhead_crypto::DataUnit;
use clap::Parser;

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

Whoever may connect to a socket has its disk: put it into a folder that only they can enter.
A signal ends it; the sockets stay, and the next start replaces them. BULKHEAD_LOG sets what is logged (error, warn, info, debug, trace).";

/// Serves disks over vhost-user-blk, one on each socket.
#[derive(Debug, Parser)]
#[command(name = "serve", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// Where to listen; give one --blk for each
    #[arg(long, value_name = "PATH", required = true)]
    pub socket: Vec<PathBuf>,

    /// What to serve there: null:SIZE (reads nothing, writes nothing), ram:SIZE (memory, gone at the end) or
    /// file:PATH (a file or block device). SIZE is in bytes, or with KiB, MiB, GiB or TiB
    #[arg(long, value_name = "SPEC", required = true)]
    pub blk: Vec<BlkSpec>,

    /// Encrypt with AES-256-XTS, under a random key for each disk unless there is a --key-file
    #[arg(long)]
    pub xts: bool,

    /// Bytes that share a tweak, and the disk's logical block: 512 or 4096
    #[arg(long, value_name = "BYTES", requires = "xts", default_value = "4096", value_parser = data_unit)]
    pub data_unit: DataUnit,

    /// Key of every disk: 64 raw bytes, data key then tweak key
    #[arg(long, value_name = "FILE", requires = "xts")]
    pub key_file: Option<PathBuf>,

    /// Queues of each disk
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub queues: u16,

    /// A worker on this CPU; repeat it for more workers [default: one worker on any CPU]
    #[arg(long, value_name = "N")]
    pub cpu: Vec<usize>,

    /// Serve with the stock crates vhost-user-backend and virtio-queue instead: the baseline
    #[arg(long)]
    pub reference: bool,

    /// Refuse writes, and open files for reading only
    #[arg(long)]
    pub read_only: bool,
}

/// What one disk is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlkSpec {
    /// Nothing: reads leave the buffer as it is, writes are forgotten.
    Null {
        /// Size in bytes.
        bytes: u64,
    },
    /// Memory.
    Ram {
        /// Size in bytes.
        bytes: u64,
    },
    /// A file or block device.
    File {
        /// Where it is.
        path: PathBuf,
    },
}

/// A mistake on the command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    /// Not one of the kinds.
    #[error("write null:SIZE, ram:SIZE or file:PATH, as in null:1GiB")]
    Kind,
    /// No path after `file:`.
    #[error("write the path after file:, as in file:disk.img")]
    NoPath,
    /// Not a size.
    #[error(
        "{0:?} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB, as in 256MiB"
    )]
    Size(String),
    /// Neither of the data units.
    #[error("{0:?} is not a data unit: write 512 or 4096")]
    DataUnit(String),
    /// Sockets and disks that don't pair.
    #[error("{sockets} --socket and {disks} --blk: give one --blk for each --socket, in order")]
    Pairs {
        /// How many sockets.
        sockets: usize,
        /// How many disks.
        disks: usize,
    },
    /// One path twice.
    #[error("--socket {0} is given twice: each disk needs its own")]
    SocketTwice(PathBuf),
}

impl Arguments {
    /// Each socket with its disk, in the order given.
    ///
    /// # Errors
    /// [`ArgumentError::Pairs`], [`ArgumentError::SocketTwice`].
    pub fn pairs(&self) -> Result<Vec<(PathBuf, BlkSpec)>, ArgumentError> {
        if self.socket.len() != self.blk.len() {
            return Err(ArgumentError::Pairs {
                sockets: self.socket.len(),
                disks: self.blk.len(),
            });
        }
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = self.socket.iter().find(|path| !seen.insert(*path)) {
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

    /// The logical block in bytes: the data unit of an encrypted disk, else a sector.
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        self.encryption().map_or(512, DataUnit::bytes)
    }
}

impl FromStr for BlkSpec {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, ArgumentError> {
        match text.split_once(':') {
            Some(("null", size)) => Ok(Self::Null {
                bytes: bytes(size)?,
            }),
            Some(("ram", size)) => Ok(Self::Ram {
                bytes: bytes(size)?,
            }),
            Some(("file", "")) => Err(ArgumentError::NoPath),
            Some(("file", path)) => Ok(Self::File { path: path.into() }),
            _ => Err(ArgumentError::Kind),
        }
    }
}

/// A size in bytes: not zero, and no larger than what a file can be.
fn bytes(text: &str) -> Result<u64, ArgumentError> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return Err(ArgumentError::Size(text.to_owned())),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok())
        .ok_or_else(|| ArgumentError::Size(text.to_owned()))
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
        assert_eq!(arguments.logical_block_bytes(), 512);
        assert!(!arguments.reference && !arguments.read_only);
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
        let twice = parse("--socket a --blk null:1GiB --socket a --blk null:1GiB").expect("parses");
        let error = twice.pairs().expect_err("one socket twice");
        assert_eq!(error, ArgumentError::SocketTwice("a".into()));
        assert!(parse("--socket a").is_err());
        assert!(parse("--blk null:1GiB").is_err());
    }

    #[test]
    fn encryption_sets_the_logical_block() {
        let line = "--socket a --blk null:1GiB --xts";
        assert_eq!(parse(line).expect("parses").logical_block_bytes(), 4096);
        let small = parse(&format!("{line} --data-unit 512")).expect("parses");
        assert_eq!(small.encryption(), Some(DataUnit::B512));
        assert_eq!(small.logical_block_bytes(), 512);
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
    fn sizes() {
        let good = [
            ("512", 512),
            ("4096B", 4096),
            ("3KiB", 3 << 10),
            ("256MiB", 256 << 20),
            ("2TiB", 2 << 40),
        ];
        for (text, expected) in good {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        let bad = [
            "",
            "0",
            "0GiB",
            "GiB",
            "-1",
            "1GB",
            "1 GiB",
            "1.5GiB",
            "1gib",
            "99999999999GiB",
            "9223372036854775808",
            "+1",
            "1GiBx",
            "\u{663}MiB",
        ];
        for text in bad {
            let error = bytes(text).expect_err(text);
            assert!(error.to_string().contains("KiB, MiB, GiB or TiB"), "{text}");
        }
    }

    #[test]
    fn a_disk_that_is_none_says_how_to_write_one() {
        for text in ["", "null", "disk.img", "NULL:1GiB", "tape:1"] {
            assert_eq!(text.parse::<BlkSpec>(), Err(ArgumentError::Kind), "{text}");
        }
        assert_eq!("file:".parse::<BlkSpec>(), Err(ArgumentError::NoPath));
        let error = parse("--socket a --blk tape:1").expect_err("no such kind");
        assert!(error.to_string().contains("write null:SIZE"), "{error}");
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
