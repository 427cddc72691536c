//! Runs a function in a child for each secret, stepping through it, and says where two runs differ.
//!
//! UNSAFETY: the child of a fork of a process with threads: it must not allocate nor take a lock that
//! another thread may hold. ptrace's calls get buffers of the size they fill.
#![expect(unsafe_code, reason = "fork and ptrace")]

use std::arch::asm;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;

use bulkhead_crypto::SecretArena;
use libc::{c_int, pid_t, user_regs_struct};

/// What a function works on, at the same address in each run.
pub struct Work {
    pub arena: Option<Arc<SecretArena>>,
    pub key: [u8; 64],
    pub data: [u8; 4096],
    pub output: [u8; 4096],
}

impl Work {
    pub fn new(arena: Option<Arc<SecretArena>>) -> Box<Self> {
        Box::new(Self {
            arena,
            key: [0; 64],
            data: [0; 4096],
            output: [0; 4096],
        })
    }
}

/// What of two runs is compared.
#[derive(Clone, Copy)]
pub enum Compare {
    /// Where each instruction lies.
    Way,
    /// That, and all general registers and flags before it.
    WayAndRegisters,
}

/// Where the stepping starts and ends, called by the function itself.
#[derive(Clone, Copy)]
pub struct Step;

impl Step {
    /// Stops for the parent, with nothing in the registers that a fork may have left there.
    #[inline(always)]
    pub fn begin(self) {
        // SAFETY: registers are cleared and said to be; the parent waits for the trap.
        unsafe {
            asm!(
                "xor eax, eax", "xor ecx, ecx", "xor edx, edx", "xor esi, esi", "xor edi, edi",
                "xor r8d, r8d", "xor r9d, r9d", "xor r10d, r10d", "xor r11d, r11d",
                "int3",
                out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
    }

    #[inline(always)]
    pub fn end(self) {
        the_end();
    }
}

/// The parent stops where this begins.
#[inline(never)]
extern "C" fn the_end() {
    std::hint::black_box(());
}

/// Whether a child may not be traced here, which is then said.
pub fn forbidden(test: &str) -> bool {
    // SAFETY: the child asks to be traced, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let none = ptr::null_mut::<u8>();
        // SAFETY: as above.
        unsafe {
            libc::_exit(c_int::from(
                libc::ptrace(libc::PTRACE_TRACEME, 0, none, none) != 0,
            ))
        };
    }
    let mut status = 0;
    // SAFETY: a child of ours.
    let rc = unsafe { libc::waitpid(child, &raw mut status, 0) };
    let forbidden = rc != child || !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0;
    if forbidden {
        println!("skipped: {test}: no process may trace another here");
    }
    forbidden
}

/// Runs `function` for each secret, and says what first differs between two runs.
pub fn differs(
    work: &mut Work,
    secrets: &[fn(usize) -> u8],
    compare: Compare,
    function: impl Fn(&mut Work, Step) + Copy,
) -> Option<String> {
    stay_here();
    let mut first: Option<Vec<[u64; 18]>> = None;
    for (index, secret) in secrets.iter().enumerate() {
        work.key
            .iter_mut()
            .enumerate()
            .for_each(|(at, b)| *b = secret(at));
        work.data
            .iter_mut()
            .enumerate()
            .for_each(|(at, b)| *b = secret(at + 64));
        work.output.fill(0);
        let steps = steps(work, compare, function);
        assert!(steps.len() > 10, "{} steps are no run", steps.len());
        let Some(first) = &first else {
            first = Some(steps);
            continue;
        };
        let differ = first.iter().zip(&steps).position(|(a, b)| a != b);
        if let Some(at) = differ {
            return Some(format!(
                "secret {index}: step {at}: {:x?} or {:x?}",
                first[at], steps[at]
            ));
        }
        if first.len() != steps.len() {
            return Some(format!(
                "secret {index}: {} or {} steps",
                first.len(),
                steps.len()
            ));
        }
    }
    None
}

/// One run in a child, as the state before each instruction.
fn steps(
    work: &mut Work,
    compare: Compare,
    function: impl Fn(&mut Work, Step) + Copy,
) -> Vec<[u64; 18]> {
    // SAFETY: the child calls `function`, which neither allocates nor locks, and ends.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        the_child(&mut Job { work, function });
    }
    let mut steps = Vec::new();
    assert_eq!(
        wait(child),
        Some(libc::SIGTRAP),
        "the child comes to its start"
    );
    let end = the_end as *const () as u64;
    loop {
        let registers = registers(child);
        if registers[0] == end {
            break;
        }
        steps.push(match compare {
            Compare::Way => {
                let mut way = [0; 18];
                way[0] = registers[0];
                way
            }
            Compare::WayAndRegisters => registers,
        });
        request(libc::PTRACE_SINGLESTEP, child);
        assert_eq!(
            wait(child),
            Some(libc::SIGTRAP),
            "after {} steps",
            steps.len()
        );
    }
    request(libc::PTRACE_KILL, child);
    assert_eq!(wait(child), None);
    steps
}

