//! GET_CONFIG and SET_CONFIG, and the one field that can be written: the cache mode.

use std::sync::Arc;

use bulkhead_dataplane::blk::config_space::{self, feature};
use bulkhead_dataplane::vhost_user::message::code;

use crate::messages::{config, disk, facts, words};
use crate::rig::{Answer, Rig, ack};

/// All offsets and sizes from 0 to 256 (T28): 66,049 pairs, each read and written.
#[test]
fn every_range_is_read_as_it_is_or_refused_and_only_the_cache_mode_is_written() {
    let facts = facts();
    let whole = config_space::read(disk(&facts));
    let mut rig = Rig::negotiated_of(facts);
    let mut written = Vec::new();
    for offset in 0..=256usize {
        let at = u32::try_from(offset).expect("small");
        for size in 0..=256usize {
            let body = config(at, &vec![0x5a; size]);
            let answer = rig.send(code::GET_CONFIG, body, vec![]);
            let inside = whole.get(offset..offset + size).filter(|b| !b.is_empty());
            let expected = inside.map_or(vec![], |bytes| config(at, bytes));
            assert_eq!(answer, Answer::Reply(expected), "{size} bytes at {offset}");
            // As it is already: a payload of one byte is 1, write-back.
            let body = config(at, &vec![1; size]);
            if rig.send(code::SET_CONFIG, body, vec![]) == ack(0) {
                written.push((offset, size));
            }
        }
    }
    assert_eq!(written, [(32, 1)]);
}

/// QEMU stops and starts a guest's queues with SET_STATUS 0 and SET_FEATURES, and does not say again what
/// the guest chose.
#[test]
fn the_cache_mode_outlives_a_pause_and_not_a_reset() {
    let facts = facts();
    let device = Arc::clone(disk(&facts));
    let mut rig = Rig::negotiated_of(facts.clone());
    let through = config(32, &[0]);
    assert_eq!(rig.send(code::SET_CONFIG, through.clone(), vec![]), ack(0));
    assert!(!device.writeback());
    let read = rig.send(code::GET_CONFIG, config(32, &[0xff]), vec![]);
    assert_eq!(read, Answer::Reply(through));
    assert_eq!(rig.send(code::SET_STATUS, words(&[0]), vec![]), ack(0));
    assert!(!device.writeback(), "after a pause");
    rig = Rig::negotiated_of(facts);
    assert!(!device.writeback(), "after a new connection");
    assert_eq!(rig.send(code::RESET_DEVICE, vec![], vec![]), ack(0));
    assert!(device.writeback(), "after a reset");
}

/// A driver that can change the cache mode and not flush begins with write-through.
#[test]
fn without_flush_the_cache_mode_begins_with_write_through() {
    let mut facts = facts();
    facts.features = config_space::features(&disk(&facts).geometry);
    let device = Arc::clone(disk(&facts));
    let mut rig = Rig::of(facts);
    let bare = rig.send(code::GET_FEATURES, vec![], vec![]);
    assert!(matches!(bare, Answer::Reply(_)));
    rig.quietly(code::SET_FEATURES, words(&[feature::CONFIG_WCE]), vec![]);
    assert!(!device.writeback());
    let both = feature::CONFIG_WCE | feature::FLUSH;
    rig.quietly(code::SET_FEATURES, words(&[both]), vec![]);
    assert!(device.writeback());
}
