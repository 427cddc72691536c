//! Frames into receive buffers of every shape, of both ring formats.

use std::sync::Arc;

use bulkhead_integration::driver::desc::Desc;
use bulkhead_integration::packets::{Packet, TCP, UDP, check};
use bulkhead_integration::random::Random;

use super::rig::{ALL, BASE, BUFFERS, MEMORY_BYTES, MERGEABLE, Rig, UNTOUCHED, each};
use super::{key, pattern, segment, tcp, tcp_segment, unsummed};
use crate::net::frame::Frame;
use crate::net::header::{
    DATA_VALID, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Header, NEEDS_CSUM, feature,
};
use crate::net::receive::{Delivered, Receiver, Refused, Scratch, deliver};
use crate::port::DropReason;
use crate::vhost_user::feature::VERSION_1;
use crate::virtqueue::RingError;

fn dropped(reason: DropReason) -> Result<Delivered, Refused> {
    Err(Refused::Dropped(reason))
}

fn delivered(packets: u64, bytes: usize) -> Result<Delivered, Refused> {
    Ok(Delivered {
        packets,
        bytes: bytes as u64,
    })
}

#[test]
fn a_frame_comes_whole_into_one_buffer_or_many() {
    each(ALL, |mut rig| {
        let (header, bytes) = tcp_segment(60_000, 1400);
        let total = 12 + bytes.len();
        for lengths in [
            vec![vec![total]],
            vec![vec![total + 100]],
            vec![vec![12, 14, total]],
            vec![vec![1, 1, 40, 0, 9, total - 51 + 12]],
            vec![vec![1536]; total.div_ceil(1536)],
            [vec![vec![26]], vec![vec![100]; 30], vec![vec![total]]].concat(),
            vec![vec![700, 324]; total.div_ceil(1024)],
        ] {
            for chain in &lengths {
                rig.offer(chain);
            }
            assert_eq!(rig.deliver(&header, &bytes), delivered(1, bytes.len()));
            let frames = rig.frames();
            let [(told, got)] = &frames[..] else {
                panic!("{} frames", frames.len());
            };
            assert_eq!(usize::from(told.num_buffers), lengths.len());
            assert_eq!((told.flags, told.gso_type), (NEEDS_CSUM, GSO_TCPV4));
            assert_eq!((told.gso_size, told.hdr_len), (1400, 54));
            assert_eq!((told.csum_start, told.csum_offset), (34, 16));
            assert!(got == &bytes, "{lengths:?}");
            assert_eq!(rig.queue.in_flight(), 0);
            // The next ones.
            rig = Rig::new(rig.features);
        }
    });
}

#[test]
fn too_few_buffers_are_all_there_afterwards() {
    each(ALL, |mut rig| {
        rig.was_put_back = true;
        let (header, bytes) = tcp_segment(10_000, 1400);
        // More than a split queue reads ahead.
        for round in 0..4 {
            for _ in 0..20 {
                rig.offer(&[400]);
            }
            let refused = rig.deliver(&header, &bytes);
            assert_eq!(refused, dropped(DropReason::NoRoom));
            rig.assert_untouched();
            let small = tcp(300 + round).complete();
            let taken = rig.deliver(&Header::default(), &small);
            assert_eq!(taken, delivered(1, small.len()));
            for _ in 0..8 {
                rig.offer(&[400]);
            }
            let taken = rig.deliver(&header, &bytes);
            assert_eq!(taken, delivered(1, bytes.len()));
            let used = rig.used();
            let ids: Vec<u32> = used.iter().map(|(id, _)| *id).collect();
            let first = u32::try_from(28 * round).expect("small");
            assert_eq!(ids, (first..first + 27).collect::<Vec<_>>(), "in order");
            assert!(used[0].1[12..] == small);
            let whole: Vec<u8> = used[1..]
                .iter()
                .flat_map(|(_, part)| part.clone())
                .collect();
            assert!(whole[12..] == bytes);
            // The one that is left.
            let taken = rig.deliver(&Header::default(), &small);
            assert_eq!(taken, delivered(1, small.len()));
            rig.used();
        }
        assert_eq!(
            rig.deliver(&header, &bytes),
            dropped(DropReason::NoRoom),
            "none at all"
        );
    });
}

