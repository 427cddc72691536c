//! Serving a fixed list of devices: what `serve` does, and what tests of the whole path use. No
//! configuration, no keys service; everything else as in production, the lock-in included.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixListener;

use mio::{Registry, Token};

use crate::device::Device;
use crate::server::{Access, Event, Manager, Server, ServerConfig};

/// A device and where it is offered.
#[derive(Debug)]
pub struct Served {
    /// What is served.
    pub device: Device,
    /// Where frontends connect.
    pub listener: UnixListener,
    /// Its name in log lines.
    pub label: String,
}

/// Nothing to manage: a device that can't be served ends the server.
struct Fixed {
    failure: Option<String>,
}

impl Manager for Fixed {
    fn register(&mut self, _: &Registry) -> io::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: &mut Server, _: Token) {}

    fn event(&mut self, server: &mut Server, event: Event) {
        if let Event::Attached {
            result: Err(reason),
            ..
        } = event
        {
            self.failure = Some(reason);
            server.stop();
        }
    }
}

/// Serves the devices until the process is ended by a signal. `ready` is called once the workers
/// run and the listeners are watched, and may lock the calling thread in.
///
/// # Errors
/// When workers or the event loop can't start, a device can't be served, or `ready` fails.
pub fn run(
    config: &ServerConfig,
    devices: Vec<Served>,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let mut server = Server::new(config)?;
    for served in devices {
        let everybody = Access { allowed_uid: None };
        server.attach(served.device, served.listener, everybody, served.label)?;
    }
    ready()?;
    let mut manager = Fixed { failure: None };
    server.run(&mut manager)?;
    match manager.failure {
        Some(reason) => Err(io::Error::other(reason)),
        None => Ok(()),
    }
}
