//! Two other implementations: AWS-LC's and RustCrypto's.
//!
//! UNSAFETY: AWS-LC is a C library, called with live buffers and their lengths.
#![expect(unsafe_code, reason = "the oracle is C")]

use std::os::raw::c_int;

use aes::cipher::KeyInit;
use bulkhead_crypto::DataUnit;

/// AWS-LC's cipher under one key.
pub struct AwsLc {
    context: *mut aws_lc_sys::EVP_CIPHER_CTX,
    encrypt: c_int,
}

impl Drop for AwsLc {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once.
        unsafe { aws_lc_sys::EVP_CIPHER_CTX_free(self.context) };
    }
}

impl AwsLc {
    pub fn new(key: &[u8; 64], encrypt: bool) -> Self {
        let encrypt = c_int::from(encrypt);
        // SAFETY: the key has the cipher's length.
        unsafe {
            let context = aws_lc_sys::EVP_CIPHER_CTX_new();
            assert!(!context.is_null());
            let rc = aws_lc_sys::EVP_CipherInit_ex(
                context,
                aws_lc_sys::EVP_aes_256_xts(),
                std::ptr::null_mut(),
                key.as_ptr(),
                std::ptr::null(),
                encrypt,
            );
            assert_eq!(rc, 1);
            Self { context, encrypt }
        }
    }

    /// One data unit.
    pub fn unit(&self, number: u128, input: &[u8], output: &mut [u8]) {
        assert_eq!(input.len(), output.len());
        let tweak = number.to_le_bytes();
        let mut written: c_int = 0;
        // SAFETY: sixteen bytes of tweak, both buffers of the length given.
        unsafe {
            let rc = aws_lc_sys::EVP_CipherInit_ex(
                self.context,
                std::ptr::null(),
                std::ptr::null_mut(),
                std::ptr::null(),
                tweak.as_ptr(),
                self.encrypt,
            );
            assert_eq!(rc, 1);
            let rc = aws_lc_sys::EVP_CipherUpdate(
                self.context,
                output.as_mut_ptr(),
                &raw mut written,
                input.as_ptr(),
                c_int::try_from(input.len()).expect("small"),
            );
            assert_eq!(rc, 1);
        }
        assert_eq!(usize::try_from(written), Ok(input.len()));
    }
}

/// Data units of a size one after the other.
pub fn units(key: &[u8; 64], unit: DataUnit, first: u128, input: &[u8], encrypt: bool) -> Vec<u8> {
    let cipher = AwsLc::new(key, encrypt);
    let mut output = vec![0; input.len()];
    let step = unit.bytes() as usize;
    let mut number = first;
    for (input, output) in input.chunks(step).zip(output.chunks_mut(step)) {
        cipher.unit(number, input, output);
        number = number.wrapping_add(1);
    }
    output
}

/// One data unit, encrypted in place, by RustCrypto.
pub fn rust_crypto(key: &[u8; 64], number: u128, data: &mut [u8]) {
    let (data_key, tweak_key) = key.split_at(32);
    let cipher = xts_mode::Xts128::new(
        aes::Aes256::new_from_slice(data_key).expect("32 bytes"),
        aes::Aes256::new_from_slice(tweak_key).expect("32 bytes"),
    );
    cipher.encrypt_sector(data, number.to_le_bytes().into());
}
