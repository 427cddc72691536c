//! Finds the system's OpenSSL: its static library, since these programs are linked statically. Where there is
//! none, its rows are left out; `cargo xtask bench` installs it first.
#![forbid(unsafe_code)]

use std::path::Path;

/// Where Debian's `libssl-dev` has it.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/libcrypto.a";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(openssl)");
    println!("cargo::rerun-if-changed={LIBRARY}");
    let target = std::env::var("TARGET").unwrap_or_default();
    if target == "x86_64-unknown-linux-gnu" && Path::new(LIBRARY).is_file() {
        println!("cargo::rustc-cfg=openssl");
        // Last on the linker's line, after the objects that need it.
        println!("cargo::rustc-link-arg={LIBRARY}");
    }
}
