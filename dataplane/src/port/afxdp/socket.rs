//! Making a socket that was passed work: memory and rings, then bound to its queue. Done by the control thread, before a
//! worker gets it.
//!
//! UNSAFETY: `setsockopt`, `getsockopt` and `bind` with structures that live through the calls and have the length that
//! is said.
#![expect(unsafe_code, reason = "options of an AF_XDP socket")]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::ring::{Consumer, Producer};
use super::umem::{RECEIVING, SENDING, Umem};

/// Entries of the ring that the kernel takes frames for what comes from.
const FILL_ENTRIES: u32 = RECEIVING;
/// Entries of the ring of what came. Whoever made the socket has made it, so that a map of sockets took it.
const RECEIVE_ENTRIES: u32 = 1024;
/// Entries of the rings of what goes and of what has gone.
const SEND_ENTRIES: u32 = SENDING;
/// How long a queue may take to become free. Nothing else is done meanwhile, and it takes a few milliseconds.
const QUEUE_PATIENCE: Duration = Duration::from_millis(300);

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("an AF_XDP port: {step}: {source}{hint}")]
pub struct XdpError {
    step: &'static str,
    source: io::Error,
    hint: &'static str,
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> XdpError {
    move |source| {
        let hint = match source.raw_os_error() {
            Some(libc::ENOBUFS | libc::ENOMEM) => {
                "; its frames are locked memory: raise RLIMIT_MEMLOCK (LimitMEMLOCK=), of which each queue pair takes \
                 3 MiB, 6 MiB with an MTU over 1,770"
            }
            Some(libc::EBUSY) => "; another socket is bound to that queue",
            _ => "",
        };
        XdpError { step, source, hint }
    }
}

/// A socket with its memory and rings, bound: what a port is made of. It goes from the control thread to a worker.
#[derive(Debug)]
pub struct XdpQueue {
    pub(super) socket: OwnedFd,
    pub(super) umem: Umem,
    pub(super) fill: Producer<u64>,
    pub(super) received: Consumer<libc::xdp_desc>,
    pub(super) sending: Producer<libc::xdp_desc>,
    pub(super) sent: Consumer<u64>,
    /// The driver works on the frames itself.
    pub(super) is_zero_copy: bool,
}

impl XdpQueue {
    /// Sets a socket up that was made for queue `queue` of interface `interface_index` and is bound to nothing yet. Frames
    /// have room for packets of `mtu` bytes.
    ///
    /// # Errors
    /// See [`XdpError`]; the socket is closed.
    pub fn new(
        socket: OwnedFd,
        interface_index: u32,
        queue: u32,
        mtu: u16,
    ) -> Result<Self, XdpError> {
        let umem = Umem::new(mtu).map_err(failed("its memory"))?;
        let fd = socket.as_fd();
        let registration = umem.registration();
        set(fd, libc::XDP_UMEM_REG, &registration).map_err(failed("registering its memory"))?;
        let rings = [
            (libc::XDP_UMEM_FILL_RING, FILL_ENTRIES),
            (libc::XDP_UMEM_COMPLETION_RING, SEND_ENTRIES),
            (libc::XDP_TX_RING, SEND_ENTRIES),
        ];
        for (option, entries) in rings {
            set(fd, option, &entries).map_err(failed("making its rings"))?;
        }
        let mut made = Self::mapped(socket, umem)?;
        for frame in 0..RECEIVING {
            made.refill(frame);
        }
        made.fill.publish();
        bind_soon(made.socket.as_fd(), interface_index, queue)
            .map_err(failed("binding it to its queue"))?;
        made.look_at_mode()?;
        Ok(made)
    }

    /// What an earlier process has set up, from its socket and the file of its memory
    /// ([`XdpQueue::descriptors`]): what came since then is there, what was being sent goes on. A few frames' room that
    /// was on its way between both sides may be lost, and a frame be given twice.
    ///
    /// # Errors
    /// See [`XdpError`].
    pub fn resumed(socket: OwnedFd, memory: OwnedFd) -> Result<Self, XdpError> {
        let umem = Umem::found(memory).map_err(failed("its memory"))?;
        let mut made = Self::mapped(socket, umem)?;
        made.look_at_mode()?;
        // A driver that works on the frames itself may hold any of them: those are lost to this port.
        if !made.is_zero_copy {
            made.find_frames();
        }
        Ok(made)
    }

    /// Its socket and the file of its memory, to be stored.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.socket.as_fd(), self.umem.file()]
    }

    /// Whether the interface's driver works on the frames itself, without copying them.
    #[must_use]
    pub fn is_zero_copy(&self) -> bool {
        self.is_zero_copy
    }

