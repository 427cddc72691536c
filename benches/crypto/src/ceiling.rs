//! What the CPU's AES units can do: the 14 rounds of AES-256 on independent registers, without memory, tweaks or
//! key schedule. No AES-256 mode on this core is faster, so a cipher's speed is a share of this.
//!
//! UNSAFETY: instructions that not every CPU has run after the CPU was asked for them; they touch registers
//! alone, each of which is declared.
#![expect(unsafe_code, reason = "AES instructions")]

/// The AES units of this CPU, the widest that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ceiling {
    /// VAES on 512-bit registers.
    Vaes512,
    /// VAES on 256-bit registers.
    Vaes256,
    /// AES-NI.
    Aesni,
}

impl Ceiling {
    /// The one to measure; none on a CPU without AES instructions, or of another architecture.
    #[must_use]
    pub fn of_this_cpu() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        return x86::widest();
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    /// As rows and legends call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vaes512 => "AES rounds alone (VAES-512)",
            Self::Vaes256 => "AES rounds alone (VAES-256)",
            Self::Aesni => "AES rounds alone (AES-NI)",
        }
    }

    /// Does the rounds of [`BYTES`] bytes.
    pub fn run(self) {
        #[cfg(target_arch = "x86_64")]
        x86::run(self);
    }
}

/// Bytes whose rounds a call does.
pub const BYTES: usize = 64 << 10;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    use super::{BYTES, Ceiling};

    pub(super) fn widest() -> Option<Ceiling> {
        let vaes = is_x86_feature_detected!("vaes");
        if vaes && is_x86_feature_detected!("avx512f") {
            Some(Ceiling::Vaes512)
        } else if vaes && is_x86_feature_detected!("avx2") {
            Some(Ceiling::Vaes256)
        } else {
            is_x86_feature_detected!("aes").then_some(Ceiling::Aesni)
        }
    }

    pub(super) fn run(ceiling: Ceiling) {
        if widest() != Some(ceiling) {
            return;
        }
        // SAFETY: the CPU has just been asked.
        unsafe {
            match ceiling {
                Ceiling::Vaes512 => rounds_512(),
                Ceiling::Vaes256 => rounds_256(),
                Ceiling::Aesni => rounds_128(),
            }
        }
    }

    /// 14 times a round on the registers 0 to 7 of one kind, with the key in register 8; again until all bytes are done.
    macro_rules! rounds {
        ($register_bytes:literal, $round:literal, $end:literal) => {
            // SAFETY: registers alone, all of them declared; a wider register is the same one.
            unsafe {
                asm!(
                    ".p2align 6",
                    "2:",
                    ".rept 14",
                    ".irp r, 0, 1, 2, 3, 4, 5, 6, 7",
                    $round,
                    ".endr",
                    ".endr",
                    "dec {count}",
                    "jnz 2b",
                    $end,
                    count = inout(reg) BYTES / (8 * $register_bytes) => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _,
                    options(nomem, nostack),
                );
            }
        };
    }

    #[target_feature(enable = "avx512f,vaes")]
    fn rounds_512() {
        rounds!(64, "vaesenc zmm\\r, zmm\\r, zmm8", "vzeroupper");
    }

    #[target_feature(enable = "avx2,vaes")]
    fn rounds_256() {
        rounds!(32, "vaesenc ymm\\r, ymm\\r, ymm8", "vzeroupper");
    }

    #[target_feature(enable = "aes")]
    fn rounds_128() {
        rounds!(16, "aesenc xmm\\r, xmm8", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_cpu_has_runs() {
        if let Some(ceiling) = Ceiling::of_this_cpu() {
            ceiling.run();
        } else {
            println!("skipped: what_this_cpu_has_runs: no AES instructions");
        }
    }
}
