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
        (MERGEABLE, segment, false),
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

#[test]
fn a_long_frame_comes_into_as_many_buffers_as_it_needs_and_the_others_are_put_back() {
    let segment = tcp_segment(60_000, 1400);
    each(ALL, |mut rig| {
        rig.was_put_back = true;
        for bytes in [4096, 4096, 5000, 4096, 4096, 3000, 4096].repeat(3) {
            rig.offer_plain(bytes);
        }
        let given = [segment.clone(), plains(&[64]).remove(0)];
        let (count, delivered) = rig.deliver_usual(&frames(&given[..1]), 1500);
        assert_eq!((count, delivered.packets), (1, 1));
        assert_eq!(delivered.bytes, segment.1.len() as u64);
        assert_eq!(rig.queue.in_flight(), 0);
        assert_eq!(rig.deliver_usual(&frames(&given[1..]), 1500).0, 1);
        let got = rig.frames();
        let [(told, bytes), (_, small)] = &got[..] else {
            panic!("{} frames", got.len());
        };
        assert_eq!((told.num_buffers, told.gso_size), (15, 1400));
        assert!(bytes == &segment.1 && small == &given[1].1);
    });
}

#[test]
fn what_a_long_frame_does_not_fit_into_is_put_back_as_a_whole() {
    let segment = tcp_segment(60_000, 1400);
    let total = 12 + segment.1.len();
    for lengths in [
        vec![4096; 14],
        // The header and what was looked at are not in the first one.
        [vec![60], vec![4096; 15]].concat(),
        // Shorter ones than are usual: as many as are taken have not enough room.
        vec![1536; total.div_ceil(1536)],
    ] {
        each(ALL, |mut rig| {
            rig.was_put_back = true;
            lengths.iter().for_each(|bytes| rig.offer_plain(*bytes));
            let given = [segment.clone()];
            assert_eq!(rig.deliver_usual(&frames(&given), 1500).0, 0);
            assert_eq!(rig.queue.in_flight(), 0);
            let room: usize = lengths.iter().sum();
            let (header, bytes) = &segment;
            let fits = rig.deliver(header, bytes).is_ok();
            assert_eq!(fits, room >= total);
            if fits {
                let got = rig.frames();
                assert_eq!(usize::from(got[0].0.num_buffers), lengths.len());
                assert!(got[0].1 == *bytes);
            }
        });
    }
}

#[test]
fn how_long_buffers_are_is_learned() {
    let segment = tcp_segment(20_000, 1400);
    each(ALL, |mut rig| {
        rig.was_put_back = true;
        let given = [segment.clone()];
        for expected in [0, 1] {
            let buffers = (12 + segment.1.len()).div_ceil(1536);
            (0..buffers).for_each(|_| rig.offer_plain(1536));
            let (count, _) = rig.deliver_usual(&frames(&given), 1500);
            assert_eq!(count, expected);
            if count == 0 {
                assert!(rig.deliver(&segment.0, &segment.1).is_ok());
            }
            let got = rig.frames();
            assert!(got.len() == 1 && got[0].1 == segment.1);
        }
    });
}
