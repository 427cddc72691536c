//! A value that the control thread replaces while workers use it: each worker has a copy of its own, and looks once in
//! a turn whether there is a newer one.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The value as it is now.
#[derive(Debug)]
pub struct Current<T> {
    /// Another one with each value.
    number: AtomicU32,
    value: Mutex<Arc<T>>,
}

impl<T> Current<T> {
    /// The first value.
    #[must_use]
    pub fn new(value: T) -> Self {
        Self {
            number: AtomicU32::new(0),
            value: Mutex::new(Arc::new(value)),
        }
    }

    /// Replaces it. Workers take it with their next turns.
    pub fn set(&self, value: T) {
        *self.value.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
        self.number.fetch_add(1, Ordering::Release);
    }

    /// It.
    #[must_use]
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.value.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A worker's copy.
#[derive(Debug)]
pub struct Seen<T> {
    number: u32,
    value: Arc<T>,
}

impl<T> Seen<T> {
    /// A copy of what is there now.
    #[must_use]
    pub fn of(current: &Current<T>) -> Self {
        // The number first: a value that comes between the two is looked at again.
        let number = current.number.load(Ordering::Acquire);
        let value = current.get();
        Self { number, value }
    }

    /// The value, newly taken if there is another.
    #[inline]
    pub fn look(&mut self, current: &Current<T>) -> &T {
        if self.number != current.number.load(Ordering::Acquire) {
            *self = Self::of(current);
        }
        &self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_taken_anew_only_if_there_is_another() {
        let current = Current::new(1);
        let mut seen = Seen::of(&current);
        let first = Arc::as_ptr(&seen.value);
        assert_eq!(*seen.look(&current), 1);
        assert_eq!(Arc::as_ptr(&seen.value), first);
        current.set(2);
        assert_eq!((*seen.look(&current), *current.get()), (2, 2));
    }

    #[test]
    fn the_last_value_is_seen_whenever_it_comes() {
        let current = Arc::new(Current::new(0));
        let setter = Arc::clone(&current);
        let thread = std::thread::spawn(move || (1..=1000).for_each(|n| setter.set(n)));
        let mut seen = Seen::of(&current);
        let mut last = 0;
        while last < 1000 {
            let now = *seen.look(&current);
            assert!(now >= last, "{now} after {last}");
            last = now;
        }
        thread.join().expect("set");
    }
}
