//! Frontends that are killed, and connections that come and go.
//!
//! A frontend that is to die is a process of its own: the test's program, started again with [`TOLD`] in its environment. Its `main`
//! calls [`run_if_told`] before anything else.

use std::error::Error;
use std::io::Read as _;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::eventfd::EventFd;

use crate::disk::{DATA, Disk, Options, PATIENCE, Request, feature};
use crate::driver::{SECTOR_BYTES, kind};
use crate::frontend::Frontend;
use crate::frontend::message::{self, VERSION, request};
use crate::random::Random;

/// Set in a frontend that is to die: the virtio features it negotiates, and after a space its socket.
const TOLD: &str = "BULKHEAD_TEST_FRONTEND";
/// Bytes of the disk that such frontends write to.
pub const SCRATCH: Range<usize> = 0x10_0000..0x18_0000;
/// Requests that one keeps in flight.
const SLOTS: u16 = 8;
/// Bytes of each of them.
const BYTES: u32 = 0x1_0000;
/// Connections that a storm has open at once: fewer than a listener's backlog.
const CROWD: usize = 64;

/// A frontend that is to die; it does with its value.
#[derive(Debug)]
pub struct Doomed(Child);

impl Doomed {
    /// Starts one that negotiates these virtio features and attaches the disk on this socket.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(socket: &Path, features: u64) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .env(TOLD, format!("{features} {}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        Ok(Self(command.spawn()?))
    }

    /// Waits until it has requests in flight.
    ///
    /// # Errors
    /// When it ended before.
    pub fn wait_for_work(&mut self) -> Result<(), Box<dyn Error>> {
        let output = self.0.stdout.as_mut().ok_or("it has no output")?;
        let mut byte = [0];
        if output.read(&mut byte)? == 0 {
            return Err("a frontend ended before it was at work".into());
        }
        Ok(())
    }

    /// Kills it, and does not wait for that.
    ///
    /// # Errors
    /// When it can't be killed.
    pub fn kill(&mut self) -> Result<(), Box<dyn Error>> {
        Ok(self.0.kill()?)
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// In a frontend that is to die: does its work until then. True in it, where it could not; then its program ends.
#[must_use]
pub fn run_if_told() -> bool {
    let Ok(told) = std::env::var(TOLD) else {
        return false;
    };
    if let Err(error) = work(&told) {
        eprintln!("a frontend that was to be killed: {error}");
    }
    true
}

/// Writes and reads, many at a time, for ever.
fn work(told: &str) -> Result<(), Box<dyn Error>> {
    // It does not stay even where who is to kill it dies first.
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
    let at = u64::from(slot) * u64::from(BYTES);
    Request {
        kind: if slot.is_multiple_of(2) {
            kind::OUT
        } else {
            kind::IN
        },
        sector: (SCRATCH.start as u64 + at) / SECTOR_BYTES,
        segments: vec![(DATA + at, BYTES)],
    }
}

/// So many connections that come and go, one after the other or many at once, and say nothing, something, a part of
/// it, or something with a descriptor.
///
/// # Errors
/// When one can't connect.
pub fn storm(socket: &Path, random: &mut Random, connections: u64) -> Result<(), Box<dyn Error>> {
    let event = EventFd::new()?;
    let question = message::encode(request::GET_FEATURES, VERSION, &[]);
    let kick = message::vring_fd(0, true);
    let kick = message::encode(request::SET_VRING_KICK, VERSION, &kick);
    let mut crowd = Vec::new();
    for _ in 0..connections {
        let frontend = Frontend::connect(socket, PATIENCE)?;
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
    Ok(())
}
