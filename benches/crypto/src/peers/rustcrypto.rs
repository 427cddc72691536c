//! RustCrypto's `xts-mode` with the `aes` crate.
#![forbid(unsafe_code)]

use aes::Aes256;
use aes::cipher::KeyInit as _;
use bulkhead_crypto::xts::KEY_BYTES;
use xts_mode::Xts128;

use super::{Buffers, Library, Peer, tweak};

pub(super) const LIBRARY: Library = Library {
    name: "RustCrypto",
    version: || "xts-mode 0.6, aes 0.9".to_owned(),
    with_key,
};

struct RustCrypto {
    cipher: Xts128<Aes256>,
    encrypt: bool,
}

fn with_key(key: &[u8; KEY_BYTES], encrypt: bool) -> Box<dyn Peer> {
    let (data, tweak) = key.split_at(KEY_BYTES / 2);
    let half = |bytes: &[u8]| Aes256::new_from_slice(bytes).expect("half a key has 32 bytes");
    Box::new(RustCrypto {
        cipher: Xts128::new(half(data), half(tweak)),
        encrypt,
    })
}

impl RustCrypto {
    fn unit(&self, bytes: &mut [u8], tweak: [u8; 16]) {
        if self.encrypt {
            self.cipher.encrypt_sector(bytes, tweak.into());
        } else {
            self.cipher.decrypt_sector(bytes, tweak.into());
        }
    }
}

impl Peer for RustCrypto {
    fn run(&mut self, unit_bytes: usize, first: u64, buffers: Buffers<'_>) {
        match buffers {
            Buffers::InPlace(bytes) => {
                for (at, unit) in bytes.chunks_exact_mut(unit_bytes).enumerate() {
                    self.unit(unit, tweak(first, at));
                }
            }
            // It works in place only.
            Buffers::Between(from, to) => {
                let units = from.chunks_exact(unit_bytes);
                let places = to.chunks_exact_mut(unit_bytes);
                for (at, (from, to)) in units.zip(places).enumerate() {
                    to.copy_from_slice(from);
                    self.unit(to, tweak(first, at));
                }
            }
        }
    }
}
