//! The data plane as the version before was, as far as a successor can tell: it writes and reads stored state in
//! the format before this one (`docs/formats/state.md`). What goes from one version to another is tested with
//! it, in both directions.
//!
//! The flag is given to this workspace's packages alone, by a wrapper around the compiler: cargo keeps what is
//! built so beside the rest, and nothing else is built twice.

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::test::suites::{self, Suite};
use crate::{binaries, workspace};

/// The compiler's flag.
const FLAG: &str = "previous_state_format";
/// The program's name.
const NAME: &str = "bulkhead-dataplane";

/// Where the program lies once it is built: beside the others, in a folder of its own.
pub fn program() -> PathBuf {
    binaries("debug").join("previous").join(NAME)
}

/// A cargo that builds the version before, out of the whole workspace: what it depends on is built as for
/// everything else.
fn cargo() -> Result<Command, Box<dyn Error>> {
    let wrapper = program().with_file_name("rustc-previous");
    let dir = wrapper.parent().ok_or("a file without a folder")?;
    fs::create_dir_all(dir)?;
    fs::write(&wrapper, format!("#!/bin/sh\nexec \"$@\" --cfg {FLAG}\n"))?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["build", "--workspace", "--bin", NAME])
        .current_dir(workspace())
        .env("RUSTC_WORKSPACE_WRAPPER", wrapper);
    Ok(command)
}

/// Builds the program, and the tests of what it stores, which are returned.
///
/// # Errors
/// What the compiler says.
pub fn build() -> Result<Vec<Suite>, Box<dyn Error>> {
    let suites = suites::build(cargo()?.args(["--test", "stored"]))?;
    fs::copy(binaries("debug").join(NAME), program())?;
    // In its place again the one of this version, which is built already.
    let again = Command::new(env!("CARGO"))
        .current_dir(workspace())
        .args(["build", "--quiet", "--workspace", "--bin", NAME])
        .status()?;
    if !again.success() {
        return Err("this version's data plane does not build".into());
    }
    Ok(suites)
}
