//! rot, keyd and the data plane as these tests play them: what each is told changes its state as
//! the protocol's docs say, and everything that arrives is written down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use bulkhead_bundle::{Policy, Volume, digest_of, verify, verify_release};
use bulkhead_protocol::control::{
    AgentToDataplane, DataplaneToAgent, RekeyProgress, RekeyState, StorageState, StorageStatus,
    VolumeStatus, WorkersStatus,
};
use bulkhead_protocol::envelope::read_capped;
use bulkhead_protocol::keys::{AgentToKeyd, HostKeys, KeydToAgent, Shred, ShredState, Undelivered};
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::rot::{FromRot, ToRot};
use bulkhead_protocol::workers::Workers;
use bulkhead_protocol::{Received, ServedId, SocketName, VolumeId};

use crate::bundles::{now, trust};
use crate::nics::{self, Nics};

/// Stops a peer at a message: it gives no answer to it, and takes no message after it.
#[derive(Debug, Clone)]
pub struct Halt {
    /// First words of the message, as the log has them.
    pub at: String,
    /// Whether the peer did what the message says.
    pub handled: bool,
}

/// What keyd says of the host's key after a bundle that shreds these.
pub fn keys(shred: &[VolumeId], epoch: u64) -> HostKeys {
    let destroyed = |volume: &VolumeId| Shred {
        volume: *volume,
        epoch,
        time_s: 1_700_000_000,
        destroyed_key: [1; 48].into(),
        new_key: [2; 48].into(),
        state: ShredState::Done,
    };
    HostKeys {
        fingerprint: [2; 48].into(),
        shreds: shred.iter().map(destroyed).collect(),
        shreds_total: shred.len() as u64,
        unfinished: None,
    }
}

/// What the log calls something.
fn first_byte(id: ServedId) -> u8 {
    match id {
        ServedId::Volume(id) => id.0[0],
        ServedId::Nic(id) => id.0[0],
    }
}

#[derive(Debug, Default)]
pub struct Peers {
    /// Every message of the agent, in order of arrival.
    pub log: Vec<String>,
    pub halt: Option<Halt>,
    pub halted: bool,
    /// keyd.
    pub floor: u64,
    pub last_digest: Option<[u8; 48]>,
    pub keyd_refuses: Option<String>,
    /// Grants that get lost.
    pub undelivered: BTreeSet<ServedId>,
    /// Their files are too short to grow: such a grant is refused while they are attached.
    pub too_short: BTreeSet<VolumeId>,
    /// Number of the upgrade that rot was asked for last.
    pub upgrade: u64,
    /// rot.
    pub bound: BTreeMap<SocketName, (u32, u32, u32)>,
    /// The data plane.
    pub granted: BTreeMap<VolumeId, Volume>,
    pub attached: BTreeMap<VolumeId, File>,
    pub prepared: BTreeSet<VolumeId>,
    /// Granted, but their keys were wiped by a detach.
    pub keyless: BTreeSet<VolumeId>,
    pub connected: BTreeSet<VolumeId>,
    /// So many attachments are refused.
    pub refuse_attach: usize,
    /// What the data plane says that it wrote, of each volume.
    pub written_bytes: u64,
    /// Their storage does not answer: so many requests of each are left when it is detached, and it can't be
    /// attached.
    pub hung: BTreeMap<VolumeId, u32>,
    /// Why the re-keys of all volumes stopped.
    pub rekey_fault: Option<String>,
    /// The NICs and switches of the data plane.
    pub nics: Nics,
}

impl Peers {
    /// The inode that each attached volume is served from.
    pub fn inodes(&self) -> BTreeMap<VolumeId, u64> {
        let inode = |file: &File| file.metadata().expect("stat").ino();
        self.attached
            .iter()
            .map(|(id, f)| (*id, inode(f)))
            .collect()
    }

    /// The data plane died: its descriptors are closed, its grants are gone.
    pub fn dataplane_died(&mut self) {
        self.granted.clear();
        self.attached.clear();
        self.prepared.clear();
        self.connected.clear();
        self.nics = Nics::default();
    }

    /// Writes a message down; whether it is to be handled, and whether answered.
    fn note(&mut self, line: String) -> (bool, bool) {
        let halt = self.halt.as_ref().filter(|halt| line.starts_with(&halt.at));
        let outcome = match halt {
            Some(halt) => (halt.handled, false),
            None => (true, true),
        };
        self.halted |= halt.is_some();
        self.log.push(line);
        outcome
    }

