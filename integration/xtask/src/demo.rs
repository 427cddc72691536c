//! `cargo xtask demo`: from nothing to a guest that uses an encrypted disk which only a signed
//! configuration could attach; each step with its evidence.

mod network;

use std::cell::RefCell;
use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use bulkhead_integration::guest::boot::Boot;
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine, value_in};
use bulkhead_integration::host::{BundleSpec, Host, HostError, VolumeSpec, own_uid};
use bulkhead_integration::{processes, workload};
use nix::sys::signal::{SigSet, Signal};

use crate::packages::{self, GUEST};
use crate::report::{Step, step};
use crate::{binaries, workspace};
use network::Network;

/// What is built.
const PACKAGES: [&str; 5] = [
    "bulkhead-rot",
    "bulkhead-keyd",
    "bulkhead-agent",
    "bulkhead-dataplane",
    "bulkhead-cli",
];
/// How long a guest's work may take once it runs.
const WORK: Duration = Duration::from_secs(240);

/// Runs it.
///
/// # Errors
/// The first step that failed; its processes are ended.
pub fn run() -> Result<ExitCode, Box<dyn Error>> {
    end_with_us()?;
    if own_uid() != 0 {
        println!("not root: all processes run as one user, which separates them less");
    }
    let dir = folder()?;
    println!("files are left in {}\n", dir.display());
    step("packages", || {
        packages::ensure(&GUEST.iter().collect::<Vec<_>>())
    })?;
    step("build", build)?;
    let boot = RefCell::new(None);
    step("guest kernel", || {
        let prepared = Boot::prepare(&dir_of_cache())?;
        let name = prepared.modules.file_name().unwrap_or_default();
        let evidence = format!("Linux {}", name.display());
        boot.replace(Some(prepared));
        Ok(evidence)
    })?;
    let boot = boot.take().ok_or("no kernel")?;
    let mut host = None;
    step("keys", || {
        host = Some(Host::create_with(&dir, &binaries("release"))?);
        Ok("operator alice, recovery key, host-1; trust root of one operator".to_owned())
    })?;
    let mut host = host.ok_or("no host")?;
    // What is started from here on is in a network namespace of its own.
    let network = Network::make(&host)?;
    let result = show(&mut host, &boot, network.as_ref());
    if result.is_err() {
        fs::write(host.path("processes.log"), host.log())?;
    }
    result?;
    println!(
        "\nStart it yourself: README, \"Use it\". The files of this run: {}",
        dir.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// Everything from the volume on.
fn show(host: &mut Host, boot: &Boot, network: Option<&Network>) -> Result<(), Box<dyn Error>> {
    let stanzas = network.map(|_| Network::stanzas()).unwrap_or_default();
    step("volume", || {
        host.create_volume(&VolumeSpec::new("disk", "256MiB", 4096))?;
        Ok("256 MiB, AES-256-XTS, its key sealed to host-1 and to the recovery key".to_owned())
    })?;
    step("signed configuration", || {
        let name = host.sign(&BundleSpec {
            more: &stanzas,
            ..BundleSpec::new(1, &["disk"])
        })?;
        let bytes = fs::metadata(host.path(&name))?.len();
        Ok(format!("{name}, {bytes} bytes: ESP384 and ML-DSA-87"))
    })?;
    step("host", || {
        host.start()?;
        let list = ["keyd", "agent", "dataplane"];
        let pids = list.map(|role| host.process(role).map(|(pid, _)| format!("{role} {pid}")));
        let pids: Result<Vec<_>, HostError> = pids.into_iter().collect();
        Ok(format!(
            "rot {} measured and started {}",
            host.rot_pid(),
            pids?.join(", ")
        ))
    })?;
    step("apply", || {
        host.apply("bundle-1.cose")?;
        let status = host.status()?;
        Ok(format!(
            "epoch {}, volume {} on {}",
            status["epoch"],
            status["volumes"][0]["name"],
            shown(&host.socket("disk"))
        ))
    })?;
    let written = RefCell::new(None);
    step("guest, first boot", || first_boot(host, boot, &written))?;
    let written = written.take().ok_or("the guest printed no sum")?;
    step("what the volume's file shows", || file_tells_nothing(host))?;
    step("a bundle with one byte changed", || changed_bundle(host))?;
    step(
        "guest, second boot; agent, keyd and data plane killed meanwhile",
        || second_boot(host, boot, &written),
    )?;
    if let Some(network) = network {
        step("two guests with network cards", || network.show(host, boot))?;
    }
    step("end", || {
        fs::write(host.path("processes.log"), host.log())?;
        host.stop();
        Ok("all processes ended".to_owned())
    })
}

/// Signals end what was started, too.
fn end_with_us() -> Result<(), Box<dyn Error>> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            println!("\nending what was started");
            processes::end_all(Duration::from_secs(8));
            std::process::exit(130);
        }
    });
    Ok(())
}