/// Keeps this thread, and its children, on one CPU: parent and child take turns, which is several times as fast there.
fn stay_here() {
    // SAFETY: a set of CPUs of this function, with one that exists.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if let Ok(cpu) = usize::try_from(libc::sched_getcpu()) {
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
        }
    }
}

struct Job<'w, F> {
    work: &'w mut Work,
    function: F,
}

/// Runs the job, to be traced by the parent; with nothing in the registers that it has not put there itself.
fn the_child<F: Fn(&mut Work, Step) + Copy>(job: &mut Job<'_, F>) -> ! {
    extern "C" fn run<F: Fn(&mut Work, Step) + Copy>(job: &mut Job<'_, F>) -> ! {
        (job.function)(job.work, Step);
        // SAFETY: ends the child without anything of the test's own end.
        unsafe { libc::_exit(0) }
    }
    // SAFETY: asks to be traced by the parent; then calls a function that does not return, whatever
    // becomes of the registers.
    unsafe {
        let none = ptr::null_mut::<u8>();
        libc::ptrace(libc::PTRACE_TRACEME, 0, none, none);
        asm!(
            "xor ebx, ebx", "xor ebp, ebp", "xor r12d, r12d", "xor r13d, r13d",
            "xor r14d, r14d", "xor r15d, r15d",
            "call rax",
            "ud2",
            in("rax") run::<F> as extern "C" fn(&mut Job<'_, F>) -> !,
            in("rdi") job,
            options(noreturn),
        )
    }
}

fn request(request: libc::c_uint, child: pid_t) {
    // SAFETY: a stopped child of ours; these requests fill nothing.
    let rc = unsafe { libc::ptrace(request, child, ptr::null_mut::<u8>(), ptr::null_mut::<u8>()) };
    assert_eq!(rc, 0, "ptrace: {}", std::io::Error::last_os_error());
}

/// The signal that a child stopped with; none if it has ended.
fn wait(child: pid_t) -> Option<c_int> {
    let mut status = 0;
    // SAFETY: a child of ours.
    let rc = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(rc, child, "waitpid: {}", std::io::Error::last_os_error());
    libc::WIFSTOPPED(status).then(|| libc::WSTOPSIG(status))
}

/// The instruction pointer first, then all general registers and the flags.
fn registers(child: pid_t) -> [u64; 18] {
    let mut r = MaybeUninit::<user_regs_struct>::uninit();
    // SAFETY: a stopped child of ours, and room for its registers.
    let r = unsafe {
        let rc = libc::ptrace(
            libc::PTRACE_GETREGS,
            child,
            ptr::null_mut::<u8>(),
            r.as_mut_ptr(),
        );
        assert_eq!(rc, 0, "ptrace: {}", std::io::Error::last_os_error());
        r.assume_init()
    };
    [
        r.rip, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
        r.r12, r.r13, r.r14, r.r15, r.eflags,
    ]
}
