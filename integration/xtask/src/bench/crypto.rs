//! `cargo xtask bench crypto`: builds and runs `crypto-bench`, then shows which execution ports its hot loops fill.

use std::error::Error;
use std::fs;
use std::process::{Command, ExitCode};

use super::{Options, ports, results};
use crate::packages::{self, BENCH, Need};
use crate::report::step;
use crate::{binaries, workspace};

/// Measures; `target/bench/crypto.json`, `crypto.svg` and `crypto-mca.txt`.
///
/// # Errors
/// When it can't be built, two ciphers differ, or nothing can be written.
pub fn run(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    step("packages", || {
        let needs: Vec<&Need> = BENCH.iter().collect();
        // Without them there are fewer rows, and no model of the ports.
        Ok(packages::ensure(&needs).unwrap_or_else(|e| format!("going on without ({e})")))
    })?;
    step("build", || {
        let output = Command::new(env!("CARGO"))
            .args([
                "build",
                "--release",
                "--quiet",
                "-p",
                "bulkhead-crypto-bench",
            ])
            .current_dir(workspace())
            .output()?;
        if output.status.success() {
            return Ok("crypto-bench, release".to_owned());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
    })?;
    let program = binaries("release").join("crypto-bench");
    let mut bench = Command::new(&program);
    bench.arg("--out").arg(results());
    if options.quick {
        bench.arg("--quick");
    }
    println!("measuring: keep the machine quiet\n");
    if !bench.status()?.success() {
        return Ok(ExitCode::FAILURE);
    }
    println!();
    step("execution ports", || {
        let json = fs::read_to_string(results().join("crypto.json"))?;
        let json: serde_json::Value = serde_json::from_str(&json)?;
        let kernel = json["header"]["kernel"].as_str().unwrap_or_default();
        // As the module of that kernel is called.
        let module = format!("xts::kernel::x86::{}", kernel.replace('-', ""));
        let functions = ["encrypt", "decrypt"].map(|name| format!("{module}::{name}"));
        let mut text = NOTE.to_owned();
        let mut summary = Vec::new();
        for function in &functions {
            match ports::of_loop(&program, function) {
                Ok(loop_) => {
                    summary.push(loop_.summary());
                    text.push_str(&format!("\n{function}\n{}\n", loop_.report));
                }
                Err(reason) => return Ok(format!("skipped: {reason}")),
            }
        }
        let file = results().join("crypto-mca.txt");
        fs::write(&file, text)?;
        Ok(format!("{}; {}", summary.join("; "), file.display()))
    })?;
    Ok(ExitCode::SUCCESS)
}

/// At the head of the file.
const NOTE: &str = "The loops of the cipher kernel as llvm-mca sees them: cycles of an iteration, and for how many of these each port is busy.
It is a model, which has no caches. Its description of Zen 4 lets two 512-bit AES rounds begin in each cycle; the core
begins one, as the bench's ceiling shows: there, ports FP0 and FP1 are busy for twice as long as it says for AES rounds.
";
