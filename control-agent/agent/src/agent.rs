//! The state machine: what is applied, what is asked, who waits. Events go in, actions and a
//! deadline come out; it waits for nobody and reads no clock.
//!
//! One job runs at a time (a bundle being taken in, or a convergence pass) and asks one question
//! at a time; one operator is served at a time, the others wait in a bounded queue.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bulkhead_bundle::{SocketSpec, TrustRoot};
use bulkhead_interfaces::xdp::Prepared;
use bulkhead_protocol::admin::{AdminReply, ProcessStatus};
use bulkhead_protocol::control::WorkersStatus;
use bulkhead_protocol::keys::HostKeys;
use bulkhead_protocol::net::InterfaceName;
use bulkhead_protocol::release::ProgramStatus;
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{NicId, ServedId, SocketName, VolumeId};

use crate::apply::Apply;
use crate::converge::Pass;
use crate::key_use::{KeyUse, SAMPLE_EVERY};
use crate::message::{Action, Answer, ClientId, Event, Peer};
use crate::mirror_file::MirrorDirectory;
use crate::networks::{Attached, MirrorFiles};
use crate::open_files::Files;
use crate::operators::{About, Waiting};
use crate::ports::Ports;
use crate::store::{Found, Store, Stored};
use crate::upgrade::Upgrade;
use crate::volume_file::VolumeDirectories;

/// How long rot and the data plane may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long keyd may take: the data plane answers every grant meanwhile.
pub(crate) const ACCEPT_TIME: Duration = Duration::from_secs(20);
/// First and longest pause before what failed is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What stays the same while the agent runs.
#[derive(Debug)]
pub struct Host {
    /// Name of this host.
    pub name: String,
    /// Whose signatures count.
    pub trust: TrustRoot,
    /// Where rot binds listeners.
    pub vhost_dir: PathBuf,
    /// Where volumes may lie.
    pub directories: VolumeDirectories,
    /// Where mirrors of NICs may be written; none: nowhere.
    pub mirrors: Option<MirrorDirectory>,
    /// Interfaces that are prepared for AF_XDP.
    pub prepared: BTreeMap<InterfaceName, Prepared>,
}

/// What the host is, as far as the agent knows.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The bundle in force.
    pub(crate) accepted: Option<Stored>,
    /// A bundle that keyd may have accepted: nothing else happens until that is known.
    pub(crate) candidate: Option<Stored>,
    /// Ports of the bundle in force that were opened with it and have not gone to the data plane yet.
    pub(crate) ports: Ports,
    /// Files of the bundle in force that were opened with it and have not gone to the data plane yet.
    pub(crate) files: Files,
    /// keyd accepted the bundle in force since it and the data plane were started.
    pub(crate) granted: bool,
    /// Grants that did not arrive, with the reason.
    pub(crate) undelivered: BTreeMap<ServedId, String>,
    /// What keyd said last of the host's key and of what was shredded; none before it said anything.
    pub(crate) keys: Option<HostKeys>,
    /// The data plane's workers, as it said last.
    pub(crate) workers: Option<WorkersStatus>,
    /// Listeners that rot confirmed.
    pub(crate) bound: BTreeMap<SocketName, SocketSpec>,
    /// Volumes that the data plane serves; none until it was asked.
    pub(crate) attached: Option<BTreeSet<VolumeId>>,
    /// The NICs and switches that the data plane has; none until it was asked.
    pub(crate) networks: Option<Attached>,
    /// The files of the mirrors that this agent began.
    pub(crate) mirror_files: MirrorFiles,
    /// NICs whose mirror has ended by itself: that was written down.
    pub(crate) ended_mirrors: BTreeSet<NicId>,
    /// Volumes and NICs that may accept no frontend because of a removal that did not happen.
    pub(crate) cancel: BTreeSet<ServedId>,
}

/// A question that a peer has not answered yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question {
    pub(crate) id: u64,
    pub(crate) peer: Peer,
    pub(crate) deadline: Instant,
}

/// How a question of a job ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// With an answer.
    Answer(Answer),
    /// The peer is gone.
    PeerGone,
    /// No answer in time.
    Silent,
}

#[derive(Debug)]
pub(crate) enum Job {
    Idle,
    Apply(Box<Apply>),
    Pass(Pass),
}

/// The agent.
#[derive(Debug)]
pub struct Agent {
    pub(crate) host: Host,
    pub(crate) store: Store,
    pub(crate) known: Known,
    pub(crate) processes: Vec<ProcessStatus>,
    /// The programs that run, as rot said last.
    pub(crate) programs: Vec<ProgramStatus>,
    pub(crate) pending: Vec<String>,
    pub(crate) job: Job,
    pub(crate) question: Option<Question>,
    pub(crate) status_question: Option<Question>,
    /// The upgrade that an operator waits for.
    pub(crate) upgrade: Option<Upgrade>,
    /// How much was encrypted under which key, and when the data plane is asked for it next.
    pub(crate) key_use: KeyUse,
    pub(crate) sample_at: Instant,
    pub(crate) sample_question: Option<Question>,
    pub(crate) serving: Option<ClientId>,
    pub(crate) asked_about: About,
    pub(crate) waiting: VecDeque<Waiting>,
    next_id: u64,
    /// How often a peer started or ended, now and when the job's last question was put.
    changes: u64,
    changes_when_asked: u64,
    /// Something changed: a pass is due.
    stale: bool,
    retry_at: Option<Instant>,
    pause: Duration,
    actions: Vec<Action>,
}

