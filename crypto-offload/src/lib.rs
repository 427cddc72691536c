//! Ciphers of the data path and the secret memory their keys live in.
//!
//! | module | owns |
//! | --- | --- |
//! | [`check`] | what can be told of a volume key without it |
//! | [`raw`] | copies from and to memory that others may change |
//! | `round_keys` | AES-256's, for kernels written for x86 |
//! | [`secret`] | memory that other processes, core dumps and the kernel's direct map can't show |
//! | [`xts`] | AES-256-XTS over data units, its key schedule in that memory |
//!
//! XTS does not authenticate: whoever can write the storage can put old or random ciphertext
//! under a data unit unnoticed.

pub mod check;
pub mod raw;
#[cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]
pub mod round_keys;
pub mod secret;
pub mod xts;

pub use check::key_check;
pub use secret::{SecretArena, SecretMemory};
pub use xts::{BufferError, DataUnit, Extent, Kernel, KeyError, XtsKey};
