//! Kernels: the same two steps, written for what a CPU can do.
//!
//! All of them work on *groups* of 32 cipher blocks (512 bytes, [`GROUP_BYTES`]), whatever the data unit: a
//! group's tweaks follow from its first one, its *base*. A kernel makes the bases of a run of data units,
//! encrypting their numbers under the tweak key, and encrypts or decrypts groups by their bases. So
//! the engine may cut a run wherever groups end, and unit sizes differ in the bases alone.
//!
//! UNSAFETY: the functions of a kernel take raw pointers; [`Functions`] says what each needs.
#![expect(unsafe_code, reason = "kernels work on raw memory")]

mod portable;
#[cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]
mod x86;

use super::types::{DataUnit, KEY_BYTES};

/// Bytes that share a base.
pub(super) const GROUP_BYTES: usize = 512;

/// A base's room is rounded up to this many: what the widest kernel writes at once.
pub(super) const BASES_ROUNDED_TO: usize = 32;

/// The tweak of a group's first cipher block, as it is added: 128 bits, little-endian.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Base(pub [u8; 16]);

/// How AES is done. They all give the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// VAES on 512-bit registers (AVX-512).
    Vaes512,
    /// VAES on 256-bit registers (AVX2).
    Vaes256,
    /// AES-NI.
    Aesni,
    /// The `aes` crate: constant-time software, or what that crate has for another architecture.
    Portable,
    /// Encrypts nothing, to be found out by the self-test.
    #[cfg(test)]
    Faulty,
}

impl Kernel {
    #[cfg(test)]
    pub(super) const PORTABLE: &'static Functions = &portable::FUNCTIONS;

    /// All there are, the fastest first.
    pub const ALL: [Self; 4] = [Self::Vaes512, Self::Vaes256, Self::Aesni, Self::Portable];

    /// Those that this CPU can run, the fastest first; the portable one is always among them.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut all = Self::ALL.to_vec();
        all.retain(|kernel| kernel.functions().is_some());
        all
    }

    /// The one that keys use: the fastest that this CPU can run.
    #[must_use]
    pub fn chosen() -> Self {
        let fastest = Self::ALL.into_iter().find(|k| k.functions().is_some());
        fastest.unwrap_or(Self::Portable)
    }

    /// Its name, as benches and logs show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vaes512 => "vaes-512",
            Self::Vaes256 => "vaes-256",
            Self::Aesni => "aes-ni",
            Self::Portable => "portable",
            #[cfg(test)]
            Self::Faulty => "faulty",
        }
    }

    /// What it consists of, if this CPU can run it.
    pub(super) fn functions(self) -> Option<&'static Functions> {
        match self {
            Self::Portable => Some(&portable::FUNCTIONS),
            #[cfg(test)]
            Self::Faulty => {
                static FAULTY: Functions = Functions {
                    encrypt: |_, _, _, _, _| {},
                    ..portable::FUNCTIONS
                };
                Some(&FAULTY)
            }
            #[cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]
            other => x86::functions(other),
            #[cfg(not(all(target_arch = "x86_64", not(feature = "portable-only"))))]
            _ => None,
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Encrypts or decrypts groups one after the other, and overwrites their bases with zeroes.
///
/// # Safety
/// `schedule` was written by `expand` of the same kernel; there are `groups` bases and room for one more, which may be
/// read (its bytes don't matter); and as many times
/// [`GROUP_BYTES`] to read at `src` and to write at `dst`, which are the same address or don't overlap.
/// Others may change the bytes meanwhile.
pub(super) type Crypt =
    unsafe fn(schedule: *const u8, bases: *mut Base, groups: usize, src: *const u8, dst: *mut u8);

/// What a kernel consists of.
#[derive(Clone, Copy)]
pub(super) struct Functions {
    /// Expands a key (data key, then tweak key).
    ///
    /// # Safety
    /// `schedule` has room for [`crate::secret::SLOT_BYTES`], aligned to 64 bytes, for this alone.
    pub expand: unsafe fn(key: &[u8; KEY_BYTES], schedule: *mut u8),
    /// Bases of the groups of `units` data units from number `first` on, whose low 64 bits don't
    /// overflow on the way. Returns how many bases were written, rounded up ones included.
    ///
    /// # Safety
    /// `schedule` was written by `expand`; `to` has room for all bases, rounded up to
    /// [`BASES_ROUNDED_TO`].
    pub bases: unsafe fn(
        schedule: *const u8,
        unit: DataUnit,
        first: u128,
        units: usize,
        to: *mut Base,
    ) -> usize,
    pub encrypt: Crypt,
    pub decrypt: Crypt,
}
