//! A complete Bulkhead host: keys, trust roots, volumes and bundles made with the command line as an
//! operator does, and the processes that rot starts.

pub mod nics;
mod systemd;
mod upgrade;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::processes::{Process, ProcessError, binary_dir};
pub use systemd::{Container, SYSTEMD};
pub use upgrade::own_binaries;

/// Name of the host in bundles.
pub const HOST: &str = "host-1";
/// How long the processes may take to be ready.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// The users that the processes run as when rot is root.
const UIDS: [(&str, u32); 3] = [("keyd", 64_011), ("agent", 64_012), ("dataplane", 64_013)];

/// Why a host failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A program.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A file.
    #[error("host: {0}")]
    Io(#[from] io::Error),
    /// The command line said no.
    #[error("bulkhead {command}: {reason}")]
    Command {
        /// Its arguments.
        command: String,
        /// What it printed.
        reason: String,
    },
    /// What was waited for did not come.
    #[error("{what}\n--- log:\n{log}")]
    Late {
        /// What.
        what: String,
        /// What the processes printed.
        log: String,
    },
}

/// A volume to be made.
#[derive(Debug, Clone)]
pub struct VolumeSpec {
    /// Its name, its file's (with `.img`) and its socket's.
    pub name: String,
    /// Size as the command line takes it.
    pub size: String,
    /// Data unit in bytes; none: plain.
    pub data_unit: Option<u32>,
    /// Request queues.
    pub queues: u16,
    /// The uid whose frontend may connect.
    pub allowed_uid: u32,
    /// More arguments of `volume create`.
    pub more: Vec<String>,
}

impl VolumeSpec {
    /// An encrypted volume with one queue, for frontends of our own uid.
    #[must_use]
    pub fn new(name: &str, size: &str, data_unit: u32) -> Self {
        Self {
            name: name.to_owned(),
            size: size.to_owned(),
            data_unit: Some(data_unit),
            queues: 1,
            allowed_uid: own_uid(),
            more: Vec::new(),
        }
    }
}

/// A bundle to be signed.
#[derive(Debug, Clone)]
pub struct BundleSpec<'a> {
    /// Its epoch.
    pub epoch: u64,
    /// Names of its volumes.
    pub volumes: &'a [&'a str],
    /// Which host it is for.
    pub host: &'a str,
    /// Validity, as TOML has it.
    pub not_before: &'a str,
    /// First moment after it.
    pub expires: &'a str,
    /// Lines added to its source.
    pub more: &'a str,
}

impl<'a> BundleSpec<'a> {
    /// For our host, valid now.
    #[must_use]
    pub fn new(epoch: u64, volumes: &'a [&'a str]) -> Self {
        Self {
            epoch,
            volumes,
            host: HOST,
            not_before: "2026-01-01T00:00:00Z",
            expires: "2126-01-01T00:00:00Z",
            more: "",
        }
    }
}

/// A host in a folder.
#[derive(Debug)]
pub struct Host {
    name: String,
    dir: PathBuf,
    /// Where its volumes lie: another host's may lie there as well.
    volumes: PathBuf,
    bin_dir: PathBuf,
    rot: Option<Process>,
    /// What rot is started with beside what it needs.
    pub more: Vec<String>,
}

/// Our own uid.
#[must_use]
pub fn own_uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

fn is_root() -> bool {
    own_uid() == 0
}

/// The uid of a process of the host: its own where rot is root.
#[must_use]
pub fn uid_of(role: &str) -> u32 {
    let own = UIDS.iter().find(|(name, _)| *name == role);
    own.filter(|_| is_root())
        .map_or_else(own_uid, |(_, uid)| *uid)
}

