//! T39: frontends that are killed at any moment of their lives, and storms of connections. Whoever comes next is
//! served, with everything as it was but for what the dead ones wrote; nothing of them is left in the process.
//!
//! The frontends that die are processes of their own: this program, started again with [`FRONTEND`].

use std::error::Error;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{DATA, Disk, Options, PATIENCE, Request, feature};
use bulkhead_integration::driver::kind;
use bulkhead_integration::frontend::Frontend;
use bulkhead_integration::frontend::message::{self, VERSION, request};
use bulkhead_integration::random::Random;
use nix::sys::eventfd::EventFd;

use crate::Outcome;
use crate::socket::{GROWTH_KIB, resident_kib};

/// Set in a frontend that is to die: its socket, and after a space the virtio features it negotiates.
pub const FRONTEND: &str = "BULKHEAD_TEST_FRONTEND";
/// Connections for each death.
const STORM: u64 = 20;
/// Connections that are open at once in a storm: fewer than a listener's backlog.
const CROWD: usize = 64;
/// Bytes of the disk that the frontends write to.
const SCRATCH: std::ops::Range<usize> = 0x10_0000..0x18_0000;
/// Requests that a frontend keeps in flight.
const SLOTS: u16 = 8;
/// Bytes of each of them.
const BYTES: u32 = 0x1_0000;
/// What the next frontend waits at most when the full number is asked for, on a machine of its own (T39).
const NEXT_SERVED: Duration = Duration::from_millis(100);

/// So many deaths, and [`STORM`] times as many connections.
pub fn run(arena: &mut Arena, random: &mut Random, rounds: u64) -> Outcome {
    let mut waits = Vec::new();
    let (mut before, mut connected) = (0, 0);
    arena.touch(SCRATCH);
    for round in 0..rounds {
        if round == rounds / 10 {
            before = resident_kib(arena)?;
        }
        connected += storm(arena, random)?;
        waits.push(death(arena, random, round % 2 == 0)?);
        if round % 20 == 0 {
            arena.check_other()?;
        }
    }
    let grown = resident_kib(arena)?.saturating_sub(before);
    if grown > GROWTH_KIB {
        return Err(format!("{rounds} deaths left {grown} KiB behind").into());
    }
    waits.sort_unstable();
    let at = |percent: usize| waits[(waits.len() - 1) * percent / 100];
    let (half, most) = (at(50), at(100));
    if std::env::var_os(crate::SOAK).is_some() && at(99) > NEXT_SERVED {
        let late = at(99);
        return Err(format!("of 100 deaths, one has the next frontend wait for {late:?}").into());
    }
    Ok(format!(
        "{rounds} deaths and {connected} connections; the next frontend was served in {half:.1?}, at most \
         {most:.1?}; {grown} KiB grown"
    ))
}

/// A frontend's life and its end: how long the next one waits for its first answer.
fn death(arena: &Arena, random: &mut Random, at_work: bool) -> Result<Duration, Box<dyn Error>> {
    let mut child = start(&arena.socket, arena.guest_features)?;
    // Half of them die before they are at work, some of these before they connect.
    if at_work {
        wait_for_work(&mut child)?;
    }
    std::thread::sleep(Duration::from_micros(random.below(6_000)));
    child.kill()?;
    let since = Instant::now();
    let mut next = arena.attach(&Options::default())?;
    let bytes = next.read(0, 0, 4096)?;
    let waited = since.elapsed();
    child.wait()?;
    if bytes != arena.contents[..4096] {
        return Err("the disk has changed where nobody wrote".into());
    }
    Ok(waited)
}

fn start(socket: &Path, features: u64) -> Result<Child, Box<dyn Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .env(FRONTEND, format!("{features} {}", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    Ok(command.spawn()?)
}

/// Waits until a frontend has requests in flight: it says so once.
fn wait_for_work(child: &mut Child) -> Result<(), Box<dyn Error>> {
    use std::io::Read as _;
    let output = child.stdout.as_mut().ok_or("no output")?;
    let mut byte = [0];
    if output.read(&mut byte)? == 0 {
        return Err("a frontend ended before it was at work".into());
    }
    Ok(())
}

/// What a frontend does until it is killed: writes and reads, many at a time.
pub fn child(told: &str) -> Result<(), Box<dyn Error>> {
    // Not even if whoever is to kill it dies first does it stay.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    let (features, socket) = told.split_once(' ').ok_or("features and a socket")?;
    let mut options = Options::default();
    options.features |= features.parse::<u64>()? | feature::EVENT_IDX;
    let mut disk = Disk::attach(&PathBuf::from(socket), &options)?;
    for slot in 0..SLOTS {
        disk.push(0, slot, &request_of(slot))?;
    }
    disk.publish(0)?;
    println!("at work");
    loop {
        let used = disk.rings[0].wait_used(&disk.memory, PATIENCE)?;
        let slot = u16::try_from(used.id)? / Disk::head(1);
        disk.check(slot, &request_of(slot), used.len)?;
        disk.push(0, slot, &request_of(slot))?;
        disk.publish(0)?;
    }
}

fn request_of(slot: u16) -> Request {
    Request {
        kind: if slot.is_multiple_of(2) {
            kind::OUT
        } else {
            kind::IN
        },
        sector: SCRATCH.start as u64 / 512 + u64::from(slot) * u64::from(BYTES) / 512,
        segments: vec![(DATA + u64::from(slot) * u64::from(BYTES), BYTES)],
    }
}

/// Connections that come and go, one after the other or many at once, and say nothing, something, a part of it, or
/// something with a descriptor; how many.
fn storm(arena: &Arena, random: &mut Random) -> Result<u64, Box<dyn Error>> {
    let event = EventFd::new()?;
    let question = message::encode(request::GET_FEATURES, VERSION, &[]);
    let kick = message::encode(
        request::SET_VRING_KICK,
        VERSION,
        &message::vring_fd(0, true),
    );
    let mut crowd = Vec::new();
    for _ in 0..STORM {
        let frontend = Frontend::connect(&arena.socket, PATIENCE)?;
        // What the crowd says waits until its turn comes.
        let cut = 1 + random.index(question.len());
        match random.below(4) {
            0 => {}
            1 => frontend.send_raw(&question, &[])?,
            2 => frontend.send_raw(&question[..cut], &[])?,
            _ => frontend.send_raw(&kick, &[event.as_fd()])?,
        }
        if random.below(4) == 0 {
            crowd.push(frontend);
        }
        if crowd.len() == CROWD {
            crowd.clear();
        }
    }
    Ok(STORM)
}
