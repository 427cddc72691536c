//! From a command line to devices ready to be served: files opened and locked, keys in secret memory,
//! listeners bound last, so that a socket exists only if everything else is there.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretMemory};
use bulkhead_dataplane::storage::error::Fault;
use bulkhead_protocol::{RekeyId, VolumeId};

use super::arguments::{ArgumentError, Arguments};
use super::file;
use super::rekey::{self, RekeyError};
use super::socket::{self, SocketError};
use super::spec::BlkSpec;

/// A device to be served.
#[derive(Debug)]
pub struct Device {
    /// Where its listener is.
    pub socket: PathBuf,
    /// Its listener, blocking.
    pub listener: UnixListener,
    /// What is served there.
    pub disk: DiskSpec,
}

/// A disk, before it is served.
#[derive(Debug)]
pub struct DiskSpec {
    /// Where its blocks live.
    pub backing: Backing,
    /// How they are encrypted there; none: plain.
    pub xts: Option<Xts>,
    /// Logical block in bytes.
    pub logical_block_bytes: u32,
    /// Request queues.
    pub queues: u16,
    /// Writes are refused.
    pub read_only: bool,
    /// DISCARD is offered.
    pub discard: bool,
    /// What GET_ID answers, zero-padded.
    pub serial: [u8; 20],
}

impl DiskSpec {
    /// Size of the disk in bytes: with a re-key less than its backing has.
    ///
    /// # Errors
    /// [`RekeyError::NoRoom`].
    pub fn bytes(&self) -> Result<u64, RekeyError> {
        match self.xts {
            Some(Xts { rekey: Some(_), .. }) => rekey::volume_bytes(self.backing.bytes()),
            _ => Ok(self.backing.bytes()),
        }
    }
}

/// Where blocks live.
#[derive(Debug)]
pub enum Backing {
    /// Nothing.
    Null {
        /// Size in bytes.
        bytes: u64,
    },
    /// Memory, to be made by who serves.
    Ram {
        /// Size in bytes.
        bytes: u64,
    },
    /// An opened file or block device, locked against others.
    File {
        /// It.
        file: File,
        /// Its size in bytes.
        bytes: u64,
        /// It bypasses the page cache, and takes whole logical blocks at any of them.
        direct: bool,
    },
    /// A file behind a volatile cache, locked against others.
    VolatileCache {
        /// It.
        file: File,
        /// Its size in bytes.
        bytes: u64,
    },
    /// Another one, slower.
    Delay {
        /// No transfer waits for longer.
        most: Duration,
        /// The other one.
        inner: Box<Backing>,
    },
    /// Another one that does not answer for a while.
    Hang {
        /// From so long after the start.
        after: Duration,
        /// For so long; none: for ever.
        lasts: Option<Duration>,
        /// The other one.
        inner: Box<Backing>,
    },
    /// Another one with a fault.
    Error {
        /// What is wrong with it.
        fault: Fault,
        /// The other one.
        inner: Box<Backing>,
    },
}

impl Backing {
    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Null { bytes }
            | Self::Ram { bytes }
            | Self::File { bytes, .. }
            | Self::VolatileCache { bytes, .. } => *bytes,
            Self::Delay { inner, .. } | Self::Hang { inner, .. } | Self::Error { inner, .. } => {
                inner.bytes()
            }
        }
    }
}

/// How a device is encrypted.
#[derive(Debug)]
pub struct Xts {
    /// Bytes that share a tweak.
    pub unit: DataUnit,
    /// [`KEY_BYTES`] bytes, data key then tweak key.
    pub key: SecretMemory,
    /// Another key that is being replaced.
    pub rekey: Option<RekeySpec>,
}

/// A re-key that is under way, or begins.
#[derive(Debug)]
pub struct RekeySpec {
    /// Whose record it is.
    pub volume: VolumeId,
    /// Which one.
    pub id: RekeyId,
    /// The key that everything was under before, as long as the other.
    pub previous: SecretMemory,
}

