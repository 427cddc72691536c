//! Results of threads that measure.
#![forbid(unsafe_code)]

use std::thread::ScopedJoinHandle;

use super::BlockError;
use crate::load::LoadError;

/// What a thread of a scope found.
///
/// # Errors
/// Its own, or that it panicked.
pub fn joined<T>(thread: ScopedJoinHandle<'_, Result<T, BlockError>>) -> Result<T, BlockError> {
    thread.join().unwrap_or_else(|_| {
        Err(BlockError::Load {
            case: "a thread that measures".to_owned(),
            source: Box::new(LoadError::Panicked),
        })
    })
}
