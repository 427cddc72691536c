//! A port of whichever kind, without a table of functions: the kind is looked at once for each frame, or less often.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::AsFd as _;
use std::sync::Arc;

use crate::net::frame::Frame;
use crate::net::{Counts, HashKey};
use crate::port::tap::TapPort;
use crate::port::{
    AfXdpPort, DropReason, Nic, NullPort, OutsideSpec, Port, Sink, SourcePort, Switch, Tokens,
    XdpSpec,
};
use crate::worker::ring::{Completion, Ring};

/// A way out of the host.
#[derive(Debug)]
pub enum Outside {
    /// A queue of a TAP.
    Tap(TapPort),
    /// A queue of an interface, by AF_XDP.
    Xdp(Box<Xdp>),
}

/// An AF_XDP port, and where its socket came from.
#[derive(Debug)]
pub struct Xdp {
    port: AfXdpPort,
    spec: Arc<XdpSpec>,
    pair: u16,
}

/// A port.
#[derive(Debug)]
pub enum AnyPort {
    /// To nowhere.
    Null(NullPort),
    /// From nowhere, to measure.
    Source(SourcePort),
    /// To other cards.
    Switch(Box<Switch<Outside>>),
    /// Out of the host.
    Outside(Outside),
}

/// Opens a way out of the host on this worker, for a queue pair of a card.
///
/// # Errors
/// Why that can't be, in words.
pub(super) fn open(
    spec: &OutsideSpec,
    (nic, pair): (Nic, u16),
    (tokens, key): (Tokens, HashKey),
    ring: &mut Ring,
) -> Result<Outside, String> {
    match spec {
        OutsideSpec::Tap(tap) => {
            let name = &tap.name;
            let queue = tap.queues.get(usize::from(pair));
            let queue = queue.ok_or_else(|| format!("the TAP {name} has no queue {pair}"))?;
            let file = ring.register_file(queue.as_fd());
            let file = file.map_err(|e| format!("the TAP {name} can't be used: {e}"))?;
            let counters = Arc::clone(&tap.counters);
            TapPort::new(nic, file, tokens, key, counters)
                .map(Outside::Tap)
                .map_err(|error| {
                    ring.forget_file(file);
                    format!("there is no memory for frames of the TAP {name}: {error}")
                })
        }
        OutsideSpec::Xdp(xdp) => {
            let (name, counters) = (&xdp.name, Arc::clone(&xdp.counters));
            let queue = xdp.take(pair).ok_or_else(|| {
                format!(
                    "{name} has no AF_XDP socket for pair {pair}, or another worker has it still"
                )
            })?;
            let [socket, _] = queue.descriptors();
            let file = match ring.register_file(socket) {
                Ok(file) => file,
                Err(error) => {
                    xdp.give_back(pair, queue);
                    return Err(format!(
                        "the AF_XDP socket of {name} can't be used: {error}"
                    ));
                }
            };
            Ok(Outside::Xdp(Box::new(Xdp {
                port: AfXdpPort::new(nic, file, tokens, key, counters, queue),
                spec: Arc::clone(xdp),
                pair,
            })))
        }
    }
}

impl Outside {
    /// Takes it off the ring, in which it has nothing any more.
    fn close(self, ring: &mut Ring) {
        match self {
            Self::Tap(tap) => ring.forget_file(tap.file()),
            Self::Xdp(xdp) => {
                let Xdp { port, spec, pair } = *xdp;
                ring.forget_file(port.file());
                spec.give_back(pair, port.into_queue());
            }
        }
    }
}

impl AnyPort {
    /// Whether frames can come from outside.
    pub(super) fn hears(&self) -> bool {
        match self {
            Self::Null(_) => false,
            Self::Switch(switch) => switch.uplink().is_some(),
            Self::Source(_) | Self::Outside(_) => true,
        }
    }

    /// Takes it off the ring, in which it has nothing any more.
    pub(super) fn close(self, ring: &mut Ring) {
        match self {
            Self::Null(_) | Self::Source(_) => {}
            Self::Switch(mut switch) => {
                if let Some(uplink) = switch.set_uplink(None) {
                    uplink.close(ring);
                }
            }
            Self::Outside(outside) => outside.close(ring),
        }
    }
}

/// A port that is one of several kinds.
macro_rules! one_of {
    ($type:ident: $($kind:ident $(. $of:ident)?),+) => {
        impl Port for $type {
            #[inline]
            fn receive(&mut self, now: u64, to: &mut impl Sink, ring: &mut Ring) -> usize {
                match self { $(Self::$kind(port) => port$(.$of)?.receive(now, to, ring),)+ }
            }

            #[inline]
            fn room(&self, from: Nic) -> usize {
                match self { $(Self::$kind(port) => port$(.$of)?.room(from),)+ }
            }

            #[inline]
            fn transmit(
                &mut self,
                from: Nic,
                frame: &Frame<'_>,
                to: &mut impl Sink,
                ring: &mut Ring,
            ) -> Result<(), DropReason> {
                match self {
                    $(Self::$kind(port) => port$(.$of)?.transmit(from, frame, to, ring),)+
                }
            }

            #[inline]
            fn transmit_all<'a>(
                &mut self,
                from: Nic,
                frames: impl Iterator<Item = Frame<'a>> + Clone,
                to: &mut impl Sink,
                ring: &mut Ring,
                counts: &mut Counts,
            ) {
                match self {
                    $(Self::$kind(port) => port$(.$of)?.transmit_all(from, frames, to, ring, counts),)+
                }
            }

            #[inline]
            fn flush(&mut self, ring: &mut Ring) {
                match self { $(Self::$kind(port) => port$(.$of)?.flush(ring),)+ }
            }

            fn landed(&mut self, completion: Completion, ring: &mut Ring) {
                match self { $(Self::$kind(port) => port$(.$of)?.landed(completion, ring),)+ }
            }

            fn arm(&mut self, ring: &mut Ring) -> bool {
                match self { $(Self::$kind(port) => port$(.$of)?.arm(ring),)+ }
            }

            fn stop(&mut self, ring: &mut Ring) {
                match self { $(Self::$kind(port) => port$(.$of)?.stop(ring),)+ }
            }

            fn is_idle(&self) -> bool {
                match self { $(Self::$kind(port) => port$(.$of)?.is_idle(),)+ }
            }
        }
    };
}

one_of!(AnyPort: Null, Source, Switch, Outside);
one_of!(Outside: Tap, Xdp.port);
