//! Times in the source: a TOML time with its offset, or Unix seconds.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use toml::de::DeValue;
use toml::value::{Datetime, Offset};

use crate::reader::{SourceError, Table};

/// A field as Unix seconds.
pub(super) fn time(table: &Table<'_, '_>, field: &'static str) -> Result<u64, SourceError> {
    match table.value(field) {
        None => Err(table.error(field, "is missing")),
        Some(DeValue::Integer(_)) => table.integer(field, u64::MAX),
        Some(DeValue::Datetime(time)) => unix_seconds(time).ok_or_else(|| {
            table.error(
                field,
                "must be a time with its offset, like 2026-01-31T12:00:00Z, not before 1970",
            )
        }),
        Some(_) => Err(table.error(
            field,
            "must be a time like 2026-01-31T12:00:00Z, or a number of Unix seconds",
        )),
    }
}

/// Seconds since 1970 of a time with date and offset; a fraction is dropped.
fn unix_seconds(time: &Datetime) -> Option<u64> {
    let (date, clock) = (time.date?, time.time?);
    let offset_minutes = match time.offset? {
        Offset::Z => 0,
        Offset::Custom { minutes } => i64::from(minutes),
    };
    let (year, month, day) = (
        i64::from(date.year),
        i64::from(date.month),
        i64::from(date.day),
    );
    // Days since 1970-01-01 in the proleptic Gregorian calendar, with years from March.
    let shifted = if month > 2 { year } else { year - 1 };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let leap_days = shifted.div_euclid(4) - shifted.div_euclid(100) + shifted.div_euclid(400);
    let days = shifted * 365 + leap_days + day_of_year - 719_468;
    let seconds = i64::from(clock.hour) * 3600
        + i64::from(clock.minute) * 60
        + i64::from(clock.second.unwrap_or(0));
    u64::try_from(days * 86_400 + seconds - offset_minutes * 60).ok()
}
