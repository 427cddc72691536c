//! No secret reaches a branch or an address: a child that runs the cipher is stepped through, instruction by
//! instruction, once for each of several keys and data at the same addresses. Where it goes must be
//! the same each time; and so must every general register in the calls of kernels written for x86,
//! which keep what is secret in vector registers. Since addresses are made of general
//! registers alone (these kernels have no gather), no access can then depend on a secret.
//!
//! Of the `aes` crate's kernel, and of a key's expansion, which compares the key's halves in general
//! registers, this shows the way alone; `memcheck.rs` shows their addresses too.
//! That other instructions take the same time whatever their operands is the CPU's word.
#![cfg(target_arch = "x86_64")]

mod memcheck;
mod planted;
mod step;

use bulkhead_crypto::xts::Kernel;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};

use step::{Compare, Work, differs, forbidden};

/// Secrets: what the key's and the data's bytes are, from their index on.
const SECRETS: [fn(usize) -> u8; 3] = [
    |at| u8::from(at == 0),
    |at| 0xff - u8::from(at == 0),
    |at| u8::try_from((at * at * 31 + at / 3 + 5) % 256).expect("below 256"),
];

/// Three units of 512 bytes, of which one straddles segments.
fn small(key: &XtsKey, work: &mut Work, encrypt: bool) {
    let (first, second) = work.data[..SMALL_BYTES].split_at(700);
    let (source, units) = ([first, second], DataUnit::B512);
    let mut destination = [&mut work.output[..SMALL_BYTES]];
    let done = if encrypt {
        key.encrypt_slices(units, 77, &source, &mut destination)
    } else {
        key.decrypt_slices(units, 77, &source, &mut destination)
    };
    assert!(done.is_ok());
}

const SMALL_BYTES: usize = 3 * 512;

/// One unit of 4096 bytes, and its front again as units of 512.
fn both_units(key: &XtsKey, work: &mut Work, encrypt: bool) {
    let large = if encrypt {
        key.encrypt(DataUnit::B4096, 5, &work.data, &mut work.output)
    } else {
        key.decrypt(DataUnit::B4096, 5, &work.data, &mut work.output)
    };
    assert!(large.is_ok());
    small(key, work, encrypt);
}

fn expand(work: &Work, kernel: Kernel) -> XtsKey {
    let Some(arena) = &work.arena else {
        panic!("an arena was made")
    };
    match XtsKey::with_kernel(arena, &work.key, kernel) {
        Ok(key) => key,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn keys_and_data_change_neither_the_way_nor_an_address() {
    const NAME: &str = "keys_and_data_change_neither_the_way_nor_an_address";
    if forbidden(NAME) {
        return;
    }
    for kernel in Kernel::ALL {
        if !Kernel::available().contains(&kernel) {
            println!("skipped: {NAME}: {kernel}: this CPU (or build) has no such kernel");
            continue;
        }
        let mut work = Work::new(Some(SecretArena::new(1).expect("arena")));
        // The self-test, which is done once in a process, is no part of it.
        drop(expand_any(&work, kernel));
        let found = differs(&mut work, &SECRETS, Compare::Way, |work, step| {
            step.begin();
            let key = expand(work, kernel);
            step.end();
            drop(key);
        });
        assert_eq!(found, None, "{kernel}: expansion");
        type Calls = fn(&XtsKey, &mut Work, bool);
        let (compare, calls): (_, Calls) = match kernel {
            // Its way is long, a step takes a while, and memcheck sees more.
            Kernel::Portable => (Compare::Way, small),
            _ => (Compare::WayAndRegisters, both_units),
        };
        for encrypt in [true, false] {
            let found = differs(&mut work, &SECRETS, compare, |work, step| {
                let key = expand(work, kernel);
                step.begin();
                calls(&key, work, encrypt);
                step.end();
            });
            assert_eq!(found, None, "{kernel}: encrypt {encrypt}");
        }
    }
}

fn expand_any(work: &Work, kernel: Kernel) -> XtsKey {
    let arena = work.arena.as_ref().expect("made");
    let mut key = [7; 64];
    key[0] = 1;
    XtsKey::with_kernel(arena, &key, kernel).expect("key")
}

#[test]
fn a_table_lookup_and_a_branch_are_found() {
    if forbidden("a_table_lookup_and_a_branch_are_found") {
        return;
    }
    let mut work = Work::new(None);
    type Plant = (fn(&mut Work), Compare);
    let plants: [Plant; 3] = [
        (planted::branch, Compare::Way),
        (planted::branch, Compare::WayAndRegisters),
        (planted::lookup, Compare::WayAndRegisters),
    ];
    for (plant, compare) in plants {
        let found = differs(&mut work, &SECRETS, compare, |work, step| {
            step.begin();
            plant(work);
            step.end();
        });
        assert!(found.is_some(), "a planted leak was not found");
    }
    let found = differs(
        &mut work,
        &SECRETS,
        Compare::WayAndRegisters,
        |work, step| {
            step.begin();
            planted::harmless(work);
            step.end();
        },
    );
    assert_eq!(found, None);
}
