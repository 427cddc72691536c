//! `gcm`: batches of packets under every kernel of the packet cipher, against AWS-LC's AEAD, and opened
//! again, some of them damaged.
//!
//! UNSAFETY: segments point into vectors that outlive the packets; AWS-LC is a C library, called with
//! live buffers and their lengths.
#![expect(unsafe_code, reason = "segments are raw; the oracle is C")]

use std::ptr;
use std::sync::{Arc, OnceLock};

use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{
    KEY_BYTES, Kernel, OpenPacket, Opener, PacketKey, SealPacket, Sealer, Segment, TAG_BYTES,
};

use crate::input::Input;

/// Packets of a batch at most: more than one group of what kernels do at once.
const MOST_PACKETS: u16 = 40;

/// Where a packet's plaintext is.
#[derive(Clone, Copy)]
enum Place {
    Same,
    Apart,
    /// In two segments, cut at this byte.
    Segments(usize),
}

struct Packet {
    associated: Vec<u8>,
    plain: Vec<u8>,
    place: Place,
    /// The bit of ciphertext or tag that is changed on the way.
    damage: Option<usize>,
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kernels = Kernel::available();
    let kernel = kernels[usize::from(input.u8()) % kernels.len()];
    let mut key = [0; KEY_BYTES];
    let bytes = input.bytes(KEY_BYTES);
    key[..bytes.len()].copy_from_slice(bytes);
    let salt = input.u32().to_le_bytes();
    let count = input.below(MOST_PACKETS);
    let first = input.u64() & (u64::MAX >> 1);
    let packets: Vec<_> = (0..count).map(|_| packet(&mut input)).collect();