    pub fn rot(&mut self, message: ToRot) -> Option<FromRot> {
        let (line, answer) = match &message {
            ToRot::Hello => {
                self.log.push("rot hello".to_owned());
                return None;
            }
            ToRot::Bind {
                request_id,
                name,
                uid,
                gid,
                mode,
            } => (
                format!("rot bind {name} {uid}:{gid} {mode:o}"),
                FromRot::Bound {
                    request_id: *request_id,
                },
            ),
            ToRot::Unbind { request_id, name } => (
                format!("rot unbind {name}"),
                FromRot::Unbound {
                    request_id: *request_id,
                },
            ),
            ToRot::Upgrade {
                request_id,
                component,
            } => {
                self.upgrade = *request_id;
                let upgraded = FromRot::Upgraded {
                    request_id: *request_id,
                };
                (format!("rot upgrade {component}"), upgraded)
            }
            other => panic!("an agent does not say {other:?}"),
        };
        let (handle, reply) = self.note(line);
        match message {
            ToRot::Bind {
                name,
                uid,
                gid,
                mode,
                ..
            } if handle => {
                let spec = (uid, gid, mode);
                self.bound.insert(name, spec);
            }
            ToRot::Unbind { name, .. } if handle => {
                self.bound.remove(&name);
            }
            _ => {}
        }
        reply.then_some(answer)
    }

    fn check_release(&mut self, request_id: u64, statement: &[u8]) -> Option<KeydToAgent> {
        let checked = verify_release(statement, &trust());
        let answer = match checked {
            Ok(verified) => KeydToAgent::ReleaseApproved {
                request_id,
                release: verified.release().expect("a program"),
            },
            Err(error) => KeydToAgent::Refused {
                request_id,
                reason: error.to_string(),
            },
        };
        let (_, reply) = self.note("keyd check release".to_owned());
        reply.then_some(answer)
    }

    pub fn keyd(&mut self, mut received: Received<AgentToKeyd>) -> Option<KeydToAgent> {
        let [envelope] = received.take_fds().expect("an envelope");
        let envelope = read_capped(envelope.as_fd()).expect("readable");
        let request_id = match received.message {
            AgentToKeyd::Accept { request_id } => request_id,
            AgentToKeyd::CheckRelease { request_id } => {
                return self.check_release(request_id, &envelope);
            }
        };
        let digest = digest_of(&envelope);
        let root = trust();
        let policy = Policy {
            trust: &root,
            host: "host-a",
            epoch_floor: self.floor,
            last_digest: self.last_digest,
            now: now(),
        };
        let refused = |reason: String| KeydToAgent::Refused { request_id, reason };
        let verified = match verify(&envelope, &policy) {
            Ok(verified) => verified,
            Err(error) => {
                self.log.push("keyd accept, refused".to_owned());
                return Some(refused(error.to_string()));
            }
        };
        let (handle, reply) = self.note(format!("keyd accept {}", verified.epoch));
        if let Some(reason) = &self.keyd_refuses {
            return Some(refused(reason.clone()));
        }
        let mut undelivered = Vec::new();
        if handle {
            self.floor = verified.epoch;
            self.last_digest = Some(digest);
            let gone: Vec<VolumeId> = self.granted.keys().copied().collect();
            for id in gone.iter().filter(|id| verified.volume(**id).is_none()) {
                self.revoke(*id);
            }
            self.nics.grant(&verified, &self.undelivered);
            let lost = |id: &&ServedId| id.nic().is_some_and(|id| verified.nic(id).is_some());
            undelivered.extend(self.undelivered.iter().filter(lost).map(|id| Undelivered {
                id: *id,
                reason: "the data plane did not answer".to_owned(),
            }));
            for volume in &verified.volumes {
                let stuck =
                    self.too_short.contains(&volume.id) && self.attached.contains_key(&volume.id);
                if self.undelivered.contains(&volume.id.into()) || stuck {
                    undelivered.push(Undelivered {
                        id: volume.id.into(),
                        reason: "the data plane did not answer".to_owned(),
                    });
                } else {
                    self.grant(volume);
                }
            }
        }
        reply.then_some(KeydToAgent::Accepted {
            request_id,
            epoch: verified.epoch,
            undelivered,
            keys: keys(&verified.shred, verified.epoch),
        })
    }

    fn revoke(&mut self, id: VolumeId) {
        self.granted.remove(&id);
        self.attached.remove(&id);
        self.prepared.remove(&id);
        self.connected.remove(&id);
    }

    fn grant(&mut self, volume: &Volume) {
        // What a grant has: everything but the names, the file and the owner of the socket. A
        // greater size alone takes nothing away, nor does a re-key that begins or ends.
        let essence = |v: &Volume| {
            let mut v = v.clone();
            v.path = "-".to_owned();
            v.name = "-".to_owned();
            v.force_removal = false;
            v.sealed_keys.clear();
            v.rekey = None;
            (v.limits, v.group) = (Limits::default(), None);
            (v.socket.uid, v.socket.gid, v.socket.mode) = (0, 0, 0);
            v
        };
        let differs = self.granted.get(&volume.id).is_some_and(|held| {
            let mut held = essence(held);
            if held.size_bytes < volume.size_bytes {
                held.size_bytes = volume.size_bytes;
            }
            held != essence(volume)
        });
        if differs {
            self.revoke(volume.id);
        }
        self.keyless.remove(&volume.id);
        self.granted.insert(volume.id, volume.clone());
    }

