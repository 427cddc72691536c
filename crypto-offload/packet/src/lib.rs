//! The packet cipher: AES-256-GCM over batches of packets with long-lived keys, as a tunnel
//! between hosts needs it.
//!
//! | module | owns |
//! | --- | --- |
//! | [`kernel`] | what does the work: a kernel of our own where the CPU allows it, else AWS-LC |
//! | [`key`] | a key, expanded once into secret memory |
//! | [`packet`] | where a packet's bytes lie: in place, between buffers, or in guest memory |
//! | [`sealer`] | the numbers of sealed packets, and how much one key may seal |
//! | [`opener`] | opening: a packet that doesn't authenticate fails alone and leaves nothing |
//! | [`mod@self_test`] | a kernel takes no key before it has shown that it works |
//!
//! A packet is sealed under a 96-bit nonce: the tunnel's 32-bit salt, then the packet's 64-bit
//! sequence number, big-endian (RFC 4106 section 4; the deterministic construction of
//! NIST SP 800-38D section 8.2.1). The tag has 16 bytes and follows the ciphertext.
//!
//! The tunnel's part: to agree on keys and salts, to carry the sequence number with the packet
//! (in the clear or not, in the associated data or not), and to refuse replays. An opened packet
//! is authentic but may be an old one: check its number against the window before opening, which
//! is cheap, and move the window after opening, since only then the number is true.
//!
//! Each direction of a tunnel has its own key, and each worker that seals has its own [`Sealer`],
//! thus its own key: nothing is shared, nothing locked. Nothing is allocated for a packet or a
//! batch either.
//!
//! Key schedules lie in secret memory ([`bulkhead_crypto::secret`]), AWS-LC's too, as its AEAD
//! contexts may lie where the caller likes. While a batch is at work there is something on the stack
//! all the same: AWS-LC copies the key of its hash there for each packet, and our kernel spills
//! sums and the masks of tags, from which that key could be computed (its round keys and powers it
//! does not). That part of the stack is wiped after each batch, and the vector registers with it. A process that uses AWS-LC here
//! and wants the rest, too, locks its workers' stacks and leaves them out of core dumps.

pub mod kernel;
pub mod key;
mod library;
pub mod opener;
pub mod packet;
pub mod sealer;
pub mod self_test;
#[cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]
mod vaes512;

pub use kernel::Kernel;
pub use key::{KEY_BYTES, KeyError, PacketKey};
pub use opener::Opener;
pub use packet::{LengthError, OpenPacket, Refused, SealPacket, Segment, TAG_BYTES};
pub use sealer::{SealError, Sealer};
pub use self_test::{SelfTestError, self_test};
