//! Attempts to get out of the data plane's lock-in, from each kind of its threads: each is made in a
//! process of its own, which must end with SIGSYS.
//!
//! (What a ring is asked for is tested beside the ring, `worker::ring::escape`.)

mod attempts;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use bulkhead_dataplane::sandbox::{self, ThreadKind, calls};
use libtest_mimic::{Arguments, Failed, Trial};

use attempts::ATTEMPTS;

/// Names the attempt that this process is to make.
const ATTEMPT_ENV: &str = "BULKHEAD_ESCAPE_ATTEMPT";
/// In the place of an attempt's name: end by `abort`.
const ABORT: &str = "abort";
/// Exit status of a process whose attempt was not deadly.
const SURVIVED: i32 = 42;
/// The first number that no system call has: in Linux 6.18 the last is below 480.
const NUMBERS: i64 = 512;
/// Marks the numbers of the x32 interface.
const X32: i64 = 0x4000_0000;

/// `uretprobe` and `uprobe`: the kernel lets them past every filter (they serve its own trampolines, and
/// do nothing anywhere else).
const NEVER_FILTERED: [i64; 2] = [335, 336];

const KINDS: [(&str, ThreadKind); 2] = [
    ("control", ThreadKind::Control),
    ("worker", ThreadKind::Worker),
];

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(ATTEMPT_ENV) {
        return as_child(&name);
    }
    let arguments = Arguments::from_args();
    let mut trials = vec![Trial::test("escape_landlock_refuses_paths", landlock)];
    for (name, kind) in KINDS {
        let sweep = move || sweep_in_child(name);
        trials.push(Trial::test(
            format!("escape_{name}_every_other_call"),
            sweep,
        ));
        trials.push(Trial::test(
            format!("escape_{name}_lives_without"),
            move || lives(name),
        ));
        trials.push(Trial::test(
            format!("escape_{name}_abort_is_seen_as_such"),
            move || aborts(name),
        ));
        for attempt in ATTEMPTS.iter().filter(|a| a.concerns(kind)) {
            let name = format!("escape_{name}_{}", attempt.name);
            let child = name.clone();
            trials.push(Trial::test(name, move || deadly(&child)));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Starts this program again, to do `what`; its output and status.
fn child(what: &str) -> Result<std::process::Output, Failed> {
    let program = std::env::current_exe()?;
    Ok(Command::new(program).env(ATTEMPT_ENV, what).output()?)
}

fn deadly(name: &str) -> Result<(), Failed> {
    let output = child(name)?;
    if output.status.signal() == Some(libc::SIGSYS) {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("it ended with {}, not with SIGSYS: {said}", output.status).into())
}

/// Without an attempt the thread goes on: the lock-in alone kills nobody.
fn lives(kind: &str) -> Result<(), Failed> {
    let output = child(&format!("escape_{kind}_nothing"))?;
    match output.status.code() {
        Some(SURVIVED) => Ok(()),
        _ => Err(format!("it ended with {}", output.status).into()),
    }
}

/// A failed assertion must not look like an escape.
fn aborts(kind: &str) -> Result<(), Failed> {
    let output = child(&format!("escape_{kind}_{ABORT}"))?;
    match output.status.signal() {
        Some(libc::SIGABRT) => Ok(()),
        _ => Err(format!("it ended with {}, not with SIGABRT", output.status).into()),
    }
}

fn sweep_in_child(kind: &str) -> Result<(), Failed> {
    let output = child(&format!("sweep {kind}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    if output.status.success() {
        return Ok(());
    }
    Err(said.into_owned().into())
}

fn as_child(name: &str) -> ExitCode {
    sandbox::lock_process().expect("the process is locked in");
    if name == "landlock" {
        return landlock_in_child();
    }
    if let Some(kind) = name.strip_prefix("sweep ") {
        return sweep(kind);
    }
    let (kind_name, rest) = name
        .strip_prefix("escape_")
        .and_then(|rest| rest.split_once('_'))
        .expect("a name");
    let (kind, what) = (kind_of(kind_name), rest.to_owned());
    match kind {
        ThreadKind::Control => attempt_on(kind, &what),
        // As the product does: on a thread that the locked-in process has started.
        ThreadKind::Worker => {
            let thread = std::thread::spawn(move || attempt_on(kind, &what));
            let _ = thread.join();
        }
    }
    ExitCode::FAILURE
}

fn kind_of(name: &str) -> ThreadKind {
    let found = KINDS.iter().find(|(other, _)| *other == name);
    found.expect("a kind of thread").1
}

fn attempt_on(kind: ThreadKind, what: &str) {
    match kind {
        ThreadKind::Control => sandbox::lock_control_thread(),
        ThreadKind::Worker => sandbox::lock_worker_thread(),
    }
    .expect("the thread is locked in");
    if what == ABORT {
        std::process::abort();
    }
    use_memory();
    if let Some(attempt) = ATTEMPTS.iter().find(|attempt| attempt.name == what) {
        let result = attempts::call(attempt.number, attempt.arguments);
        eprintln!("the call returned {result}");
    }
    std::process::exit(SURVIVED);
}

/// Allocates and frees as a guest with long chains has us do it: small things among large ones, then none.
fn use_memory() {
    for bytes in [1 << 12, 100_000, 1 << 20, 8 << 20] {
        for _ in 0..4 {
            let blocks: Vec<Vec<u8>> = (0..16).map(|i| vec![1; bytes / (1 + i)]).collect();
            std::hint::black_box(&blocks);
        }
    }
}

/// Makes every call that is not on the list, each in a process of its own.
fn sweep(kind_name: &str) -> ExitCode {
    let kind = kind_of(kind_name);
    let allowed = calls::allowed(kind).expect("the list");
    let numbers = (0..NUMBERS).chain((0..NUMBERS).map(|number| X32 | number));
    let outside: Vec<i64> = numbers
        .filter(|n| !allowed.contains_key(n) && !NEVER_FILTERED.contains(n))
        .collect();
    let survived: Vec<i64> = outside
        .iter()
        .copied()
        .filter(|&number| {
            attempts::signal_of_fork(|| {
                let locked = match kind {
                    ThreadKind::Control => sandbox::lock_control_thread(),
                    ThreadKind::Worker => sandbox::lock_worker_thread(),
                };
                if locked.is_ok() {
                    attempts::call(number, [0; 6]);
                }
            }) != Some(libc::SIGSYS)
        })
        .collect();
    println!(
        "{kind_name}: {} calls allowed, {} of {} others end in SIGSYS",
        allowed.len(),
        outside.len() - survived.len(),
        outside.len()
    );
    if survived.is_empty() && outside.len() > 900 {
        return ExitCode::SUCCESS;
    }
    println!("not deadly: {survived:?}");
    ExitCode::FAILURE
}

/// Landlock by itself, before a filter: the second fence.
fn landlock() -> Result<(), Failed> {
    // LANDLOCK_CREATE_RULESET_VERSION (1): the version of the interface, or an error without it.
    if attempts::call(libc::SYS_landlock_create_ruleset, [0, 0, 1, 0, 0, 0]) < 1 {
        println!("skipped: escape_landlock_refuses_paths: this kernel has no Landlock");
        return Ok(());
    }
    let output = child("landlock")?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
    }
}

fn landlock_in_child() -> ExitCode {
    let tried = [
        ("open", std::fs::File::open("/etc/passwd").map(drop)),
        ("create", std::fs::File::create("escaped").map(drop)),
        ("list", std::fs::read_dir("/").map(drop)),
        ("execute", Command::new("/bin/true").status().map(drop)),
    ];
    let denied = |e: &std::io::Error| e.kind() == std::io::ErrorKind::PermissionDenied;
    for (name, result) in tried {
        if !result.as_ref().is_err_and(denied) {
            eprintln!("{name}: {result:?}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
