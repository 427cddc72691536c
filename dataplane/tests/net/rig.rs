//! A server with network cards, and what a test has it do.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_dataplane::net::{Counts, NetDevice, Shape};
use bulkhead_dataplane::port::{DropReason, Guard, PortSpec, SwitchSpec};
use bulkhead_dataplane::server::{
    Access, DeviceStatus, Event, MANAGER_TOKENS, Manager, Server, ServerConfig,
};
use bulkhead_dataplane::worker::WorkerConfig;
use bulkhead_dataplane::worker::message::DeviceId;
use bulkhead_integration::card::{Card, Options};
use bulkhead_protocol::net::SpoofChecks;
use mio::{Registry, Token, Waker};

/// How long anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What a test has the control thread do.
type Job = Box<dyn FnOnce(&mut Server) + Send>;

/// A manager that does as a test says.
struct Told {
    jobs: Receiver<Job>,
    attached: Sender<DeviceId>,
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
        if let Event::Attached { id, result } = event {
            result.expect("every worker takes it");
            let _ = self.attached.send(id);
        }
    }
}

/// A server on a thread of its own, with two workers.
pub struct Rig {
    jobs: Sender<Job>,
    attached: Receiver<DeviceId>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
    dir: tempfile::TempDir,
    count: u8,
    pub switch: Arc<SwitchSpec>,
}

/// A card that is offered.
pub struct Offered {
    pub id: DeviceId,
    pub device: Arc<NetDevice>,
    pub path: PathBuf,
}

impl Rig {
    pub fn new() -> Self {
        let ((jobs, jobs_in), (attached_out, attached)) = (channel(), channel());
        let (waker_out, waker) = channel();
        let thread = std::thread::spawn(move || {
            let config = ServerConfig {
                workers: vec![WorkerConfig::default(); 2],
                ..ServerConfig::default()
            };
            let server = Server::new(&config).expect("server");
            let mut manager = Told {
                jobs: jobs_in,
                attached: attached_out,
                waker: waker_out,
            };
            server.run(&mut manager).expect("an end in order");
        });
        Self {
            jobs,
            attached,
            waker: waker.recv().expect("it runs"),
            thread: Some(thread),
            dir: tempfile::tempdir().expect("folder"),
            count: 0,
            switch: SwitchSpec::new("lan".to_owned(), None),
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

    /// Offers a card with so many pairs on a socket of its own.
    pub fn offer(&mut self, port: PortSpec, queue_pairs: u16) -> Offered {
        self.count += 1;
        let shape = Shape {
            mac: mac(self.count),
            mtu: 1500,
            queue_pairs,
        };
        let guard = Guard::new(shape.mac, &SpoofChecks::default());
        let device = NetDevice::with_port(shape, port, guard);
        let path = self.dir.path().join(format!("{}.sock", self.count));
        let listener = UnixListener::bind(&path).expect("bind");
        let access = Access { allowed_uid: None };
        let offered = Arc::clone(&device);
        let id = self.ask(move |server| {
            server
                .attach(offered, listener, access, "card".to_owned())
                .expect("attach")
        });
        assert_eq!(self.attached.recv_timeout(PATIENCE), Ok(id));
        Offered { id, device, path }
    }

    /// Offers a card on the switch.
    pub fn on_switch(&mut self, queue_pairs: u16) -> Offered {
        let switch = Arc::clone(&self.switch);
        self.offer(PortSpec::Switch(switch), queue_pairs)
    }

    /// Two cards on the switch, with their guests.
    pub fn two(&mut self, a: &Options, b: &Options) -> [(Offered, Card); 2] {
        [a, b].map(|options| {
            let offered = self.on_switch(options.pairs);
            let card = Card::attach(&offered.path, options).expect("attach");
            (offered, card)
        })
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

/// The address of the card that was offered as the `number`th.
pub fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

/// A UDP frame over IPv4, with so many bytes of payload.
pub fn frame(from: u8, to: [u8; 6], ports: (u16, u16), payload: usize) -> Vec<u8> {
    let mut frame = Vec::from(to);
    frame.extend(mac(from));
    frame.extend([8, 0]);
    let length = u16::try_from(28 + payload).expect("short");
    frame.extend([0x45, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    // From the lesser to the greater of two: both directions of a flow have the same addresses.
    frame.extend([10, 0, 0, from, 10, 0, 0, to[5]]);
    frame.extend(ports.0.to_be_bytes());
    frame.extend(ports.1.to_be_bytes());
    frame.extend((length - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend((0..payload).map(|at| u8::try_from(at % 251).expect("small")));
    frame
}

/// Waits until a count is there: workers count at the end of a turn.
pub fn counted(counts: impl Fn() -> Counts, is_it: impl Fn(&Counts) -> bool) -> Counts {
    let until = Instant::now() + PATIENCE;
    loop {
        let now = counts();
        if is_it(&now) {
            return now;
        }
        assert!(Instant::now() < until, "{now:?}");
        std::thread::yield_now();
    }
}

/// How many frames were dropped for a reason.
pub fn drops(counts: &Counts, reason: DropReason) -> u64 {
    counts.drops[reason.number()]
}
