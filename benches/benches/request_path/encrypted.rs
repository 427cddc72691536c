//! Encrypted requests of 4 and 128 KiB in data units of 512 and 4096 bytes: under the kernel that volumes use, under the
//! one that needs nothing of the CPU (the `aes` crate's batches), and the cipher alone.

use std::hint::black_box;

use bulkhead_benches::ratio::Pace;
use bulkhead_crypto::{DataUnit, Kernel, SecretArena, XtsKey};
use bulkhead_dataplane::blk::{BlkDevice, Cipher, Geometry};
use bulkhead_dataplane::storage::StorageSpec;
use criterion::{BenchmarkId, Criterion, Throughput};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::guest::BATCH;
use crate::{DISK_BYTES, Depth, Ours, key_bytes};

/// A kind of request.
#[derive(Clone, Copy)]
struct Shape {
    kind: u32,
    request_bytes: u32,
    unit: DataUnit,
}

impl Shape {
    fn all() -> impl Iterator<Item = Self> {
        let kinds = [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT].into_iter();
        let sizes = kinds.flat_map(|kind| [4 << 10, 128 << 10].map(|bytes| (kind, bytes)));
        sizes.flat_map(|(kind, request_bytes)| {
            [DataUnit::B512, DataUnit::B4096].map(|unit| Self {
                kind,
                request_bytes,
                unit,
            })
        })
    }

    fn name(self) -> String {
        let kind = if self.kind == VIRTIO_BLK_T_IN {
            "read"
        } else {
            "write"
        };
        format!(
            "{kind}-{}KiB/unit{}",
            self.request_bytes >> 10,
            self.unit.bytes()
        )
    }

    fn key(self, kernel: Kernel) -> XtsKey {
        let arena = SecretArena::new(1).unwrap();
        XtsKey::with_kernel(&arena, &key_bytes(), kernel).unwrap()
    }

    fn ours(self, kernel: Kernel) -> Ours {
        let geometry = Geometry {
            logical_block_bytes: self.unit.bytes(),
            read_only: false,
            serial: [0; 20],
            queues: 1,
            discard: false,
        };
        let cipher = Cipher {
            key: self.key(kernel),
            unit: self.unit,
        };
        let device = BlkDevice::new(geometry, DISK_BYTES / 512, StorageSpec::Null, Some(cipher));
        Ours::new(self.kind, self.request_bytes, device)
    }

    /// The cipher alone, for as many bytes as a turn has.
    fn cipher_alone(self) -> impl FnMut() {
        let key = self.key(Kernel::chosen());
        let source = vec![0; self.request_bytes as usize];
        let mut destination = source.clone();
        move || {
            for request in 0..u64::from(BATCH) {
                let first = request * u64::from(self.request_bytes / self.unit.bytes());
                let (from, to) = (black_box(&source), black_box(&mut destination));
                if self.kind == VIRTIO_BLK_T_OUT {
                    key.encrypt(self.unit, first, from, to)
                } else {
                    key.decrypt(self.unit, first, from, to)
                }
                .unwrap();
            }
        }
    }
}

pub fn rows(c: &mut Criterion) {
    for shape in Shape::all() {
        let mut group = c.benchmark_group(format!("encrypted/{}", shape.name()));
        group.throughput(Throughput::Elements(u64::from(BATCH)));
        for kernel in [Kernel::chosen(), Kernel::Portable] {
            let mut ours = shape.ours(kernel);
            let name = BenchmarkId::from_parameter(kernel);
            group.bench_function(name, |b| b.iter(|| ours.turn(Depth::Whole)));
            ours.guest.check(true);
        }
        group.finish();
    }
}

pub fn ratios() {
    for shape in Shape::all() {
        let (mut ours, mut portable) = (shape.ours(Kernel::chosen()), shape.ours(Kernel::Portable));
        let turns = Pace::default().turns(&mut [
            &mut || ours.turn(Depth::Whole),
            &mut || portable.turn(Depth::Whole),
            &mut shape.cipher_alone(),
        ]);
        println!(
            "ratio/encrypted/{}  {:.0} ns for {BATCH} requests  portable/bulkhead {:.2}  bulkhead/cipher alone {:.2}",
            shape.name(),
            turns.median(0) * 1e9,
            turns.ratio(1, 0),
            turns.ratio(0, 2),
        );
    }
}
