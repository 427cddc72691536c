//! A child's binary: copied into a memfd, sealed, checked and measured once at the start.
//!
//! What is measured is what is executed: the SHA-384 is taken over the sealed memfd, after the
//! seals, and restarts use the same memfd. The disk is read once.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::rot::Measurement;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use sha2::{Digest, Sha384};

/// Largest binary that is taken, in bytes.
pub const MAX_BINARY_BYTES: u64 = 512 * 1024 * 1024;

const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_INTERP: u32 = 3;
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;

/// Why a binary is not executed.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// Reading the file or making the memfd failed.
    #[error("can't take {} ({step}): {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        step: &'static str,
        /// With what it failed.
        source: io::Error,
    },
    /// The file is not what rot executes.
    #[error("{} is refused: {reason}; build it static-pie for x86_64-unknown-linux-gnu (+crt-static)", path.display())]
    NotStaticPie {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Over [`MAX_BINARY_BYTES`].
    #[error("{} is refused: it has {bytes} bytes, the most is {MAX_BINARY_BYTES}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
    },
}

/// A sealed, measured copy of a binary.
#[derive(Debug)]
pub struct MeasuredBinary {
    memfd: File,
    measurement: Measurement,
}

impl MeasuredBinary {
    /// Copies `path` into a memfd called `name`, seals it, then checks and measures the sealed bytes.
    ///
    /// # Errors
    /// See [`BinaryError`].
    pub fn load(path: &Path, name: &str) -> Result<Self, BinaryError> {
        let failed = |step: &'static str| {
            move |source: io::Error| BinaryError::Io {
                path: path.to_owned(),
                step,
                source,
            }
        };
        let source = File::open(path).map_err(failed("open"))?;
        let bytes = source.metadata().map_err(failed("size"))?.len();
        if bytes > MAX_BINARY_BYTES {
            return Err(BinaryError::TooLarge {
                path: path.to_owned(),
                bytes,
            });
        }
        // Named, because vm.memfd_noexec may have made the opposite the default.
        let executable = MFdFlags::from_bits_retain(libc::MFD_EXEC);
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | executable;
        let memfd = memfd_create(name, flags).map_err(|e| failed("memfd")(e.into()))?;
        let mut memfd = File::from(memfd);
        // The file may grow while it is read: the cap holds for the copy too.
        let mut capped = io::Read::take(source, MAX_BINARY_BYTES);
        io::copy(&mut capped, &mut memfd).map_err(failed("copy"))?;
        let seals = SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_SEAL;
        fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| failed("seal")(e.into()))?;
        check_static_pie(&memfd).map_err(|reason| BinaryError::NotStaticPie {
            path: path.to_owned(),
            reason,
        })?;
        let measurement = measure(&mut memfd).map_err(failed("measure"))?;
        Ok(Self { memfd, measurement })
    }

    /// One that the rot before this one sealed: measured again.
    ///
    /// # Errors
    /// It is not sealed, or can't be read.
    pub fn adopt(memfd: OwnedFd) -> io::Result<Self> {
        let seals = SealFlag::from_bits_retain(fcntl(&memfd, FcntlArg::F_GET_SEALS)?);
        if !seals.contains(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)
        {
            return Err(io::Error::other("a binary that was left is not sealed"));
        }
        let mut memfd = File::from(memfd);
        let measurement = measure(&mut memfd)?;
        Ok(Self { memfd, measurement })
    }

    /// SHA-384 of the sealed bytes.
    #[must_use]
    pub fn measurement(&self) -> Measurement {
        self.measurement
    }
}

impl AsFd for MeasuredBinary {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

/// SHA-384 of the binary that this process executes.
///
/// # Errors
/// It can't be read.
pub fn measure_own() -> io::Result<Measurement> {
    measure(&mut File::open("/proc/self/exe")?)
}

fn measure(file: &mut File) -> io::Result<Measurement> {
    let mut hash = Sha384::new();
    let mut buffer = vec![0u8; 1 << 20];
    file.seek(SeekFrom::Start(0))?;
    loop {
        let n = io::Read::read(file, &mut buffer)?;
        if n == 0 {
            let digest: [u8; 48] = hash.finalize().into();
            return Ok(Measurement::from(digest));
        }
        hash.update(buffer.get(..n).unwrap_or_default());
    }
}

/// A little-endian number of `N` bytes at `offset`.
fn field<const N: usize>(file: &File, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0u8; N];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

fn check_static_pie(file: &File) -> Result<(), &'static str> {
    const SHORT: &str = "its ELF headers are cut short";
    let ident: [u8; ELF_HEADER_BYTES] = field(file, 0).ok_or("it is too short for an ELF file")?;
    if !ident.starts_with(b"\x7fELF\x02\x01") {
        return Err("it is not a 64-bit little-endian ELF file");
    }
    let half = |at| field::<2>(file, at).map(u16::from_le_bytes).ok_or(SHORT);
    if half(16)? != ET_DYN || half(18)? != EM_X86_64 {
        return Err("it is not a position-independent x86-64 executable");
    }
    let table = field::<8>(file, 32).map(u64::from_le_bytes).ok_or(SHORT)?;
    if half(54)? != PROGRAM_HEADER_BYTES {
        return Err("its program headers have an unknown size");
    }
    for i in 0..u64::from(half(56)?) {
        let at = table
            .checked_add(i * u64::from(PROGRAM_HEADER_BYTES))
            .ok_or(SHORT)?;
        let kind = field::<4>(file, at).map(u32::from_le_bytes).ok_or(SHORT)?;
        if kind == PT_INTERP {
            return Err("it names a dynamic loader (PT_INTERP), which would not be measured");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measurement_is_the_sha384_of_the_file() {
        let own = std::env::current_exe().unwrap();
        let binary = MeasuredBinary::load(&own, "test").unwrap();
        let expected: [u8; 48] = Sha384::digest(std::fs::read(&own).unwrap()).into();
        assert_eq!(binary.measurement(), Measurement::from(expected));
    }

    #[test]
    fn the_copy_cannot_be_changed_once_measured() {
        let own = std::env::current_exe().unwrap();
        let binary = MeasuredBinary::load(&own, "test").unwrap();
        assert!(binary.memfd.write_at(b"x", 0).is_err());
        assert!(binary.memfd.set_len(0).is_err());
    }

    #[test]
    fn refused_dynamic_elf() {
        let error = MeasuredBinary::load(Path::new("/bin/sh"), "test").unwrap_err();
        assert!(error.to_string().contains("PT_INTERP"), "{error}");
    }

    #[test]
    fn refused_what_is_not_elf() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "#!/bin/sh\n".repeat(20)).unwrap();
        let error = MeasuredBinary::load(file.path(), "test").unwrap_err();
        assert!(error.to_string().contains("not a 64-bit"), "{error}");
    }
}
