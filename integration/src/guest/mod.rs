//! A Linux guest in QEMU under TCG: Debian's cloud kernel, an initial ram disk made here, a script
//! that it runs, and its serial console.
//!
//! - [`boot`]: the kernel's ELF and its modules, unpacked from Debian's package into a cache folder.
//! - [`cpio`]: the archive format of initial ram disks.
//! - [`image`]: what lies in the guest's root: busybox, modules, host programs with their libraries.
//! - [`nic`]: network cards.
//! - [`qmp`]: commands to a running QEMU.

pub mod boot;
pub mod cpio;
pub mod image;
pub mod nic;
pub mod qmp;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::processes::{Process, ProcessError, installed};
use boot::{Boot, BootError};
pub use nic::GuestNic;

/// How long a boot may take before it is called failed.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// QEMU's system emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// Why a guest failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Kernel or modules.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A program.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A file.
    #[error("guest: {0}")]
    Io(#[from] io::Error),
    /// Nothing came in time, or the guest ended before.
    #[error("the guest did not say {wanted:?}: {how}\n--- console:\n{console}")]
    Silent {
        /// What was waited for.
        wanted: String,
        /// Timed out, or ended.
        how: String,
        /// All that it printed.
        console: String,
    },
}

/// A disk of a guest; the first is /dev/vda.
#[derive(Debug, Clone)]
pub enum GuestDisk {
    /// Over vhost-user.
    VhostUser {
        /// The back-end's socket.
        socket: PathBuf,
        /// Request queues.
        queues: u16,
        /// Packed rings are offered to the guest, if the back-end has them.
        packed: bool,
        /// Addresses are the platform's (VIRTIO_F_ACCESS_PLATFORM), as a confidential guest's are.
        platform: bool,
    },
    /// A file, served by QEMU itself.
    Raw(PathBuf),
}

/// A guest to be started.
#[derive(Debug)]
pub struct GuestSpec<'a> {
    /// Where its files are made.
    pub dir: &'a Path,
    /// Its disks.
    pub disks: &'a [GuestDisk],
    /// What it runs, as busybox's `sh` has it. It powers off behind the last line.
    pub script: &'a str,
    /// Programs of this machine that it is to have, with the libraries they need.
    pub programs: &'a [&'a str],
    /// Files that it is to have: path in the guest, contents.
    pub files: &'a [(&'a str, Vec<u8>)],
    /// Kernel modules beside those of virtio disks.
    pub modules: &'a [&'a str],
    /// The uid that QEMU runs as; none: ours.
    pub uid: Option<u32>,
    /// The machine around it.
    pub machine: Machine,
}

/// What may be different about a guest's machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its processors. A disk has no more queues in the guest than there are of them.
    pub cpus: u16,
    /// Where QEMU listens for commands ([`qmp`]).
    pub qmp: Option<PathBuf>,
    /// The socket on which another QEMU hands its guest over; the guest doesn't boot.
    pub incoming: Option<PathBuf>,
    /// Its network cards.
    pub nics: Vec<GuestNic>,
    /// The guest's own reboot starts it again, instead of ending it.
    pub reboots: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: 1,
            qmp: None,
            incoming: None,
            nics: Vec::new(),
            reboots: false,
        }
    }
}

/// A running guest. It ends with the value.
#[derive(Debug)]
pub struct Guest {
    process: Process,
}

/// How often QEMU looks whether a back-end that went away is there again.
const RECONNECT_MS: u32 = 100;
/// Memory of a guest.
const MEMORY: &str = "512M";

