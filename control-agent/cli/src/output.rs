//! What commands write: public files, envelopes, and times, sizes and texts for people.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use bulkhead_files::private_file;

use crate::failure::Failure;

/// The name of the public half of a key file: the same with `.pub` behind it.
pub(crate) fn public_path(secret: &Path) -> PathBuf {
    let mut path = secret.as_os_str().to_owned();
    path.push(".pub");
    path.into()
}

/// Refuses a path at which something is, before anything is made that would have to be undone.
pub(crate) fn must_be_new(path: &Path) -> Result<(), Failure> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(private_file::PrivateFileError::Exists(path.to_owned()).into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::at(path, error)),
    }
}

/// Runs the second half of a pair of files; if it fails, what the first half made is removed.
pub(crate) fn or_remove<T, E: Into<Failure>>(
    made: &Path,
    second: Result<T, E>,
) -> Result<T, Failure> {
    second.map_err(|error| {
        // If this fails too, the first error says enough.
        let _ = fs::remove_file(made);
        error.into()
    })
}

/// Reads a file of at most `cap_bytes`.
pub(crate) fn read_capped(path: &Path, cap_bytes: usize) -> Result<Vec<u8>, Failure> {
    let file = fs::File::open(path).map_err(|e| Failure::at(path, e))?;
    let mut bytes = Vec::new();
    file.take(cap_bytes as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::at(path, e))?;
    if bytes.len() > cap_bytes {
        return Err(Failure::at(
            path,
            format!("is over the size cap of {cap_bytes} bytes: is it the right file?"),
        ));
    }
    Ok(bytes)
}

/// Puts a file in the place of one that may be there: it is the old or the new one, never a part.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    or_remove(&temporary, written.map_err(|e| Failure::at(path, e)))
}

/// A text from outside, safe for a terminal: control characters are written out.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// A Unix time as `2026-01-31 12:00:00 UTC`.
pub(crate) fn utc(seconds: u64) -> String {
    // Years from March, so that the leap day is the last of a year; eras of 400 years (146,097 days).
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let since_march_0 = days + 719_468;
    let (era, day_of_era) = (since_march_0 / 146_097, since_march_0 % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// A number of bytes with the largest unit that leaves it whole.
pub(crate) fn size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes > 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// A number of bytes in the largest unit of which there is one, with one digit behind the point, rounded
/// down.
pub(crate) fn rounded(bytes: u64) -> String {
    for (shift, unit) in [
        (50, "PiB"),
        (40, "TiB"),
        (30, "GiB"),
        (20, "MiB"),
        (10, "KiB"),
    ] {
        if bytes >> shift > 0 {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

/// An argument as a POSIX shell takes it back.
pub(crate) fn shell_quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '+');
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A row of a table of words.
pub(crate) fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

/// Lines in columns, each as wide as its widest entry.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        out.push_str("  ");
        out.push_str(line.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (1_767_225_599, "2025-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), text);
        }
        // The farthest time a bundle can name is still written, and does not panic.
        assert!(utc(u64::MAX).ends_with("UTC"));
    }

    #[test]
    fn sizes_are_exact() {
        assert_eq!(size(64 << 20), "64 MiB");
        assert_eq!(size((64 << 20) + 512), "67109376 B");
        assert_eq!(size(3 << 40), "3 TiB");
        assert_eq!(size(0), "0 B");
    }

    #[test]
    fn rounded_sizes_never_say_too_much() {
        assert_eq!(rounded(1023), "1023 B");
        assert_eq!(rounded((1 << 20) - 1), "1023.9 KiB");
        assert_eq!(rounded(3 << 39), "1.5 TiB");
        assert_eq!(rounded(u64::MAX), "16383.9 PiB");
    }

    #[test]
    fn what_comes_from_outside_can_not_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable("größe"), "größe");
    }

    #[test]
    fn a_shell_takes_a_quoted_argument_back() {
        assert_eq!(shell_quoted("/srv/disk-1.img"), "/srv/disk-1.img");
        assert_eq!(shell_quoted("/srv/my disk"), "'/srv/my disk'");
        assert_eq!(shell_quoted("it's"), r"'it'\''s'");
        assert_eq!(shell_quoted(""), "''");
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["A".into(), "LONG".into()],
            vec!["bcd".into(), "e".into()],
        ];
        assert_eq!(table(&rows), "  A    LONG\n  bcd  e\n");
    }
}