/// Why devices can't be served.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The command line.
    #[error(transparent)]
    Arguments(#[from] ArgumentError),
    /// A listener.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A file.
    #[error("{path}: {step}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file that can't be a disk.
    #[error("{0} is neither a file nor a block device")]
    Kind(PathBuf),
    /// Somebody has it.
    #[error("{0} is in use, by another process or another --blk: end that, or choose another file")]
    InUse(PathBuf),
    /// Not whole blocks.
    #[error(
        "{what} has {bytes} bytes, which are not one or more whole blocks of {block_bytes}: \
         choose another size (`truncate -s` changes that of a file)"
    )]
    Size {
        /// Which disk.
        what: String,
        /// Its size.
        bytes: u64,
        /// The logical block.
        block_bytes: u32,
    },
    /// Not a key.
    #[error(
        "{0}: a key is exactly {KEY_BYTES} bytes: make one with \
         `head -c {KEY_BYTES} /dev/urandom`"
    )]
    KeyLength(PathBuf),
    /// No re-key.
    #[error("the disk at {socket} can't be re-keyed: {source}")]
    Rekey {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: RekeyError,
    },
    /// No key.
    #[error("can't make a key in secret memory: {0}")]
    Secret(io::Error),
}

/// Opens everything that a command line names.
///
/// # Errors
/// See [`DeviceError`]; then no socket was left behind.
pub fn open(arguments: &Arguments) -> Result<Vec<Device>, DeviceError> {
    let block_bytes = arguments.logical_block_bytes()?;
    let mut parts = Vec::new();
    for (index, (socket, spec)) in arguments.pairs()?.into_iter().enumerate() {
        let backing = backing(&spec, arguments.read_only, block_bytes)?;
        let xts = xts(arguments, &serial(index))?;
        if let Some((xts, re_key)) = xts.as_ref().and_then(|x| Some((x, x.rekey.as_ref()?))) {
            rekey::prepare(&backing, re_key.volume, re_key.id, xts.unit.bytes()).map_err(
                |source| {
                    let socket = socket.clone();
                    DeviceError::Rekey { socket, source }
                },
            )?;
        }
        parts.push((socket, backing, xts));
    }
    let mut devices: Vec<Device> = Vec::new();
    for (index, (socket, backing, xts)) in parts.into_iter().enumerate() {
        let listener = match socket::listen(&socket) {
            Ok(listener) => listener,
            Err(e) => {
                remove_sockets(devices.iter().map(|device| device.socket.as_path()));
                return Err(e.into());
            }
        };
        devices.push(Device {
            socket,
            listener,
            disk: DiskSpec {
                backing,
                xts,
                logical_block_bytes: block_bytes,
                queues: arguments.queues,
                read_only: arguments.read_only,
                discard: arguments.discard,
                serial: serial(index),
            },
        });
    }
    Ok(devices)
}

/// The keys of a disk.
fn xts(arguments: &Arguments, serial: &[u8; 20]) -> Result<Option<Xts>, DeviceError> {
    let Some(unit) = arguments.encryption() else {
        return Ok(None);
    };
    let rekey = match (&arguments.rekey_from, arguments.rekey_id) {
        (Some(from), Some(id)) => Some(RekeySpec {
            volume: rekey::volume_id(serial),
            id,
            previous: key(Some(from))?,
        }),
        _ => None,
    };
    Ok(Some(Xts {
        unit,
        key: key(arguments.key_file.as_deref())?,
        rekey,
    }))
}

/// Removes the sockets of devices that won't be served.
pub fn remove_sockets<'a>(paths: impl Iterator<Item = &'a Path>) {
    for path in paths {
        if let Err(e) = std::fs::remove_file(path) {
            tracing::warn!("{}: can't remove the socket: {e}", path.display());
        }
    }
}

fn serial(index: usize) -> [u8; 20] {
    let mut serial = [0; 20];
    let text = format!("serve-{index}");
    for (to, from) in serial.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    serial
}

