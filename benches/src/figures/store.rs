//! Where a run's figures are stored, and how they come into a page of documentation.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::Path;

use super::row::Report;
use super::{markdown, plot, table};

/// Writes `NAME.json` and `NAME.svg` into a folder, and the figures as a table to the standard output.
///
/// # Errors
/// When they can't be written.
pub fn write(report: &Report, out: &Path, name: &str) -> Result<(), Box<dyn Error>> {
    let json = out.join(name).with_extension("json");
    fs::write(&json, format!("{:#}\n", report.to_json()))?;
    let svg = json.with_extension("svg");
    fs::write(&svg, plot::svg(report)?)?;
    print!("{}", table::text(report));
    println!("written: {}, {}", json.display(), svg.display());
    Ok(())
}

/// Writes the tables of the last run of that name into a page, to where its marks are, and its picture beside the page
/// as `picture`.
///
/// # Errors
/// When there was no run, or the page has no place for it.
pub fn refresh(out: &Path, name: &str, page: &Path, picture: &str) -> Result<(), Box<dyn Error>> {
    let json = out.join(name).with_extension("json");
    let text =
        fs::read_to_string(&json).map_err(|e| format!("{}: {e}: measure first", json.display()))?;
    let report = serde_json::from_str(&text)?;
    let old = fs::read_to_string(page).map_err(|e| format!("{}: {e}", page.display()))?;
    let new = markdown::refresh(&old, name, &report);
    let new = new.ok_or_else(|| {
        format!(
            "{} has no lines {} and {}: tables go between them",
            page.display(),
            markdown::begin(name),
            markdown::end(name)
        )
    })?;
    fs::write(page, new)?;
    let picture = page.with_file_name(picture);
    fs::copy(json.with_extension("svg"), &picture)?;
    println!("written: {}, {}", page.display(), picture.display());
    Ok(())
}
