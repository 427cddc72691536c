//! Several frames into a driver's receive buffers together.

use super::rig::{ALL, MERGEABLE, Rig, each};
use super::{key, pattern, tcp_segment, unsummed};
use crate::net::frame::Frame;
use crate::net::header::{Header, NEEDS_CSUM};
use crate::net::tests::tcp;

/// An Ethernet frame of so many bytes, told from others by the last ones.
fn plain(bytes: usize, number: u8) -> Vec<u8> {
    let mut frame = pattern(bytes);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[bytes - 1] = number;
    frame
}

fn frames<'a>(given: &'a [(Header, Vec<u8>)]) -> Vec<Frame<'a>> {
    let frame = |(header, bytes): &'a (Header, Vec<u8>)| {
        Frame::of_bytes(header, bytes, key()).expect("a frame")
    };
    given.iter().map(frame).collect()
}

fn plains(lengths: &[usize]) -> Vec<(Header, Vec<u8>)> {
    let numbered = lengths.iter().zip(1..);
    numbered
        .map(|(bytes, number)| (Header::default(), plain(*bytes, number)))
        .collect()
}

fn assert_got(rig: &mut Rig, expected: &[(Header, Vec<u8>)]) {
    let got = rig.frames();
    assert_eq!(got.len(), expected.len());
    for ((told, bytes), (_, right)) in got.iter().zip(expected) {
        assert_eq!(told.num_buffers, 1);
        assert!(bytes == right, "{} bytes", right.len());
    }
}

#[test]
fn frames_of_all_lengths_come_in_order_each_in_a_buffer_of_its_own() {
    each(MERGEABLE, |mut rig| {
        let given = plains(&[14, 15, 16, 60, 64, 192, 193, 255, 500, 1514]);
        for _ in &given {
            rig.offer_plain(2000);
        }
        let total: usize = given.iter().map(|(_, bytes)| bytes.len()).sum();
        let (count, delivered) = rig.deliver_usual(&frames(&given), 9000);
        assert_eq!(count, given.len());
        assert_eq!((delivered.packets, delivered.bytes), (10, total as u64));
        assert_got(&mut rig, &given);
        assert_eq!(rig.queue.in_flight(), 0);
    });
}

#[test]
fn it_goes_as_far_as_there_are_buffers_that_are_long_enough() {
    each(MERGEABLE, |mut rig| {
        rig.was_put_back = true;
        let given = plains(&[64, 64, 64, 64]);
        for bytes in [76, 76, 75, 76] {
            rig.offer_plain(bytes);
        }
        let (count, _) = rig.deliver_usual(&frames(&given), 9000);
        assert_eq!(count, 2, "the third is too short");
        assert_got(&mut rig, &given[..2]);
        assert_eq!(rig.queue.in_flight(), 0, "the others were put back");
        // The next one needs two, and what is behind it comes behind it.
        assert!(rig.deliver(&given[2].0, &given[2].1).is_ok());
        assert_eq!(
            rig.deliver_usual(&frames(&given[3..]), 9000).0,
            0,
            "all are used"
        );
        let [(told, bytes)] = &rig.frames()[..] else {
            panic!("one frame");
        };
        assert_eq!((told.num_buffers, bytes), (2, &given[2].1));
    });
}

#[test]
fn what_is_longer_than_the_mtu_or_to_be_cut_or_completed_is_left() {
    let (unsummed, segment) = (unsummed(&tcp(100)), tcp_segment(3000, 1400));
    let first = plains(&[64]).remove(0);
    for (features, odd, goes) in [
        (MERGEABLE, plains(&[1515]).remove(0), false),
        (MERGEABLE, unsummed.clone(), false),
        (ALL, unsummed, true),
        (ALL, segment, false),
    ] {
        each(features, |mut rig| {
            (0..3).for_each(|_| rig.offer_plain(4000));
            let given = [first.clone(), odd.clone(), first.clone()];
            let (count, _) = rig.deliver_usual(&frames(&given), 1500);
            let expected = if goes { 3 } else { 1 };
            assert_eq!(count, expected);
            let got = rig.frames();
            assert_eq!(got.len(), expected);
            if goes {
                assert_eq!(got[1].0.flags, NEEDS_CSUM);
                assert!(got[1].1 == odd.1);
            }
        });
    }
}

#[test]
fn what_is_written_together_is_marked_in_the_dirty_log_too() {
    use std::os::unix::fs::FileExt as _;
    each(MERGEABLE, |mut rig| {
        let at = rig.next;
        rig.offer_plain(2000);
        let given = plains(&[64]);
        assert_eq!(rig.deliver_usual(&frames(&given), 1500).0, 1);
        let mut byte = [0];
        let page = at / 4096;
        rig.log.read_exact_at(&mut byte, page / 8).expect("the log");
        assert_ne!(byte[0] & 1 << (page % 8), 0);
    });
}
