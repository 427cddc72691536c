//! `bulkhead-dataplane`: started by rot with one inherited channel; locks itself in, then serves the
//! volumes that keyd grants.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use bulkhead_crypto::SecretArena;
use bulkhead_crypto::xts::Kernel;
use bulkhead_dataplane::control::{Control, KEY_SLOTS, Staff, Start};
use bulkhead_dataplane::fence::Fence;
use bulkhead_dataplane::hand;
use bulkhead_dataplane::sandbox;
use bulkhead_dataplane::server::{Server, ServerConfig};
use bulkhead_dataplane::stored::{Found, Inherited, Keeper};
use bulkhead_dataplane::worker::WorkerConfig;
use bulkhead_protocol::process::{inherited_channel, init_logging, is_candidate};
use bulkhead_protocol::workers::{MAX_CPU, Workers, parse_cpus};
use nix::sched::sched_getaffinity;
use nix::unistd::Pid;

const USAGE: &str = "usage: bulkhead-dataplane [--workers N] [--cpus LIST]   (LIST: like 2,4-7; one \
                     CPU per worker)\nWithout both the bundle says it. It is started by \
                     bulkhead-rot.";

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
/// Where the host does not say how many workers there are, keyd is asked first, and hello said for that.
fn run(host: Option<Workers>) -> Result<(), Failure> {
    bulkhead_crypto::xts::self_test()?;
    let mut start = Start::new(inherited_channel()?);
    let mut inherited = Inherited::take()?;
    let arena = SecretArena::new(KEY_SLOTS)
        .map_err(|e| format!("can't make secret memory for keys: {e}; raise RLIMIT_MEMLOCK"))?;
    sandbox::lock_process()?;
    let bundle = match (&host, inherited.workers()) {
        (Some(_), _) => None,
        // Guests wait, for hello too: others than these come with a later start.
        (None, before) if is_candidate() => before,
        (None, Some(before)) if inherited.has_volumes() => Some(before),
        (None, _) => start.ask_for_workers()?,
    };
    if start.is_stopped() {
        return Ok(());
    }
    let staff = Staff::new(host, bundle, &usable_cpus()?);
    if let Some(problem) = staff.problem() {
        tracing::error!("{problem}");
    }
    let (fence, end) = Fence::new()?;
    let mut server = serve(&staff, fence)?;
    if is_candidate() {
        start.wait_for_go(&mut inherited)?;
        if start.is_stopped() {
            return Ok(());
        }
    }
    let (keeper, found) = inherited.take_over()?;
    if let Some(blamed) = keeper.blamed() {
        hand::watch(blamed)?;
    }
    if is_candidate() {
        keeper.forgive_all();
    }
    // Before anything is submitted.
    let number = keep_own(&keeper, &found, &staff, &end)?;
    let mut control = Control::new(start, arena, &server, staff, (keeper, number))?;
    control.resume(&mut server, found);
    sandbox::lock_control_thread()?;
    let cipher = Kernel::chosen();
    tracing::info!(workers = server.worker_count(), %cipher, "locked in and serving");
    let ended = server.run(&mut control);
    control.leave();
    ended?;
    match control.failure() {
        None => Ok(()),
        Some(reason) => Err(reason.into()),
    }
}

/// Stores what a successor has to know of this process, its fence and its workers: the fence's number.
fn keep_own(keeper: &Keeper, found: &Found, staff: &Staff, end: &OwnedFd) -> Result<u64, Failure> {
    let is_free = |number: &u64| found.fences.iter().all(|(other, _)| other != number);
    let number = (1..)
        .find(is_free)
        .ok_or("there is no number for a fence")?;
    keeper.keep_fence(number, end.as_fd())?;
    if found.workers.as_ref() != Some(staff.asked()) {
        keeper.keep_workers(staff.asked())?;
    }
    Ok(number)
}

/// The threads and their rings. The fence is theirs alone afterwards.
fn serve(staff: &Staff, fence: Fence) -> std::io::Result<Server> {
    let worker = |cpu| WorkerConfig {
        cpu,
        lock_in: true,
        fence: Some(fence.clone()),
    };
    Server::new(&ServerConfig {
        workers: staff.cpus().map(worker).collect(),
        ..ServerConfig::default()
    })
}

/// A panic in one thread ends the process, never leaves half of it serving; and no backtrace, for
/// which files would have to be opened.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        hand::blame();
        tracing::error!("{panic}");
        std::process::abort();
    }));
}

/// What the arguments ask for; none if they ask for nothing.
fn workers(arguments: &[String]) -> Result<Option<Workers>, String> {
    let mut count = None;
    let mut cpus = Vec::new();
    let mut rest = arguments.iter();
    while let Some(name) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{name} has no value"));
        match name.as_str() {
            "--workers" => count = Some(number(value()?)?),
            "--cpus" => cpus = parse_cpus(value()?)?,
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    if count.is_none() && cpus.is_empty() {
        return Ok(None);
    }
    Workers::new(count, cpus).map(Some)
}

fn number(text: &str) -> Result<u16, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not a number of workers"))
}

/// The CPUs that this process may use, ascending.
fn usable_cpus() -> Result<Vec<u16>, Failure> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let usable = |cpu: &u16| set.is_set(usize::from(*cpu)).unwrap_or(false);
    Ok((0..=MAX_CPU).filter(usable).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Option<Workers>, String> {
        let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        workers(&arguments)
    }

    #[test]
    fn workers_and_their_cpus() {
        assert_eq!(parsed(""), Ok(None));
        let asked = |count, cpus: &[u16]| Workers::new(count, cpus.to_vec()).map(Some);
        assert_eq!(parsed("--workers 2"), asked(Some(2), &[]));
        assert_eq!(parsed("--cpus 3,5-6"), asked(None, &[3, 5, 6]));
        assert_eq!(parsed("--workers 1 --cpus 7"), asked(Some(1), &[7]));
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

    #[test]
    fn this_process_may_use_a_cpu() {
        assert!(!usable_cpus().expect("the kernel says").is_empty());
    }
}