    pub fn dataplane(
        &mut self,
        mut received: Received<AgentToDataplane>,
    ) -> Option<DataplaneToAgent> {
        let message = received.message.clone();
        let (line, request_id) = match &message {
            AgentToDataplane::Attach {
                request_id,
                volume,
                socket,
            } => (
                format!("dataplane attach {} {socket}", volume.0[0]),
                *request_id,
            ),
            AgentToDataplane::Detach { request_id, id } => {
                (format!("dataplane detach {}", first_byte(*id)), *request_id)
            }
            AgentToDataplane::PrepareRemove {
                request_id,
                id,
                force,
            } => (
                format!("dataplane prepare {} force={force}", first_byte(*id)),
                *request_id,
            ),
            AgentToDataplane::CancelRemove { request_id, id } => {
                (format!("dataplane cancel {}", first_byte(*id)), *request_id)
            }
            AgentToDataplane::Status { request_id } => ("dataplane status".to_owned(), *request_id),
            of_network => nics::line(of_network),
        };
        let (handle, reply) = self.note(line);
        if !handle {
            return None;
        }
        let answer = self.dataplane_does(request_id, message, &mut received);
        reply.then_some(answer)
    }

    fn dataplane_does(
        &mut self,
        request_id: u64,
        message: AgentToDataplane,
        received: &mut Received<AgentToDataplane>,
    ) -> DataplaneToAgent {
        let done = DataplaneToAgent::Done { request_id };
        let refused = |reason: &str| DataplaneToAgent::Refused {
            request_id,
            reason: reason.to_owned(),
        };
        match message {
            AgentToDataplane::Attach { volume, socket, .. } => {
                let [file]: [OwnedFd; 1] = received.take_fds().expect("a file");
                let granted = self.granted.get(&volume);
                if granted.is_none_or(|grant| grant.socket.name != socket) {
                    return refused("no grant for this volume and socket");
                }
                if self.keyless.contains(&volume) {
                    return refused("its key was wiped");
                }
                if let (Some(requests), false) =
                    (self.hung.get(&volume), self.attached.contains_key(&volume))
                {
                    return refused(&format!("{requests} requests still with the kernel"));
                }
                if self.refuse_attach > 0 {
                    self.refuse_attach -= 1;
                    return refused("the file has no blocks today");
                }
                self.attached.entry(volume).or_insert_with(|| file.into());
                done
            }
            AgentToDataplane::Detach {
                id: ServedId::Volume(volume),
                ..
            } => {
                assert!(self.attached.contains_key(&volume), "detach of nothing");
                self.attached.remove(&volume);
                self.connected.remove(&volume);
                if self.granted.get(&volume).is_some_and(Volume::is_encrypted) {
                    self.keyless.insert(volume);
                }
                match self.hung.get(&volume) {
                    Some(&requests) => DataplaneToAgent::GivenUp {
                        request_id,
                        requests,
                    },
                    None => done,
                }
            }
            AgentToDataplane::PrepareRemove {
                id: ServedId::Volume(volume),
                force,
                ..
            } => {
                assert!(self.granted.contains_key(&volume), "prepare of nothing");
                if self.connected.contains(&volume) && !force {
                    return refused("a frontend is connected");
                }
                self.prepared.insert(volume);
                done
            }
            AgentToDataplane::CancelRemove {
                id: ServedId::Volume(volume),
                ..
            } => {
                if self.prepared.remove(&volume) {
                    done
                } else {
                    refused("nothing is prepared")
                }
            }
            AgentToDataplane::Status { .. } => DataplaneToAgent::Status {
                request_id,
                volumes: self
                    .granted
                    .keys()
                    .chain(self.hung.keys().filter(|id| !self.granted.contains_key(id)))
                    .map(|id| self.volume_status(*id))
                    .collect(),
                workers: WorkersStatus {
                    workers: Workers::default(),
                    by_host: false,
                    pending: None,
                    problem: Some("no CPU\x1b[2J".to_owned()),
                    loads: Vec::new(),
                    queue_moves: 0,
                    queue_moves_given_up: 0,
                },
            },
            of_network => self.nics.does(request_id, of_network, received),
        }
    }

    fn volume_status(&self, volume: VolumeId) -> VolumeStatus {
        VolumeStatus {
            volume,
            attached: self.attached.contains_key(&volume),
            connected: self.connected.contains(&volume),
            encrypted: false,
            running_queues: 0,
            retired_queues: 0,
            requests_ok: 7,
            requests_failed: 0,
            read_bytes: 0,
            written_bytes: self.written_bytes,
            fault: Some("a fault\x1b[2J".to_owned()),
            capacity_bytes: 0,
            holds_volume: false,
            waits_for_volume: false,
            storage: self.hung.get(&volume).map(|&old_requests| StorageStatus {
                state: StorageState::GivenUp,
                old_requests,
                oldest_ms: 14_000,
                slow_after_ms: 1000,
                slow_total: 12,
                latency: None,
            }),
            throttled_ms: 0,
            rekey: self.rekey_fault.clone().map(|reason| RekeyProgress {
                done_bytes: 1,
                total_bytes: 3,
                state: RekeyState::Failed { reason },
            }),
        }
    }
}
