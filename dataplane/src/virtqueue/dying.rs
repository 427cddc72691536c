//! Deaths between two stores to shared memory, for tests: every store of a ring or of an in-flight region says so
//! before. In a program it is nothing.
#![forbid(unsafe_code)]

#[cfg(not(test))]
#[inline(always)]
pub(super) fn step() {}

#[cfg(test)]
pub(super) use testing::step;

#[cfg(test)]
pub(super) mod testing {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    /// What a death unwinds with.
    struct Death;

    thread_local! {
        /// Stores that this thread may still do; none: any number.
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// A store is about to be done.
    pub(in crate::virtqueue) fn step() {
        LEFT.with(|left| match left.get() {
            Some(0) => resume_unwind(Box::new(Death)),
            Some(n) => left.set(Some(n - 1)),
            None => {}
        });
    }

    /// What `f` returns; none if it would do more than `stores` stores: it dies before the next one.
    pub(in crate::virtqueue) fn within<T>(stores: usize, f: impl FnOnce() -> T) -> Option<T> {
        LEFT.with(|left| left.set(Some(stores)));
        let result = catch_unwind(AssertUnwindSafe(f));
        LEFT.with(|left| left.set(None));
        match result {
            Ok(value) => Some(value),
            Err(death) if death.is::<Death>() => None,
            Err(other) => resume_unwind(other),
        }
    }
}
