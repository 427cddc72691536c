//! A file system that stops answering, fails or goes when it is told to, as a network's does: one file, in memory,
//! behind FUSE.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite,
    Request, WriteFlags,
};
use tempfile::TempDir;

/// What is known of the file stays known, so that only its bytes can hang.
const LONG: Duration = Duration::from_secs(3600);
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "disk";

/// What is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sticks {
    /// Everything is.
    #[default]
    Nothing,
    /// Writes.
    Writes,
    /// Nothing is.
    All,
}

/// What somebody asks of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Read,
    Write,
    Flush,
}

/// How an answer is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// It is this errno, and nothing is done.
    Errno(i32),
    /// Half of the bytes are done.
    Half,
}

/// What is done once it answers again: with the bytes, or what is wrong with it.
type Later = Box<dyn FnOnce(&mut Vec<u8>, Option<Wrong>) + Send>;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    stuck: Sticks,
    wrong: Option<(Asked, Wrong)>,
    later: Vec<Later>,
}

/// A mounted file system.
pub struct Stuck {
    state: Arc<Mutex<State>>,
    dir: TempDir,
    /// Unmounted before the folder goes.
    session: Option<BackgroundSession>,
}

struct OneFile(Arc<Mutex<State>>);

impl OneFile {
    fn answer(
        &self,
        asked: Asked,
        answer: impl FnOnce(&mut Vec<u8>, Option<Wrong>) + Send + 'static,
    ) {
        let mut state = self.0.lock().expect("nobody panicked");
        let is_write = asked == Asked::Write;
        let stuck = state.stuck == Sticks::All || is_write && state.stuck == Sticks::Writes;
        if stuck {
            state.later.push(Box::new(answer));
            return;
        }
        let wrong = state.wrong.filter(|(of, _)| *of == asked);
        answer(&mut state.bytes, wrong.map(|(_, wrong)| wrong));
    }

    fn attributes(&self, node: INodeNo) -> FileAttr {
        let is_file = node == FILE;
        let size = self.0.lock().expect("nobody panicked").bytes.len() as u64;
        FileAttr {
            ino: node,
            size: if is_file { size } else { 0 },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: 0o777,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&LONG, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&LONG, &self.attributes(node));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let at = usize::try_from(offset).expect("small");
        self.answer(Asked::Read, move |bytes, wrong| {
            let end = bytes.len().min(at + size as usize);
            match wrong {
                None => reply.data(&bytes[at..end]),
                Some(Wrong::Half) => reply.data(&bytes[at..at + (end - at) / 2]),
                Some(Wrong::Errno(errno)) => reply.error(Errno::from_i32(errno)),
            }
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (at, data) = (usize::try_from(offset).expect("small"), data.to_vec());
        self.answer(Asked::Write, move |bytes, wrong| {
            let count = match wrong {
                None => data.len(),
                Some(Wrong::Half) => data.len() / 2,
                Some(Wrong::Errno(errno)) => return reply.error(Errno::from_i32(errno)),
            };
            bytes[at..at + count].copy_from_slice(&data[..count]);
            reply.written(u32::try_from(count).expect("short"));
        });
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.answer(Asked::Flush, move |_, wrong| match wrong {
            Some(Wrong::Errno(errno)) => reply.error(Errno::from_i32(errno)),
            _ => reply.ok(),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

impl Stuck {
    /// One with a file of so many bytes; none where it can't be mounted.
    pub fn mount(bytes: u64) -> Option<Self> {
        let state = Arc::new(Mutex::new(State {
            bytes: vec![0; usize::try_from(bytes).expect("small")],
            ..State::default()
        }));
        let dir = TempDir::new().expect("folder");
        let session =
            fuser::spawn_mount(OneFile(Arc::clone(&state)), dir.path(), &Config::default());
        let session = Some(session.ok()?);
        Some(Self {
            state,
            dir,
            session,
        })
    }

    /// The file, opened once more.
    pub fn file(&self) -> File {
        let both = OpenOptions::new().read(true).write(true).clone();
        both.open(self.dir.path().join(NAME)).expect("open")
    }

    /// From now on this is not answered; nothing: what has waited is.
    pub fn stick(&self, stuck: Sticks) {
        let mut state = self.state.lock().expect("nobody panicked");
        state.stuck = stuck;
        if stuck == Sticks::Nothing {
            let later = std::mem::take(&mut state.later);
            later
                .into_iter()
                .for_each(|answer| answer(&mut state.bytes, None));
        }
    }

    /// From now on what is asked is answered like this; none: rightly.
    pub fn go_wrong(&self, wrong: Option<(Asked, Wrong)>) {
        self.state.lock().expect("nobody panicked").wrong = wrong;
    }

    /// The disk is gone: who waits for an answer, or asks for one later, gets an error from the kernel.
    pub fn go_away(&self) {
        // The file is open, so that it can't be unmounted; but nobody is waited for any more.
        let mut by_force = std::process::Command::new("umount");
        by_force.arg("-f").arg(self.dir.path());
        by_force.output().expect("umount runs");
    }

    /// It answers when this goes: to be dropped before whoever has its file open.
    pub fn answers_at_the_end(&self) -> Answers<'_> {
        Answers(self)
    }

    /// Requests that wait for an answer.
    pub fn waiting(&self) -> usize {
        self.state.lock().expect("nobody panicked").later.len()
    }
}

/// Has it answer again.
pub struct Answers<'a>(&'a Stuck);

impl Drop for Answers<'_> {
    fn drop(&mut self) {
        self.0.stick(Sticks::Nothing);
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        // The kernel closes a ring's files a little after the ring: an unmount would find it in use.
        let mut lazily = std::process::Command::new("umount");
        let _ = lazily.arg("-l").arg(self.dir.path()).status();
        drop(self.session.take());
    }
}
