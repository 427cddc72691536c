//! When the fence of a dead data plane hangs up, as seen from outside: rot keeps the read ends of fences among
//! the descriptors that it stores, and root may open a pipe of another process again.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a fence is waited for.
const PATIENCE_MS: u16 = 10_000;

/// Fences that are up.
#[derive(Debug)]
pub struct Fences(Vec<File>);

impl Fences {
    /// Those whose read ends a process has; none where they can't be seen.
    #[must_use]
    pub fn of(pid: u32) -> Self {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let entries = entries.into_iter().flatten().flatten();
        let mut inodes = Vec::new();
        let mut files = Vec::new();
        for file in entries.filter_map(|entry| open(&entry.path())) {
            let inode = file.metadata().map(|data| data.ino()).unwrap_or(0);
            if !has_hung_up(&file, 0) && !inodes.contains(&inode) {
                inodes.push(inode);
                files.push(file);
            }
        }
        Self(files)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Watches them from a thread of its own: when the last one hung up, once all have; none if there were none,
    /// or they did not.
    #[must_use]
    pub fn watch(self) -> JoinHandle<Option<Instant>> {
        std::thread::spawn(move || {
            let mut last = None;
            for file in &self.0 {
                if !has_hung_up(file, PATIENCE_MS) {
                    return None;
                }
                last = Some(Instant::now());
            }
            last
        })
    }
}

/// The read end of a pipe, once more.
fn open(path: &PathBuf) -> Option<File> {
    let target = std::fs::read_link(path).ok()?;
    let mode = std::fs::symlink_metadata(path).ok()?.permissions().mode();
    // The link's own mode says what the descriptor is open for.
    let reads_only = mode & 0o600 == 0o400;
    if !reads_only || !target.to_string_lossy().starts_with("pipe:") {
        return None;
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
        .open(path)
        .ok()
}

fn has_hung_up(file: &File, patience_ms: u16) -> bool {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::from(patience_ms)).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who has the same open file description has its lock already (T36): it says nothing of the other's requests.
    #[test]
    fn a_lock_on_a_handed_over_file_does_not_hold() {
        use std::process::{Command, Stdio};
        let file = tempfile::NamedTempFile::new().expect("a file");
        let held = File::open(file.path()).expect("open");
        held.try_lock().expect("nobody has it");
        // A process that has the file, as a dead one's requests have it.
        let handed_over = held.try_clone().expect("duplicated");
        let mut other = Command::new("sleep")
            .arg("60")
            .stdin(Stdio::from(handed_over))
            .spawn()
            .expect("a process");
        let successor = held.try_clone().expect("duplicated");
        successor.try_lock().expect("it has it already");
        let stranger = File::open(file.path()).expect("open");
        assert!(stranger.try_lock().is_err(), "others are kept off");
        drop((held, successor));
        assert!(stranger.try_lock().is_err(), "the other has it still");
        other.kill().expect("a signal");
        other.wait().expect("its end");
        stranger.try_lock().expect("now nobody has it");
    }

    #[test]
    fn a_pipe_of_this_process_is_watched() {
        let (read, write) = nix::unistd::pipe().expect("a pipe");
        let fences = Fences::of(std::process::id());
        assert!(!fences.is_empty());
        let before = fences.len();
        drop(write);
        assert!(Fences::of(std::process::id()).len() < before);
        drop((read, fences));
    }
}
