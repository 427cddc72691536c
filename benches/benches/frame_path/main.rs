//! What is decided about a frame, and what that costs: copying and parsing its head, holding what it claims against
//! what its card may be, and where the switch sends it, for flows that it knows and for those that it does not; to give it to a
//! driver; and what the rings themselves cost.
//!
//! Criterion's throughput counts frames. The rows `ratio/..` divide medians of one run: the switch's decision
//! beside two look-ups in the standard library's hash map, which is what a bridge does without a flow cache.
#![allow(clippy::unwrap_used, reason = "a bench ends where something fails")]

mod receive;
mod rings;

use std::collections::HashMap;
use std::hint::black_box;

use bulkhead_benches::ratio::medians;
use bulkhead_dataplane::net::HashKey;
use bulkhead_dataplane::net::frame::Frame;
use bulkhead_dataplane::net::header::Header;
use bulkhead_dataplane::port::switch::bridge::{Bridge, Verdict};
use bulkhead_dataplane::port::switch::station::{Member, Station};
use bulkhead_dataplane::port::{Guard, Nic};
use bulkhead_protocol::net::SpoofChecks;
use criterion::{Criterion, Throughput};

/// Frames of a round.
const ROUND: usize = 1024;

fn mac(number: usize) -> [u8; 6] {
    let [a, b] = u16::try_from(number).unwrap().to_be_bytes();
    [2, 0, 0, 0, a, b]
}

/// A UDP datagram from 10.0.0.1 in 64 bytes.
fn datagram() -> Vec<u8> {
    let mut frame = [&mac(2)[..], &mac(1), &[0x08, 0]].concat();
    frame.extend([0x45, 0, 0, 50, 0, 1, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 53, 0, 30, 0, 0]);
    frame.resize(64, 7);
    frame
}

/// A bridge with 16 NICs, and as many flows of the first one.
struct Flows {
    bridge: Bridge,
    from: Member,
    pairs: Vec<(Station, Station)>,
}

impl Flows {
    fn new(count: usize) -> Self {
        let mut bridge = Bridge::default();
        for nic in 0..16u16 {
            bridge.join(Nic(nic), mac(usize::from(nic))).unwrap();
        }
        // Those beyond the NICs' own are in VLANs of their own, and found there.
        let pair = |flow: usize| {
            let vlan = u16::try_from(flow / 15).unwrap();
            let station = |number| Station::new(mac(number), vlan);
            (station(1 + flow % 15), station(0))
        };
        let pairs: Vec<_> = (0..count).map(pair).collect();
        for (at, (destination, _)) in pairs.iter().enumerate() {
            let there = Nic(u16::try_from(1 + at % 15).unwrap()).into();
            bridge.decide(there, Station::new([0xff; 6], 0), *destination);
        }
        let from = Nic(0).into();
        let mut flows = Self {
            bridge,
            from,
            pairs,
        };
        assert!(flows.round() > ROUND / 2, "they are known");
        flows
    }

    /// Decides a round of frames: how many went to one NIC.
    fn round(&mut self) -> usize {
        let pairs = self.pairs.iter().cycle().take(ROUND);
        let mut one = 0;
        for (destination, source) in pairs {
            let verdict = self.bridge.decide(self.from, *destination, *source);
            one += usize::from(matches!(black_box(verdict), Verdict::To(_)));
        }
        one
    }

    /// The same with every flow forgotten before.
    fn first_round(&mut self) -> usize {
        self.bridge.forget_decisions();
        self.round()
    }
}

fn rows(c: &mut Criterion) {
    let bytes = datagram();
    let (header, key) = (Header::default(), HashKey::new(7));
    let frame = Frame::of_bytes(&header, &bytes, key).unwrap();
    let mut group = c.benchmark_group("frame");
    group.throughput(Throughput::Elements(1));
    group.bench_function("parse", |b| {
        b.iter(|| {
            Frame::of_bytes(&header, black_box(&bytes), key)
                .unwrap()
                .info()
                .hash
        });
    });
    for (name, sources) in [
        ("MAC", &[][..]),
        ("MAC and IP", &["10.9.0.0/16", "10.0.0.1/32"]),
    ] {
        let sources = sources
            .iter()
            .map(|prefix| prefix.parse().unwrap())
            .collect();
        let guard = Guard::new(
            mac(1),
            &SpoofChecks {
                sources,
                ..SpoofChecks::default()
            },
        );
        group.bench_function(format!("guard: {name}"), |b| {
            b.iter(|| guard.check(black_box(&frame)).unwrap());
        });
    }
    group.finish();
    let mut group = c.benchmark_group("switch");
    group.throughput(Throughput::Elements(ROUND as u64));
    for count in [1, 16, 256] {
        let mut flows = Flows::new(count);
        group.bench_function(format!("{count} known flows"), |b| b.iter(|| flows.round()));
    }
    let mut flows = Flows::new(256);
    group.bench_function("256 new flows", |b| b.iter(|| flows.first_round()));
    group.finish();
}

fn ratios() {
    let mut flows = Flows::new(16);
    let pairs = flows.pairs.clone();
    let mut table: HashMap<Station, u16> = HashMap::new();
    for (at, (destination, source)) in pairs.iter().enumerate() {
        table.insert(*destination, u16::try_from(at).unwrap());
        table.insert(*source, 0);
    }
    let mut plain = || {
        for (destination, source) in pairs.iter().cycle().take(ROUND) {
            black_box(table.get_mut(source));
            black_box(table.get(destination));
        }
    };
    let mut ours = || {
        black_box(flows.round());
    };
    let times = medians(&mut [&mut ours, &mut plain]);
    println!(
        "ratio/switch/known flow  hash map/bulkhead {:.2}",
        times[1] / times[0]
    );
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    rows(&mut criterion);
    receive::rows(&mut criterion);
    rings::rows(&mut criterion);
    criterion.final_summary();
    if std::env::args().any(|argument| argument == "--bench") {
        ratios();
        receive::ratios();
        rings::ratios();
    }
}
