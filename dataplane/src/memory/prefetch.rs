//! Hints to the CPU about memory that is used soon: a line that another CPU wrote last takes longer to come
//! than a request takes, so that those of several requests have to be under way together.
//!
//! UNSAFETY: a hint reads and writes nothing and can't fault, whatever the address; what it must not do is
//! change a flag or a register. Callers still name bytes inside of ranges that were checked alone, so that a
//! guest can't have lines fetched that are not its own.
#![expect(unsafe_code, reason = "instructions that Rust has no function for")]

use std::ptr::NonNull;

/// The line of this byte is going to be read.
#[inline(always)]
pub(crate) fn will_read<T>(at: NonNull<T>) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: see the module.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.as_ptr().cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The line of this byte is going to be written, by this CPU alone.
#[inline(always)]
pub(crate) fn will_write<T>(at: NonNull<T>) {
    // Not `_mm_prefetch`: a compiler makes a PREFETCHW of it only for CPUs that are sure to have it. All
    // 64-bit ones take it, if only as an instruction that does nothing.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: see the module.
    unsafe {
        std::arch::asm!(
            "prefetchw byte ptr [{at}]",
            at = in(reg) at.as_ptr(),
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
