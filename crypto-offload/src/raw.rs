//! Copies from and to memory that others may change meanwhile, and the wiping of what is secret.
//!
//! UNSAFETY: copies and wiping go through raw pointers, to exactly the bytes given; a copy touches each once.
//! Registers are zeroed by instructions that the CPU was asked for.
#![expect(unsafe_code, reason = "copies between raw ranges")]

/// Copies `bytes` bytes, reading each once. In assembly where there is one for the architecture, because to the
/// compiler a concurrent change would be a data race.
///
/// # Safety
/// `src` is readable and `dst` writable for `bytes`; they don't overlap.
#[cfg(target_arch = "x86_64")]
#[inline]
pub unsafe fn copy(src: *const u8, dst: *mut u8, bytes: usize) {
    // SAFETY: exactly the bytes given; the direction flag is clear between functions.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") bytes => _,
            inout("rsi") src => _,
            inout("rdi") dst => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies `bytes` bytes, reading each once.
///
/// # Safety
/// `src` is readable and `dst` writable for `bytes`; they don't overlap.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
pub unsafe fn copy(src: *const u8, dst: *mut u8, bytes: usize) {
    for at in 0..bytes {
        // SAFETY: inside the caller's ranges; volatile, so that each byte is read once.
        unsafe { dst.add(at).write_volatile(src.add(at).read_volatile()) };
    }
}

/// Overwrites `bytes` bytes with zeroes, whatever the compiler thinks of their further use.
///
/// # Safety
/// `at` is writable for `bytes`, and ours alone.
#[inline]
pub(crate) unsafe fn wipe(at: *mut u8, bytes: usize) {
    // SAFETY: passed on to the caller.
    unsafe { at.write_bytes(0, bytes) };
    // What may read the bytes can't lose the write before.
    std::hint::black_box(at);
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}

/// Overwrites what a cipher leaves: vector registers, and the stack below the caller as far as the frames of what it
/// called last may have gone. Round keys, and what they were used on, may stand in both.
#[inline(never)]
pub fn wipe_left<const STACK_BYTES: usize>() {
    // Somebody might look at the zeroes, so that they must be there.
    std::hint::black_box(&mut [0u8; STACK_BYTES]);
    wipe_registers();
}

/// Zeroes the vector registers; nothing on an architecture (or a CPU older than AVX) for which this isn't written.
#[inline]
pub fn wipe_registers() {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the CPU was asked for the instructions.
        unsafe {
            if is_x86_feature_detected!("avx512f") {
                x86::wipe_upper_registers();
            }
            if is_x86_feature_detected!("avx") {
                x86::wipe_lower_registers();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    /// Those that only AVX-512 has.
    #[target_feature(enable = "avx512f")]
    pub(super) fn wipe_upper_registers() {
        // SAFETY: changes only registers that it says it does.
        unsafe {
            asm!(
                "vpxord zmm16, zmm16, zmm16",
                "vpxord zmm17, zmm17, zmm17",
                "vpxord zmm18, zmm18, zmm18",
                "vpxord zmm19, zmm19, zmm19",
                "vpxord zmm20, zmm20, zmm20",
                "vpxord zmm21, zmm21, zmm21",
                "vpxord zmm22, zmm22, zmm22",
                "vpxord zmm23, zmm23, zmm23",
                "vpxord zmm24, zmm24, zmm24",
                "vpxord zmm25, zmm25, zmm25",
                "vpxord zmm26, zmm26, zmm26",
                "vpxord zmm27, zmm27, zmm27",
                "vpxord zmm28, zmm28, zmm28",
                "vpxord zmm29, zmm29, zmm29",
                "vpxord zmm30, zmm30, zmm30",
                "vpxord zmm31, zmm31, zmm31",
                out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
                out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }

    /// The first sixteen, whole.
    #[target_feature(enable = "avx")]
    pub(super) fn wipe_lower_registers() {
        // SAFETY: as above.
        unsafe {
            asm!(
                "vzeroall",
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nomem, nostack, preserves_flags),
            );
        }
    }
}
