//! `serve`: disks and network cards on sockets. See `serve --help` and `docs/benchmarks.md`.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::IsTerminal as _;
use std::process::ExitCode;

use bulkhead_benches::serve::arguments::Arguments;
use bulkhead_benches::serve::{cpus, dataplane, devices, limits, net, reference};
use bulkhead_dataplane::serve::Served;
use clap::Parser as _;
use nix::sys::signal::{Signal, raise};
use tracing_subscriber::EnvFilter;

/// Set, the process stops at its start, before it locks itself in, until something lets it go on: so
/// `cargo xtask coverage` measures it from there.
const STOP_FIRST_ENV: &str = "BULKHEAD_STOP_FIRST";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("BULKHEAD_LOG");
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter.unwrap_or_else(|_| EnvFilter::new("warn")))
        .init();
    if std::env::var_os(STOP_FIRST_ENV).is_some() {
        let _ = raise(Signal::SIGSTOP);
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("serve: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    cpus::check(&arguments.cpu)?;
    let devices = devices::open(arguments)?;
    let announce = || {
        let cards = arguments.net.iter().map(|net| &net.socket);
        for socket in arguments.socket.iter().chain(cards) {
            println!("listening on {}", socket.display());
        }
    };
    if arguments.reference {
        reference::run(devices, &arguments.cpu, announce)?;
    } else {
        let config = dataplane::config(&arguments.cpu, arguments.workers, arguments.shuffle);
        let limited = |disks: &[Served]| {
            let disks = disks
                .iter()
                .filter_map(|served| served.device.blk().map(|disk| &**disk));
            limits::set(disks, &arguments.limit, arguments.group.as_ref());
        };
        let disks = devices.iter().map(|device| device.socket.as_path());
        let cards = net::open(&arguments.net, &arguments.uplink)
            .inspect_err(|_| devices::remove_sockets(disks))?;
        dataplane::run((devices, cards), &config, limited, announce)?;
    }
    Ok(())
}
