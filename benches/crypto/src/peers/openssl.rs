//! The system's OpenSSL 3, linked from its static library, as these programs load nothing when they run. Where that is not
//! installed this module is left out (`build.rs`), and with it OpenSSL's rows.
//!
//! UNSAFETY: functions of the C library as its manual has them, under their own conditions, which `evp`
//! keeps; its version is a string that lives as long as the process.
#![expect(unsafe_code, reason = "the peer is a C library")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};

use super::Library;
use super::evp::{Evp, interface};

pub(super) const LIBRARY: Library = Library {
    name: "OpenSSL",
    version,
    with_key: |key, encrypt| Box::new(Evp::<OpenSsl>::new(key, encrypt)),
};

/// The few of its types and functions that are used (`EVP_EncryptInit(3)`, `OpenSSL_version(3)`).
mod c {
    use super::{c_char, c_int, c_void};

    #[repr(C)]
    pub struct EvpCipherCtx {
        opaque: [u8; 0],
    }

    // SAFETY: the prototypes of the library's headers, unchanged since OpenSSL 1.1.
    unsafe extern "C" {
        pub fn OpenSSL_version(which: c_int) -> *const c_char;
        pub fn EVP_aes_256_xts() -> *const c_void;
        pub fn EVP_CIPHER_CTX_new() -> *mut EvpCipherCtx;
        pub fn EVP_CIPHER_CTX_free(context: *mut EvpCipherCtx);
        pub fn EVP_CipherInit_ex(
            context: *mut EvpCipherCtx,
            cipher: *const c_void,
            engine: *mut c_void,
            key: *const u8,
            iv: *const u8,
            encrypt: c_int,
        ) -> c_int;
        pub fn EVP_CipherUpdate(
            context: *mut EvpCipherCtx,
            to: *mut u8,
            written: *mut c_int,
            from: *const u8,
            len: c_int,
        ) -> c_int;
    }
}

fn version() -> String {
    // SAFETY: it has no conditions, and gives a string that stays.
    let text = unsafe { CStr::from_ptr(c::OpenSSL_version(0)) };
    text.to_string_lossy().into_owned()
}

interface!(OpenSsl, c, c::EvpCipherCtx);
