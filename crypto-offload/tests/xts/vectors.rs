//! Published vectors, under every kernel: IEEE 1619-2007, annex B, and NIST's XTSVS.

use bulkhead_crypto::xts::Kernel;
use bulkhead_crypto::{DataUnit, XtsKey};

use crate::{each_kernel, expand, oracle};

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .chars()
        .filter_map(|c| c.to_digit(16))
        .map(|d| u8::try_from(d).expect("digit"))
        .collect();
    digits.chunks(2).map(|d| (d[0] << 4) | d[1]).collect()
}

/// IEEE 1619-2007, annex B, vectors 10 to 14: AES-256, 512 bytes; the number of the data unit, then how the
/// ciphertext begins and ends. AWS-LC checks what lies between.
const IEEE: [(u128, &str, &str); 5] = [
    (
        0xff,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        "773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
    ),
    (
        0xffff,
        "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11",
        "54fbff89eeaeea791f4a7ab1f9868294a4f9e27b42af8100cb9d59cef9645803",
    ),
    (
        0xff_ffff,
        "e387aaa58ba483afa7e8eb469778317ecf4cf573aa9d4eac23f2cdf914e4e200",
        "ed242c8900dd1fa965bc950dfce09b132263a1eef52dd6888c309f5a7d712826",
    ),
    (
        0xffff_ffff,
        "bf53d2dade78e822a4d949a9bc6766b01b06a8ef70d26748c6a7fc36d80ae4c5",
        "f6516139420fcff3b7361d86322c4bd84c82f335abb152c4a93411373aaa8220",
    ),
    (
        0xff_ffff_ffff,
        "64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed23",
        "6975be5e0b4efce51cd3e70c25a1fbbbd609d273ad5b0d59631c531f6a0a57b9",
    ),
];

#[test]
fn ieee_1619() {
    let key: [u8; 64] = hex(
        "2718281828459045235360287471352662497757247093699959574966967627 \
         3141592653589793238462643383279502884197169399375105820974944592",
    )
    .try_into()
    .expect("64 bytes");
    let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
    each_kernel("ieee_1619", |kernel| {
        let xts = expand(&key, kernel);
        for (number, first, last) in IEEE {
            let cipher = encrypt(&xts, number, &plain);
            assert!(
                cipher.starts_with(&hex(first)),
                "{kernel}: unit {number:#x}"
            );
            assert!(cipher.ends_with(&hex(last)), "{kernel}: unit {number:#x}");
            assert_eq!(
                cipher,
                oracle::units(&key, DataUnit::B512, number, &plain, true)
            );
            assert_eq!(decrypt(&xts, number, &cipher), plain);
        }
    });
}

fn encrypt(key: &XtsKey, number: u128, input: &[u8]) -> Vec<u8> {
    let mut output = vec![0; input.len()];
    key.encrypt_slices(DataUnit::B512, number, &[input], &mut [&mut output])
        .expect("whole units");
    output
}

fn decrypt(key: &XtsKey, number: u128, input: &[u8]) -> Vec<u8> {
    let mut output = vec![0; input.len()];
    key.decrypt_slices(DataUnit::B512, number, &[input], &mut [&mut output])
        .expect("whole units");
    output
}

/// Runs a list of vectors, whose data units are two and three cipher blocks long. A block of a data unit
/// doesn't depend on those after it, so each stands at the front of a whole unit.
fn nist(list: &str, number: impl Fn(&str) -> u128, kernel: Kernel) {
    let mut count = 0;
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<_> = line.split(' ').collect();
        let [direction, key, unit, plain, cipher] = fields[..] else {
            panic!("five fields expected: {line}");
        };
        let xts = expand(&hex(key).try_into().expect("64 bytes"), kernel);
        let (plain, cipher, number) = (hex(plain), hex(cipher), number(unit));
        let whole = |front: &[u8]| {
            let mut unit = vec![0x5a; 512];
            unit[..front.len()].copy_from_slice(front);
            unit
        };
        match direction {
            "encrypt" => assert!(
                encrypt(&xts, number, &whole(&plain)).starts_with(&cipher),
                "{line}"
            ),
            "decrypt" => assert!(
                decrypt(&xts, number, &whole(&cipher)).starts_with(&plain),
                "{line}"
            ),
            _ => panic!("encrypt or decrypt expected: {line}"),
        }
        count += 1;
    }
    assert_eq!(count, 80);
}

#[test]
fn nist_data_unit_numbers() {
    each_kernel("nist_data_unit_numbers", |kernel| {
        let number = |text: &str| text.parse().expect("a number");
        nist(include_str!("nist_number.txt"), number, kernel);
    });
}

#[test]
fn nist_tweaks() {
    each_kernel("nist_tweaks", |kernel| {
        let number = |text: &str| u128::from_le_bytes(hex(text).try_into().expect("16 bytes"));
        nist(include_str!("nist_tweak.txt"), number, kernel);
    });
}
