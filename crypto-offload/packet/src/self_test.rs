//! The self-test: a kernel takes no key before it has shown, once in a process, that it does on this
//! CPU what it should: known answers, sealed and opened, and a forgery refused.
//!
//! Keys and data are public, so that nothing of it needs secret memory or a system call.
//!
//! UNSAFETY: the schedule is a buffer of this module, used by the functions of one kernel.
#![expect(unsafe_code, reason = "kernels work on raw memory")]

use std::ptr::NonNull;
use std::sync::OnceLock;

use bulkhead_crypto::secret::SLOT_BYTES;

use crate::kernel::{Functions, Kernel};
use crate::key::KEY_BYTES;
use crate::packet::{OpenPacket, SealPacket, TAG_BYTES};

/// A kernel that does not do what it should. Nothing may be sealed or opened with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the self-test of AES-256-GCM failed ({kernel} kernel: {what}): this CPU or this program is broken, \
     so no packet is sealed or opened; move to another host or install the program again"
)]
pub struct SelfTestError {
    /// Which kernel.
    pub kernel: Kernel,
    /// What came out wrong.
    pub what: &'static str,
}

/// Tests the kernel that keys will use, unless that was done before. To be called when a process
/// starts, so that it refuses service at once and not with its first key.
///
/// # Errors
/// [`SelfTestError`], now and ever after.
pub fn self_test() -> Result<(), SelfTestError> {
    let kernel = Kernel::chosen();
    kernel
        .functions()
        .map_or(Ok(()), |functions| tested(kernel, functions))
}

/// The verdict on a kernel, found out at its first use.
pub(crate) fn tested(kernel: Kernel, functions: &'static Functions) -> Result<(), SelfTestError> {
    static VERDICTS: [OnceLock<Result<(), SelfTestError>>; Kernel::ALL.len()] =
        [const { OnceLock::new() }; Kernel::ALL.len()];
    let test = || examine(functions).map_err(|what| SelfTestError { kernel, what });
    match VERDICTS.get(kernel as usize) {
        Some(verdict) => *verdict.get_or_init(test),
        None => test(),
    }
}

/// Key, nonce and associated data of test case 16 of the specification of GCM (McGrew and Viega,
/// appendix B), whose plaintext is other.
const KEY: [u8; KEY_BYTES] = [
    0xfe, 0xff, 0xe9, 0x92, 0x86, 0x65, 0x73, 0x1c, 0x6d, 0x6a, 0x8f, 0x94, 0x67, 0x30, 0x83, 0x08,
    0xfe, 0xff, 0xe9, 0x92, 0x86, 0x65, 0x73, 0x1c, 0x6d, 0x6a, 0x8f, 0x94, 0x67, 0x30, 0x83, 0x08,
];
const SALT: [u8; 4] = [0xca, 0xfe, 0xba, 0xbe];
const SEQUENCE: u64 = 0xface_dbad_deca_f888;
const ASSOCIATED: [u8; 20] = [
    0xfe, 0xed, 0xfa, 0xce, 0xde, 0xad, 0xbe, 0xef, 0xfe, 0xed, 0xfa, 0xce, 0xde, 0xad, 0xbe, 0xef,
    0xab, 0xad, 0xda, 0xd2,
];

/// Lengths of the plaintexts `0, 1, .. 250, 0, 1, ..`, and the tags of their packets, which AWS-LC and
/// OpenSSL agree on: none, part of a vector, several groups, several reductions.
const ANSWERS: [(usize, u128); 4] = [
    (0, 0x9f6b_e076_03c0_b0bd_1272_8540_63e9_c9ba),
    (60, 0x2031_8c16_7a6e_cbfe_1158_b3ac_5ad7_7450),
    (512, 0x658a_7948_d52f_995f_5bba_fba6_6df8_1e8f),
    (2077, 0x6485_e6ea_f3cd_d219_dc23_64fc_b4f6_a1f2),
];

/// Room for a schedule.
#[repr(C, align(64))]
struct Slot([u8; SLOT_BYTES]);

/// Says what comes out wrong.
fn examine(functions: &Functions) -> Result<(), &'static str> {
    let mut slot = Box::new(Slot([0; SLOT_BYTES]));
    let slot = NonNull::from(&mut slot.0).cast();
    // SAFETY: a zeroed slot of this function; its kernel's functions alone use it below.
    if !unsafe { (functions.expand)(slot, &KEY) } {
        return Err("a key is not expanded");
    }
    for (length, tag) in ANSWERS {
        let plain: Vec<u8> = (0..=250).cycle().take(length).collect();
        let mut buffer = plain.clone();
        buffer.extend([0; TAG_BYTES]);
        let mut packet = SealPacket::in_place(&ASSOCIATED, &mut buffer).map_err(|_| "a length")?;
        packet.number(SEQUENCE);
        // SAFETY: the slot was filled above.
        let sealed = unsafe { (functions.seal)(slot, SALT, &mut [packet]) };
        if !sealed || buffer.get(length..) != Some(&tag.to_be_bytes()) {
            return Err("a tag");
        }
        let mut forged = buffer.clone();
        forged[length] ^= 1;
        for (buffer, good) in [(&mut buffer, true), (&mut forged, false)] {
            let packet = OpenPacket::in_place(SEQUENCE, &ASSOCIATED, buffer);
            let mut batch = [packet.map_err(|_| "a length")?];
            // SAFETY: as above.
            unsafe { (functions.open)(slot, SALT, &mut batch) };
            match batch[0].plaintext() {
                Ok(opened) if good && *opened == plain => (),
                Err(_) if !good => (),
                _ => return Err("an opened packet"),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    static BROKEN: Functions = Functions {
        expand: |_, _| true,
        seal: |_, _, _| true,
        open: |_, _, packets| packets.iter_mut().for_each(OpenPacket::opened),
    };

    #[test]
    fn kernels_pass_and_one_that_does_nothing_does_not() {
        for kernel in Kernel::available() {
            let functions = kernel.functions().expect("available");
            assert_eq!(examine(functions), Ok(()), "{kernel}");
        }
        assert_eq!(self_test(), Ok(()));
        assert_eq!(examine(&BROKEN), Err("a tag"));
    }
}