/// A fresh folder. In the workspace, unless the processes' users could not come through to it.
fn folder() -> Result<PathBuf, Box<dyn Error>> {
    let here = workspace().join("demo");
    let open = |path: &Path| {
        let mode = fs::metadata(path).map_or(0, |m| m.permissions().mode());
        mode & 0o001 != 0
    };
    let reachable = workspace().ancestors().all(open);
    let dir = if own_uid() != 0 || reachable {
        here
    } else {
        PathBuf::from("/var/tmp/bulkhead-demo")
    };
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn dir_of_cache() -> PathBuf {
    let release = binaries("release");
    release.parent().unwrap_or(&release).join("guest")
}

fn build() -> Step {
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--release", "--quiet"]);
    for package in PACKAGES {
        command.args(["-p", package]);
    }
    let output = command
        .current_dir(workspace())
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok("five static programs, release".to_owned());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned().into())
}

fn start_guest(host: &Host, boot: &Boot, script: &str) -> Result<Guest, Box<dyn Error>> {
    let disks = [GuestDisk::VhostUser {
        socket: host.socket("disk"),
        queues: 1,
        packed: false,
        platform: false,
    }];
    let spec = GuestSpec {
        dir: host.dir(),
        disks: &disks,
        script,
        programs: &["mkfs.ext4"],
        files: &[],
        modules: &[],
        uid: None,
        machine: Machine::default(),
    };
    Ok(Guest::start(boot, &spec)?)
}

/// Both sums of a console, which have to be the same.
fn same_sums(host: &Host, console: &str) -> Result<String, Box<dyn Error>> {
    let written = value_in(console, "written").ok_or("the guest printed no sum")?;
    if value_in(console, "read").as_ref() != Some(&written) {
        let log = host.log();
        return Err(format!("the guest read something else:\n{console}\n{log}").into());
    }
    Ok(written)
}

fn first_boot(host: &Host, boot: &Boot, written: &RefCell<Option<String>>) -> Step {
    let script = workload::write_and_read_back();
    let console = start_guest(host, boot, &script)?.finish(BOOT_PATIENCE + WORK)?;
    fs::write(host.path("guest-1.log"), &console)?;
    let sum = same_sums(host, &console)?;
    written.replace(Some(sum.clone()));
    Ok(format!(
        "ext4 made, 64 MiB written and read back, SHA-256 {}…",
        sum.get(..16).unwrap_or(&sum)
    ))
}

fn file_tells_nothing(host: &Host) -> Step {
    let look = workload::look_at(&host.image("disk"))?;
    let evidence = format!(
        "{} MiB written, {:.4} bits of entropy a byte, the plaintext found {} times",
        look.written_blocks / 256,
        look.entropy_bits,
        look.plaintext_hits
    );
    if look.plaintext_hits > 0 || look.entropy_bits < 7.99 || look.written_blocks < 64 * 256 {
        return Err(evidence.into());
    }
    Ok(evidence)
}

fn changed_bundle(host: &Host) -> Step {
    let name = host.sign(&BundleSpec::new(2, &["disk"]))?;
    let mut bytes = fs::read(host.path(&name))?;
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 1;
    }
    fs::write(host.path("changed.cose"), bytes)?;
    let before = host.status()?;
    match host.apply("changed.cose") {
        Err(HostError::Command { reason, .. }) if host.status()? == before => {
            Ok(format!("refused, nothing changed: {}", reason.trim()))
        }
        Err(error) => Err(error.into()),
        Ok(text) => Err(format!("it was taken: {text}").into()),
    }
}

fn second_boot(host: &Host, boot: &Boot, written: &str) -> Step {
    let mut guest = start_guest(host, boot, &workload::find_and_replace())?;
    guest.wait_for("phase=write", BOOT_PATIENCE + WORK)?;
    let mut killed = Vec::new();
    for role in ["agent", "keyd", "dataplane"] {
        let (pid, _) = host.process(role)?;
        host.kill(role)?;
        killed.push(format!("{role} {pid}"));
    }
    let console = guest.finish(BOOT_PATIENCE + WORK)?;
    fs::write(host.path("guest-2.log"), &console)?;
    if value_in(&console, "found").as_deref() != Some(written) {
        return Err(format!("the second boot found something else:\n{console}").into());
    }
    same_sums(host, &console)?;
    let (pid, generation) = host.process("dataplane")?;
    if generation != 2 {
        return Err(
            format!("data plane {pid} is the {generation}th, and the second was to serve").into(),
        );
    }
    let connected = host.log().matches("frontend connected to").count();
    if connected != 2 {
        return Err(format!("QEMU connected {connected} times, not once for each boot").into());
    }
    Ok(format!(
        "the data is there; {} killed while it wrote 64 MiB more, which read back the same; data plane {pid} went on \
         with QEMU's connection",
        killed.join(", ")
    ))
}

/// A path as people at the workspace would type it.
fn shown(path: &Path) -> String {
    let short = path.strip_prefix(workspace()).unwrap_or(path);
    short.display().to_string()
}
