//! A turn of two processes, one that serves and one that drives: how long a packet takes.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::rings::{Rings, Way};
use super::testpmd::{Rates, Testpmd};
use crate::block::BlockError;
use crate::block::backend::Backend;
use crate::block::bench::Bench;
use crate::block::side::Side;
use crate::ratio::median;

/// Pieces of a turn; the median of them counts, so that a moment's disturbance does not.
const PIECES: u32 = 4;

/// How long the first packet of a turn may take, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(20);

/// Who serves.
#[derive(Debug)]
pub enum Server {
    /// `serve`, which is stopped between its turns: it has no such word, and with some ports it never sleeps.
    Ours(Backend),
    /// `testpmd`, which has to be told.
    Testpmd(Testpmd),
}

/// A back-end with the `testpmd` that is connected to it.
#[derive(Debug)]
pub struct Pair {
    server: Server,
    frontend: Testpmd,
    /// Ports of the frontend.
    ports: u16,
}

/// What a pair does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// One end makes frames of so many bytes, the other takes them.
    OneWay(Way, u32),
    /// The frontend sends frames of so many bytes, which the back-end sends on by another port.
    Bridge(u32),
    /// So many bursts of frames of so many bytes from each of the frontend's ports; each port sends on what the other
    /// received.
    Round {
        /// Bursts of 32.
        bursts: u32,
        /// Bytes of each frame.
        bytes: u32,
    },
}

impl Server {
    fn begin(&mut self) -> Result<(), BlockError> {
        match self {
            Self::Ours(serve) => signal(serve, Signal::SIGCONT),
            Self::Testpmd(testpmd) => testpmd.begin(),
        }
    }

    fn end(&mut self) -> Result<(), BlockError> {
        match self {
            Self::Ours(serve) => signal(serve, Signal::SIGSTOP),
            Self::Testpmd(testpmd) => testpmd.end(),
        }
    }
}

fn signal(serve: &Backend, signal: Signal) -> Result<(), BlockError> {
    let sent = match i32::try_from(serve.pid()) {
        Ok(pid) if pid > 0 => kill(Pid::from_raw(pid), signal),
        _ => Err(nix::Error::ESRCH),
    };
    sent.map_err(|error| BlockError::Program {
        what: format!("{signal} for serve"),
        source: error.into(),
    })
}

impl Pair {
    /// Connects a frontend to a back-end's sockets, a port to each, with as many of [`Rings::port`]'s numbers.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn connect(
        bench: &Bench,
        server: Server,
        sockets: &[PathBuf],
        rings: Rings,
    ) -> Result<Self, BlockError> {
        let ports = (0..)
            .zip(sockets)
            .map(|(number, socket)| rings.port(number, socket));
        let ports: Vec<String> = ports.collect();
        // What one port sends is for the other one.
        let peers = [
            "--eth-peer=0,02:bb:00:00:00:01",
            "--eth-peer=1,02:bb:00:00:00:00",
        ];
        let peers = peers.get(..ports.len()).filter(|peers| peers.len() > 1);
        let frontend = Testpmd::start(bench.driver_cpu, &ports, peers.unwrap_or_default())?;
        if let Server::Ours(serve) = &server {
            signal(serve, Signal::SIGSTOP)?;
        }
        Ok(Self {
            server,
            frontend,
            ports: u16::try_from(ports.len()).unwrap_or(0),
        })
    }

    /// What it does from its next turn on.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn prepare(&mut self, traffic: Traffic) -> Result<(), BlockError> {
        let (bytes, ends) = match traffic {
            Traffic::OneWay(Way::Tx, bytes) => (bytes, ["txonly", "rxonly"]),
            Traffic::OneWay(Way::Rx, bytes) => (bytes, ["rxonly", "txonly"]),
            Traffic::Bridge(bytes) => (bytes, ["txonly", "io"]),
            Traffic::Round { bytes, .. } => (bytes, ["io", "io"]),
        };
        let [frontend, server] = ends;
        let told = |testpmd: &mut Testpmd, mode: &str| {
            testpmd.set(&format!("fwd {mode}"))?;
            testpmd.set(&format!("txpkts {bytes}"))
        };
        told(&mut self.frontend, frontend)?;
        if let Server::Testpmd(testpmd) = &mut self.server {
            told(testpmd, server)?;
        }
        Ok(())
    }

    /// Nanoseconds for a packet.
    ///
    /// # Errors
    /// [`BlockError::Program`].
    pub fn turn(&mut self, bench: &Bench, traffic: Traffic) -> Result<f64, BlockError> {
        self.server.begin()?;
        match traffic {
            Traffic::OneWay(..) | Traffic::Bridge(_) => self.frontend.begin()?,
            Traffic::Round { bursts, .. } => self.frontend.begin_with(bursts)?,
        }
        self.wait_until_it_flows(bench, traffic)?;
        let mut pieces = Vec::new();
        for _ in 0..PIECES {
            std::thread::sleep(bench.pace.sample / PIECES);
            pieces.push(1e9 / self.look(traffic)?);
        }
        self.frontend.end()?;
        self.server.end()?;
        Ok(median(pieces))
    }

    /// Begins to count once a packet has come through.
    fn wait_until_it_flows(&mut self, bench: &Bench, traffic: Traffic) -> Result<(), BlockError> {
        let deadline = Instant::now() + PATIENCE;
        std::thread::sleep(bench.pace.warm_up);
        while self.look(traffic)? == 0.0 {
            if Instant::now() > deadline {
                return Err(BlockError::Program {
                    what: format!("{traffic:?}"),
                    source: std::io::Error::other(format!("no packet came in {PATIENCE:?}")),
                });
            }
            std::thread::sleep(bench.pace.warm_up);
        }
        Ok(())
    }

    /// Packets a second since the last look.
    fn look(&mut self, traffic: Traffic) -> Result<f64, BlockError> {
        let mut sum = 0.0;
        for port in 0..self.ports {
            let Rates { rx, tx } = self.frontend.rates(port)?;
            sum += match traffic {
                Traffic::OneWay(Way::Tx, _) | Traffic::Bridge(_) => tx,
                Traffic::OneWay(Way::Rx, _) | Traffic::Round { .. } => rx,
            };
        }
        Ok(sum)
    }
}

/// A side whose turns are a pair's.
pub fn side<'a>(bench: &'a Bench, pair: &'a RefCell<Pair>, traffic: Traffic) -> Side<'a> {
    Side::new(move || pair.borrow_mut().turn(bench, traffic))
}
