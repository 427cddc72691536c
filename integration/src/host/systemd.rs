//! A host under a real systemd: the unit that is shipped, run by systemd as the first process of a
//! container of its own (namespaces and a root made of this machine's programs; nothing is installed).

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Host, HostError, START_PATIENCE, UIDS};
use crate::processes::Process;

/// The program.
pub const SYSTEMD: &str = "/usr/lib/systemd/systemd";

/// A running container. Dropped, everything in it is killed.
#[derive(Debug)]
pub struct Container {
    init: u32,
}

/// What the container's root is made of, before systemd is executed in it. `@DIR@` is the host's
/// folder, `@BIN@` that of its programs.
const SETUP: &str = r#"set -e
mount --make-rprivate /
mkdir -p @DIR@/root
mount -t tmpfs -o mode=755 root @DIR@/root
cd @DIR@/root
mkdir -p usr etc/systemd/system/bulkhead.service.d etc/bulkhead run var/lib/bulkhead tmp proc sys dev srv/volumes \
    opt/bulkhead old
mount --rbind /usr usr
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
mount -t proc proc proc
mount -t sysfs -o ro sys sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mkdir dev/shm
ln -s /proc/self/fd dev/fd
mount --bind @DIR@/state var/lib/bulkhead
mount --bind @DIR@/volumes srv/volumes
mount --bind @BIN@ opt/bulkhead
: > opt/log
mount --bind @DIR@/log opt/log
cp @DIR@/trust.toml etc/bulkhead/trust.toml
cp @DIR@/trust.toml etc/bulkhead/keyd-trust.toml
cp @DIR@/bulkhead.service etc/systemd/system/
cp @DIR@/drop-in.conf etc/systemd/system/bulkhead.service.d/test.conf
echo 0123456789abcdef0123456789abcdef > etc/machine-id
echo root:x:0:0::/:/bin/sh > etc/passwd
echo root:x:0: > etc/group
echo ID=test > etc/os-release
hostname @HOST@
pivot_root . old
umount -l /old
exec env -i container=test PATH=/usr/sbin:/usr/bin @SYSTEMD@ --unit=bulkhead.service --log-target=console --show-status=no
"#;

/// The container has no other units, and its log is the test's.
const DROP_IN: &str = "[Unit]\nDefaultDependencies=no\n\
    [Service]\nStandardOutput=append:/opt/log\nStandardError=append:/opt/log\n";

/// Passes the log on, for as long as the container runs.
const START: &str = r#"(tail --pid=$$ -n +1 -f "$0" &)
exec unshare --mount --pid --uts --ipc --net --cgroup --fork --kill-child=SIGKILL sh "$1"
"#;

/// The unit as it is shipped, with this host's folder of programs and users.
fn unit() -> io::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/bulkhead.service");
    let mut unit = fs::read_to_string(path)?.replace("/usr/lib/bulkhead", "/opt/bulkhead");
    for ((role, uid), shipped) in UIDS.iter().zip([861, 862, 863]) {
        let (from, to) = (
            format!("--{role}-uid {shipped}"),
            format!("--{role}-uid {uid}"),
        );
        if !unit.contains(&from) {
            return Err(io::Error::other(format!("the unit has no {from}")));
        }
        unit = unit.replace(&from, &to);
    }
    Ok(unit)
}

impl Host {
    /// Starts systemd, which starts rot by the shipped unit, and waits until all is ready. `run` of the
    /// folder is then the container's run directory. Process ids that rot's log and the status name
    /// are the container's: use [`Container::process`].
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn start_under_systemd(&mut self) -> Result<Container, HostError> {
        let fill = |text: &str| {
            text.replace("@DIR@", &self.dir.display().to_string())
                .replace("@BIN@", &self.bin_dir.display().to_string())
                .replace("@HOST@", &self.name)
                .replace("@SYSTEMD@", SYSTEMD)
        };
        fs::write(self.path("setup.sh"), fill(SETUP))?;
        fs::write(self.path("bulkhead.service"), unit()?)?;
        fs::write(self.path("drop-in.conf"), DROP_IN)?;
        fs::write(self.path("log"), "")?;
        let mut command = Command::new("sh");
        command.args(["-c", START]);
        command.args([self.path("log"), self.path("setup.sh")]);
        let unshare = Process::start_command(command)?;
        let pid = unshare.pid();
        self.rot = Some(unshare);
        let end = Instant::now() + START_PATIENCE;
        let init = loop {
            match children(pid).first() {
                Some(init) => break *init,
                None if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
                None => return Err(self.late("the container did not start")),
            }
        };
        let container = Container { init };
        let run = format!("/proc/{init}/root/run/bulkhead");
        std::os::unix::fs::symlink(run, self.path("run"))?;
        let ready = |host: &Self| {
            host.log().contains(" rot  INFO ready") && host.path("run/admin.sock").exists()
        };
        self.wait_until("the processes were not ready in time", ready)?;
        Ok(container)
    }
}

/// The children of a process.
fn children(pid: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

impl Container {
    /// The process id, outside the container, of rot or a process that it started; none if there is
    /// none now.
    #[must_use]
    pub fn process(&self, program: &str) -> Option<u32> {
        let is_it = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let name = line.split(|&byte| byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(name).ends_with(&format!("bulkhead-{program}"))
        };
        let of_systemd = children(self.init);
        let of_rot = of_systemd.iter().flat_map(|rot| children(*rot));
        of_systemd.iter().copied().chain(of_rot).find(is_it)
    }

    /// Kills such a process and waits until another is in its place: when the signal was sent.
    ///
    /// # Errors
    /// There is none, or none comes.
    pub fn kill(&self, program: &str) -> io::Result<Instant> {
        let late = |what: &str| io::Error::other(format!("{program} {what}"));
        let old = self.process(program).ok_or_else(|| late("does not run"))?;
        let at = Instant::now();
        kill(
            Pid::from_raw(i32::try_from(old).unwrap_or(0)),
            Signal::SIGKILL,
        )?;
        while self.process(program).is_none_or(|now| now == old) {
            if at.elapsed() > START_PATIENCE {
                return Err(late("was not started again"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(at)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // The kernel kills everything in the container with its first process.
        if let Ok(init) = i32::try_from(self.init) {
            let _ = kill(Pid::from_raw(init), Signal::SIGKILL);
        }
    }
}
