//! The vhost-user listeners: bound where only rot can write, kept for as long as the agent wants
//! them, so that they outlive every data plane.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use bulkhead_protocol::identity::SocketName;
use nix::sys::socket::SockType;

use crate::directories::Directory;
use crate::handoff::{Leaving, LeftListener};
use crate::replace::Inherited;
use crate::socket_file::{Access, SocketFileError, listen_at, remove_socket, set_access};

/// Most listeners at once.
pub const MAX_LISTENERS: usize = 1024;
/// Longest path that a frontend can connect to (`sockaddr_un` without its end).
const MAX_PATH_BYTES: usize = 107;

/// Why a listener is not bound or not removed.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// A step failed.
    #[error("listener {name}: {source}")]
    Failed {
        /// Which listener.
        name: SocketName,
        /// What failed.
        source: SocketFileError,
    },
    /// The request is not one that rot carries out.
    #[error("listener {name} is refused: {reason}")]
    Refused {
        /// Which listener.
        name: SocketName,
        /// Why, and what to do.
        reason: String,
    },
}

#[derive(Debug)]
struct Listener {
    socket: Rc<OwnedFd>,
    access: Access,
}

/// All listeners, by name.
#[derive(Debug)]
pub struct Listeners {
    directory: Directory,
    bound: BTreeMap<SocketName, Listener>,
}

fn file_name(name: &SocketName) -> String {
    format!("{name}.sock")
}

