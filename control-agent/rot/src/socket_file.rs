//! A listening unix socket and its file: made with the right owner and mode before anybody can
//! connect, seen under its name only once it listens, and removed only if it is a socket.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, RenameFlags, renameat2};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstatat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Owner, group and permission bits of a socket file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits, at most 0o777.
    pub mode: u32,
}

/// A step on a socket file that failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {step}: {source}")]
pub struct SocketFileError {
    step: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> SocketFileError {
    move |source| SocketFileError {
        step,
        source: source.into(),
    }
}

/// A listening, non-blocking socket at `name` in `directory`, where nothing may be yet.
///
/// # Errors
/// Says the step that failed; nothing is left behind.
pub fn listen_at(
    directory: impl AsFd,
    name: &str,
    kind: SockType,
    access: Access,
) -> Result<OwnedFd, SocketFileError> {
    let directory = directory.as_fd();
    // No socket name begins with a dot, so that this is nobody's name.
    let temporary = format!(".{name}.new");
    remove_socket(directory, &temporary)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, kind, flags, None).map_err(failed("make the socket"))?;
    // Through the descriptor: the real path may be too long for sockaddr_un, or swapped.
    let path = format!("/proc/self/fd/{}/{temporary}", directory.as_raw_fd());
    let address = UnixAddr::new(path.as_str()).map_err(failed("form the address"))?;
    bind(fd.as_raw_fd(), &address).map_err(failed("bind (is /proc mounted?)"))?;
    let made = (|| {
        set_access(directory, &temporary, access)?;
        let backlog = Backlog::new(BACKLOG).map_err(failed("choose the backlog"))?;
        listen(&fd, backlog).map_err(failed("listen"))?;
        let replace_nothing = RenameFlags::RENAME_NOREPLACE;
        renameat2(
            directory,
            temporary.as_str(),
            directory,
            name,
            replace_nothing,
        )
        .map_err(failed("give the socket file its name"))
    })();
    if let Err(error) = made {
        // The first failure is the one to tell.
        let _ = remove_socket(directory, &temporary);
        return Err(error);
    }
    Ok(fd)
}

/// Sets owner, group and mode; in between nobody but root can connect.
///
/// # Errors
/// Says the step that failed.
pub fn set_access(directory: impl AsFd, name: &str, access: Access) -> Result<(), SocketFileError> {
    let directory = directory.as_fd();
    let no_follow = FchmodatFlags::NoFollowSymlink;
    fchmodat(directory, name, Mode::empty(), no_follow).map_err(failed("close the socket file"))?;
    let (uid, gid) = (Uid::from_raw(access.uid), Gid::from_raw(access.gid));
    let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
    fchownat(directory, name, Some(uid), Some(gid), flags)
        .map_err(failed("set the owner of the socket file"))?;
    let mode = Mode::from_bits_truncate(access.mode);
    fchmodat(directory, name, mode, no_follow).map_err(failed("set the mode of the socket file"))
}

/// Removes a socket file; none there is well too.
///
/// # Errors
/// Anything that is not a socket stays and is an error.
pub fn remove_socket(directory: impl AsFd, name: &str) -> Result<(), SocketFileError> {
    let directory = directory.as_fd();
    let found = match fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) => found,
        Err(Errno::ENOENT) => return Ok(()),
        Err(e) => return Err(failed("look at the socket file")(e)),
    };
    if found.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFSOCK.bits() {
        let what = format!("{name:?} is in the way and is no socket; move it elsewhere");
        return Err(failed("remove a socket file")(io::Error::other(what)));
    }
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(failed("remove a socket file")(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::os::unix::net::UnixStream;

    fn own(mode: u32) -> Access {
        Access {
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            mode,
        }
    }

    #[test]
    fn it_listens_under_its_name_and_leaves_no_other() {
        let base = tempfile::tempdir().unwrap();
        let directory = File::open(base.path()).unwrap();
        let _fd = listen_at(&directory, "a.sock", SockType::Stream, own(0o640)).unwrap();
        let path = base.path().join("a.sock");
        UnixStream::connect(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o640);
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_there_is_not_replaced_and_nothing_is_left_behind() {
        let base = tempfile::tempdir().unwrap();
        let directory = File::open(base.path()).unwrap();
        std::fs::write(base.path().join("a.sock"), "kept").unwrap();
        let error = listen_at(&directory, "a.sock", SockType::Stream, own(0o600)).unwrap_err();
        assert!(error.to_string().contains("its name"), "{error}");
        assert_eq!(std::fs::read(base.path().join("a.sock")).unwrap(), b"kept");
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1);
    }

    #[test]
    fn only_a_socket_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let directory = File::open(base.path()).unwrap();
        remove_socket(&directory, "absent").unwrap();
        std::fs::write(base.path().join("file"), "kept").unwrap();
        std::os::unix::fs::symlink("file", base.path().join("link")).unwrap();
        for name in ["file", "link"] {
            let error = remove_socket(&directory, name).unwrap_err().to_string();
            assert!(error.contains("no socket"), "{error}");
        }
        drop(listen_at(&directory, "s", SockType::SeqPacket, own(0o600)).unwrap());
        let path = base.path().join("s");
        assert!(std::fs::metadata(&path).unwrap().file_type().is_socket());
        remove_socket(&directory, "s").unwrap();
        assert!(!path.exists());
    }
}
