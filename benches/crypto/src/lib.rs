//! What the ciphers cost on a core, beside libraries that do the same and beside what the CPU's AES units
//! allow: `cargo xtask bench crypto`.
//!
//! Two ciphers that are compared must have made the same bytes first ([`Differ`]). Each case is measured
//! in turns ([`bulkhead_benches::ratio`]) on one core.
//!
//! | module | owns |
//! | --- | --- |
//! | [`xts`] | AES-256-XTS in every shape of call |
//! | [`gcm`] | AES-256-GCM of packets |
//! | [`ceiling`] | AES rounds on registers, and nothing else |
//! | [`peers`] | libraries, each called the best way it has |
//! | [`placement`] | a large request on one core or two |
//! | [`header`] | what ran, and how |
//!
//! Rows, tables and pictures are those of [`bulkhead_benches::figures`].

pub mod ceiling;
pub mod gcm;
pub mod header;
pub mod peers;
pub mod placement;
pub mod xts;

use bulkhead_benches::figures::header::pin;
use bulkhead_benches::figures::row::Row;
use bulkhead_benches::ratio::Pace;

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

/// What is measured on one core, in the order of the table.
const ON_ONE_CORE: &[Measurement] = &[xts::measure, gcm::measure];

/// What is measured on two, afterwards.
const ON_TWO_CORES: &[Measurement] = &[placement::measure];

/// Measures everything; the rows, and the CPU that had those of one core.
///
/// # Errors
/// [`Differ`].
pub fn measure(pace: Pace) -> Result<(Vec<Row>, Option<usize>), Differ> {
    // A thread of its own, so that the others may go elsewhere.
    let one_core = std::thread::spawn(move || {
        let cpu = pin();
        (all(ON_ONE_CORE, pace), cpu)
    });
    let (rows, cpu) = match one_core.join() {
        Ok(measured) => measured,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let mut rows = rows?;
    rows.extend(all(ON_TWO_CORES, pace)?);
    Ok((rows, cpu))
}

fn all(measurements: &[Measurement], pace: Pace) -> Result<Vec<Row>, Differ> {
    let mut rows = Vec::new();
    for measurement in measurements {
        rows.extend(measurement(pace)?);
    }
    Ok(rows)
}
