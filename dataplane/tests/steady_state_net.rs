//! A worker that serves network cards allocates nothing in the steady state: thousands of frames from one guest to
//! another, short ones, long ones, and such as are completed or cut on the way, split and packed.

mod counting;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use bulkhead_dataplane::net::{NetDevice, Shape};
use bulkhead_dataplane::port::{Guard, PortSpec, SwitchSpec};
use bulkhead_dataplane::serve::{self, Served};
use bulkhead_dataplane::server::ServerConfig;
use bulkhead_dataplane::worker::WorkerConfig;
use bulkhead_integration::card::{Card, HEADER_BYTES, Options, PATIENCE, net_feature};
use bulkhead_integration::disk::feature;
use bulkhead_protocol::net::SpoofChecks;

use counting::{allocations_of, assert_it_counts, worker_thread};

const ROUNDS: usize = 200;

fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

/// Serves cards on a switch of their own until the process ends: their sockets.
fn serve_cards(dir: &tempfile::TempDir, count: u8) -> Vec<PathBuf> {
    let switch = SwitchSpec::new("lan".to_owned(), None);
    let (mut served, mut paths) = (Vec::new(), Vec::new());
    for number in 1..=count {
        let shape = Shape {
            mac: mac(number),
            mtu: 1500,
            queue_pairs: 1,
        };
        let guard = Guard::new(shape.mac, &SpoofChecks::default());
        let port = PortSpec::Switch(Arc::clone(&switch));
        let path = dir.path().join(format!("{number}.sock"));
        served.push(Served {
            device: NetDevice::with_port(shape, port, guard).into(),
            listener: UnixListener::bind(&path).expect("bind"),
            label: "card".to_owned(),
        });
        paths.push(path);
    }
    let (ready, is_ready) = channel();
    std::thread::spawn(move || {
        let config = ServerConfig {
            workers: vec![WorkerConfig::default()],
            ..ServerConfig::default()
        };
        let began = move || ready.send(()).map_err(std::io::Error::other);
        serve::run(&config, served, began)
    });
    is_ready.recv_timeout(PATIENCE).expect("it serves");
    paths
}

/// A TCP frame over IPv4, and the header that leaves its checksum, and its cutting if it is long, to others.
fn frame(to: u8, payload: usize) -> ([u8; HEADER_BYTES], Vec<u8>) {
    let length = u16::try_from(40 + payload).expect("short").to_be_bytes();
    let mut bytes = [&mac(to)[..], &mac(1), &[8, 0, 0x45, 0], &length].concat();
    bytes.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, to]);
    bytes.extend([
        0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0,
    ]);
    bytes.resize(54 + payload, 7);
    let mut header = [1, 0, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    if payload > 1460 {
        header[1] = 1;
        header[4..6].copy_from_slice(&1448u16.to_le_bytes());
    }
    (header, bytes)
}

/// Sends everything to each receiver, who gets as many frames of each as it is to be.
fn round(sender: &mut Card, receivers: &mut [(u8, Card, bool)]) {
    for (number, receiver, takes_all) in receivers {
        for payload in [0, 100, 1400, 20_000] {
            let (header, bytes) = frame(*number, payload);
            sender.send_with(0, &header, &bytes).expect("sent");
            let whole = *takes_all || payload < 1460;
            let count = if whole { 1 } else { payload.div_ceil(1448) };
            let mut got = 0;
            for _ in 0..count {
                got += receiver.receive(0).expect("received").frame.len() - 54;
            }
            assert_eq!(got, payload);
        }
    }
}

fn allocations(paths: &[PathBuf], kind: u64) -> u64 {
    let usual = Options::default();
    let options = |features| Options { features, ..usual };
    let all = usual.features | kind;
    let attach =
        |at: usize, features| Card::attach(&paths[at], &options(features)).expect("attach");
    let mut sender = attach(0, all);
    let mut receivers = [
        (2, attach(1, all), true),
        (3, attach(2, all & !net_feature::OFFLOADS), false),
    ];
    for _ in 0..ROUNDS {
        round(&mut sender, &mut receivers);
    }
    allocations_of(worker_thread(), || {
        for _ in 0..ROUNDS {
            round(&mut sender, &mut receivers);
        }
    })
}

/// One test, since the count is the process's.
#[test]
fn a_worker_allocates_nothing_for_frames_in_the_steady_state() {
    let dir = tempfile::tempdir().expect("folder");
    let paths = serve_cards(&dir, 3);
    for (name, kind) in [
        ("split", 0),
        ("packed", feature::RING_PACKED),
        ("in order", feature::IN_ORDER | feature::EVENT_IDX),
    ] {
        assert_eq!(allocations(&paths, kind), 0, "{name}");
    }
    assert_it_counts();
}
