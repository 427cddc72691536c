//! The programs of a host as its status shows them: which release each is of, and what came of the
//! last upgrade.

use std::fmt::Write as _;

use bulkhead_files::text::to_hex;
use bulkhead_protocol::release::ProgramStatus;

use crate::json::Json;
use crate::output::{printable, table};

/// Digits of a measurement in the table; `--json` has all of them.
const SHORT_DIGITS: usize = 16;

/// The table.
pub(crate) fn to_text(programs: &[ProgramStatus]) -> String {
    if programs.is_empty() {
        return String::new();
    }
    let titles = ["PROGRAM", "RELEASE", "MEASUREMENT"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for program in programs {
        let mut measurement = to_hex(&program.measurement[..]);
        measurement.truncate(SHORT_DIGITS);
        // As it was found on the disk when rot started: whose release that is nobody has checked.
        let version = program.version.map_or("-".to_owned(), |v| v.to_string());
        rows.push(vec![program.component.to_string(), version, measurement]);
    }
    let mut out = format!("\nprograms\n{}", table(&rows));
    for program in programs {
        if let Some(reason) = &program.failed {
            let _ = writeln!(
                out,
                "  {}: its upgrade came to nothing: {}",
                program.component,
                printable(reason)
            );
        }
    }
    out
}

/// For programs.
pub(crate) fn to_json(programs: &[ProgramStatus]) -> Json {
    let one = |program: &ProgramStatus| {
        Json::Object(vec![
            ("program", Json::text(program.component)),
            ("release", Json::or_null(program.version, Json::Number)),
            ("measurement", Json::Text(to_hex(&program.measurement[..]))),
            ("failed", Json::or_null(program.failed.as_ref(), Json::text)),
        ])
    };
    Json::Array(programs.iter().map(one).collect())
}