#[test]
fn without_mergeable_buffers_a_frame_comes_into_one_chain_or_not_at_all() {
    for (features, size) in [(VERSION_1, 12), (0, 10)] {
        each(features, |mut rig| {
            let bytes = tcp(1000).complete();
            rig.offer(&[600, size + bytes.len() - 601]);
            rig.offer(&[2000]);
            let refused = rig.deliver(&Header::default(), &bytes);
            assert_eq!(refused, dropped(DropReason::NoRoom), "a byte is missing");
            rig.assert_untouched();
            let short = tcp(999).complete();
            assert_eq!(
                rig.deliver(&Header::default(), &short),
                delivered(1, short.len())
            );
            assert_eq!(
                rig.deliver(&Header::default(), &bytes),
                delivered(1, bytes.len())
            );
            let frames = rig.frames();
            assert!(frames[0].1 == short && frames[1].1 == bytes);
            // Only one of before version 1.0 has no such field.
            let count = u16::from(size == 12);
            assert_eq!(frames[0].0.num_buffers, count);
        });
    }
}

#[test]
fn chains_that_no_frame_fits_into_are_given_back_empty() {
    each(ALL, |mut rig| {
        let bytes = tcp(100).complete();
        rig.offer(&[25]);
        rig.offer_descs(&[Desc::readable(BUFFERS, 4096)]);
        rig.offer(&[0]);
        rig.offer(&[200]);
        assert_eq!(
            rig.deliver(&Header::default(), &bytes),
            delivered(1, bytes.len())
        );
        let used = rig.used();
        let lengths: Vec<usize> = used.iter().map(|(_, bytes)| bytes.len()).collect();
        assert_eq!(lengths, [0, 0, 0, 12 + bytes.len()]);
        // Only so many for one frame; the next one goes on.
        for _ in 0..6 {
            rig.offer(&[3]);
        }
        rig.offer(&[200]);
        let refused = rig.deliver(&Header::default(), &bytes);
        assert_eq!(refused, dropped(DropReason::BadBuffers));
        assert_eq!(rig.used().len(), 5);
        assert_eq!(
            rig.deliver(&Header::default(), &bytes),
            delivered(1, bytes.len())
        );
        assert_eq!(rig.used().len(), 2);
    });
}

#[test]
fn an_empty_chain_in_the_middle_of_a_frame_does_not_stand_in_the_way() {
    each(ALL, |mut rig| {
        let bytes = tcp(1000).complete();
        rig.offer(&[100]);
        rig.offer(&[100]);
        rig.offer_descs(&[Desc::readable(BUFFERS, 4096)]);
        rig.offer(&[2000]);
        let refused = rig.deliver(&Header::default(), &bytes);
        assert_eq!(refused, dropped(DropReason::BadBuffers));
        // What was written to the first two is not theirs to read.
        rig.queue.publish();
        for _ in 0..3 {
            let used = rig.ring.poll_used(&rig.memory).expect("good");
            assert_eq!(used.expect("used").len, 0);
        }
        assert_eq!(
            rig.deliver(&Header::default(), &bytes),
            delivered(1, bytes.len())
        );
        assert_eq!(rig.frames().len(), 1);
    });
}

#[test]
fn a_ring_that_breaks_in_the_middle_of_a_frame_keeps_nothing() {
    each(ALL, |mut rig| {
        let bytes = tcp(1000).complete();
        rig.offer(&[100]);
        rig.offer_descs(&[Desc::writable(BASE + MEMORY_BYTES, 4096)]);
        let refused = rig.deliver(&Header::default(), &bytes);
        let Err(Refused::Broken(RingError::OutsideMemory { .. })) = refused else {
            panic!("{refused:?}");
        };
        rig.assert_untouched();
    });
}

#[test]
fn a_frame_needs_no_more_buffers_than_there_may_be() {
    // The header and Ethernet in one, and every other byte in one of its own: of a frame of up to 64 bytes with its
    // header 33 may be.
    each(ALL, |mut rig| {
        let bytes = tcp(0).complete();
        rig.offer(&[34]);
        for _ in 0..bytes.len() - 22 {
            rig.offer(&[1]);
        }
        assert_eq!(
            rig.deliver(&Header::default(), &bytes),
            delivered(1, bytes.len())
        );
        let frames = rig.frames();
        assert_eq!(frames[0].0.num_buffers, 33);
        assert!(frames[0].1 == bytes);
    });
}

