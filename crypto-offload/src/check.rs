//! What can be told of a volume key without it: the check value that the record of a re-key carries, so
//! that a wrong key is refused and not used.
#![forbid(unsafe_code)]

use crate::xts::{BufferError, DataUnit, XtsKey};

/// Number of the data unit that is encrypted for a check: no volume has it.
const CHECK_UNIT: u64 = u64::MAX;

/// The check value of a key for one re-key: the first 16 bytes of a data unit of 512 bytes with the number
/// 2^64 - 1, encrypted, whose first 16 bytes are the id of the re-key, the others zero. It depends on both
/// halves of the key and tells nothing of them.
///
/// # Errors
/// None ever: a buffer is one data unit long.
pub fn key_check(key: &XtsKey, rekey_id: &[u8; 16]) -> Result<[u8; 16], BufferError> {
    let mut plain = [0; 512];
    plain[..16].copy_from_slice(rekey_id);
    let mut encrypted = [0; 512];
    key.encrypt(DataUnit::B512, CHECK_UNIT, &plain, &mut encrypted)?;
    let mut check = [0; 16];
    check.copy_from_slice(&encrypted[..16]);
    Ok(check)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SecretArena;

    #[test]
    fn it_differs_with_either_half_of_the_key_and_with_the_id() {
        let arena = SecretArena::new(4).expect("arena");
        let key = |first: u8, last: u8| {
            let mut key = [7; 64];
            (key[0], key[63]) = (first, last);
            XtsKey::new(&arena, &key).expect("key")
        };
        let check = |key: &XtsKey, id: u8| key_check(key, &[id; 16]).expect("one unit");
        let usual = check(&key(1, 2), 3);
        assert_eq!(usual, check(&key(1, 2), 3));
        for other in [
            check(&key(9, 2), 3),
            check(&key(1, 9), 3),
            check(&key(1, 2), 9),
        ] {
            assert_ne!(usual, other);
        }
    }
}
