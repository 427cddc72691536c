//! A listener at a path.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::AsRawFd as _;

/// Why nothing can listen at a path.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("{0}: another process serves there: end it, or choose another --socket")]
    Live(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is not a socket: choose another --socket, or remove it")]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("{path}: can't listen: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens at `path`. A socket that nobody listens at any more is replaced.
///
/// # Errors
/// See [`SocketError`].
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source: io::Error| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
        Ok(there) if !there.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) if is_live(path).map_err(|e| failed(e.into()))? => {
            return Err(SocketError::Live(path.to_owned()));
        }
        Ok(_) => fs::remove_file(path).map_err(failed)?,
    }
    UnixListener::bind(path).map_err(failed)
}

/// Whether somebody listens: only then does a connection not fail with ECONNREFUSED. It is tried without
/// waiting, since a listener with a full queue would keep us.
fn is_live(path: &Path) -> Result<bool, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => Ok(false),
        // Full (EAGAIN), or of another type (EPROTOTYPE): somebody's all the same.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Ok(true),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("s");
        let first = listen(&path).expect("nothing is there");
        assert!(matches!(listen(&path), Err(SocketError::Live(_))));
        UnixStream::connect(&path).expect("the first still listens");
        drop(first);
        let _second = listen(&path).expect("stale");
        UnixStream::connect(&path).expect("the second listens");
    }

    #[test]
    fn what_is_not_a_socket_stays() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("s");
        fs::write(&path, "precious").expect("write");
        assert!(matches!(listen(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).expect("read"), b"precious");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("link");
        assert!(matches!(listen(&link), Err(SocketError::NotASocket(_))));
        let missing = dir.path().join("missing").join("s");
        assert!(matches!(listen(&missing), Err(SocketError::Io { .. })));
    }
}
