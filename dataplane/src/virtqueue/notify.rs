//! When a driver wants to be called (virtio 1.2, 2.7.7.2, 2.7.10 and 2.8.10).
#![forbid(unsafe_code)]

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
pub const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
pub const NO_NOTIFY: u16 = 1;

/// `RING_EVENT_FLAGS_ENABLE`: for each (packed rings, 2.8.14).
pub const EVENT_ENABLE: u32 = 0;
/// `RING_EVENT_FLAGS_DISABLE`: never.
pub const EVENT_DISABLE: u32 = 1;
/// `RING_EVENT_FLAGS_DESC`: for one descriptor, with EVENT_IDX.
pub const EVENT_DESC: u32 = 2;

/// With EVENT_IDX: whether the used index, on its way from `old` to `new`, passed `event`
/// (all modulo 2^16).
#[must_use]
#[inline]
pub fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// As [`passed`], of a packed ring: each place is an index below `size` with its wrap counter in bit
/// 15, and a way is at most once around. An event that is no place is passed always.
#[must_use]
#[inline]
pub fn passed_packed(event: u16, new: u16, old: u16, size: u16) -> bool {
    // Places of two turns, on a circle.
    let turn = u32::from(size);
    let place = |at: u16| u32::from(at & 0x7fff) + if at & 0x8000 != 0 { 0 } else { turn };
    let from = |a: u32, b: u32| (a + 2 * turn - b) % (2 * turn);
    if event & 0x7fff >= size {
        return true;
    }
    let (event, new, old) = (place(event), place(new), place(old));
    from(event, old) < from(new, old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_once() {
        // The driver asks to be called when entry `event` is used: the index goes to event + 1.
        for event in [0u16, 1, 7, 0x7fff, 0xffff] {
            for batch in 1u16..5 {
                let mut calls = 0;
                let mut at = event.wrapping_sub(8);
                for _ in 0..8 {
                    let next = at.wrapping_add(batch);
                    calls += u32::from(passed(event, next, at));
                    at = next;
                }
                let expected = u32::from(8 * batch > 8);
                assert_eq!(calls, expected, "event {event}, batch {batch}");
            }
        }
    }

    #[test]
    fn nothing_used_is_no_call() {
        assert!(!passed(5, 6, 6));
        assert!(!passed_packed(5, 6, 6, 8));
    }

    /// A place of a packed ring after that many descriptors.
    fn place(count: u16, size: u16) -> u16 {
        let wrap = u16::from((count / size).is_multiple_of(2));
        (count % size) | (wrap << 15)
    }

    #[test]
    fn an_event_of_a_packed_ring_is_passed_once_in_two_turns() {
        for size in [1u16, 3, 8, 100] {
            for batch in 1..=size {
                for event in 0..2 * size {
                    let (mut calls, mut at) = (0, 0);
                    while at < event {
                        at += batch;
                    }
                    // From here on, until it comes around again.
                    let end = event + 2 * size;
                    while at + batch <= end {
                        let old = place(at, size);
                        calls += u32::from(passed_packed(
                            place(event, size),
                            place(at + batch, size),
                            old,
                            size,
                        ));
                        at += batch;
                    }
                    assert!(calls <= 1, "size {size}, batch {batch}, event {event}");
                    let next = place(event + 1, size);
                    assert!(passed_packed(
                        place(event, size),
                        next,
                        place(event, size),
                        size
                    ));
                }
            }
        }
    }

    #[test]
    fn an_event_behind_the_ring_is_a_call() {
        assert!(passed_packed(8, 2, 1, 8));
        assert!(passed_packed(0xffff, 2, 1, 8));
    }
}
