//! No secret reaches a branch or an address: a child that seals and opens is stepped through, as for
//! the volume cipher, once for each of several keys and data at the same addresses. Where it goes
//! must be the same each time, and so must every general register: what is secret stays in vector
//! registers. Of a key's expansion, which doubles the hash key in general registers, the way alone is
//! compared. AWS-LC's constant time is AWS-LC's.
#![cfg(all(target_arch = "x86_64", not(feature = "portable-only")))]

#[path = "../../tests/constant_time/step.rs"]
mod step;

use bulkhead_crypto::SecretArena;
use bulkhead_packet_cipher::{
    Kernel, OpenPacket, Opener, PacketKey, SealPacket, Sealer, TAG_BYTES,
};

use step::{Compare, Step, Work, differs, forbidden};

/// Secrets: what the key's and the data's bytes are, from their index on.
const SECRETS: [fn(usize) -> u8; 3] = [
    |at| u8::from(at == 0),
    |at| 0xff - u8::from(at == 0),
    |at| u8::try_from((at * at * 31 + at / 3 + 5) % 256).expect("below 256"),
];

/// Plaintexts: part of a vector, some vectors, several groups with two reductions.
const LENGTHS: [usize; 3] = [40, 200, 1400];

const HEADER: [u8; 20] = [9; 20];

fn key(work: &Work) -> PacketKey {
    let Some(arena) = &work.arena else {
        panic!("an arena was made")
    };
    let Some(key) = work.key.first_chunk() else {
        panic!("a key is longer")
    };
    match PacketKey::with_kernel(arena, key, Kernel::Vaes512) {
        Ok(key) => key,
        Err(error) => panic!("{error}"),
    }
}

/// Cuts the output into the packets' buffers.
fn buffers(work: &mut Work) -> [&mut [u8]; 3] {
    let mut rest = &mut work.output[..];
    LENGTHS.map(|length| {
        let (buffer, behind) = std::mem::take(&mut rest).split_at_mut(length + TAG_BYTES);
        rest = behind;
        buffer
    })
}

fn seal(work: &mut Work, sealer: &mut Sealer, step: Option<Step>) {
    let data = work.data;
    let mut from = 0;
    let mut packets = buffers(work).map(|buffer| {
        let plain = &data[from..from + buffer.len() - TAG_BYTES];
        from += plain.len();
        SealPacket::between(&HEADER, plain, buffer).expect("lengths fit")
    });
    if let Some(step) = step {
        step.begin();
    }
    let sealed = sealer.seal_batch(&mut packets);
    if let Some(step) = step {
        step.end();
    }
    assert_eq!(sealed, Ok(1));
}

fn open(work: &mut Work, opener: &Opener, good: bool, step: Step) {
    let mut number = 0;
    let mut packets = buffers(work).map(|buffer| {
        number += 1;
        buffer[0] ^= u8::from(!good);
        OpenPacket::in_place(number, &HEADER, buffer).expect("lengths fit")
    });
    step.begin();
    opener.open_batch(&mut packets);
    step.end();
    assert!(packets.iter_mut().all(|p| p.plaintext().is_ok() == good));
}

#[test]
fn keys_and_data_change_neither_the_way_nor_an_address() {
    if forbidden("keys_and_data_change_neither_the_way_nor_an_address") {
        return;
    }
    if !Kernel::available().contains(&Kernel::Vaes512) {
        println!("skipped: keys_and_data_change_neither_the_way_nor_an_address: no such CPU");
        return;
    }
    let mut work = Work::new(Some(SecretArena::new(2).expect("arena")));
    // The self-test, which is done once in a process, is no part of it.
    drop(key(&work));
    let found = differs(&mut work, &SECRETS, Compare::Way, |work, step| {
        step.begin();
        let key = key(work);
        step.end();
        drop(key);
    });
    assert_eq!(found, None, "expansion");
    let found = differs(
        &mut work,
        &SECRETS,
        Compare::WayAndRegisters,
        |work, step| {
            let mut sealer = Sealer::new(key(work), [1; 4], 1);
            seal(work, &mut sealer, Some(step));
        },
    );
    assert_eq!(found, None, "sealing");
    for good in [true, false] {
        let found = differs(
            &mut work,
            &SECRETS,
            Compare::WayAndRegisters,
            |work, step| {
                let mut sealer = Sealer::new(key(work), [1; 4], 1);
                let opener = Opener::new(key(work), [1; 4]);
                seal(work, &mut sealer, None);
                open(work, &opener, good, step);
            },
        );
        assert_eq!(found, None, "opening, all good: {good}");
    }
    // That one is refused may show; and that it does shows that the comparison sees something.
    let found = differs(&mut work, &SECRETS, Compare::Way, |work, step| {
        let mut sealer = Sealer::new(key(work), [1; 4], 1);
        let opener = Opener::new(key(work), [1; 4]);
        seal(work, &mut sealer, None);
        open(work, &opener, work.key[0] == 1, step);
    });
    assert!(found.is_some(), "a refusal goes another way");
}
