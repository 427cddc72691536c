//! What a disk is made of, as the command line of `serve` says it.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bulkhead_dataplane::storage::error::{Fault, Kind, What};

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
    /// A file behind a volatile cache.
    VolatileCache {
        /// Where it is.
        path: PathBuf,
    },
    /// Another one, slower.
    Delay {
        /// No transfer waits for longer.
        most: Duration,
        /// The other one.
        inner: Box<BlkSpec>,
    },
    /// Another one that does not answer for a while.
    Hang {
        /// From so long after the start.
        after: Duration,
        /// For so long; none: for ever.
        lasts: Option<Duration>,
        /// The other one.
        inner: Box<BlkSpec>,
    },
    /// Another one with a fault.
    Error {
        /// What is wrong with it.
        fault: Fault,
        /// The other one.
        inner: Box<BlkSpec>,
    },
}

/// Not a disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not one of the kinds.
    #[error(
        "write null:SIZE, ram:SIZE or file:PATH, as in null:1GiB; for tests volatile-cache:PATH, \
         delay=US:SPEC, hang=AFTER/FOR:SPEC or error=KIND/ERRNO/N:SPEC"
    )]
    Kind,
    /// No path after `file:`.
    #[error("write the path after file: or volatile-cache:, as in file:disk.img")]
    NoPath,
    /// Not a size.
    #[error(
        "{0:?} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB, as in 256MiB"
    )]
    Size(String),
    /// Not a time.
    #[error("{0:?} is no number of microseconds: write it as in delay=500:ram:1MiB")]
    Delay(String),
    /// Not a while.
    #[error(
        "{0:?} does not say when it hangs: write milliseconds from the start and for how long, as in \
         hang=5000/2000:ram:1MiB, or hang=5000/ever:ram:1MiB"
    )]
    Hang(String),
    /// Not a fault.
    #[error(
        "{0:?} is not a fault: write KIND/ERRNO/N as in write/EIO/100, where KIND is read, write, \
         flush, discard, zero or any, ERRNO a number, EIO, ENOSPC, EAGAIN, EINTR, ENOMEM, EOPNOTSUPP \
         or short, and N says that every Nth fails"
    )]
    Fault(String),
}

impl FromStr for BlkSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (kind, rest) = text.split_once(':').ok_or(SpecError::Kind)?;
        let inner = || rest.parse().map(Box::new);
        match kind.split_once('=') {
            Some(("delay", us)) => {
                let us: u64 = us.parse().map_err(|_| SpecError::Delay(us.to_owned()))?;
                Ok(Self::Delay {
                    most: Duration::from_micros(us),
                    inner: inner()?,
                })
            }
            Some(("hang", given)) => {
                let (after, lasts) =
                    hang(given).ok_or_else(|| SpecError::Hang(given.to_owned()))?;
                Ok(Self::Hang {
                    after,
                    lasts,
                    inner: inner()?,
                })
            }
            Some(("error", given)) => Ok(Self::Error {
                fault: fault(given).ok_or_else(|| SpecError::Fault(given.to_owned()))?,
                inner: inner()?,
            }),
            Some(_) => Err(SpecError::Kind),
            None => simple(kind, rest),
        }
    }
}

fn simple(kind: &str, rest: &str) -> Result<BlkSpec, SpecError> {
    match (kind, rest) {
        ("null", size) => Ok(BlkSpec::Null {
            bytes: bytes(size)?,
        }),
        ("ram", size) => Ok(BlkSpec::Ram {
            bytes: bytes(size)?,
        }),
        ("file" | "volatile-cache", "") => Err(SpecError::NoPath),
        ("file", path) => Ok(BlkSpec::File { path: path.into() }),
        ("volatile-cache", path) => Ok(BlkSpec::VolatileCache { path: path.into() }),
        _ => Err(SpecError::Kind),
    }
}

/// From when on, and for how long.
fn hang(text: &str) -> Option<(Duration, Option<Duration>)> {
    let (after, lasts) = text.split_once('/')?;
    let ms = |text: &str| text.parse().ok().map(Duration::from_millis);
    let lasts = match lasts {
        "ever" => None,
        lasts => Some(ms(lasts)?),
    };
    Some((ms(after)?, lasts))
}

