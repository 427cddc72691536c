//! `rekey_*`: the process that re-keys a volume is killed at random moments under verified I/O; after each
//! kill every data unit of the file must be readable with the two keys and what the file says of itself.
//!
//! Each row has a number of kills for every run of the tests and a full one, which `BULKHEAD_SOAK=1` asks
//! for. Killed processes leave the page cache whole: what a power cut leaves is tried in the data plane's own
//! tests, with a volatile cache.

mod content;
mod guest;
mod lives;
mod offline;
mod planted;

use std::error::Error;
use std::time::Instant;

use bulkhead_crypto::DataUnit;
use bulkhead_integration::driver::ring::Format;
use libtest_mimic::{Arguments, Failed, Trial};

use lives::Lives;

/// Environment variable that asks for the full numbers.
const SOAK: &str = "BULKHEAD_SOAK";
/// Kills of each row in every run, and the full number: with four rows 20 and 300 (T63).
const KILLS: (u64, u64) = (5, 75);

fn main() {
    let args = Arguments::from_args();
    let mut trials = vec![
        plain("rekey_check_finds_planted_faults", planted::faults),
        plain("rekey_check_knows_doubts", planted::doubts),
    ];
    for (format, ring) in [(Format::Split, "split"), (Format::Packed, "packed")] {
        for unit in [DataUnit::B512, DataUnit::B4096] {
            let name = format!("rekey_killed_{ring}_xts{}", unit.bytes());
            trials.push(Trial::test(name.clone(), move || {
                killed(&name, format, unit).map_err(Failed::from)
            }));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn plain(name: &str, run: fn() -> Result<(), Box<dyn Error>>) -> Trial {
    Trial::test(name, move || run().map_err(Failed::from))
}

fn killed(name: &str, format: Format, unit: DataUnit) -> Result<(), Box<dyn Error>> {
    let soak = std::env::var_os(SOAK).is_some_and(|value| value != "0");
    let kills = if soak { KILLS.1 } else { KILLS.0 };
    let began = Instant::now();
    let figures = Lives::new(name, format, unit)?.run(kills)?;
    println!(
        "{name}: {figures} in {:.1} s",
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