/// Whoever sends looks at each of them, which leads to nothing: they are out of the way for the next frame.
#[test]
fn buffers_of_which_a_frame_needs_too_many_go_back() {
    each(ALL, |mut rig| {
        let bytes = tcp(0).complete();
        rig.offer(&[26]);
        for _ in 0..40 {
            rig.offer(&[1]);
        }
        let refused = rig.deliver(&Header::default(), &bytes);
        assert_eq!(refused, dropped(DropReason::BadBuffers));
        rig.queue.publish();
        let mut given_back = 0;
        while let Some(used) = rig.ring.poll_used(&rig.memory).expect("good") {
            assert_eq!(used.len, 0);
            given_back += 1;
        }
        assert_eq!(given_back, 34);
    });
}

#[test]
fn longer_than_the_mtu_is_too_long_unless_it_is_cut() {
    each(ALL, |mut rig| {
        rig.offer(&[70_000]);
        let long = tcp(1461).complete();
        let frame = Frame::of_bytes(&Header::default(), &long, key()).expect("good");
        let refused = rig.deliver_with_mtu(&frame, 1500);
        assert_eq!(refused, dropped(DropReason::TooLong));
        for (mss, fits) in [(1461, false), (1460, true)] {
            let (header, bytes) = tcp_segment(20_000, mss);
            let frame = Frame::of_bytes(&header, &bytes, key()).expect("good");
            assert_eq!(rig.deliver_with_mtu(&frame, 1500).is_ok(), fits);
        }
    });
}

/// What each driver gets of each frame: the same bytes, with what it has not negotiated done.
#[test]
fn a_driver_gets_only_offloads_that_it_negotiated() {
    const CSUM: u64 = MERGEABLE | feature::GUEST_CSUM;
    let payload = pattern(5000);
    for (packet, gso_type, bit) in [
        (Packet::v4(TCP, &payload), GSO_TCPV4, feature::GUEST_TSO4),
        (Packet::v6(TCP, &payload), GSO_TCPV6, feature::GUEST_TSO6),
        (Packet::v4(UDP, &payload), GSO_UDP_L4, feature::GUEST_USO4),
        (Packet::v6(UDP, &payload), GSO_UDP_L4, feature::GUEST_USO6),
    ] {
        // Segments are not taken without checksums (5.1.3.1), whatever is negotiated.
        for (features, count, flags) in [
            (CSUM | bit, 1, NEEDS_CSUM),
            (ALL & !bit, 4, NEEDS_CSUM),
            (CSUM, 4, NEEDS_CSUM),
            (MERGEABLE | bit, 4, 0),
            (MERGEABLE, 4, 0),
        ] {
            each(features, |mut rig| {
                for _ in 0..5 {
                    rig.offer(&[1000, 9000]);
                }
                let (header, bytes) = segment(&packet, gso_type, 1400);
                let headers = packet.header_bytes();
                let all = headers * count + payload.len();
                assert_eq!(rig.deliver(&header, &bytes), delivered(count as u64, all));
                let frames = rig.frames();
                assert_eq!(frames.len(), count);
                for (told, got) in frames {
                    assert_eq!((told.flags, told.num_buffers), (flags, 1));
                    let kind = if count == 1 { gso_type } else { GSO_NONE };
                    assert_eq!(told.gso_type, kind);
                    assert_eq!(check(&got).is_ok(), flags == 0);
                }
            });
        }
    }
    for (features, is_left) in [(CSUM, true), (MERGEABLE, false), (VERSION_1, false)] {
        each(features, |mut rig| {
            rig.offer(&[9000]);
            let packet = Packet::v6(UDP, &payload);
            let (header, bytes) = unsummed(&packet);
            assert_eq!(rig.deliver(&header, &bytes), delivered(1, bytes.len()));
            let (told, got) = rig.frames().pop().expect("one");
            assert_eq!(told.flags, if is_left { NEEDS_CSUM } else { 0 });
            assert!(got == if is_left { bytes } else { packet.complete() });
        });
    }
}

#[test]
fn a_frame_that_is_cut_comes_as_far_as_there_is_room() {
    each(MERGEABLE, |mut rig| {
        rig.offer(&[2000]);
        rig.offer(&[2000]);
        rig.offer(&[100]);
        let (header, bytes) = tcp_segment(5000, 1400);
        let mut scratch = Scratch::default();
        let mut got = Delivered::default();
        let frame = Frame::of_bytes(&header, &bytes, key()).expect("good");
        let receiver = Receiver::of(rig.features, 1500);
        let refused = deliver(&mut rig.queue, receiver, &mut scratch, &frame, &mut got);
        assert_eq!(refused, Err(Refused::Dropped(DropReason::NoRoom)));
        assert_eq!(Ok(got), delivered(2, 2 * 1454));
        assert_eq!(rig.frames().len(), 2);
        assert_eq!(rig.queue.in_flight(), 0);
    });
}

