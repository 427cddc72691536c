//! Ports: where a network card's frames go, and where those for it come from.
//!
//! A [`Port`] lives on one worker and is nobody else's: no locks, no atomics but counters. A NIC that has a port of
//! its own has one for each of its queue pairs, on the worker that serves the pair; a switch is one port for all NICs
//! that are connected to it, and one worker serves all of their queues.
//!
//! **Nothing of a guest's stays.** When [`Port::transmit`] returns, the port has copied what it sends: the guest's
//! buffers are used at once, in order, and nothing of a network queue is in flight when a worker dies, is upgraded
//! or gives a queue to another one. The copy that this costs a port which leads out of the process is small beside
//! the kernel's own work; guest to guest it is the only one.
//!
//! **What waits, waits in the guest.** A lane takes no more from a tx queue than its port has room for
//! ([`Port::room`]). Between guests a switch always has room: a frame that one receiver can't take is dropped there
//! and counted there, so that it holds up no other.
//!
//! | module | owns |
//! | --- | --- |
//! | [`reason`] | why a frame was dropped |
//! | [`guard`] | whether a guest sends as itself |
//! | [`mirror`] | copies of a NIC's frames in a file |
//! | [`null`] | the port that takes everything and gives nothing |
//! | [`source`] | the port that makes frames, to measure |
//! | [`spec`] | what a network card is connected to, as the control thread and every worker know it |
//! | [`switch`] | the learning bridge among NICs and one uplink |
//! | [`tap`] | the port that leads to a queue of a TAP |
//! | [`afxdp`] | the port that leads to a queue of an interface, past the host's stack |
//! | [`interface`] | what ports that lead to the host's interfaces count |

pub mod afxdp;
pub mod guard;
pub mod interface;
pub mod mirror;
pub mod null;
pub mod reason;
pub mod source;
pub mod spec;
pub mod switch;
pub mod tap;

use crate::net::Counts;
use crate::net::frame::Frame;
use crate::worker::ring::{Completion, Ring};

pub use afxdp::AfXdpPort;
pub use guard::Guard;
pub use mirror::{Mirror, MirrorFile};
pub use null::NullPort;
pub use reason::DropReason;
pub use source::SourcePort;
pub use spec::{OutsideSpec, PortSpec, SwitchSpec, TapSpec, XdpSpec};
pub use switch::Switch;
pub use tap::TapPort;

/// Number of a NIC among those of its worker. It is also its place in the worker's switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nic(pub u16);

/// Where frames go on this worker, and come from. All of its methods are called by the worker that owns it, none of
/// them waits, and none allocates or makes a system call for each frame.
///
/// In a turn of the worker: `receive`, then for each batch of a tx queue `room`, some `transmit` or a `transmit_all`,
/// and one `flush`.
/// Completions come in between, each to the port whose [`Tokens`] its token is of.
pub trait Port {
    /// Gives frames that arrived from outside to `to`, up to a bounded number: how many there were. `now` is the
    /// turn's time ([`clock::now`](crate::worker::clock::now)); it never goes back.
    fn receive(&mut self, now: u64, to: &mut impl Sink, ring: &mut Ring) -> usize;

    /// How many frames of this NIC's it takes now, of any length. As many can be given to it before it is asked again;
    /// more may be dropped as [`DropReason::PortBusy`]. A port of several NICs has only those wait whose frames would be
    /// lost.
    fn room(&self, from: Nic) -> usize;

    /// Takes a guest's frame, which has passed its NIC's limits and guard. Frames for NICs of this worker go to
    /// `to`. `frame.body` isn't used after it returns.
    ///
    /// # Errors
    /// Why it went nowhere, to be counted with the queue that sent it. What single receivers of it could not take
    /// is not told here: [`Sink::deliver`] has counted it with them.
    fn transmit(
        &mut self,
        from: Nic,
        frame: &Frame<'_>,
        to: &mut impl Sink,
        ring: &mut Ring,
    ) -> Result<(), DropReason>;

    /// As [`Port::transmit`] of each of these frames, which a guest sends one after the other; what became of each is
    /// counted there.
    #[inline]
    fn transmit_all<'a>(
        &mut self,
        from: Nic,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
        to: &mut impl Sink,
        ring: &mut Ring,
        counts: &mut Counts,
    ) {
        for frame in frames {
            match self.transmit(from, &frame, to, ring) {
                Ok(()) => counts.frame(frame.bytes() as u64),
                Err(reason) => counts.dropped(reason),
            }
        }
    }

    /// The end of a batch: what was taken goes on its way.
    fn flush(&mut self, ring: &mut Ring);

    /// An entry of the ring that this port has pushed has ended.
    fn landed(&mut self, completion: Completion, ring: &mut Ring);

    /// The worker is about to sleep: from now on a frame that arrives wakes it with a completion. False: something
    /// has arrived already, or it can't be armed now; the worker is to go on.
    fn arm(&mut self, ring: &mut Ring) -> bool;

    /// Asks for the end of what it has in the ring, as the port is to go or to be handed over.
    fn stop(&mut self, ring: &mut Ring);

    /// Whether nothing of it is in the ring; after [`Port::stop`] that becomes true with its last completion.
    fn is_idle(&self) -> bool;
}

/// Who gets frames for NICs of this worker.
pub trait Sink {
    /// Copies a frame into a NIC's receive buffers, in the queue that its flow belongs to.
    ///
    /// # Errors
    /// Why the NIC did not get it. It is already counted there: this is for who wants to know what became of it.
    fn deliver(&mut self, to: Nic, frame: &Frame<'_>) -> Result<(), DropReason>;

    /// As [`Sink::deliver`] of each of these frames, one after the other, up to the first that the NIC does not get:
    /// how many it got.
    #[inline]
    fn deliver_all<'a>(
        &mut self,
        to: Nic,
        frames: impl Iterator<Item = Frame<'a>> + Clone,
    ) -> usize {
        let given = |frame: &Frame<'_>| self.deliver(to, frame).is_ok();
        frames.take_while(given).count()
    }
}

/// The tokens of a port's entries in the ring: the worker finds the port by the upper half, the port its own entry
/// by the lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tokens(u64);

impl Tokens {
    /// Bits that the port sets itself.
    pub const SLOT_BITS: u32 = 32;

    /// Those whose upper half is that of `base`.
    #[must_use]
    pub fn new(base: u64) -> Self {
        Self(base >> Self::SLOT_BITS << Self::SLOT_BITS)
    }

    /// The token of an entry.
    #[must_use]
    #[inline]
    pub fn token(self, slot: u32) -> u64 {
        self.0 | u64::from(slot)
    }

    /// The entry of a token.
    #[must_use]
    #[inline]
    pub fn slot(token: u64) -> u32 {
        u32::try_from(token & u64::from(u32::MAX)).unwrap_or(0)
    }

    /// Whether a token is one of these.
    #[must_use]
    #[inline]
    pub fn has(self, token: u64) -> bool {
        token >> Self::SLOT_BITS == self.0 >> Self::SLOT_BITS
    }
}