fn backing(spec: &BlkSpec, read_only: bool, block_bytes: u32) -> Result<Backing, DeviceError> {
    let (what, backing) = match spec {
        BlkSpec::Null { bytes } => ("null".to_owned(), Backing::Null { bytes: *bytes }),
        BlkSpec::Ram { bytes } => ("ram".to_owned(), Backing::Ram { bytes: *bytes }),
        BlkSpec::File { path } => (
            path.display().to_string(),
            file::open(path, read_only, block_bytes)?,
        ),
        BlkSpec::VolatileCache { path } => (path.display().to_string(), file::open_cached(path)?),
        BlkSpec::Delay { most, inner } => {
            let inner = Box::new(backing(inner, read_only, block_bytes)?);
            return Ok(Backing::Delay { most: *most, inner });
        }
        BlkSpec::Hang {
            after,
            lasts,
            inner,
        } => {
            let inner = Box::new(backing(inner, read_only, block_bytes)?);
            let (after, lasts) = (*after, *lasts);
            return Ok(Backing::Hang {
                after,
                lasts,
                inner,
            });
        }
        BlkSpec::Error { fault, inner } => {
            let inner = Box::new(backing(inner, read_only, block_bytes)?);
            let fault = fault.clone();
            return Ok(Backing::Error { fault, inner });
        }
    };
    let bytes = backing.bytes();
    if bytes == 0 || !bytes.is_multiple_of(u64::from(block_bytes)) {
        return Err(DeviceError::Size {
            what,
            bytes,
            block_bytes,
        });
    }
    Ok(backing)
}