    fn mapped(socket: OwnedFd, umem: Umem) -> Result<Self, XdpError> {
        let fd = socket.as_fd();
        let places: libc::xdp_mmap_offsets =
            get(fd, libc::XDP_MMAP_OFFSETS).map_err(failed("asking for its rings"))?;
        let mapping = failed("mapping its rings");
        // Offsets of mmap, all below 2^33.
        let at = |offset: u64| i64::try_from(offset).unwrap_or(0);
        let fill = at(libc::XDP_UMEM_PGOFF_FILL_RING);
        let sent = at(libc::XDP_UMEM_PGOFF_COMPLETION_RING);
        Ok(Self {
            fill: Producer::new(fd, fill, &places.fr, FILL_ENTRIES).map_err(&mapping)?,
            received: Consumer::new(fd, libc::XDP_PGOFF_RX_RING, &places.rx, RECEIVE_ENTRIES)
                .map_err(&mapping)?,
            sending: Producer::new(fd, libc::XDP_PGOFF_TX_RING, &places.tx, SEND_ENTRIES)
                .map_err(&mapping)?,
            sent: Consumer::new(fd, sent, &places.cr, SEND_ENTRIES).map_err(&mapping)?,
            is_zero_copy: false,
            umem,
            socket,
        })
    }

    fn look_at_mode(&mut self) -> Result<(), XdpError> {
        let options: libc::xdp_options =
            get(self.socket.as_fd(), libc::XDP_OPTIONS).map_err(failed("asking for its mode"))?;
        self.is_zero_copy = options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0;
        Ok(())
    }

    /// Gives the kernel a frame for what comes; it sees it with the next publishing.
    #[inline]
    pub(super) fn refill(&mut self, frame: u32) {
        if self.fill.put(self.umem.address(frame)) {
            self.umem.give(frame);
        }
    }

    /// Gives the kernel every frame for what comes that is in neither of its rings: this side had them when it ended.
    fn find_frames(&mut self) {
        let mut known = vec![false; RECEIVING as usize];
        let umem = &self.umem;
        let mut note = |address: u64| {
            let frame = umem.place(address).map(|(frame, _)| frame as usize);
            if let Some(known) = frame.and_then(|frame| known.get_mut(frame)) {
                *known = true;
            }
        };
        self.fill.each_waiting(&mut note);
        for ahead in 0..self.received.waiting() {
            if let Some(entry) = self.received.peek(ahead) {
                note(entry.addr);
            }
        }
        for (frame, known) in (0..).zip(known) {
            if known {
                // Whatever was noted when the process ended.
                self.umem.give(frame);
            } else {
                self.refill(frame);
            }
        }
        self.fill.publish();
    }
}

fn set<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let at = std::ptr::from_ref(value).cast();
    // SAFETY: a value of that many bytes, which lives through the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_XDP, option, at, bytes) };
    done(result)
}

fn get<T: Zeroed>(socket: BorrowedFd<'_>, option: libc::c_int) -> io::Result<T> {
    let mut value = T::ZERO;
    let mut bytes = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let at = (&raw mut value).cast();
    // SAFETY: room for that many bytes, which lives through the call; any bytes are a value.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            option,
            at,
            &raw mut bytes,
        )
    };
    done(result)?;
    // An older kernel would answer with less.
    if bytes as usize != size_of::<T>() {
        return Err(io::Error::other("the kernel is older than Linux 5.4"));
    }
    Ok(value)
}

/// Numbers only, which any bytes are.
trait Zeroed: Copy {
    const ZERO: Self;
}

const NOWHERE: libc::xdp_ring_offset = libc::xdp_ring_offset {
    producer: 0,
    consumer: 0,
    desc: 0,
    flags: 0,
};

impl Zeroed for libc::xdp_mmap_offsets {
    const ZERO: Self = Self {
        rx: NOWHERE,
        tx: NOWHERE,
        fr: NOWHERE,
        cr: NOWHERE,
    };
}

impl Zeroed for libc::xdp_options {
    const ZERO: Self = Self { flags: 0 };
}

/// Binds it, also where the socket that had the queue before is still being closed: by whoever stores descriptors for us,
/// and then by the kernel, which frees a queue in the background.
fn bind_soon(socket: BorrowedFd<'_>, interface_index: u32, queue: u32) -> io::Result<()> {
    let until = Instant::now() + QUEUE_PATIENCE;
    loop {
        match bind(socket, interface_index, queue) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}

/// Without a word about copying: the driver works on the frames itself where it can.
fn bind(socket: BorrowedFd<'_>, interface_index: u32, queue: u32) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: u16::try_from(libc::AF_XDP).map_err(io::Error::other)?,
        sxdp_flags: libc::XDP_USE_NEED_WAKEUP,
        sxdp_ifindex: interface_index,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    let bytes = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    let at = (&raw const address).cast();
    // SAFETY: an address of that many bytes, which lives through the call.
    done(unsafe { libc::bind(socket.as_raw_fd(), at, bytes) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