impl Agent {
    /// The agent of a host, with what it kept.
    pub(crate) fn new(host: Host, found: Found, now: Instant) -> Self {
        let Found {
            store,
            accepted,
            candidate,
        } = found;
        // An earlier agent may have ended between preparing a removal and undoing it.
        let sockets = accepted.iter().flat_map(|stored| stored.bundle.sockets());
        let known = Known {
            cancel: sockets.map(|(id, _)| id).collect(),
            accepted,
            candidate,
            ..Known::default()
        };
        Self {
            host,
            key_use: store.key_use().clone(),
            store,
            known,
            processes: Vec::new(),
            programs: Vec::new(),
            pending: Vec::new(),
            job: Job::Idle,
            question: None,
            status_question: None,
            upgrade: None,
            sample_at: now + SAMPLE_EVERY,
            sample_question: None,
            serving: None,
            asked_about: About::default(),
            waiting: VecDeque::new(),
            next_id: 1,
            changes: 0,
            changes_when_asked: 0,
            stale: false,
            // Peers are announced within this time; without them nothing can be done anyway.
            retry_at: Some(now + FIRST_PAUSE),
            pause: FIRST_PAUSE,
            actions: Vec::new(),
        }
    }

    /// Takes in something that happened.
    pub fn handle(&mut self, now: Instant, event: Event) {
        match event {
            Event::Started(process) => self.started(now, process),
            Event::Programs(programs) => self.programs = programs,
            Event::Ended(peer) => self.ended(now, peer),
            Event::Answered {
                peer,
                request_id,
                answer,
            } => self.answered(now, peer, request_id, answer),
            Event::Asked {
                client,
                request,
                envelope,
            } => self.asked(client, request, envelope),
            Event::Gone(client) => self.waiting.retain(|waiting| waiting.client != client),
        }
        self.go_on(now);
    }

    /// Ends what is overdue and starts what is due.
    pub fn tick(&mut self, now: Instant) {
        if let Some(question) = self.question.take_if(|q| q.deadline <= now) {
            tracing::warn!("{} did not answer in time", question.peer);
            self.job_outcome(now, question.peer, Outcome::Silent);
        }
        if self
            .status_question
            .take_if(|q| q.deadline <= now)
            .is_some()
        {
            self.answer_status(None);
        }
        self.apply_overdue(now);
        self.upgrade_overdue(now);
        self.sample_key_use(now);
        self.go_on(now);
    }

