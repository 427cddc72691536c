//! AES-256-XTS (IEEE 1619) over data units, as dm-crypt's `aes-xts-plain64` writes it.
//!
//! The tweak of a data unit is its number, 128 bits little-endian; with 4096-byte units that is
//! the number of the 4096-byte unit (`cryptsetup --sector-size 4096 --iv-large-sectors`).
//! Units are whole multiples of a cipher block, so that there is no ciphertext stealing.
//!
//! Each source byte is read once, and nothing but finished output is written to the destination. So the source
//! (or the destination) may be memory that a guest changes meanwhile, and ciphertext never stands
//! in guest memory.
//!
//! A key's schedule lives in secret memory only. What is derived from it (tweaks, data between two segments) stands in
//! registers and a little on the stack, and is wiped before a call returns. What the kernel saves of the registers
//! when a signal or another thread interrupts a call is beyond that.
//!
//! | module | owns |
//! | --- | --- |
//! | `types` | keys' and units' lengths, what is refused |
//! | `key` | [`XtsKey`]: expansion, the calls |
//! | `segments` | the calls between scattered pieces of memory |
//! | `extents` | calls for several runs of units at once |
//! | `engine` | the walk over segments, in batches of groups |
//! | [`Kernel`] | how AES is done on this CPU |
//! | [`self_test()`] | whether the kernel does what it should here |

mod engine;
mod extents;
mod kernel;
mod key;
mod segments;
mod self_test;
mod types;

pub use extents::Extent;
pub use kernel::Kernel;
pub use key::XtsKey;
pub use self_test::{SelfTestError, self_test};
pub use types::{BufferError, DataUnit, KEY_BYTES, KeyError};
