//! What encryption costs: AES-256-XTS as a volume has it, beside AWS-LC (the peer) and memcpy (the
//! floor), for requests of 4 KiB and 128 KiB in data units of 512 and 4096 bytes.
//!
//! Criterion's rows are times; the rows `ratio/..` at the end divide medians of one run, which is what
//! may be quoted: peer over ours (above 1: we are faster), ours over memcpy.
//!
//! UNSAFETY: AWS-LC is called with a context that lives through the call and buffers of the length given.
#![expect(unsafe_code, reason = "the peer is a C library")]

use std::hint::black_box;
use std::os::raw::c_int;

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CipherInit_ex, EVP_CipherUpdate,
    EVP_aes_256_xts,
};
use bulkhead_benches::ratio::medians;
use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use criterion::{BenchmarkId, Criterion, Throughput};

const REQUESTS: [usize; 2] = [4 << 10, 128 << 10];
const UNITS: [DataUnit; 2] = [DataUnit::B512, DataUnit::B4096];
/// An arbitrary place on the volume: the first unit of a request.
const FIRST_UNIT: u64 = 0x1234_5678;

/// AWS-LC's side: one context with its key expanded once, a new tweak for each data unit, as its
/// interface has it.
struct Peer {
    context: *mut EVP_CIPHER_CTX,
    encrypt: bool,
}

impl Peer {
    fn new(key: &[u8; KEY_BYTES], encrypt: bool) -> Self {
        // SAFETY: plain allocation; checked below.
        let context = unsafe { EVP_CIPHER_CTX_new() };
        assert!(!context.is_null(), "AWS-LC gives no context");
        // SAFETY: the context is live and the key has the 64 bytes that the cipher reads.
        let rc = unsafe {
            EVP_CipherInit_ex(
                context,
                EVP_aes_256_xts(),
                std::ptr::null_mut(),
                key.as_ptr(),
                std::ptr::null(),
                c_int::from(encrypt),
            )
        };
        assert_eq!(rc, 1, "AWS-LC refuses the key");
        Self { context, encrypt }
    }

    fn run(&self, unit: DataUnit, first: u64, source: &[u8], destination: &mut [u8]) {
        let units = source.chunks_exact(unit.bytes() as usize);
        let places = destination.chunks_exact_mut(unit.bytes() as usize);
        for ((from, to), number) in units.zip(places).zip(u128::from(first)..) {
            let tweak = number.to_le_bytes();
            let mut written: c_int = 0;
            let len = c_int::try_from(from.len()).expect("a data unit");
            // SAFETY: the context is live; the tweak has 16 bytes; both buffers have `len`.
            let done = unsafe {
                EVP_CipherInit_ex(
                    self.context,
                    std::ptr::null(),
                    std::ptr::null_mut(),
                    std::ptr::null(),
                    tweak.as_ptr(),
                    c_int::from(self.encrypt),
                ) == 1
                    && EVP_CipherUpdate(
                        self.context,
                        to.as_mut_ptr(),
                        &raw mut written,
                        from.as_ptr(),
                        len,
                    ) == 1
            };
            assert!(done && written == len, "AWS-LC failed");
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { EVP_CIPHER_CTX_free(self.context) };
    }
}

fn ours(key: &XtsKey, unit: DataUnit, encrypt: bool, source: &[u8], destination: &mut [u8]) {
    let done = if encrypt {
        key.encrypt(unit, FIRST_UNIT, source, destination)
    } else {
        key.decrypt(unit, FIRST_UNIT, source, destination)
    };
    done.expect("whole units");
}

fn key_bytes() -> [u8; KEY_BYTES] {
    std::array::from_fn(|i| u8::try_from(i * 7 % 251).expect("small"))
}

fn label(encrypt: bool) -> &'static str {
    if encrypt { "encrypt" } else { "decrypt" }
}

/// Both must have made the same bytes, or there is nothing to compare.
fn agree(key: &XtsKey, peer: &Peer, unit: DataUnit, source: &[u8]) {
    let mut left = vec![0; source.len()];
    let mut right = vec![1; source.len()];
    ours(key, unit, peer.encrypt, source, &mut left);
    peer.run(unit, FIRST_UNIT, source, &mut right);
    assert!(left == right, "the two ciphers differ");
}

fn rows(c: &mut Criterion, key: &XtsKey) {
    for encrypt in [true, false] {
        let peer = Peer::new(&key_bytes(), encrypt);
        let mut group = c.benchmark_group(format!("xts-{}", label(encrypt)));
        for request in REQUESTS {
            let source = vec![0x5a; request];
            let mut destination = vec![0; request];
            group.throughput(Throughput::Bytes(request as u64));
            for unit in UNITS {
                agree(key, &peer, unit, &source);
                let row = format!("unit{}/{}KiB", unit.bytes(), request >> 10);
                group.bench_function(BenchmarkId::new("bulkhead", &row), |b| {
                    b.iter(|| ours(key, unit, encrypt, black_box(&source), &mut destination));
                });
                group.bench_function(BenchmarkId::new("aws-lc", &row), |b| {
                    b.iter(|| peer.run(unit, FIRST_UNIT, black_box(&source), &mut destination));
                });
            }
            let row = format!("{}KiB", request >> 10);
            group.bench_function(BenchmarkId::new("memcpy", row), |b| {
                b.iter(|| black_box(&mut destination).copy_from_slice(black_box(&source)));
            });
        }
        group.finish();
    }
}

fn ratios(key: &XtsKey) {
    for encrypt in [true, false] {
        let peer = Peer::new(&key_bytes(), encrypt);
        for request in REQUESTS {
            for unit in UNITS {
                let source = vec![0x5a; request];
                let (mut a, mut b, mut c) = (vec![0; request], vec![0; request], vec![0; request]);
                let times = medians(&mut [
                    &mut || ours(key, unit, encrypt, black_box(&source), &mut a),
                    &mut || peer.run(unit, FIRST_UNIT, black_box(&source), &mut b),
                    &mut || black_box(&mut c).copy_from_slice(black_box(&source)),
                ]);
                println!(
                    "ratio/xts-{}/unit{}/{}KiB  aws-lc/bulkhead {:.2}  bulkhead/memcpy {:.1}",
                    label(encrypt),
                    unit.bytes(),
                    request >> 10,
                    times[1] / times[0],
                    times[0] / times[2],
                );
            }
        }
    }
}

fn main() {
    let arena = SecretArena::new(1).expect("secret memory");
    let key = XtsKey::new(&arena, &key_bytes()).expect("the halves differ");
    let mut criterion = Criterion::default().configure_from_args();
    rows(&mut criterion, &key);
    criterion.final_summary();
    // `cargo bench` says --bench; without it criterion only tries each row once.
    if std::env::args().any(|argument| argument == "--bench") {
        ratios(&key);
    }
}
