//! When a driver wants to be called (virtio 1.2, 2.7.7.2 and 2.7.10).
#![forbid(unsafe_code)]

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
pub const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
pub const NO_NOTIFY: u16 = 1;

/// With EVENT_IDX: whether the used index, on its way from `old` to `new`, passed `event`
/// (all modulo 2^16).
#[must_use]
#[inline]
pub fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
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
    }
}
