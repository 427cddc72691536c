//! What systemd gives rot at its start: the way to its store, and what an earlier rot left there.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;

use super::notify::Notify;
use super::table::Table;
use super::{Found, TABLE_NAME, Upstream};
use crate::inherited;

/// systemd's store, if there is one, and what lies in it. Once, before anything else is opened.
///
/// # Errors
/// `NOTIFY_SOCKET` is set but can't be reached, or no memory for the table.
pub fn from_environment() -> io::Result<Option<(Upstream, Vec<Found>)>> {
    let Ok(name) = std::env::var("NOTIFY_SOCKET") else {
        return Ok(None);
    };
    let mut notify = Notify::connect(&name)
        .map_err(|e| io::Error::new(e.kind(), format!("NOTIFY_SOCKET {name:?}: {e}")))?;
    let mut given = inherited::descriptors()?;
    let table = given.iter().position(|(name, _)| name == TABLE_NAME);
    let table = table.map(|at| Table::adopt(given.swap_remove(at).1));
    match table {
        Some(Ok(table)) => {
            let (upstream, found) = Upstream::resumed(notify, table, given);
            tracing::info!(descriptors = found.len(), "resumed what systemd stored");
            return Ok(Some((upstream, found)));
        }
        Some(Err(error)) => {
            tracing::error!("what systemd stored is dropped: its table can't be read: {error}");
            notify.remove(TABLE_NAME);
        }
        None if given.is_empty() => {}
        None => tracing::error!("what systemd stored is dropped: there is no table of it"),
    }
    for (name, _) in given {
        notify.remove(&name);
    }
    Ok(Some((Upstream::new(notify)?, Vec::new())))
}
