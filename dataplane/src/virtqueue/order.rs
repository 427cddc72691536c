//! VIRTIO_F_IN_ORDER (virtio 1.2, 2.7.9 and 2.8.6): requests end in any order, and are shown as
//! used in the order in which they were made available.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// A chain that was taken.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    head: u16,
    /// Bytes written, once it has ended.
    len: Option<u32>,
}

/// Chains in the order in which they were taken, until they are shown as used.
#[derive(Debug)]
pub(super) struct Order {
    /// One place for each chain that can be in flight; used round and round.
    places: Box<[Taken]>,
    /// Where each head is.
    place_of: Box<[u16]>,
    first: usize,
    count: usize,
    /// Chains of a run that was taken while nothing was in flight. They come before all others, and have no places.
    leading: usize,
}

impl Order {
    /// For heads below `size`.
    pub(super) fn new(size: u16) -> Self {
        let size = usize::from(size);
        Self {
            places: vec![Taken::default(); size].into_boxed_slice(),
            place_of: vec![0; size].into_boxed_slice(),
            first: 0,
            count: 0,
            leading: 0,
        }
    }

    fn wrapped(&self, place: usize) -> usize {
        if place < self.places.len() {
            place
        } else {
            place - self.places.len()
        }
    }

    /// A chain was taken; its head is not in flight, so that there is a place for it.
    pub(super) fn taken(&mut self, head: u16) {
        let place = self.wrapped(self.first + self.count);
        if let (Some(taken), Some(of)) = (
            self.places.get_mut(place),
            self.place_of.get_mut(usize::from(head)),
        ) {
            *taken = Taken { head, len: None };
            // A place is below the size, which is a u16.
            *of = u16::try_from(place).unwrap_or(0);
            self.count += 1;
        }
    }

    /// Chains were taken together. True: nothing else is in flight, so that they lead: whoever has them ends them first to
    /// last ([`Order::leaders_ended`]), and nothing is noted of each. False: they are as if taken one by one.
    #[inline]
    pub(super) fn run_taken(&mut self, heads: impl ExactSizeIterator<Item = u16>) -> bool {
        if self.count == 0 && self.leading == 0 {
            self.leading = heads.len();
            return true;
        }
        heads.for_each(|head| self.taken(head));
        false
    }

    /// The first so many that lead have ended, or were put back: whether the next chain that is to be shown has ended,
    /// too.
    #[inline]
    pub(super) fn leaders_ended(&mut self, count: usize) -> bool {
        self.leading = self.leading.saturating_sub(count);
        self.has_next()
    }

    /// A chain in flight has ended.
    pub(super) fn ended(&mut self, head: u16, len: u32) {
        let place = self.place_of.get(usize::from(head)).copied().unwrap_or(0);
        if let Some(taken) = self.places.get_mut(usize::from(place)) {
            taken.len = Some(len);
        }
    }

    /// A chain in flight has ended that is to be shown next, which is what happens unless several are under way; false:
    /// it is not that one, and nothing was noted.
    #[inline]
    pub(super) fn ended_first(&mut self, head: u16) -> bool {
        let first = self.places.get(self.first);
        if self.count == 0
            || self.leading > 0
            || first.is_none_or(|first| first.head != head || first.len.is_some())
        {
            return false;
        }
        self.first = self.wrapped(self.first + 1);
        self.count -= 1;
        true
    }

    /// Whether the next chain that is to be shown has ended.
    #[inline]
    pub(super) fn has_next(&self) -> bool {
        let first = self.places.get(self.first);
        self.count > 0 && self.leading == 0 && first.is_some_and(|first| first.len.is_some())
    }

    /// The `count` chains that were taken last are not in flight any more; none of them has ended.
    pub(super) fn forget_last(&mut self, count: usize) {
        self.count = self.count.saturating_sub(count);
    }

    /// One chain will never end: those that have ended and wait behind it, one by one.
    pub(super) fn dissolve(&mut self) -> Option<u16> {
        while self.count > 0 {
            let taken = *self.places.get(self.first)?;
            self.first = self.wrapped(self.first + 1);
            self.count -= 1;
            if taken.len.is_some() {
                return Some(taken.head);
            }
        }
        None
    }

    /// The next chain that can be shown as used.
    pub(super) fn next(&mut self) -> Option<(u16, u32)> {
        if self.count == 0 || self.leading > 0 {
            return None;
        }
        let taken = *self.places.get(self.first)?;
        let len = taken.len?;
        self.first = self.wrapped(self.first + 1);
        self.count -= 1;
        Some((taken.head, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_ends_first_is_shown_in_the_order_it_was_taken() {
        let mut order = Order::new(4);
        // Round and round, past the end of the places.
        for round in 0..5u16 {
            let heads = [round % 4, (round + 1) % 4, (round + 2) % 4];
            heads.iter().for_each(|head| order.taken(*head));
            order.ended(heads[2], 2);
            assert_eq!(order.next(), None);
            order.ended(heads[0], 0);
            assert_eq!(order.next(), Some((heads[0], 0)));
            assert_eq!(order.next(), None);
            order.ended(heads[1], 1);
            assert_eq!(order.next(), Some((heads[1], 1)));
            assert_eq!(order.next(), Some((heads[2], 2)));
            assert_eq!(order.next(), None);
        }
    }

    #[test]
    fn a_full_queue_has_a_place_for_each() {
        let mut order = Order::new(3);
        for head in [2, 0, 1] {
            order.taken(head);
        }
        for head in [1, 0, 2] {
            order.ended(head, u32::from(head));
        }
        let shown: Vec<_> = std::iter::from_fn(|| order.next()).collect();
        assert_eq!(shown, [(2, 2), (0, 0), (1, 1)]);
    }

    #[test]
    fn the_first_that_was_taken_needs_no_note_when_it_ends() {
        let mut order = Order::new(4);
        // Past the end of the places.
        for round in 0..3u16 {
            let heads = [round % 4, (round + 1) % 4, (round + 2) % 4];
            heads.iter().for_each(|head| order.taken(*head));
            assert!(!order.ended_first(heads[1]), "another one comes first");
            order.ended(heads[1], 7);
            assert!(order.ended_first(heads[0]) && order.has_next());
            assert!(!order.ended_first(heads[1]), "it has ended");
            assert_eq!(order.next(), Some((heads[1], 7)));
            assert!(!order.has_next() && order.ended_first(heads[2]));
            assert!(!order.ended_first(heads[2]) && order.next().is_none());
        }
    }

    #[test]
    fn a_run_that_was_taken_alone_comes_before_all_others() {
        let mut order = Order::new(4);
        for _ in 0..3 {
            assert!(order.run_taken([3, 1].into_iter()));
            order.taken(0);
            assert!(!order.run_taken([2].into_iter()), "others are in flight");
            assert!(!order.ended_first(0), "the run comes first");
            order.ended(0, 5);
            assert!(!order.has_next() && order.next().is_none());
            assert!(!order.leaders_ended(1), "one is left");
            assert!(order.leaders_ended(1));
            assert_eq!(order.next(), Some((0, 5)));
            assert!(order.ended_first(2));
        }
    }

    #[test]
    fn nothing_waits_for_a_run_of_a_queue_that_is_given_up() {
        let mut order = Order::new(4);
        assert!(order.run_taken([3].into_iter()));
        order.taken(0);
        order.taken(1);
        order.ended(1, 5);
        assert_eq!(order.dissolve(), Some(1));
        assert_eq!(order.dissolve(), None);
    }
}
