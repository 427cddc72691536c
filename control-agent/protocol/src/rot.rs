//! Messages between the root of trust and the processes it starts.
//!
//! A child starts with two inherited descriptors: its channel to rot
//! ([`crate::process::ROT_FD`]) and its descriptor store ([`crate::fd_store::STORE_FD`]).
//! Everything else arrives over the channel. The order at a start is:
//! [`ToRot::Hello`] from the child, then [`FromRot::Peer`] for each peer that is
//! alive. When a child is restarted, the survivors get a new `Peer` for its role with
//! a higher generation and drop the channel they had.
//!
//! # A live upgrade of the data plane
//! rot starts the new process, the candidate ([`crate::process::is_candidate`]), beside the old one,
//! with a duplicate of what the old one stored. What the old one stores and removes from then on
//! reaches it too ([`crate::fd_store::Store::follow`]).
//!
//! | step | message | what the sender did before it, and what follows |
//! | --- | --- | --- |
//! | 1 | candidate: [`ToRot::Ready`] | it has mapped, prefaulted, made its threads and rings; it serves nothing, stores nothing, takes nothing out of a connection |
//! | 2 | rot to the old: [`FromRot::Freeze`] | the old one takes no more messages and requests, drains, writes its state, takes the fence out of its rings |
//! | 3 | the old: [`ToRot::Frozen`] | all that it stored is with rot; it touches nothing any more |
//! | 4 | rot to the candidate: [`FromRot::Go`] | what step 3 stored lies in its store's socket; it reads the states again, starts its queues |
//! | 5 | candidate: [`ToRot::Hello`] | from here on it is the data plane like any other; rot kills the old one |
//!
//! Whatever fails before step 4 (a process ends, says something else, or is not done in time; or
//! the old one answers [`ToRot::CantFreeze`]): rot kills the candidate and says [`FromRot::Thaw`] to
//! the old one if it was told to freeze, and that goes on. What fails after step 4 is a crash: rot
//! ends both and starts the old binary with what is stored.

use minicbor::{Decode, Encode};

use crate::identity::SocketName;
use crate::release::{Component, ProgramStatus, Release};

/// Which process is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[cbor(index_only)]
pub enum Role {
    /// `bulkhead-keyd`.
    #[n(0)]
    Keyd,
    /// `bulkhead-agent`.
    #[n(1)]
    Agent,
    /// `bulkhead-dataplane`.
    #[n(2)]
    Dataplane,
}

impl Role {
    /// Every role, in start order.
    pub const ALL: [Self; 3] = [Self::Keyd, Self::Dataplane, Self::Agent];

    /// The process name, as it stands in logs and in status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Keyd => "keyd",
            Self::Agent => "agent",
            Self::Dataplane => "dataplane",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// SHA-384 of the bytes of the executed binary.
pub type Measurement = minicbor::bytes::ByteArray<48>;

/// From rot to a child.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FromRot {
    /// A peer process is there. Descriptors: the socket to it, then its pidfd.
    /// A channel held for an earlier generation of the same role is dead.
    #[n(0)]
    Peer {
        /// Who it is.
        #[n(0)]
        role: Role,
        /// How many times this role was started before, from 1.
        #[n(1)]
        generation: u64,
        /// What rot measured before it executed it.
        #[n(2)]
        measurement: Measurement,
        /// Its process id, for people to read; trust hangs on the pidfd.
        #[n(3)]
        pid: u32,
    },
    /// To the data plane: a vhost-user listener. Descriptor: the listening socket.
    #[n(1)]
    Listener {
        /// Its name.
        #[n(0)]
        name: SocketName,
    },
    /// To the data plane: the listener of that name is gone; stop accepting from it.
    #[n(2)]
    ListenerGone {
        /// Its name.
        #[n(0)]
        name: SocketName,
    },
    /// To the agent: the operator's socket. Descriptor: the listening socket.
    #[n(3)]
    AdminListener,
    /// To the agent: the listener is bound and the data plane has been sent it.
    #[n(4)]
    Bound {
        /// Of the request.
        #[n(0)]
        request_id: u64,
    },
    /// To the agent: the listener is gone (also if it never was there).
    #[n(5)]
    Unbound {
        /// Of the request.
        #[n(0)]
        request_id: u64,
    },
    /// To the agent: the request failed; nothing changed.
    #[n(6)]
    Failed {
        /// Of the request.
        #[n(0)]
        request_id: u64,
        /// For the operator.
        #[n(1)]
        reason: String,
    },
    /// End in good order.
    #[n(7)]
    Stop,
    /// To the data plane: a candidate is ready; stop serving and answer [`ToRot::Frozen`] or
    /// [`ToRot::CantFreeze`].
    #[n(8)]
    Freeze {
        /// Which attempt this is, never used again. The answer repeats it: a process that was held up may still answer an
        /// attempt that was given up. (None: a rot from before there were numbers.)
        #[n(0)]
        attempt: Option<u64>,
    },
    /// To a candidate: everything is yours.
    #[n(9)]
    Go,
    /// To the data plane, frozen or on the way there: the candidate is gone; serve again.
    #[n(10)]
    Thaw,
    /// To the agent: the binary was verified and the upgrade goes on; it ends with
    /// [`FromRot::Upgraded`] or [`FromRot::Failed`], unless the agent itself is what is upgraded: then
    /// the next [`FromRot::Programs`] tells.
    #[n(11)]
    Upgrading {
        /// Of the request.
        #[n(0)]
        request_id: u64,
    },
    /// To the agent: the new binary runs.
    #[n(12)]
    Upgraded {
        /// Of the request.
        #[n(0)]
        request_id: u64,
    },
    /// To keyd: this release runs from now on; nothing older may be approved any more. Said again at
    /// each start of keyd.
    #[n(13)]
    Runs {
        /// Which.
        #[n(0)]
        release: Release,
    },
    /// To the agent, after its Hello and after each upgrade: what runs.
    #[n(14)]
    Programs {
        /// One for each component.
        #[n(0)]
        programs: Vec<ProgramStatus>,
    },
}

