//! libFuzzer around one target, named by the environment variable `BULKHEAD_FUZZ_TARGET`.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

/// The function of the target that the environment names; ends the process if there is none.
fn chosen() -> fn(&[u8]) {
    let name = std::env::var("BULKHEAD_FUZZ_TARGET").unwrap_or_default();
    let found = bulkhead_fuzz::TARGETS.iter().find(|target| target.name == name);
    let Some(target) = found else {
        eprintln!("BULKHEAD_FUZZ_TARGET={name:?} names no target: `cargo xtask fuzz` lists them");
        std::process::exit(2);
    };
    target.run
}

fuzz_target!(|data: &[u8]| TARGET.get_or_init(chosen)(data));
