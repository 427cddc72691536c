//! Copies from and to memory that others may change meanwhile, and the wiping of what is secret.
//!
//! UNSAFETY: both go through raw pointers, to exactly the bytes given; a copy touches each once.
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
