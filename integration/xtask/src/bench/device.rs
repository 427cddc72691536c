//! What the benches of devices have in common: the programs are built, huge pages reserved, and the bench is run or told
//! to write its last run into a page.

use std::error::Error;
use std::fs;
use std::process::{Command, ExitCode};

use super::{Options, results};
use crate::packages::{self, Need};
use crate::report::step;
use crate::{binaries, workspace};

/// The page that quotes runs.
const PAGE: &str = "docs/performance.md";
/// Where Linux says, and is told, how many huge pages there are.
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
/// As many as guests of 256 disks take, of 2 MiB each, and some more.
const WANTED_PAGES: u64 = 640;
/// Of the machine's memory that leaves at least so much, in KiB.
const LEFT_KIB: u64 = 4 << 20;

/// Measures with the bench of that name; `target/bench/NAME.json` and `NAME.svg`. With `--table` it writes the last run's
/// tables into the page that quotes them, instead.
///
/// # Errors
/// When it can't be built, something can't be measured, or nothing can be written.
pub fn run(name: &str, needs: &[Need], options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    if !options.table {
        step("packages", || {
            let needs: Vec<&Need> = needs.iter().collect();
            // Without them there are fewer rows.
            Ok(packages::ensure(&needs).unwrap_or_else(|e| format!("going on without ({e})")))
        })?;
    }
    let program = format!("{name}-bench");
    step("build", || {
        let output = Command::new(env!("CARGO"))
            .args(["build", "--release", "--quiet", "-p", "bulkhead-benches"])
            .current_dir(workspace())
            .output()?;
        if output.status.success() {
            return Ok(format!("serve and {program}, release"));
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    })?;
    let mut bench = Command::new(binaries("release").join(program));
    bench.arg("--out").arg(results());
    if options.table {
        bench.arg("--table").arg(workspace().join(PAGE));
        return ended(&mut bench);
    }
    if options.quick {
        bench.arg("--quick");
    }
    if let Some(only) = &options.only {
        bench.args(["--only", only]);
    }
    if let Some(folder) = &options.against {
        bench.arg("--against").arg(folder);
    }
    let pages = HugePages::ensure();
    println!("measuring: keep the machine quiet\n");
    let code = ended(&mut bench);
    drop(pages);
    code
}

fn ended(bench: &mut Command) -> Result<ExitCode, Box<dyn Error>> {
    let success = bench.status()?.success();
    Ok(if success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Huge pages for the guests' memory, as many as before when it drops.
struct HugePages {
    before: u64,
}

impl HugePages {
    /// None where there are enough, or none can be had.
    fn ensure() -> Option<Self> {
        let number = |path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let before = number(HUGE_PAGES)?;
        let left = available_kib(&fs::read_to_string("/proc/meminfo").ok()?)?
            .checked_sub(WANTED_PAGES.saturating_sub(before) * 2048)?;
        if before >= WANTED_PAGES || left < LEFT_KIB {
            return None;
        }
        if fs::write(HUGE_PAGES, WANTED_PAGES.to_string()).is_err() {
            println!("only root can reserve huge pages: guests' memory lies in ordinary ones");
            return None;
        }
        println!(
            "reserved huge pages for guests: {WANTED_PAGES} of 2 MiB; {before} again at the end"
        );
        Some(Self { before })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, self.before.to_string());
    }
}

/// Memory that programs can still have, in KiB.
fn available_kib(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:       24684084 kB\nMemAvailable:   22000000 kB\n";
        assert_eq!(available_kib(meminfo), Some(22_000_000));
        assert_eq!(available_kib("MemTotal: 1 kB\n"), None);
    }
}