#[test]
fn that_data_is_valid_is_told_to_drivers_that_leave_checksums() {
    for (features, flags) in [(ALL, DATA_VALID), (MERGEABLE, 0)] {
        each(features, |mut rig| {
            rig.offer(&[2000]);
            let header = Header {
                flags: DATA_VALID,
                ..Header::default()
            };
            let bytes = tcp(10).complete();
            let frame = Frame::of_bytes(&header, &bytes, key()).expect("good");
            assert_eq!(
                rig.deliver_with_mtu(&frame, 1500),
                delivered(1, bytes.len())
            );
            assert_eq!(rig.frames()[0].0.flags, flags);
        });
    }
}

/// A migration copies what was received.
#[test]
fn what_is_written_is_marked_in_the_dirty_log() {
    each(ALL, |mut rig| {
        let at = BUFFERS + 0x10_0000;
        rig.next = at - 500;
        rig.offer(&[450]);
        rig.next = at + 3 * 4096;
        rig.offer(&[100, 4096]);
        let bytes = tcp(1000).complete();
        assert_eq!(
            rig.deliver(&Header::default(), &bytes),
            delivered(1, bytes.len())
        );
        let page = at / 4096;
        let mut marks = [0; 2];
        let first = (page - 1) / 8;
        std::os::unix::fs::FileExt::read_exact_at(&rig.log, &mut marks, first).expect("read");
        let marks = u16::from_le_bytes(marks);
        let pages: Vec<u64> = (0..16)
            .filter(|bit| marks & (1 << bit) != 0)
            .map(|bit| first * 8 + bit)
            .collect();
        assert_eq!(
            pages,
            [page - 1, page + 3],
            "and not the one that nothing was written to"
        );
    });
}

/// The same guest memory for both: what is received overlaps what was sent.
#[test]
fn a_frame_may_overlap_the_buffers_that_it_is_received_in() {
    use crate::memory::{GuestBuffer, Lease};
    let (memory, file) = crate::memory::anonymous(0x4000).expect("memory");
    let lease = Lease::new(Arc::new(memory));
    let bytes = pattern(0x1000);
    std::os::unix::fs::FileExt::write_all_at(&file_of(file), &bytes, 0x1000).expect("inside");
    let buffer = |pieces: &[(u64, u32)]| {
        let mut buffer = GuestBuffer::default();
        buffer.reset(&lease);
        for (at, length) in pieces {
            buffer.push(*at, *length).expect("inside");
        }
        buffer
    };
    let from = buffer(&[(0x1000, 0x1000)]);
    let to = buffer(&[(0x1010, 0x1000)]);
    assert!(to.copy_from(0, &from, 0, 0x1000));
    let mut got = vec![0; 0x1000];
    assert!(to.copy_out(0, &mut got));
    assert_eq!(got, bytes);
}

fn file_of(fd: std::os::fd::OwnedFd) -> std::fs::File {
    fd.into()
}

/// Buffers of one memory into buffers of another, however both are cut.
#[test]
fn bytes_are_copied_from_any_buffer_to_any() {
    let mut random = Random::named("copies");
    for _ in 0..300 {
        let (from, to) = (super::Guest::new(), super::Guest::new());
        let bytes = random.bytes(2000);
        let mut pieces =
            || -> Vec<usize> { (0..random.index(20)).map(|_| random.index(300)).collect() };
        let (cut_from, cut_to) = (pieces(), pieces());
        let from = from.buffer(&bytes, &cut_from);
        let to = to.buffer(&vec![UNTOUCHED; 2000], &cut_to);
        let (at, begin) = (random.index(1000), random.index(1000));
        let length = random.index(1001);
        assert!(to.copy_from(at as u64, &from, begin as u64, length));
        let mut got = vec![0; 2000];
        assert!(to.copy_out(0, &mut got));
        let mut expected = vec![UNTOUCHED; 2000];
        expected[at..at + length].copy_from_slice(&bytes[begin..begin + length]);
        assert!(
            got == expected,
            "{at}, {begin}, {length}: {cut_from:?} {cut_to:?}"
        );
        assert!(!to.copy_from(1001, &from, 0, 1000), "no room");
        assert!(!to.copy_from(0, &from, 1001, 1000), "not so many");
    }
}