    let mut sealed = seal(kernel, &key, salt, first, &packets);
    for ((packet, sealed), number) in packets.iter().zip(&sealed).zip(first..) {
        let expected = oracle(&key, salt, number, packet);
        let wrong = sealed.iter().zip(&expected).position(|(a, b)| a != b);
        let bytes = packet.plain.len();
        assert_eq!(wrong, None, "{kernel}: packet {number} of {bytes} bytes");
    }
    for (packet, sealed) in packets.iter().zip(&mut sealed) {
        if let Some(bit) = packet.damage {
            let bit = bit % (sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
        }
    }
    open(kernel, &key, salt, first, &packets, &mut sealed);
}

fn packet(input: &mut Input) -> Packet {
    let most = [70, 300, 2000, 10_000][usize::from(input.u8() % 4)];
    let length = usize::from(input.below(most));
    let seed = input.u8();
    let associated = usize::from(input.below(40));
    let place = match input.u8() % 3 {
        0 => Place::Same,
        1 => Place::Apart,
        _ => Place::Segments(usize::from(input.u16()) % (length + 1)),
    };
    let byte = |at: usize| (at % 251).to_le_bytes()[0] ^ seed;
    Packet {
        associated: (0..associated).map(byte).collect(),
        plain: (0..length).map(byte).rev().collect(),
        place,
        damage: input
            .u8()
            .is_multiple_of(4)
            .then(|| usize::from(input.u16())),
    }
}

/// Room for one key at a time, made once.
fn key_of(kernel: Kernel, key: &[u8; KEY_BYTES]) -> PacketKey {
    static ARENA: OnceLock<Arc<SecretArena>> = OnceLock::new();
    let arena = ARENA.get_or_init(|| SecretArena::new(1).expect("secret memory for one key"));
    PacketKey::with_kernel(arena, key, kernel).expect("a kernel of this CPU")
}

fn seal(
    kernel: Kernel,
    key: &[u8; KEY_BYTES],
    salt: [u8; 4],
    first: u64,
    packets: &[Packet],
) -> Vec<Box<[u8]>> {
    // Each buffer is as long as it must be, so that a step beyond it is seen.
    let room = |packet: &Packet| -> Box<[u8]> {
        let mut bytes = match packet.place {
            Place::Same => packet.plain.clone(),
            Place::Apart | Place::Segments(_) => vec![0xee; packet.plain.len()],
        };
        bytes.extend([0xee; TAG_BYTES]);
        bytes.into()
    };
    let mut outputs: Vec<_> = packets.iter().map(room).collect();
    let places = packets.iter().zip(&mut outputs);
    let mut batch: Vec<_> = places
        .map(|(packet, output)| to_seal(packet, output))
        .collect();
    let mut sealer = Sealer::new(key_of(kernel, key), salt, first);
    assert_eq!(sealer.seal_batch(&mut batch), Ok(first));
    assert_eq!(sealer.next_sequence(), Some(first + packets.len() as u64));
    drop(batch);
    outputs
}

fn to_seal<'a>(packet: &'a Packet, output: &'a mut [u8]) -> SealPacket<'a> {
    let associated = &packet.associated;
    let made = match packet.place {
        Place::Same => SealPacket::in_place(associated, output),
        Place::Apart => SealPacket::between(associated, &packet.plain, output),
        Place::Segments(at) => {
            let (left, right) = packet.plain.split_at(at);
            let segments = [left, right].map(|part| Segment {
                address: part.as_ptr(),
                bytes: part.len(),
            });
            // SAFETY: the plaintext outlives the packet and lies apart from the output.
            unsafe { SealPacket::from_segments(associated, &segments, output) }
        }
    };
    made.expect("lengths fit")
}

/// What AWS-LC makes of it.
fn oracle(key: &[u8; KEY_BYTES], salt: [u8; 4], number: u64, packet: &Packet) -> Vec<u8> {
    let nonce = [&salt[..], &number.to_be_bytes()].concat();
    let mut sealed = vec![0; packet.plain.len() + TAG_BYTES];
    let mut bytes = 0;
    // SAFETY: a context of this function, freed at its end; every buffer has the length given.
    let done = unsafe {
        let aead = aws_lc_sys::EVP_aead_aes_256_gcm();
        let context = aws_lc_sys::EVP_AEAD_CTX_new(aead, key.as_ptr(), key.len(), TAG_BYTES);
        assert!(!context.is_null());
        let done = aws_lc_sys::EVP_AEAD_CTX_seal(
            context,
            sealed.as_mut_ptr(),
            ptr::from_mut(&mut bytes),
            sealed.len(),
            nonce.as_ptr(),
            nonce.len(),
            packet.plain.as_ptr(),
            packet.plain.len(),
            packet.associated.as_ptr(),
            packet.associated.len(),
        );
        aws_lc_sys::EVP_AEAD_CTX_free(context);
        done
    };
    assert_eq!((done, bytes), (1, sealed.len()));
    sealed
}

/// Opens the batch: what was damaged is refused and leaves zeroes, all else comes out.
fn open(
    kernel: Kernel,
    key: &[u8; KEY_BYTES],
    salt: [u8; 4],
    first: u64,
    packets: &[Packet],
    sealed: &mut [Box<[u8]>],
) {
    let copies = sealed.to_vec();
    let mut outputs: Vec<Box<[u8]>> = packets.iter().map(|p| p.plain.clone().into()).collect();
    outputs.iter_mut().for_each(|output| output.fill(0xee));
    let buffers = sealed.iter_mut().zip(&copies).zip(&mut outputs);
    let numbered = packets.iter().zip(buffers).zip(first..);
    let mut batch: Vec<_> = numbered
        .map(|((packet, ((buffer, copy), output)), number)| {
            let associated = &packet.associated;
            let made = match packet.place {
                Place::Same => OpenPacket::in_place(number, associated, buffer),
                _ => OpenPacket::between(number, associated, copy, output),
            };
            made.expect("lengths fit")
        })
        .collect();
    Opener::new(key_of(kernel, key), salt).open_batch(&mut batch);
    for (opened, packet) in batch.iter_mut().zip(packets) {
        let opened = opened.plaintext().map(|bytes| bytes.to_vec());
        let good = packet.damage.is_none().then(|| packet.plain.clone());
        assert_eq!(opened.ok(), good, "{kernel}");
    }
    drop(batch);
    for (i, packet) in packets
        .iter()
        .enumerate()
        .filter(|(_, p)| p.damage.is_some())
    {
        let left = match packet.place {
            Place::Same => &sealed[i][..packet.plain.len()],
            _ => &outputs[i],
        };
        assert!(
            left.iter().all(|&byte| byte == 0),
            "{kernel}: plaintext is left"
        );
    }
}
