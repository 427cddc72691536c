//! A server, and what a test has it do.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bulkhead_dataplane::blk::{BlkDevice, Geometry};
use bulkhead_dataplane::server::{
    Access, DeviceStatus, Event, MANAGER_TOKENS, Manager, Server, ServerConfig,
};
use bulkhead_dataplane::storage::StorageSpec;
use bulkhead_dataplane::worker::WorkerConfig;
use bulkhead_dataplane::worker::message::DeviceId;
use mio::{Registry, Token, Waker};

/// How long anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What a test has the control thread do.
type Job = Box<dyn FnOnce(&mut Server) + Send>;

/// A manager that does as a test says, and passes on what it is told.
struct Told {
    jobs: Receiver<Job>,
    events: Sender<Event>,
    waker: Sender<Waker>,
}

impl Manager for Told {
    fn register(&mut self, registry: &Registry) -> io::Result<()> {
        let waker = Waker::new(registry, Token(MANAGER_TOKENS))?;
        self.waker.send(waker).map_err(io::Error::other)
    }

    fn ready(&mut self, server: &mut Server, _: Token) {
        for job in self.jobs.try_iter() {
            job(server);
        }
    }

    fn event(&mut self, _: &mut Server, event: Event) {
        let _ = self.events.send(event);
    }
}

/// A server on a thread of its own, with two workers.
pub struct Rig {
    jobs: Sender<Job>,
    events: Receiver<Event>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    pub dir: tempfile::TempDir,
    /// Devices offered.
    pub count: usize,
    /// The thread's number, of the system's.
    pub tid: i32,
}

impl Rig {
    pub fn new() -> Self {
        let ((jobs, jobs_in), (events_out, events)) = (channel(), channel());
        let (waker_out, waker) = channel();
        let (tid_out, tid) = channel();
        let thread = std::thread::spawn(move || {
            tid_out
                .send(nix::unistd::gettid().as_raw())
                .expect("awaited");
            let config = ServerConfig {
                workers: vec![WorkerConfig::default(); 2],
                ..ServerConfig::default()
            };
            let server = Server::new(&config).expect("server");
            let mut manager = Told {
                jobs: jobs_in,
                events: events_out,
                waker: waker_out,
            };
            server.run(&mut manager).expect("an end in order");
        });
        Self {
            jobs,
            events,
            waker: waker.recv().expect("it runs"),
            thread: Some(thread),
            dir: tempfile::tempdir().expect("folder"),
            count: 0,
            tid: tid.recv().expect("it runs"),
        }
    }

    /// What the control thread makes of it.
    pub fn ask<T: Send + 'static>(&self, f: impl FnOnce(&mut Server) -> T + Send + 'static) -> T {
        let (answer, answered) = channel();
        let job = move |server: &mut Server| drop(answer.send(f(server)));
        self.jobs.send(Box::new(job)).expect("it runs");
        self.waker.wake().expect("it runs");
        answered.recv_timeout(PATIENCE).expect("an answer")
    }

    pub fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).expect("an event")
    }

    pub fn quiet(&self) -> bool {
        self.events.recv_timeout(Duration::from_millis(50)).is_err()
    }

    /// Offers a device on a socket of its own.
    pub fn attach(&mut self, allowed_uid: Option<u32>) -> (DeviceId, PathBuf) {
        let geometry = Geometry {
            logical_block_bytes: 512,
            read_only: false,
            serial: [0; 20],
            queues: 1,
            discard: false,
        };
        let device = BlkDevice::new(geometry, 2048, StorageSpec::Null, None);
        self.offer(device, allowed_uid)
    }

    /// Offers this device on a socket of its own.
    pub fn offer(
        &mut self,
        device: Arc<BlkDevice>,
        allowed_uid: Option<u32>,
    ) -> (DeviceId, PathBuf) {
        self.count += 1;
        let path = self.dir.path().join(format!("{}.sock", self.count));
        let listener = UnixListener::bind(&path).expect("bind");
        let access = Access { allowed_uid };
        let id = self.ask(move |server| {
            server
                .attach(&device, listener, access, "disk".to_owned())
                .expect("attach")
        });
        assert!(matches!(self.event(), Event::Attached { id: of, result: Ok(()) } if of == id));
        (id, path)
    }

    pub fn status(&self, id: DeviceId) -> DeviceStatus {
        self.ask(move |server| server.status(id))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.jobs.send(Box::new(|server| server.stop()));
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(std::thread::panicking() || ended.is_ok());
        }
    }
}
