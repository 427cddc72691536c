//! What is measured: each gives nanoseconds for a request in a turn.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use clap::Parser as _;

use super::BlockError;
use super::bench::Bench;
use super::shape::Shape;
use crate::load::arguments::Arguments;
use crate::load::report::Report;
use crate::load::{LoadError, run};

/// How far the mean of a turn may be from the median of its pieces: beyond, something disturbed it.
const STEADY: f64 = 0.1;
/// How often a disturbed turn is tried again.
const AGAIN: usize = 2;

/// Something that can be measured: a turn gives nanoseconds for a request.
pub struct Side<'a>(Box<dyn FnMut() -> Result<f64, BlockError> + 'a>);

impl std::fmt::Debug for Side<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Side")
    }
}

impl<'a> Side<'a> {
    /// One that does this in its turn.
    pub fn new(turn: impl FnMut() -> Result<f64, BlockError> + 'a) -> Self {
        Self(Box::new(turn))
    }

    /// Takes a turn.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn turn(&mut self) -> Result<f64, BlockError> {
        (self.0)()
    }

    /// A back-end under load.
    #[must_use]
    pub fn backend(bench: &'a Bench, socket: &Path, shape: Shape) -> Self {
        Self::backends(bench, &[socket.to_owned()], shape)
    }

    /// Several disks of a back-end under load, all together.
    #[must_use]
    pub fn backends(bench: &'a Bench, sockets: &[PathBuf], shape: Shape) -> Self {
        Self::backends_with(bench, sockets, shape, &[])
    }

    /// The same with more options of `load`.
    #[must_use]
    pub fn backends_with(
        bench: &'a Bench,
        sockets: &[PathBuf],
        shape: Shape,
        more: &[&str],
    ) -> Self {
        let mut options = shape.options();
        for socket in sockets {
            options.extend(["--socket".to_owned(), socket.display().to_string()]);
        }
        options.extend(more.iter().map(|option| (*option).to_owned()));
        Self::new(move || steady(bench, &options))
    }

    /// The ring echo with so many queues.
    #[must_use]
    pub fn echo(bench: &'a Bench, shape: Shape, queues: usize) -> Self {
        let mut options = shape.options();
        options.extend(["--ring-echo", "--queues", &queues.to_string()].map(str::to_owned));
        options.extend(["--peer-cpu".to_owned(), bench.worker_cpu.to_string()]);
        Self::new(move || steady(bench, &options))
    }
}

/// Loads as options say, again where something disturbed it; nanoseconds for a request, none (not a number) if not
/// one was answered in so short a time.
fn steady(bench: &Bench, options: &[String]) -> Result<f64, BlockError> {
    let mut ns = f64::NAN;
    for _ in 0..=AGAIN {
        let report = load(bench, options, 1)?;
        let (mean, median) = (report.mean_iops(), report.iops());
        let iops = if median > 0.0 { median } else { mean };
        if iops > 0.0 {
            ns = 1e9 / iops;
        }
        if iops > 0.0 && (bench.quick || (mean / iops - 1.0).abs() <= STEADY) {
            break;
        }
    }
    Ok(ns)
}

/// Loads from the driving CPU as options say, for so many samples' time.
///
/// # Errors
/// [`BlockError::Load`].
pub fn load(bench: &Bench, options: &[String], samples: u32) -> Result<Report, BlockError> {
    let failed = |source| BlockError::Load {
        case: options.join(" ").chars().take(160).collect(),
        source: Box::new(source),
    };
    let mut line = vec!["load".to_owned()];
    for (name, value) in [
        ("--cpu", bench.driver_cpu.to_string()),
        (
            "--seconds",
            (bench.pace.sample * samples).as_secs_f64().to_string(),
        ),
        ("--warm-up", bench.pace.warm_up.as_secs_f64().to_string()),
    ] {
        if !options.iter().any(|option| option == name) {
            line.extend([name.to_owned(), value]);
        }
    }
    line.extend(options.iter().cloned());
    let arguments = Arguments::try_parse_from(line);
    let arguments = arguments.map_err(|e| failed(LoadError::Options(e.to_string())))?;
    run::run(&arguments).map_err(failed)
}
