//! EVP, the interface that AWS-LC and OpenSSL share: a context that has the key, and for each data unit a new
//! tweak and one update.
//!
//! UNSAFETY: the libraries are called with a context that lives through the call, is used by one thread at
//! a time and freed once, with a key and a tweak of the cipher's lengths and with buffers of the length given.
#![expect(unsafe_code, reason = "the peers are C libraries")]

use std::ffi::c_int;
use std::marker::PhantomData;

use bulkhead_crypto::xts::KEY_BYTES;

use super::{Buffers, Peer, tweak};

/// A library's functions. Each is the C function of its name, which [`Evp`] calls as that demands.
pub(super) trait Interface {
    /// `EVP_CIPHER_CTX`
    type Context;
    /// `EVP_CIPHER_CTX_new`
    unsafe fn new() -> *mut Self::Context;
    /// `EVP_CIPHER_CTX_free`
    unsafe fn free(context: *mut Self::Context);
    /// `EVP_CipherInit_ex` with AES-256-XTS
    unsafe fn set_key(context: *mut Self::Context, key: *const u8, encrypt: c_int) -> c_int;
    /// `EVP_CipherInit_ex` without cipher or key
    unsafe fn set_tweak(context: *mut Self::Context, tweak: *const u8, encrypt: c_int) -> c_int;
    /// `EVP_CipherUpdate`
    unsafe fn update(
        context: *mut Self::Context,
        to: *mut u8,
        written: *mut c_int,
        from: *const u8,
        len: c_int,
    ) -> c_int;
}

/// A type that is the [`Interface`] of the C functions in a module.
macro_rules! interface {
    ($library:ident, $c:ident, $context:ty) => {
        struct $library;

        impl $crate::peers::evp::Interface for $library {
            type Context = $context;

            unsafe fn new() -> *mut Self::Context {
                // SAFETY: passed on.
                unsafe { $c::EVP_CIPHER_CTX_new() }
            }

            unsafe fn free(context: *mut Self::Context) {
                // SAFETY: passed on.
                unsafe { $c::EVP_CIPHER_CTX_free(context) }
            }

            unsafe fn set_key(
                context: *mut Self::Context,
                key: *const u8,
                encrypt: c_int,
            ) -> c_int {
                let cipher = $c::EVP_aes_256_xts;
                // SAFETY: passed on.
                unsafe {
                    $c::EVP_CipherInit_ex(context, cipher(), null_mut(), key, null(), encrypt)
                }
            }

            unsafe fn set_tweak(
                context: *mut Self::Context,
                tweak: *const u8,
                encrypt: c_int,
            ) -> c_int {
                // SAFETY: passed on.
                unsafe {
                    $c::EVP_CipherInit_ex(context, null(), null_mut(), null(), tweak, encrypt)
                }
            }

            unsafe fn update(
                context: *mut Self::Context,
                to: *mut u8,
                written: *mut c_int,
                from: *const u8,
                len: c_int,
            ) -> c_int {
                // SAFETY: passed on.
                unsafe { $c::EVP_CipherUpdate(context, to, written, from, len) }
            }
        }
    };
}
pub(super) use interface;

/// A context with a key.
pub(super) struct Evp<I: Interface> {
    context: *mut I::Context,
    encrypt: bool,
    interface: PhantomData<I>,
}

impl<I: Interface> Evp<I> {
    /// # Panics
    /// If the library refuses: it has no such cipher, or no memory.
    pub(super) fn new(key: &[u8; KEY_BYTES], encrypt: bool) -> Self {
        // SAFETY: it has no conditions; checked below.
        let context = unsafe { I::new() };
        assert!(!context.is_null(), "the library gives no context");
        let evp = Self {
            context,
            encrypt,
            interface: PhantomData,
        };
        // SAFETY: the context is live, and the key has the 64 bytes that the cipher reads.
        let rc = unsafe { I::set_key(evp.context, key.as_ptr(), c_int::from(encrypt)) };
        assert_eq!(rc, 1, "the library refuses the key");
        evp
    }

    /// # Safety
    /// `from` is readable and `to` writable for `len` bytes; the same address, or apart.
    unsafe fn unit(&mut self, tweak: [u8; 16], from: *const u8, to: *mut u8, len: c_int) {
        let mut written: c_int = 0;
        let encrypt = c_int::from(self.encrypt);
        // SAFETY: the context is live, the tweak has 16 bytes, and the buffers are the caller's.
        let done = unsafe {
            I::set_tweak(self.context, tweak.as_ptr(), encrypt) == 1
                && I::update(self.context, to, &raw mut written, from, len) == 1
        };
        assert!(done && written == len, "the library failed");
    }
}

impl<I: Interface> Peer for Evp<I> {
    fn run(&mut self, unit_bytes: usize, first: u64, buffers: Buffers<'_>) {
        let len = c_int::try_from(unit_bytes).expect("a data unit is small");
        match buffers {
            Buffers::InPlace(bytes) => {
                for (at, unit) in bytes.chunks_exact_mut(unit_bytes).enumerate() {
                    let place = unit.as_mut_ptr();
                    // SAFETY: one buffer of `len` bytes.
                    unsafe { self.unit(tweak(first, at), place, place, len) };
                }
            }
            Buffers::Between(from, to) => {
                let units = from.chunks_exact(unit_bytes);
                let places = to.chunks_exact_mut(unit_bytes);
                for (at, (from, to)) in units.zip(places).enumerate() {
                    // SAFETY: two buffers of `len` bytes.
                    unsafe { self.unit(tweak(first, at), from.as_ptr(), to.as_mut_ptr(), len) };
                }
            }
        }
    }
}

impl<I: Interface> Drop for Evp<I> {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { I::free(self.context) };
    }
}