/// A key straight into secret memory: from a file, or random. Never equal halves by chance worth
/// speaking of; a file's halves are compared when the key is expanded.
fn key(file: Option<&Path>) -> Result<SecretMemory, DeviceError> {
    let mut memory = SecretMemory::new(KEY_BYTES).map_err(DeviceError::Secret)?;
    let Some(path) = file else {
        getrandom::fill(memory.as_mut_bytes()).map_err(|e| DeviceError::Secret(e.into()))?;
        return Ok(memory);
    };
    let failed = |source| DeviceError::File {
        path: path.to_owned(),
        step: "the key can't be read",
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    match file.read_exact(memory.as_mut_bytes()) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(DeviceError::KeyLength(path.to_owned()));
        }
        Err(e) => return Err(failed(e)),
    }
    match file.read(&mut [0]).map_err(failed)? {
        0 => Ok(memory),
        _ => Err(DeviceError::KeyLength(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use clap::Parser as _;
    use tempfile::TempDir;

    use super::*;

    fn arguments(dir: &TempDir, line: &str) -> Arguments {
        let dir = dir.path().display().to_string();
        let words = line.split_whitespace().map(|word| word.replace('@', &dir));
        let words = std::iter::once("serve".to_owned()).chain(words);
        Arguments::try_parse_from(words).expect("the line parses")
    }

    fn folder() -> TempDir {
        let dir = tempfile::tempdir().expect("folder");
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.path().join(name), bytes).expect("write");
        };
        write("disk", &[0x5a; 8192]);
        write("odd", &[0x5a; 8191]);
        write("sectors", &[0x5a; 4096 + 512]);
        write("key", &(0..64).collect::<Vec<u8>>());
        write("other", &(100..164).collect::<Vec<u8>>());
        write("short-key", &[1; 63]);
        write("long-key", &[1; 65]);
        dir
    }

    #[test]
    fn devices_are_what_the_line_says() {
        let dir = folder();
        let line = "--socket @/a --blk file:@/disk --socket @/b --blk ram:1MiB --queues 3 \
                    --xts --data-unit 512 --key-file @/key";
        let mut devices = open(&arguments(&dir, line)).expect("opens");
        let second = devices.pop().expect("two");
        let first = devices.pop().expect("two");
        assert!(matches!(
            first.disk.backing,
            Backing::File { bytes: 8192, .. }
        ));
        assert!(matches!(
            second.disk.backing,
            Backing::Ram { bytes: 0x10_0000 }
        ));
        for disk in [&first.disk, &second.disk] {
            let xts = disk.xts.as_ref().expect("encrypted");
            assert_eq!(xts.unit, DataUnit::B512);
            assert_eq!(xts.key.as_bytes(), (0..64).collect::<Vec<u8>>());
            assert_eq!((disk.queues, disk.logical_block_bytes), (3, 512));
            assert!(!disk.read_only);
        }
        assert_ne!(first.disk.serial, second.disk.serial);
        assert_eq!(&second.disk.serial, b"serve-1\0\0\0\0\0\0\0\0\0\0\0\0\0");
        remove_sockets([first.socket.as_path(), &second.socket].into_iter());
        assert!(!dir.path().join("a").exists() && !dir.path().join("b").exists());
    }

    #[test]
    fn random_keys_differ() {
        let dir = folder();
        let line = "--socket @/a --blk null:1MiB --socket @/b --blk null:1MiB --xts";
        let devices = open(&arguments(&dir, line)).expect("opens");
        let keys: Vec<_> = devices
            .iter()
            .map(|d| d.disk.xts.as_ref().expect("encrypted").key.as_bytes())
            .collect();
        assert_ne!(keys[0], keys[1]);
        assert!(keys.iter().all(|key| key[..32] != key[32..]));
    }

    #[test]
    fn a_file_is_served_once() {
        let dir = folder();
        let line = "--socket @/a --blk file:@/disk --socket @/b --blk file:@/disk";
        let error = open(&arguments(&dir, line)).expect_err("the same file twice");
        assert!(matches!(error, DeviceError::InUse(_)), "{error}");
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn nothing_stays_behind_a_failure() {
        let dir = folder();
        std::fs::write(dir.path().join("b"), "a file").expect("write");
        let line = "--socket @/a --blk null:1MiB --socket @/b --blk null:1MiB";
        let error = open(&arguments(&dir, line)).expect_err("b is a file");
        assert!(matches!(error, DeviceError::Socket(_)), "{error}");
        assert!(!dir.path().join("a").exists() && dir.path().join("b").exists());
    }

    #[test]
    fn what_can_not_be_a_disk_or_a_key_is_refused() {
        let dir = folder();
        let cases = [
            ("--blk file:@/missing", "can't be opened"),
            ("--blk file:@", "neither a file nor"),
            ("--blk file:/dev/null", "neither a file nor"),
            ("--blk file:@/odd", "whole blocks of 512"),
            ("--blk null:513", "whole blocks of 512"),
            ("--blk file:@/sectors --xts", "whole blocks of 4096"),
            ("--blk null:1MiB --xts --key-file @/short-key", "exactly 64"),
            ("--blk null:1MiB --xts --key-file @/long-key", "exactly 64"),
            (
                "--blk null:1MiB --xts --key-file @/missing",
                "can't be read",
            ),
            (REKEYED, "its record lies in a file"),
            (&REKEYED.replace("null:8MiB", "file:@/disk"), "two more MiB"),
            (&REKEYED.replace("@/other", "@/missing"), "can't be read"),
        ];
        for (line, expected) in cases {
            let error = open(&arguments(&dir, &format!("--socket @/a {line}"))).expect_err(line);
            assert!(error.to_string().contains(expected), "{line}: {error}");
            assert!(!dir.path().join("a").exists(), "{line}");
        }
    }

    const REKEYED: &str = "--blk null:8MiB --xts --key-file @/key --rekey-from @/other \
                           --rekey-id 0b5f6d1e-9d4c-4d0a-8f5e-2f6a1c3b7e90";

    #[test]
    fn a_disk_that_is_re_keyed_is_smaller_than_its_file() {
        let dir = folder();
        let file = File::create_new(dir.path().join("large")).expect("file");
        file.set_len(8 << 20).expect("length");
        let line = REKEYED.replace("null:8MiB", "delay=1:file:@/large");
        let devices = open(&arguments(&dir, &format!("--socket @/a {line}"))).expect("opens");
        let disk = &devices[0].disk;
        assert_eq!(disk.bytes().expect("room"), 6 << 20);
        let xts = disk.xts.as_ref().expect("encrypted");
        let rekey = xts.rekey.as_ref().expect("re-keyed");
        assert_ne!(rekey.previous.as_bytes(), xts.key.as_bytes());
        let mut magic = [0; 16];
        file.read_exact_at(&mut magic, 6 << 20).expect("read");
        assert_eq!(&magic, b"bulkhead rekey 1");
    }

    #[test]
    fn read_only_opens_for_reading() {
        let dir = folder();
        let line = "--socket @/a --blk file:@/disk --read-only";
        let devices = open(&arguments(&dir, line)).expect("opens");
        let Backing::File { file, .. } = &devices[0].disk.backing else {
            panic!("not a file");
        };
        let buffer = file::AlignedBuffer::new(4096).bytes_mut().to_vec();
        assert!(file.write_at(&buffer, 0).is_err());
    }
}