impl Guest {
    /// Starts a guest.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn start(boot: &Boot, spec: &GuestSpec<'_>) -> Result<Self, GuestError> {
        let image = image::build(boot, spec)?;
        let initrd = spec.dir.join("initrd");
        fs::write(&initrd, image)?;
        let mut command = Command::new(
            installed(QEMU).ok_or_else(|| io::Error::other(format!("{QEMU} is not installed")))?,
        );
        command
            .args(["-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-serial", "stdio", "-monitor", "none"])
            .args(["-machine", "q35,memory-backend=memory"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", MEMORY])
            .args(["-smp", &spec.machine.cpus.to_string()])
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=memory,size={MEMORY},share=on"
            ))
            .arg("-kernel")
            .arg(&boot.kernel)
            .arg("-initrd")
            .arg(&initrd)
            .arg("-append")
            .arg(command_line());
        for (index, disk) in spec.disks.iter().enumerate() {
            command.args(disk_arguments(index, disk));
        }
        for (index, nic) in spec.machine.nics.iter().enumerate() {
            command.args(nic.arguments(index));
        }
        if !spec.machine.reboots {
            command.arg("-no-reboot");
        }
        if let Some(socket) = &spec.machine.qmp {
            let socket = format!("unix:{},server=on,wait=off", socket.display());
            command.args(["-qmp", &socket]);
        }
        if let Some(socket) = &spec.machine.incoming {
            command.args(["-incoming", &format!("unix:{}", socket.display())]);
        }
        if let Some(uid) = spec.uid {
            use std::os::unix::process::CommandExt as _;
            command.uid(uid).gid(uid);
        }
        Ok(Self {
            process: Process::start_command(command)?,
        })
    }

    /// Waits until a line of the console contains `text`.
    ///
    /// # Errors
    /// [`GuestError::Silent`] with all that it printed.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<(), GuestError> {
        let deadline = Instant::now() + patience;
        loop {
            let step = Duration::from_millis(50);
            if self.process.wait_for_log(text, step) {
                return Ok(());
            }
            let how = if let Some(status) = self.process.ended() {
                // What it printed last may still be on its way.
                if self.process.wait_for_log(text, Duration::from_millis(300)) {
                    return Ok(());
                }
                format!("QEMU ended: {status}")
            } else if Instant::now() > deadline {
                format!("within {} s", patience.as_secs())
            } else {
                continue;
            };
            return Err(GuestError::Silent {
                wanted: text.to_owned(),
                how,
                console: self.process.log(),
            });
        }
    }

    /// Waits for its power-off; all that it printed.
    ///
    /// # Errors
    /// [`GuestError::Silent`] if it does not come, or a line of the script failed.
    pub fn finish(&mut self, patience: Duration) -> Result<String, GuestError> {
        self.wait_for(image::END, patience)?;
        self.process.wait(Duration::from_secs(20));
        Ok(self.process.log())
    }

    /// What it printed so far.
    #[must_use]
    pub fn console(&self) -> String {
        self.process.log()
    }

    /// The value that a line `name=value` of the console has.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<String> {
        value_in(&self.process.log(), name)
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// The value that the last line `name=value` of a console has.
#[must_use]
pub fn value_in(console: &str, name: &str) -> Option<String> {
    let start = format!("{name}=");
    console
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix(&start).map(str::to_owned))
}

fn disk_arguments(index: usize, disk: &GuestDisk) -> Vec<String> {
    match disk {
        GuestDisk::VhostUser {
            socket,
            queues,
            packed,
            platform,
        } => vec![
            "-chardev".to_owned(),
            format!(
                "socket,id=c{index},path={},reconnect-ms={RECONNECT_MS}",
                socket.display()
            ),
            "-device".to_owned(),
            format!(
                "vhost-user-blk-pci,chardev=c{index},num-queues={queues},packed={},{}",
                on(*packed),
                // A transitional device can't have it.
                if *platform {
                    "iommu_platform=on,disable-legacy=on"
                } else {
                    "iommu_platform=off"
                }
            ),
        ],
        GuestDisk::Raw(path) => vec![
            "-drive".to_owned(),
            format!("if=none,id=d{index},format=raw,file={}", path.display()),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=d{index}"),
        ],
    }
}

fn on(option: bool) -> &'static str {
    if option { "on" } else { "off" }
}

/// The kernel's arguments. Under TCG it misjudges the speed of the time stamp counter, so that its
/// clock would run at twice the speed; it is told.
fn command_line() -> String {
    let mut line = "console=ttyS0 panic=-1 quiet".to_owned();
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let megahertz = info
        .lines()
        .find_map(|l| l.strip_prefix("cpu MHz")?.split_once(':'))
        .and_then(|(_, value)| value.trim().parse::<f64>().ok());
    if let Some(megahertz) = megahertz {
        line.push_str(&format!(
            " tsc_early_khz={:.0} tsc=reliable",
            megahertz * 1000.0
        ));
    }
    line
}