impl Listeners {
    /// None yet. Sockets that an earlier run left in `directory` are removed.
    ///
    /// # Errors
    /// Anything else in the directory: it is rot's alone.
    pub fn new(directory: Directory) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
        for entry in fs::read_dir(path)? {
            let name = entry?.file_name();
            remove_socket(&directory, &name.to_string_lossy()).map_err(io::Error::other)?;
        }
        Ok(Self {
            directory,
            bound: BTreeMap::new(),
        })
    }

    /// Leaves them to the rot that is executed in the place of this one.
    pub fn leave<'a>(&'a self, leaving: &mut Leaving<'a>) -> Vec<LeftListener> {
        let leave = |(name, listener): (&SocketName, &'a Listener)| {
            let Access { uid, gid, mode } = listener.access;
            LeftListener {
                name: name.clone(),
                access: [uid, gid, mode],
                socket: leaving.number(listener.socket.as_fd()),
            }
        };
        self.bound.iter().map(leave).collect()
    }

    /// Those that the rot before this one left. Their files in `directory` stay as they are.
    ///
    /// # Errors
    /// A descriptor is not open.
    pub fn resumed(
        directory: Directory,
        left: Vec<LeftListener>,
        inherited: &mut Inherited,
    ) -> io::Result<Self> {
        let mut bound = BTreeMap::new();
        for LeftListener {
            name,
            access: [uid, gid, mode],
            socket,
        } in left
        {
            let listener = Listener {
                socket: inherited.shared(socket)?,
                access: Access { uid, gid, mode },
            };
            bound.insert(name, listener);
        }
        Ok(Self { directory, bound })
    }

    /// Binds a listener. Gives the socket if it is new; a name that is bound keeps its socket and
    /// takes the new owner and mode.
    ///
    /// # Errors
    /// See [`ListenerError`]; nothing has changed then.
    pub fn bind(
        &mut self,
        name: &SocketName,
        access: Access,
    ) -> Result<Option<Rc<OwnedFd>>, ListenerError> {
        self.check(name, access)
            .map_err(|reason| ListenerError::Refused {
                name: name.clone(),
                reason,
            })?;
        let failed = |source| ListenerError::Failed {
            name: name.clone(),
            source,
        };
        let file = file_name(name);
        if let Some(listener) = self.bound.get_mut(name) {
            if listener.access != access
                && let Err(error) = set_access(&self.directory, &file, access)
            {
                // Back to what it was; where that fails too, it stays closed to all but root.
                let _ = set_access(&self.directory, &file, listener.access);
                return Err(failed(error));
            }
            listener.access = access;
            return Ok(None);
        }
        let socket = listen_at(&self.directory, &file, SockType::Stream, access).map_err(failed)?;
        let socket = Rc::new(socket);
        let listener = Listener {
            socket: Rc::clone(&socket),
            access,
        };
        self.bound.insert(name.clone(), listener);
        Ok(Some(socket))
    }

    fn check(&self, name: &SocketName, access: Access) -> Result<(), String> {
        let Access { uid, gid, mode } = access;
        if mode > 0o777 {
            return Err(format!("mode {mode:o} has more than the bits of 777"));
        }
        if uid == u32::MAX || gid == u32::MAX {
            return Err(format!("{} is no user or group id", u32::MAX));
        }
        let path_bytes = self
            .directory
            .path()
            .join(file_name(name))
            .as_os_str()
            .len();
        if path_bytes > MAX_PATH_BYTES {
            return Err(format!(
                "its path has {path_bytes} bytes, a socket's has at most {MAX_PATH_BYTES}; choose a shorter socket name or --run-dir"
            ));
        }
        if self.bound.len() >= MAX_LISTENERS && !self.bound.contains_key(name) {
            return Err(format!("there are {MAX_LISTENERS} already; unbind some"));
        }
        Ok(())
    }

    /// Removes a listener. Says whether there was one.
    ///
    /// # Errors
    /// The file can't be removed; the listener stays.
    pub fn unbind(&mut self, name: &SocketName) -> Result<bool, ListenerError> {
        if !self.bound.contains_key(name) {
            return Ok(false);
        }
        remove_socket(&self.directory, &file_name(name)).map_err(|source| {
            ListenerError::Failed {
                name: name.clone(),
                source,
            }
        })?;
        Ok(self.bound.remove(name).is_some())
    }

    /// Each listener's name and socket.
    pub fn iter(&self) -> impl Iterator<Item = (&SocketName, Rc<OwnedFd>)> {
        self.bound
            .iter()
            .map(|(name, listener)| (name, Rc::clone(&listener.socket)))
    }

    /// Removes all of them; what can't be removed is left to the next start.
    pub fn remove_all(&mut self) {
        let names: Vec<SocketName> = self.bound.keys().cloned().collect();
        for name in names {
            if let Err(error) = self.unbind(&name) {
                tracing::warn!("{error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    fn listeners(base: &Path) -> Listeners {
        Listeners::new(Directory::own(&base.join("vhost")).unwrap()).unwrap()
    }

    fn own(mode: u32) -> Access {
        Access {
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            mode,
        }
    }

    #[test]
    fn binding_again_keeps_the_socket_and_takes_the_new_mode() {
        let base = tempfile::tempdir().unwrap();
        let mut listeners = listeners(base.path());
        let name: SocketName = "vm".parse().unwrap();
        assert!(listeners.bind(&name, own(0o660)).unwrap().is_some());
        let file = base.path().join("vhost/vm.sock");
        let inode = std::fs::metadata(&file).unwrap().ino();
        assert!(listeners.bind(&name, own(0o660)).unwrap().is_none());
        assert!(listeners.bind(&name, own(0o600)).unwrap().is_none());
        let found = std::fs::metadata(&file).unwrap();
        assert_eq!((found.ino(), found.mode() & 0o7777), (inode, 0o600));
        assert!(listeners.unbind(&name).unwrap());
        assert!(!file.exists());
        assert!(!listeners.unbind(&name).unwrap());
    }

    #[test]
    fn refused_requests_change_nothing() {
        let base = tempfile::tempdir().unwrap();
        let mut listeners = listeners(base.path());
        let name: SocketName = "vm".parse().unwrap();
        let no_user = Access {
            uid: u32::MAX,
            ..own(0o600)
        };
        for (access, word) in [(own(0o1777), "mode 1777"), (no_user, "no user")] {
            let error = listeners.bind(&name, access).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(listeners.iter().count(), 0);
        assert!(!base.path().join("vhost/vm.sock").exists());
    }

    #[test]
    fn refused_a_path_that_no_frontend_could_connect_to() {
        let base = tempfile::tempdir().unwrap();
        let long = base.path().join("d".repeat(80));
        let mut listeners = Listeners::new(Directory::own(&long).unwrap()).unwrap();
        let name: SocketName = "a-name-of-some-length".parse().unwrap();
        let error = listeners.bind(&name, own(0o600)).unwrap_err().to_string();
        assert!(error.contains("shorter socket name"), "{error}");
    }

    #[test]
    fn what_an_earlier_run_left_is_removed_and_other_files_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let mut first = listeners(base.path());
        first.bind(&"vm".parse().unwrap(), own(0o600)).unwrap();
        drop(first);
        assert!(base.path().join("vhost/vm.sock").exists());
        listeners(base.path());
        assert!(!base.path().join("vhost/vm.sock").exists());
        std::fs::write(base.path().join("vhost/notes"), "kept").unwrap();
        let directory = Directory::own(&base.path().join("vhost")).unwrap();
        let error = Listeners::new(directory).unwrap_err().to_string();
        assert!(error.contains("\"notes\" is in the way"), "{error}");
    }
}