/// From a child to rot.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToRot {
    /// The process runs, is locked in and takes messages. No descriptors. (A data plane that has to ask keyd
    /// for its workers says it before it makes them: its threads lock themselves in as soon as it knows.)
    #[n(0)]
    Hello,
    /// From the agent: bind a vhost-user listener. Binding a name that is bound with the
    /// same owner and mode answers [`FromRot::Bound`] and keeps the listener.
    #[n(1)]
    Bind {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// The name; rot makes the path from it.
        #[n(1)]
        name: SocketName,
        /// Owner of the socket file.
        #[n(2)]
        uid: u32,
        /// Group of the socket file.
        #[n(3)]
        gid: u32,
        /// Permission bits of the socket file; at most 0o777.
        #[n(4)]
        mode: u32,
    },
    /// From the agent: close and remove a listener.
    #[n(2)]
    Unbind {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// The name.
        #[n(1)]
        name: SocketName,
    },
    /// From a candidate: it has prepared all that it can while the old data plane serves.
    #[n(3)]
    Ready,
    /// From the data plane: it serves nothing any more, and all that its successor needs is stored.
    #[n(4)]
    Frozen {
        /// That of the [`FromRot::Freeze`]. (None: a data plane from before there were numbers.)
        #[n(0)]
        attempt: Option<u64>,
    },
    /// From the data plane: it can't freeze, or can't yet, and goes on.
    #[n(5)]
    CantFreeze {
        /// For the operator.
        #[n(0)]
        reason: String,
        /// As of [`ToRot::Frozen`].
        #[n(1)]
        attempt: Option<u64>,
    },
    /// From keyd: operators released this binary. The last one of each component counts.
    #[n(6)]
    Approve {
        /// Which.
        #[n(0)]
        release: Release,
    },
    /// From the agent: run what lies in `--bin-dir` now, if keyd approved exactly that.
    #[n(7)]
    Upgrade {
        /// Chosen by the agent, repeated in the answer.
        #[n(0)]
        request_id: u64,
        /// Which program.
        #[n(1)]
        component: Component,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways between a version with numbers and the one before.
    #[test]
    fn attempts_are_left_out_by_who_does_not_know_them() {
        #[derive(Debug, PartialEq, Encode, Decode)]
        enum Before {
            #[n(4)]
            Frozen,
            #[n(5)]
            CantFreeze {
                #[n(0)]
                reason: String,
            },
            #[n(8)]
            Freeze,
        }
        let old = |message: &Before| minicbor::to_vec(message).expect("encoded");
        let reason = "no".to_owned();
        let refusal = Before::CantFreeze {
            reason: reason.clone(),
        };
        let refused = |attempt| ToRot::CantFreeze {
            reason: reason.clone(),
            attempt,
        };
        assert_eq!(
            minicbor::decode::<ToRot>(&old(&refusal)).expect("decoded"),
            refused(None)
        );
        assert_eq!(
            minicbor::decode::<ToRot>(&old(&Before::Frozen)).expect("decoded"),
            ToRot::Frozen { attempt: None }
        );
        assert_eq!(
            minicbor::decode::<FromRot>(&old(&Before::Freeze)).expect("decoded"),
            FromRot::Freeze { attempt: None }
        );
        let new = minicbor::to_vec(refused(Some(7))).expect("encoded");
        assert_eq!(minicbor::decode::<Before>(&new).expect("decoded"), refusal);
        let new = minicbor::to_vec(ToRot::Frozen { attempt: Some(7) }).expect("encoded");
        assert_eq!(
            minicbor::decode::<Before>(&new).expect("decoded"),
            Before::Frozen
        );
        let new = minicbor::to_vec(FromRot::Freeze { attempt: Some(7) }).expect("encoded");
        assert_eq!(
            minicbor::decode::<Before>(&new).expect("decoded"),
            Before::Freeze
        );
    }
}
