//! What the ciphers cost on a core, beside libraries that do the same and beside what the CPU's AES units
//! allow: `cargo xtask bench crypto`.
//!
//! Two ciphers that are compared must have made the same bytes first ([`Differ`]). Each case is measured
//! in turns ([`bulkhead_benches::ratio`]) on one core.
//!
//! | module | owns |
//! | --- | --- |
//! | [`row`] | what is written down |
//! | [`xts`] | AES-256-XTS in every shape of call |
//! | [`ceiling`] | AES rounds on registers, and nothing else |
//! | [`peers`] | libraries, each called the best way it has |
//! | [`header`] | what ran, and how |
//! | [`table`] | figures for people |
//! | [`plot`] | the same as a picture |

pub mod ceiling;
pub mod header;
pub mod peers;
pub mod plot;
pub mod row;
pub mod table;
pub mod xts;

use bulkhead_benches::ratio::Pace;

use row::Row;

/// Two ciphers made different bytes of the same: then there is nothing to compare, and something is broken.
#[derive(Debug, thiserror::Error)]
#[error("{case}: {peer} makes other bytes than Bulkhead of the same key, data and numbers")]
pub struct Differ {
    /// What was tried.
    pub case: String,
    /// Beside whom.
    pub peer: &'static str,
}

/// Measures something; gives its rows.
type Measurement = fn(Pace) -> Result<Vec<Row>, Differ>;

/// Everything that is measured, in the order of the table.
const MEASUREMENTS: &[Measurement] = &[xts::measure];

/// Measures everything.
///
/// # Errors
/// [`Differ`].
pub fn measure(pace: Pace) -> Result<Vec<Row>, Differ> {
    let mut rows = Vec::new();
    for measurement in MEASUREMENTS {
        rows.extend(measurement(pace)?);
    }
    Ok(rows)
}
