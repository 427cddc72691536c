//! The data plane beside its floors and its peers: `cargo xtask bench block`.
//!
//! Everything that is compared is measured in turns, within moments of each other ([`rounds`]); two CPUs are
//! told near or far around each turn. One CPU serves, one drives.
//!
//! | module | owns |
//! | --- | --- |
//! | [`arguments`] | the command line of `block-bench` |
//! | [`bench`] | what all measurements have: CPUs, folders, pace |
//! | [`backend`] | processes that serve: ours, the reference, `qemu-storage-daemon` |
//! | [`side`] | what is measured: a back-end under load, the ring echo, `fio`, the cipher or a copy alone |
//! | [`alone`] | the cipher and a copy, without rings |
//! | [`fio`] | `fio` on a bare file |
//! | [`deciphered`] | a bare file that is deciphered as it is read |
//! | [`rounds`] | sides in turns |
//! | [`shape`] | requests that are measured |
//! | [`storages`] | null, ram, a file and tmpfs, plain and encrypted, and their targets |
//! | [`devices`] | one worker with many devices, and with idle ones |
//! | [`workers`] | two workers beside one |
//! | [`qos`] | limits, groups, and a hostile neighbour |
//! | [`thread`] | results of threads that measure |
//! | [`header`] | what ran, and how |

pub mod alone;
pub mod arguments;
pub mod backend;
pub mod bench;
pub mod deciphered;
pub mod devices;
pub mod fio;
pub mod header;
pub mod qos;
pub mod rounds;
pub mod shape;
pub mod side;
pub mod storages;
pub mod thread;
pub mod workers;

use std::io;
use std::path::PathBuf;

use crate::figures::row::Row;
use crate::load::LoadError;
use bench::Bench;

/// Why something can't be measured.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The load generator.
    #[error("load: {source} (with {case})")]
    Load {
        /// What was measured.
        case: String,
        /// Why.
        source: Box<LoadError>,
    },
    /// A back-end that does not serve.
    #[error("{command} does not serve within {seconds} s; it said:\n{log}")]
    Backend {
        /// How it was started.
        command: String,
        /// How long it was waited for.
        seconds: u64,
        /// What it said.
        log: String,
    },
    /// A program.
    #[error("{what}: {source}")]
    Program {
        /// Which, or what it was to do.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// `fio`.
    #[error("fio on {path} has no figures: {said}")]
    Fio {
        /// The file.
        path: PathBuf,
        /// What it said.
        said: String,
    },
    /// A file of the bench.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Too few CPUs.
    #[error("this process may run on {0} CPU(s), and two are needed: one serves, one drives")]
    Cpus(usize),
    /// The cipher.
    #[error("the cipher: {0}")]
    Cipher(String),
}

/// Measures something; gives its rows.
type Measurement = fn(&Bench) -> Result<Vec<Row>, BlockError>;

/// What is measured, in the order of the table.
const ALL: &[(&str, Measurement)] = &[
    ("storages", storages::measure),
    ("devices", devices::measure),
    ("idle", devices::idle),
    ("workers", workers::measure),
    ("limits", qos::measure),
];

/// Measures all that the command line wants.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    if bench.against.is_some() {
        return storages::against(bench);
    }
    let mut rows = Vec::new();
    for (name, measurement) in ALL {
        if bench.wants_part(name) {
            rows.extend(measurement(bench)?);
        }
    }
    rows.extend(storages::once_more(bench, &rows)?);
    Ok(rows)
}
