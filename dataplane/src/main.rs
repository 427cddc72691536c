//! `bulkhead-dataplane`: started by rot with one inherited channel; locks itself in, then serves the
//! volumes that keyd grants.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use bulkhead_crypto::SecretArena;
use bulkhead_crypto::xts::Kernel;
use bulkhead_dataplane::control::{Control, KEY_SLOTS};
use bulkhead_dataplane::sandbox;
use bulkhead_dataplane::server::{Server, ServerConfig};
use bulkhead_dataplane::worker::WorkerConfig;
use bulkhead_protocol::process::{inherited_channel, init_logging};

const USAGE: &str = "usage: bulkhead-dataplane [--workers N] [--cpus LIST]   (LIST: like 2,4-7; one \
                     CPU per worker)\nIt is started by bulkhead-rot.";
/// Most workers: more cores than one host has for its disks.
const MAX_WORKERS: usize = 64;

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    init_logging("dataplane");
    end_on_panic();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let workers = match workers(&arguments) {
        Ok(workers) => workers,
        Err(problem) => {
            eprintln!("bulkhead-dataplane: {problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(workers) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The cipher is tested, everything opened and made; then the process locks itself in, says hello and serves.
fn run(workers: Vec<WorkerConfig>) -> Result<(), Failure> {
    bulkhead_crypto::xts::self_test()?;
    let rot = inherited_channel()?;
    let arena = SecretArena::new(KEY_SLOTS)
        .map_err(|e| format!("can't make secret memory for keys: {e}; raise RLIMIT_MEMLOCK"))?;
    sandbox::lock_process()?;
    let count = workers.len();
    let server = Server::new(&ServerConfig {
        workers,
        ..ServerConfig::default()
    })?;
    let mut control = Control::new(rot, arena, &server)?;
    sandbox::lock_control_thread()?;
    let cipher = Kernel::chosen();
    tracing::info!(workers = count, %cipher, "locked in and serving");
    server.run(&mut control)?;
    match control.failure() {
        None => Ok(()),
        Some(reason) => Err(reason.into()),
    }
}

/// A panic in one thread ends the process, never leaves half of it serving; and no backtrace, for
/// which files would have to be opened.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        std::process::abort();
    }));
}

/// What the arguments ask for.
fn workers(arguments: &[String]) -> Result<Vec<WorkerConfig>, String> {
    let mut count = None;
    let mut cpus = None;
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{name} has no value"));
        match name.as_str() {
            "--workers" => count = Some(number(value()?)?),
            "--cpus" => cpus = Some(cpu_list(value()?)?),
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    let cpus = cpus.unwrap_or_default();
    let count = count.unwrap_or(cpus.len().max(1));
    if !(1..=MAX_WORKERS).contains(&count) {
        return Err(format!("{count} workers: there are 1 to {MAX_WORKERS}"));
    }
    if !cpus.is_empty() && cpus.len() != count {
        return Err(format!("{count} workers, but {} CPUs for them", cpus.len()));
    }
    let cpu_of = |index: usize| cpus.get(index).copied();
    let worker = |index| WorkerConfig {
        cpu: cpu_of(index),
        lock_in: true,
    };
    Ok((0..count).map(worker).collect())
}

fn number(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not a number"))
}

/// A list like `2,4-7`.
fn cpu_list(text: &str) -> Result<Vec<usize>, String> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if last < first || last - first >= MAX_WORKERS || cpus.len() >= MAX_WORKERS {
            return Err(format!(
                "{part:?} is not a range of at most {MAX_WORKERS} CPUs"
            ));
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Option<usize>>, String> {
        let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Ok(workers(&arguments)?
            .iter()
            .map(|worker| worker.cpu)
            .collect())
    }

    #[test]
    fn workers_and_their_cpus() {
        assert_eq!(parsed(""), Ok(vec![None]));
        assert_eq!(parsed("--workers 2"), Ok(vec![None, None]));
        assert_eq!(parsed("--cpus 3,5-6"), Ok(vec![Some(3), Some(5), Some(6)]));
        assert_eq!(parsed("--workers 1 --cpus 7"), Ok(vec![Some(7)]));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            "--workers",
            "--workers 0",
            "--workers 65",
            "--workers x",
            "--cpus 5-3",
            "--cpus 0-99999999",
            "--workers 2 --cpus 1",
            "--verbose",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