fn fault(text: &str) -> Option<Fault> {
    let mut parts = text.split('/');
    let kind = match parts.next()? {
        "read" => Kind::Read,
        "write" => Kind::Write,
        "flush" => Kind::Flush,
        "discard" => Kind::Discard,
        "zero" => Kind::Zero,
        "any" => Kind::Any,
        _ => return None,
    };
    let what = match parts.next()? {
        "short" => What::Short,
        "EIO" => What::Errno(libc::EIO),
        "ENOSPC" => What::Errno(libc::ENOSPC),
        "EAGAIN" => What::Errno(libc::EAGAIN),
        "EINTR" => What::Errno(libc::EINTR),
        "ENOMEM" => What::Errno(libc::ENOMEM),
        "EOPNOTSUPP" => What::Errno(libc::EOPNOTSUPP),
        number => What::Errno(number.parse().ok().filter(|n| (1..4096).contains(n))?),
    };
    let every = parts.next()?.parse().ok().filter(|n| *n > 0)?;
    parts.next().is_none().then(|| Fault {
        every,
        ..Fault::each(kind, what)
    })
}

/// A size in bytes: not zero, and no larger than what a file can be.
///
/// # Errors
/// [`SpecError::Size`].
pub fn bytes(text: &str) -> Result<u64, SpecError> {
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
        _ => return Err(SpecError::Size(text.to_owned())),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0 && i64::try_from(*bytes).is_ok())
        .ok_or_else(|| SpecError::Size(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(text.parse::<BlkSpec>(), Err(SpecError::Kind), "{text}");
        }
        assert_eq!("file:".parse::<BlkSpec>(), Err(SpecError::NoPath));
        let error = "tape:1".parse::<BlkSpec>().expect_err("no such kind");
        assert!(error.to_string().contains("write null:SIZE"), "{error}");
    }

    #[test]
    fn test_backends_nest() {
        let spec = "delay=500:error=write/EIO/10:file:a:b".parse();
        let file = BlkSpec::File { path: "a:b".into() };
        let tenth = Fault {
            every: 10,
            ..Fault::each(Kind::Write, What::Errno(libc::EIO))
        };
        let failing = BlkSpec::Error {
            fault: tenth,
            inner: Box::new(file),
        };
        let expected = BlkSpec::Delay {
            most: Duration::from_micros(500),
            inner: Box::new(failing),
        };
        assert_eq!(spec, Ok(expected));
        assert_eq!(fault_of("read/short/1"), Some(What::Short));
        assert_eq!(fault_of("any/28/3"), Some(What::Errno(libc::ENOSPC)));
        for bad in [
            "",
            "write",
            "write/EIO",
            "write/EIO/0",
            "write/-5/1",
            "write/EIO/1/1",
        ] {
            assert_eq!(fault(bad), None, "{bad}");
        }
        for bad in [
            "delay:ram:1MiB",
            "delay=x:ram:1MiB",
            "error=write/EIO/1:tape:1",
            "delay=1:",
        ] {
            assert!(bad.parse::<BlkSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_that_hangs_says_when() {
        let hang = |after, lasts: Option<u64>| BlkSpec::Hang {
            after: Duration::from_millis(after),
            lasts: lasts.map(Duration::from_millis),
            inner: Box::new(BlkSpec::Ram { bytes: 1 << 20 }),
        };
        assert_eq!("hang=50/2000:ram:1MiB".parse(), Ok(hang(50, Some(2000))));
        assert_eq!("hang=0/ever:ram:1MiB".parse(), Ok(hang(0, None)));
        for bad in ["", "5", "5/", "/5", "never/5", "5/5/5", "-1/5", "5/Ever"] {
            let error = format!("hang={bad}:ram:1MiB").parse::<BlkSpec>();
            assert_eq!(error, Err(SpecError::Hang(bad.to_owned())));
        }
    }

    fn fault_of(text: &str) -> Option<What> {
        fault(text).map(|fault| fault.what)
    }
}
