//! What the text files that people handle have in common: bundles' sources, trust roots, and the
//! keys of operators, hosts and recovery.
//!
//! [`reader`] reads TOML with errors that name file, line and field; [`text`] writes bytes as
//! base64 and hex; [`private_file`] keeps secrets from others' eyes; [`name`] says what a name is.
//! A crate of its own because the keys of operators are AWS-LC's and those of hosts are not
//! (ADR 0004): neither side links the other's cryptography for the sake of a file format.
#![forbid(unsafe_code)]

pub mod name;
pub mod private_file;
pub mod reader;
pub mod text;

pub use reader::SourceError;