    /// When [`Agent::tick`] is due next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let questions = [&self.question, &self.status_question, &self.sample_question];
        let asked = questions.into_iter().flatten().map(|q| q.deadline);
        let decide_by = match &self.job {
            Job::Apply(apply) => apply.decide_by(),
            _ => None,
        };
        let upgrade = self
            .upgrade
            .as_ref()
            .map(|upgrade| upgrade.question.deadline);
        let due = [Some(self.sample_at), self.retry_at, decide_by, upgrade];
        asked.chain(due.into_iter().flatten()).min()
    }

    /// What is to be sent, in this order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        mem::take(&mut self.actions)
    }

    pub(crate) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(crate) fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Whether a peer is there to be asked.
    pub(crate) fn is_there(&self, peer: Peer) -> bool {
        let role = match peer {
            Peer::Rot => return true,
            Peer::Keyd => Role::Keyd,
            Peer::Dataplane => Role::Dataplane,
        };
        self.processes.iter().any(|process| process.role == role)
    }

    /// Puts the job's one question; `make` gets its id.
    pub(crate) fn ask(&mut self, now: Instant, peer: Peer, make: impl FnOnce(u64) -> Action) {
        let id = self.fresh_id();
        let time = match peer {
            Peer::Keyd => ACCEPT_TIME,
            Peer::Rot | Peer::Dataplane => ANSWER_TIME,
        };
        self.question = Some(Question {
            id,
            peer,
            deadline: now + time,
        });
        self.changes_when_asked = self.changes;
        let action = make(id);
        self.act(action);
    }

    /// Whether every peer is the process it was when the job's last question was put.
    pub(crate) fn asked_same_peers(&self) -> bool {
        self.changes == self.changes_when_asked
    }

    /// Ends the job; the operator whose it was gets the reply.
    pub(crate) fn end_job(&mut self, reply: Option<(ClientId, AdminReply)>) {
        self.job = Job::Idle;
        self.question = None;
        if let Some((client, reply)) = reply {
            self.reply(client, reply);
        }
    }

    /// Replies and serves the next.
    pub(crate) fn reply(&mut self, client: ClientId, reply: AdminReply) {
        if self.serving == Some(client) {
            self.serving = None;
        }
        self.act(Action::Reply(client, reply));
    }

    /// A pass is due as soon as nothing else runs.
    pub(crate) fn want_pass(&mut self) {
        self.stale = true;
    }

    /// A pass ended with this much left to do.
    pub(crate) fn schedule(&mut self, now: Instant, pending: Vec<String>) {
        if pending.is_empty() {
            self.pause = FIRST_PAUSE;
            self.retry_at = None;
        } else {
            self.retry_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        for line in pending.iter().filter(|line| !self.pending.contains(line)) {
            tracing::warn!("pending: {line}");
        }
        self.pending = pending;
    }

    fn started(&mut self, now: Instant, process: ProcessStatus) {
        let role = process.role;
        self.processes.retain(|other| other.role != role);
        self.processes.push(process);
        let peer = match role {
            Role::Agent => return,
            Role::Keyd => Peer::Keyd,
            Role::Dataplane => Peer::Dataplane,
        };
        self.forget(now, peer);
        self.peer_is_back(now, peer);
        self.pause = FIRST_PAUSE;
        if self.is_there(Peer::Keyd) && self.is_there(Peer::Dataplane) {
            self.want_pass();
        }
    }

    fn ended(&mut self, now: Instant, peer: Peer) {
        let role = match peer {
            Peer::Rot => return,
            Peer::Keyd => Role::Keyd,
            Peer::Dataplane => Role::Dataplane,
        };
        self.processes.retain(|process| process.role != role);
        self.forget(now, peer);
        let soon = now + FIRST_PAUSE;
        self.retry_at = Some(self.retry_at.map_or(soon, |at| at.min(soon)));
    }

    /// What a generation of a peer knew and was asked is void.
    fn forget(&mut self, now: Instant, peer: Peer) {
        self.changes += 1;
        self.known.granted = false;
        if peer == Peer::Dataplane {
            self.known.attached = None;
            self.known.networks = None;
            self.known.workers = None;
            self.known.undelivered.clear();
            self.sample_question = None;
            self.keep_key_use();
        }
        if self.question.take_if(|q| q.peer == peer).is_some() {
            self.job_outcome(now, peer, Outcome::PeerGone);
        }
        if self.status_question.take_if(|q| q.peer == peer).is_some() {
            self.answer_status(None);
        }
        self.upgrade_lost(peer);
    }

    fn answered(&mut self, now: Instant, peer: Peer, request_id: u64, answer: Answer) {
        if let Answer::Accepted { keys, .. } = &answer {
            self.known.keys = Some(keys.clone());
        }
        let is_it = |q: &mut Question| q.peer == peer && q.id == request_id;
        if let Answer::Volumes(volumes, workers) = &answer {
            self.count_key_use(volumes);
            self.known.workers = Some(workers.clone());
        }
        if let Answer::Storage(volume, status) = &answer {
            self.tell_of_storage(*volume, status);
        } else if let Answer::MirrorEnded(nic, status, problem) = &answer {
            self.tell_of_ended_mirror(*nic, status, problem.as_deref());
        } else if self.is_of_upgrade(peer, request_id) {
            self.upgrade_answered(now, answer);
        } else if self.sample_question.take_if(is_it).is_some() {
            self.keep_key_use();
        } else if self.question.take_if(is_it).is_some() {
            self.job_outcome(now, peer, Outcome::Answer(answer));
        } else if self.status_question.take_if(is_it).is_some() {
            self.answer_status(Some(answer));
        } else {
            // An undo is not waited for, and an answer may come after its deadline.
            tracing::debug!("{peer} answered request {request_id}, which nobody waits for");
        }
    }

    fn job_outcome(&mut self, now: Instant, peer: Peer, outcome: Outcome) {
        match &self.job {
            Job::Idle => {}
            Job::Apply(_) => self.apply_outcome(now, outcome),
            Job::Pass(_) => self.pass_outcome(now, peer, outcome),
        }
    }

    fn peer_is_back(&mut self, now: Instant, peer: Peer) {
        match &mut self.job {
            Job::Idle => {}
            Job::Apply(_) => self.apply_peer_back(now, peer),
            Job::Pass(pass) => pass.peer_is_back(peer),
        }
    }

    /// Starts whatever can be started.
    fn go_on(&mut self, now: Instant) {
        loop {
            if matches!(self.job, Job::Idle) {
                let due = self.retry_at.is_some_and(|at| at <= now);
                if self.stale || due {
                    self.stale = false;
                    self.retry_at = None;
                    self.start_pass(now, None);
                    continue;
                }
            }
            if self.serving.is_some() || !self.serve_next(now) {
                return;
            }
        }
    }
}
