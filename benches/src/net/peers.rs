//! Back-ends that are measured: `serve` with network cards, and `testpmd` with `net_vhost` ports.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::testpmd::Testpmd;
use crate::block::BlockError;
use crate::block::backend::{self, Backend};
use crate::block::bench::Bench;

/// The peer's name in rows and in the header.
pub const VHOST: &str = "testpmd net_vhost";

/// `serve` with a card for each port (as `--net` has them), on the CPU that serves.
///
/// # Errors
/// [`BlockError::Backend`], [`BlockError::Program`].
pub fn ours(bench: &Bench, name: &str, ports: &[String]) -> Result<Backend, BlockError> {
    let sockets = sockets(bench, name, ports.len());
    let mut command = Command::new(bench.bin.join("serve"));
    command.args(["--cpu", &bench.worker_cpu.to_string()]);
    for (socket, port) in sockets.iter().zip(ports) {
        command
            .arg("--net")
            .arg(format!("{},{port}", socket.display()));
    }
    let last = sockets.last().map(|socket| socket.display().to_string());
    let line = format!("listening on {}", last.unwrap_or_default());
    backend::start(command, sockets, None, |process| {
        process.wait_for_log(&line, Duration::from_millis(20))
    })
}

/// `testpmd` with so many `net_vhost` ports and others, on the CPU that serves; the ports' sockets.
///
/// # Errors
/// [`BlockError::Program`].
pub fn testpmd(
    bench: &Bench,
    name: &str,
    vhost_ports: usize,
    others: &[String],
) -> Result<(Testpmd, Vec<PathBuf>), BlockError> {
    let sockets = sockets(bench, name, vhost_ports);
    let mut ports: Vec<String> = (0..)
        .zip(&sockets)
        .map(|(number, socket): (u16, _)| vhost_port(number, socket))
        .collect();
    ports.extend_from_slice(others);
    let testpmd = Testpmd::start(bench.worker_cpu, &ports, &[])?;
    Ok((testpmd, sockets))
}

fn vhost_port(number: u16, socket: &Path) -> String {
    format!("net_vhost{number},iface={},queues=1", socket.display())
}

/// Where they are to listen, and nothing is any more.
fn sockets(bench: &Bench, name: &str, count: usize) -> Vec<PathBuf> {
    let names = (0..count).map(|number| bench.on_disk(&format!("{name}-{number}")));
    let free = |path: &PathBuf| {
        // `testpmd` does not take a socket's place that was there before; nothing there is what is wanted.
        let _ = std::fs::remove_file(path);
    };
    names.inspect(free).collect()
}
