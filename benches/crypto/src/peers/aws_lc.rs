//! AWS-LC.
//!
//! UNSAFETY: functions of the C library under their own conditions, which `evp` keeps; its version is a
//! string that lives as long as the process.
#![expect(unsafe_code, reason = "the peer is a C library")]

use std::ffi::{CStr, c_int};
use std::ptr::{null, null_mut};

use aws_lc_sys as c;

use super::Library;
use super::evp::{Evp, interface};

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

interface!(AwsLc, c, c::EVP_CIPHER_CTX);
