//! The error of a command: a text for the operator that says what, where and what to do.

use std::error::Error;
use std::fmt;

/// Why a command was refused or failed.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// An error about a file.
    pub(crate) fn at(path: &std::path::Path, error: impl fmt::Display) -> Self {
        Self(format!("{}: {error}", path.display()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// Failure itself is no `Error`, so that every error of the libraries can become one by `?`.
impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}
