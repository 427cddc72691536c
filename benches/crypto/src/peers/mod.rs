//! Libraries that do AES-256-XTS, each called the best way that its interface has: the key expanded once, and one
//! call with a new tweak for each data unit, since none of them takes several units at once.
//!
//! | module | owns |
//! | --- | --- |
//! | `evp` | the interface that the two C libraries share |
//! | `aws_lc` | AWS-LC |
//! | `openssl` | the system's OpenSSL, where its static library is installed |
//! | `rustcrypto` | RustCrypto's `xts-mode` with its `aes` |

mod aws_lc;
mod evp;
#[cfg(openssl)]
mod openssl;
mod rustcrypto;

use bulkhead_crypto::xts::KEY_BYTES;

/// A run of data units to encrypt or decrypt.
#[derive(Debug)]
pub enum Buffers<'b> {
    /// Each unit becomes what comes of it.
    InPlace(&'b mut [u8]),
    /// From the first to the second, of the same length.
    Between(&'b [u8], &'b mut [u8]),
}

/// A library with a key and a direction.
pub trait Peer {
    /// Encrypts or decrypts whole data units of `unit_bytes`, the first of which has the number `first`.
    fn run(&mut self, unit_bytes: usize, first: u64, buffers: Buffers<'_>);
}

/// A library.
#[derive(Debug, Clone, Copy)]
pub struct Library {
    /// As rows call it.
    pub name: &'static str,
    /// Its version.
    pub version: fn() -> String,
    /// Takes a key for encryption (true) or decryption.
    pub with_key: fn(key: &[u8; KEY_BYTES], encrypt: bool) -> Box<dyn Peer>,
}

/// Those that are there.
pub const LIBRARIES: &[Library] = &[
    aws_lc::LIBRARY,
    #[cfg(openssl)]
    openssl::LIBRARY,
    rustcrypto::LIBRARY,
];

/// Whether the system's OpenSSL was there when this was built.
pub const HAS_OPENSSL: bool = cfg!(openssl);

/// The tweak of a data unit: its number, 128 bits, little-endian.
fn tweak(first: u64, unit: usize) -> [u8; 16] {
    (u128::from(first) + unit as u128).to_le_bytes()
}
