//! What rot leaves to the rot that is executed in its place: which descriptor is what, and what it
//! knows of its children. Written into a memfd by the one, read by the other before it does anything.
//!
//! The new rot is tried out first, as a child with a copy of every descriptor, up to where it would
//! begin to supervise. So a binary that can't read this, or takes another command line, is never
//! executed in place.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use bulkhead_protocol::identity::SocketName;
use bulkhead_protocol::release::{Component, Release};
use bulkhead_protocol::rot::Role;
use minicbor::{Decode, Encode};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::replace::{Inherited, close_on_exec};

/// Environment variable: the number of the memfd's descriptor.
pub const HANDOFF_ENV: &str = "BULKHEAD_ROT_HANDOFF";
/// Environment variable: this is a try; end with status 0 where it would begin.
pub const TRY_ENV: &str = "BULKHEAD_ROT_TRY";
/// Version of what is left.
const VERSION: u32 = 1;
/// Longest text in bytes: 17,000 descriptors of 40 bytes each, and some.
const MAX_BYTES: u64 = 4 << 20;

/// Everything that is left. Descriptors are numbers of the process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Handoff {
    /// [`VERSION`] of who wrote it.
    #[n(0)]
    version: u32,
    /// The lock of the run directory.
    #[n(1)]
    pub lock: RawFd,
    /// The operators' socket.
    #[n(2)]
    pub admin: RawFd,
    /// The processes.
    #[n(3)]
    pub children: Vec<LeftChild>,
    /// The vhost-user listeners.
    #[n(4)]
    pub listeners: Vec<LeftListener>,
    /// What the children stored, in order, as far as systemd does not have it.
    #[n(5)]
    pub stored: Vec<LeftStored>,
    /// The way to systemd's store, and what lies there.
    #[n(6)]
    pub systemd: Option<LeftSystemd>,
    /// What was upgraded to, the new rot included.
    #[n(7)]
    pub runs: Vec<Release>,
    /// Upgrades that came to nothing, with the reason.
    #[n(8)]
    pub failed: Vec<(Component, String)>,
    /// The request that is answered once the new rot supervises.
    #[n(9)]
    pub request_id: u64,
}

/// A role's process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LeftChild {
    /// Which.
    #[n(0)]
    pub role: Role,
    /// How many times it was started.
    #[n(1)]
    pub generation: u64,
    /// Starts in a row that came to nothing.
    #[n(2)]
    pub vain_starts: u32,
    /// The sealed memfd of its binary.
    #[n(3)]
    pub binary: RawFd,
    /// The process, unless the role waits for its start.
    #[n(4)]
    pub process: Option<LeftProcess>,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LeftProcess {
    /// Its id.
    #[n(0)]
    pub pid: u32,
    /// Its pidfd.
    #[n(1)]
    pub pidfd: RawFd,
    /// rot's end of its channel.
    #[n(2)]
    pub link: Option<RawFd>,
    /// rot's end of its store.
    #[n(3)]
    pub keeper: Option<RawFd>,
    /// It said its `Hello`.
    #[n(4)]
    pub hello: bool,
}

/// A listener.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LeftListener {
    /// Its name.
    #[n(0)]
    pub name: SocketName,
    /// Owner, group and mode of its file.
    #[n(1)]
    pub access: [u32; 3],
    /// The socket.
    #[n(2)]
    pub socket: RawFd,
}

/// A stored descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LeftStored {
    /// Whose.
    #[n(0)]
    pub role: Role,
    /// Under which name.
    #[n(1)]
    pub name: String,
    /// The descriptor.
    #[n(2)]
    pub fd: RawFd,
}

/// systemd's store.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LeftSystemd {
    /// The connected socket.
    #[n(0)]
    pub notify: RawFd,
    /// The table.
    #[n(1)]
    pub table: RawFd,
    /// The files, with systemd's names of them.
    #[n(2)]
    pub files: Vec<(String, RawFd)>,
}

/// Descriptors that are to be left open, and their numbers.
#[derive(Debug, Default)]
pub struct Leaving<'a> {
    fds: Vec<BorrowedFd<'a>>,
}

