//! The same under valgrind's memcheck, which follows every bit that comes of a key or of data, and reports each branch
//! and each address that depends on one. It knows neither AVX-512 nor VAES, so this is about the kernels
//! for CPUs that have neither, of one of which stepping shows less.
//!
//! UNSAFETY: a request to valgrind is a sequence of instructions that does nothing elsewhere.
#![expect(unsafe_code, reason = "valgrind's requests are instructions")]

use std::arch::asm;
use std::process::Command;

use bulkhead_crypto::SecretArena;
use bulkhead_crypto::xts::Kernel;

use crate::step::Work;
use crate::{both_units, expand, expand_any, planted};

/// Says what is done with the secrets.
const JOB: &str = "BULKHEAD_MEMCHECK_JOB";

/// What valgrind is asked (`valgrind.h`, `memcheck.h`).
const RUNNING: u64 = 0x1001;
const COUNT_ERRORS: u64 = 0x1201;
const MAKE_UNDEFINED: u64 = 0x4d43_0001;
const MAKE_DEFINED: u64 = 0x4d43_0002;

/// Valgrind's answer; zero from a CPU.
fn ask(request: u64, bytes: &mut [u8]) -> u64 {
    let at = bytes.as_mut_ptr().addr() as u64;
    let arguments = [request, at, bytes.len() as u64, 0, 0, 0];
    let mut answer = 0;
    // SAFETY: rotations by 128 bits in all, and an exchange of a register with itself; valgrind reads the arguments and
    // gives an answer.
    unsafe {
        asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") arguments.as_ptr(),
            inout("rdx") answer,
        );
    }
    answer
}

/// How many branches and addresses depended on what is undefined, while `function` ran.
fn reported(function: impl FnOnce()) -> u64 {
    let before = ask(COUNT_ERRORS, &mut []);
    function();
    ask(COUNT_ERRORS, &mut []) - before
}

/// Runs in ordinary tests, where nothing is ever reported, and under valgrind.
#[test]
fn what_memcheck_runs() {
    let on_valgrind = ask(RUNNING, &mut []) != 0;
    let job = std::env::var(JOB).unwrap_or_default();
    assert!(on_valgrind || job.is_empty(), "a job is for valgrind");
    let mut work = Work::new(Some(SecretArena::new(1).expect("arena")));
    for kernel in Kernel::available() {
        drop(expand_any(&work, kernel));
        work.key = std::array::from_fn(|at| u8::try_from(at).expect("small"));
        work.data = std::array::from_fn(|at| u8::try_from(at % 251).expect("small"));
        let plain = work.data;
        ask(MAKE_UNDEFINED, &mut work.key);
        ask(MAKE_UNDEFINED, &mut work.data);
        match job.as_str() {
            "branch" => assert!(reported(|| planted::branch(&mut work)) > 0),
            "lookup" => assert!(reported(|| planted::lookup(&mut work)) > 0),
            _ => {
                let mut key = None;
                let expanding = reported(|| key = Some(expand(&work, kernel)));
                // That a key whose halves are equal is refused is a branch, and no secret; one more is
                // an assertion in debug builds of the library that compares them.
                let allowed = if on_valgrind { 1..=2 } else { 0..=0 };
                assert!(
                    allowed.contains(&expanding),
                    "{kernel}: {expanding} in expansion"
                );
                let key = key.expect("expanded");
                let encrypting = reported(|| both_units(&key, &mut work, true));
                work.data = work.output;
                let decrypting = reported(|| both_units(&key, &mut work, false));
                assert_eq!((encrypting, decrypting), (0, 0), "{kernel}");
            }
        }
        for bytes in [&mut work.key[..], &mut work.data, &mut work.output] {
            ask(MAKE_DEFINED, bytes);
        }
        if job.is_empty() {
            assert_eq!(work.output[..1536], plain[..1536], "{kernel}");
        }
        println!("memcheck: {kernel}: {on_valgrind}");
    }
}

/// Runs the test above under valgrind, if there is one.
fn valgrind(job: &str) {
    let output = Command::new("valgrind")
        .args(["--quiet", "--leak-check=no", "--error-limit=no"])
        .arg(std::env::current_exe().expect("this test"))
        .args([
            "--exact",
            "memcheck::what_memcheck_runs",
            "--test-threads=1",
            "--show-output",
        ])
        .env(JOB, job)
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: memcheck {job}: can't run valgrind: {error}");
            return;
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("memcheck: portable: true"), "{text}");
}

#[test]
fn memcheck_finds_no_secret_in_a_branch_or_an_address() {
    valgrind("cipher");
}

#[test]
fn memcheck_finds_a_table_lookup_and_a_branch() {
    valgrind("branch");
    valgrind("lookup");
}