impl Host {
    /// Makes keys and trust root in a folder, with the binaries of the running test.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn create(dir: &Path) -> Result<Self, HostError> {
        Self::create_with(dir, &binary_dir())
    }

    /// As [`Host::create`], with the binaries of a folder.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn create_with(dir: &Path, bin_dir: &Path) -> Result<Self, HostError> {
        Self::create_named(HOST, dir, &dir.join("volumes"), bin_dir)
    }

    /// Another host beside this one, with a folder and keys of its own, on the same shared volumes.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn beside(&self, name: &str, dir: &Path) -> Result<Self, HostError> {
        Self::create_named(name, dir, &self.volumes, &self.bin_dir)
    }

    fn create_named(
        name: &str,
        dir: &Path,
        volumes: &Path,
        bin_dir: &Path,
    ) -> Result<Self, HostError> {
        let host = Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            volumes: volumes.to_owned(),
            bin_dir: bin_dir.to_owned(),
            rot: None,
            more: Vec::new(),
        };
        for folder in ["", "volumes", "keys", "mirrors"] {
            let path = dir.join(folder);
            fs::create_dir_all(&path)?;
            // The processes run as other users, and have to come through here.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        if is_root() {
            let uid = Some(uid_of("agent"));
            std::os::unix::fs::chown(host.mirrors(), uid, uid)?;
        }
        host.cli(&[
            "operator",
            "new",
            "--name",
            "alice",
            "--out",
            "keys/alice.key",
        ])?;
        host.cli(&[
            "trust",
            "new",
            "--operator",
            "keys/alice.key.pub",
            "--out",
            "trust.toml",
        ])?;
        host.cli(&["recovery", "new", "--out", "keys/recovery.key"])?;
        let uid = uid_of("keyd").to_string();
        host.cli(&[
            "host",
            "init",
            "--name",
            name,
            "--state-dir",
            "state",
            "--uid",
            &uid,
        ])?;
        Ok(host)
    }

    /// Its name in bundles.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file in the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The file of a volume.
    #[must_use]
    pub fn image(&self, volume: &str) -> PathBuf {
        self.volumes.join(format!("{volume}.img"))
    }

    /// Where mirrors of NICs are written.
    #[must_use]
    pub fn mirrors(&self) -> PathBuf {
        self.path("mirrors")
    }

    /// The socket of a volume or a NIC.
    #[must_use]
    pub fn socket(&self, volume: &str) -> PathBuf {
        self.dir.join("run/vhost").join(format!("{volume}.sock"))
    }

    /// Runs the command line in the folder; what it did, whatever that was.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn try_cli(&self, arguments: &[&str]) -> Result<Output, HostError> {
        Ok(Command::new(self.bin_dir.join("bulkhead"))
            .args(arguments)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output()?)
    }

    /// Runs the command line in the folder; what it printed.
    ///
    /// # Errors
    /// [`HostError::Command`] when it does not end with 0.
    pub fn cli(&self, arguments: &[&str]) -> Result<String, HostError> {
        let output = self.try_cli(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(HostError::Command {
            command: arguments.join(" "),
            reason: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Makes a volume; its stanza lies beside its file.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn create_volume(&self, spec: &VolumeSpec) -> Result<(), HostError> {
        let image = self.image(&spec.name).display().to_string();
        let path = format!("{}.img", spec.name);
        let out = format!("{}.toml", spec.name);
        let queues = spec.queues.to_string();
        let allowed = spec.allowed_uid.to_string();
        // Without root, rot can give a socket to its own user and group only.
        let (socket_uid, socket_gid) = if is_root() {
            (allowed.clone(), allowed.clone())
        } else {
            let gid = nix::unistd::getgid().as_raw();
            (own_uid().to_string(), gid.to_string())
        };
        let owner = uid_of("agent").to_string();
        let unit = spec
            .data_unit
            .map_or_else(|| "none".to_owned(), |unit| unit.to_string());
        let mut arguments = vec![
            "volume",
            "create",
            "--name",
            &spec.name,
            "--path",
            &path,
            "--size",
            &spec.size,
            "--file",
            &image,
            "--owner-uid",
            &owner,
            "--data-unit",
            &unit,
            "--queues",
            &queues,
            "--socket",
            &spec.name,
            "--allowed-uid",
            &allowed,
            "--socket-uid",
            &socket_uid,
            "--socket-gid",
            &socket_gid,
            "--out",
            &out,
        ];
        if spec.data_unit.is_some() {
            arguments.extend(["--host", "state/host.pub"]);
            arguments.extend(["--recovery", "keys/recovery.key.pub"]);
        }
        arguments.extend(spec.more.iter().map(String::as_str));
        self.cli(&arguments).map(drop)
    }

    /// Writes a bundle's source and signs it with alice's key; the envelope's name.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn sign(&self, spec: &BundleSpec<'_>) -> Result<String, HostError> {
        let include: Vec<_> = spec.volumes.iter().map(|v| format!("{v}.toml")).collect();
        let source = format!(
            "host = {:?}\nepoch = {}\nnot_before = {}\nexpires = {}\ninclude = {include:?}\n{}",
            spec.host, spec.epoch, spec.not_before, spec.expires, spec.more
        );
        let name = format!("bundle-{}", spec.epoch);
        fs::write(self.path(&format!("{name}.toml")), source)?;
        let envelope = format!("{name}.cose");
        let (source, key) = (format!("{name}.toml"), "keys/alice.key");
        self.cli(&[
            "sign", "--bundle", &source, "--key", key, "--out", &envelope,
        ])?;
        Ok(envelope)
    }

    /// Starts rot, which starts everything else, and waits until all is ready.
    ///
    /// # Errors
    /// [`HostError::Late`] with the log.
    pub fn start(&mut self) -> Result<(), HostError> {
        let mut command = Command::new(self.bin_dir.join("bulkhead-rot"));
        command
            .current_dir(&self.dir)
            .args(["--host", &self.name, "--trust", "trust.toml"])
            .arg("--bin-dir")
            .arg(&self.bin_dir)
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--volume-dir")
            .arg(&self.volumes)
            .arg("--mirror-dir")
            .arg(self.mirrors());
        command.args(&self.more);
        if is_root() {
            for (role, uid) in UIDS {
                command.arg(format!("--{role}-uid")).arg(uid.to_string());
            }
        }
        let rot = self.rot.insert(Process::start_command(command)?);
        if rot.wait_for_log("ready", START_PATIENCE) {
            return Ok(());
        }
        Err(self.late("the processes were not ready in time"))
    }

    fn late(&self, what: &str) -> HostError {
        HostError::Late {
            what: what.to_owned(),
            log: self.log(),
        }
    }

    /// What the processes printed.
    #[must_use]
    pub fn log(&self) -> String {
        self.rot.as_ref().map(Process::log).unwrap_or_default()
    }

    /// The lines of that from number `from` on, each with the moment at which it came.
    #[must_use]
    pub fn log_from(&self, from: usize) -> Vec<(Instant, String)> {
        let rot = self.rot.as_ref();
        rot.map(|rot| rot.log_from(from)).unwrap_or_default()
    }

    /// rot's process id.
    #[must_use]
    pub fn rot_pid(&self) -> u32 {
        self.rot.as_ref().map_or(0, Process::pid)
    }

    /// Ends rot in good order, and with it everything.
    pub fn stop(&mut self) {
        if let Some(mut rot) = self.rot.take() {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(rot.pid()).unwrap_or(0));
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            rot.wait(Duration::from_secs(8));
        }
    }

    /// Kills rot, with which everything ends; when that was. [`Host::start`] starts another one.
    pub fn kill_rot(&mut self) -> Instant {
        let at = Instant::now();
        self.rot = None;
        at
    }

    /// Applies an envelope; what the command line printed.
    ///
    /// # Errors
    /// [`HostError::Command`] with the reason of a refusal.
    pub fn apply(&self, envelope: &str) -> Result<String, HostError> {
        self.cli(&["apply", envelope, "--admin", "run/admin.sock"])
    }

    /// The host's status.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn status(&self) -> Result<serde_json::Value, HostError> {
        let text = self.cli(&["status", "--admin", "run/admin.sock", "--json"])?;
        serde_json::from_str(&text).map_err(|e| HostError::Io(io::Error::other(e)))
    }

    /// Process id and generation of a process that rot started, as rot's log has them.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn process(&self, role: &str) -> Result<(u32, u64), HostError> {
        let log = self.log();
        let field = |line: &str, name: &str| -> Option<u64> {
            let value = line.split_whitespace().find_map(|w| w.strip_prefix(name));
            value?.strip_prefix('=')?.parse().ok()
        };
        let role_is = format!(" role={role} ");
        let is_it = |line: &&str| {
            let (started, upgraded) = ("started role=", "runs in the place of the one before");
            line.contains(&role_is) && (line.contains(started) || line.contains(upgraded))
        };
        let found = log.lines().rev().find(is_it);
        let found = found.and_then(|line| {
            let pid = u32::try_from(field(line, "pid")?).ok()?;
            Some((pid, field(line, "generation")?))
        });
        found.ok_or_else(|| self.late(&format!("rot started no {role}")))
    }

    /// Kills a process that rot started, and waits until its successor is there.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn kill(&self, role: &str) -> Result<(), HostError> {
        let (pid, generation) = self.process(role)?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap_or(0));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).map_err(io::Error::from)?;
        self.wait_until(&format!("{role} was not started again"), |host| {
            host.process(role).is_ok_and(|(_, now)| now > generation)
        })
    }

    /// Waits until something holds.
    ///
    /// # Errors
    /// [`HostError::Late`] after some seconds.
    pub fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<(), HostError> {
        let deadline = Instant::now() + START_PATIENCE;
        while Instant::now() < deadline {
            if holds(self) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(self.late(what))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}