impl<'a> Leaving<'a> {
    /// Leaves a descriptor, and gives its number.
    pub fn number(&mut self, fd: BorrowedFd<'a>) -> RawFd {
        self.fds.push(fd);
        fd.as_raw_fd()
    }

    /// Runs `exec` while they are not closed on exec. It returns only if it failed.
    ///
    /// # Errors
    /// What `exec` or `fcntl` failed with; everything is as before then.
    pub fn while_open<T>(&self, exec: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let set = |closed| {
            self.fds
                .iter()
                .try_for_each(|fd| close_on_exec(*fd, closed))
        };
        let done = set(false).and_then(|()| exec());
        set(true)?;
        done
    }
}

impl Handoff {
    /// Nothing yet but the lock and the operators' socket.
    #[must_use]
    pub fn new(lock: RawFd, admin: RawFd, request_id: u64) -> Self {
        Self {
            version: VERSION,
            lock,
            admin,
            children: Vec::new(),
            listeners: Vec::new(),
            stored: Vec::new(),
            systemd: None,
            runs: Vec::new(),
            failed: Vec::new(),
            request_id,
        }
    }

    /// Writes it into a memfd.
    ///
    /// # Errors
    /// No memory.
    pub fn write(&self) -> io::Result<OwnedFd> {
        let bytes = minicbor::to_vec(self).map_err(io::Error::other)?;
        let mut file = File::from(memfd_create("rot-handoff", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&bytes)?;
        Ok(file.into())
    }

    /// What the rot before this one left to it, if there was one.
    ///
    /// # Errors
    /// It can't be read, or is of another version.
    pub fn inherited(inherited: &mut Inherited) -> io::Result<Option<Self>> {
        let Ok(number) = std::env::var(HANDOFF_ENV) else {
            return Ok(None);
        };
        let number = number.parse().map_err(io::Error::other)?;
        Self::read(&inherited.owned(number)?).map(Some)
    }

    fn read(memfd: &OwnedFd) -> io::Result<Self> {
        let mut file = File::from(memfd.as_fd().try_clone_to_owned()?);
        file.rewind()?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        let handoff: Self = minicbor::decode(&bytes).map_err(io::Error::other)?;
        if handoff.version == VERSION {
            return Ok(handoff);
        }
        Err(io::Error::other(format!(
            "it is of version {}, this rot reads {VERSION}",
            handoff.version
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_other_versions_are_refused() {
        let mut handoff = Handoff::new(7, 8, 9);
        handoff.children.push(LeftChild {
            role: Role::Agent,
            generation: 3,
            vain_starts: 1,
            binary: 10,
            process: Some(LeftProcess {
                pid: 77,
                pidfd: 11,
                link: None,
                keeper: Some(12),
                hello: true,
            }),
        });
        handoff.stored.push(LeftStored {
            role: Role::Dataplane,
            name: "v0.state".to_owned(),
            fd: 13,
        });
        handoff.failed.push((Component::Keyd, "why".to_owned()));
        let memfd = handoff.write().unwrap();
        assert_eq!(Handoff::read(&memfd).unwrap(), handoff);
        handoff.version += 1;
        let error = Handoff::read(&handoff.write().unwrap()).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
        let file = File::from(memfd);
        file.set_len(9).unwrap();
        assert!(Handoff::read(&file.into()).is_err());
    }

    #[test]
    fn descriptors_are_left_open_only_meanwhile() {
        use nix::fcntl::{FcntlArg, fcntl};
        let file = File::open("/dev/null").unwrap();
        let closed = || fcntl(&file, FcntlArg::F_GETFD).unwrap() & libc::FD_CLOEXEC != 0;
        let mut leaving = Leaving::default();
        assert_eq!(leaving.number(file.as_fd()), file.as_raw_fd());
        let failed = leaving.while_open(|| {
            assert!(!closed());
            Err::<(), _>(io::Error::other("no exec"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no exec");
        assert!(closed());
    }
}
