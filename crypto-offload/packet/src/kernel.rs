//! Kernels: the same work, done as a CPU can do it best.
#![deny(unsafe_code)]

use std::ptr::NonNull;

use crate::key::KEY_BYTES;
use crate::library;
use crate::packet::{OpenPacket, SealPacket};
#[cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]
use crate::vaes512;

/// What does the work. They all give the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Our own: VAES and VPCLMULQDQ on 512-bit registers (AVX-512; Zen 4, Ice Lake and later).
    Vaes512,
    /// AWS-LC, one packet after the other; everywhere.
    Library,
}

impl Kernel {
    /// All there are, the fastest first.
    pub const ALL: [Self; 2] = [Self::Vaes512, Self::Library];

    /// Those that this CPU can run, the fastest first; AWS-LC is always among them.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut all = Self::ALL.to_vec();
        all.retain(|kernel| kernel.functions().is_some());
        all
    }

    /// The one that [`PacketKey::new`](crate::PacketKey::new) takes: the fastest that this CPU can run.
    #[must_use]
    pub fn chosen() -> Self {
        let fastest = Self::ALL
            .into_iter()
            .find(|kernel| kernel.functions().is_some());
        fastest.unwrap_or(Self::Library)
    }

    /// Its name, as benches and logs show it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vaes512 => "vaes-512",
            Self::Library => "aws-lc",
        }
    }

    /// What it consists of, if this CPU can run it.
    pub(crate) fn functions(self) -> Option<&'static Functions> {
        match self {
            Self::Library => Some(&library::FUNCTIONS),
            #[cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]
            Self::Vaes512 => vaes512::functions(),
            #[cfg(not(all(target_arch = "x86_64", not(feature = "portable-only"))))]
            Self::Vaes512 => None,
        }
    }
}

impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a kernel consists of.
pub(crate) struct Functions {
    /// Expands a key; whether it could.
    ///
    /// # Safety
    /// The slot has [`bulkhead_crypto::secret::SLOT_BYTES`], aligned to 64 bytes, zeroed, for this
    /// alone.
    pub expand: unsafe fn(slot: NonNull<u8>, key: &[u8; KEY_BYTES]) -> bool,
    /// Seals packets that have their numbers; whether all were.
    ///
    /// # Safety
    /// The slot was filled by `expand` of the same kernel.
    pub seal: unsafe fn(slot: NonNull<u8>, salt: [u8; 4], packets: &mut [SealPacket<'_>]) -> bool,
    /// Opens packets that were not opened yet; each says how it went.
    ///
    /// # Safety
    /// As for `seal`.
    pub open: unsafe fn(slot: NonNull<u8>, salt: [u8; 4], packets: &mut [OpenPacket<'_>]),
}

/// The nonce of a packet: the tunnel's salt, then its number.
pub(crate) fn nonce(salt: [u8; 4], sequence: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&salt);
    nonce[4..].copy_from_slice(&sequence.to_be_bytes());
    nonce
}

/// Looking at what kernels leave in registers and on the stack.
#[cfg(all(test, target_arch = "x86_64"))]
pub(crate) mod residue {
    #![expect(unsafe_code, reason = "the stack below the caller is nobody's")]

    use std::ptr::NonNull;

    use bulkhead_crypto::secret::SLOT_BYTES;

    const DEPTH: usize = 16 << 10;

    /// Vector registers in bytes, those that only AVX-512 has included.
    const REGISTERS: usize = 32 * 64;

    /// The vector registers, on a CPU with AVX-512, and the stack below the caller.
    #[inline(never)]
    pub(crate) fn left(copy: &mut Vec<u8>) {
        macro_rules! each {
            ($($register:literal)*) => {
                concat!($("vmovdqu64 [rdi + 64 * ", $register, "], zmm", $register, "\n",)*)
            };
        }
        let wide = u64::from(is_x86_feature_detected!("avx512f"));
        // SAFETY: there is room; a test's stack goes far deeper; what lies there is only read.
        unsafe {
            std::arch::asm!(
                "test {wide}, {wide}",
                "jz 2f",
                each!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
                each!(16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31),
                "2:",
                "add rdi, {registers}",
                "lea rsi, [rsp - {depth}]",
                "rep movsb",
                wide = in(reg) wide,
                registers = const REGISTERS,
                depth = const DEPTH,
                inout("rcx") DEPTH => _,
                inout("rdi") copy.as_mut_ptr() => _,
                out("rsi") _,
                options(nostack),
            );
        }
    }

    /// Room for what is left. (Made beforehand, because that uses registers.)
    pub(crate) fn room() -> Vec<u8> {
        vec![0; REGISTERS + DEPTH]
    }

    /// Whether 16 bytes of the schedule in this slot, or any of the tags, stand in the copy.
    pub(crate) fn holds(copy: &[u8], slot: NonNull<u8>, tags: &[[u8; 16]]) -> bool {
        // SAFETY: the slot is mapped, and nobody writes it now.
        let schedule = unsafe { std::slice::from_raw_parts(slot.as_ptr(), SLOT_BYTES) };
        let secret = schedule
            .chunks_exact(16)
            .filter(|c| c.iter().filter(|&&b| b != 0).count() > 8);
        let mut secrets: Vec<&[u8]> = secret.collect();
        secrets.extend(tags.iter().map(|tag| &tag[..]));
        assert!(
            secrets.len() > 15 + tags.len(),
            "a schedule has 15 round keys"
        );
        copy.windows(16).any(|window| secrets.contains(&window))
    }
}
