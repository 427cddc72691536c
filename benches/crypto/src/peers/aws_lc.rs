//! AWS-LC.
//!
//! UNSAFETY: functions of the C library under their own conditions, which `evp` keeps; its version is a
//! string that lives as long as the process.
#![expect(unsafe_code, reason = "the peer is a C library")]

use std::ffi::{CStr, c_int};
use std::ptr::{null, null_mut};

use aws_lc_sys as c;

use super::Library;
use super::evp::{Evp, Interface};

pub(super) const LIBRARY: Library = Library {
    name: "AWS-LC",
    version,
    with_key: |key, encrypt| Box::new(Evp::<AwsLc>::new(key, encrypt)),
};

fn version() -> String {
    // SAFETY: it has no conditions, and gives a string that stays.
    let text = unsafe { CStr::from_ptr(c::OpenSSL_version(0)) };
    text.to_string_lossy().into_owned()
}

struct AwsLc;

impl Interface for AwsLc {
    type Context = c::EVP_CIPHER_CTX;

    unsafe fn new() -> *mut Self::Context {
        // SAFETY: passed on.
        unsafe { c::EVP_CIPHER_CTX_new() }
    }

    unsafe fn free(context: *mut Self::Context) {
        // SAFETY: passed on.
        unsafe { c::EVP_CIPHER_CTX_free(context) }
    }

    unsafe fn set_key(context: *mut Self::Context, key: *const u8, encrypt: c_int) -> c_int {
        let cipher = c::EVP_aes_256_xts;
        // SAFETY: passed on.
        unsafe { c::EVP_CipherInit_ex(context, cipher(), null_mut(), key, null(), encrypt) }
    }

    unsafe fn set_tweak(context: *mut Self::Context, tweak: *const u8, encrypt: c_int) -> c_int {
        // SAFETY: passed on.
        unsafe { c::EVP_CipherInit_ex(context, null(), null_mut(), null(), tweak, encrypt) }
    }

    unsafe fn update(
        context: *mut Self::Context,
        to: *mut u8,
        written: *mut c_int,
        from: *const u8,
        len: c_int,
    ) -> c_int {
        // SAFETY: passed on.
        unsafe { c::EVP_CipherUpdate(context, to, written, from, len) }
    }
}
