//! How much was encrypted under the present key of each volume, as far as this host did it: the data
//! plane's figures of bytes written, added up over its restarts and the agent's. Whoever reads them is
//! told to give the volume another key when it is time (`docs/adr/0020-key-limits.md`).
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bulkhead_bundle::key_scope::{ADVISED_BYTES, MAX_BYTES};
use bulkhead_bundle::{HostBundle, Volume};
use bulkhead_protocol::control::{AgentToDataplane, VolumeStatus};
use bulkhead_protocol::rot::Role;
use bulkhead_protocol::{RekeyId, VolumeId};

use crate::agent::{Agent, Question};
use crate::message::{Action, Peer};

/// How often the data plane is asked, and the totals are written down.
pub(crate) const SAMPLE_EVERY: Duration = Duration::from_secs(60);
/// How long it may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
const KIND: &str = "bulkhead agent key use v1";
/// If more volumes than this are remembered, those that are not in the bundle are forgotten.
const MAX_REMEMBERED: usize = 4096;

/// The process whose figures were added last: figures of another begin at zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Process {
    pid: u32,
    generation: u64,
}

/// What was encrypted under one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Total {
    /// The re-key that brought the key; none for the one that the volume was made with.
    rekey: Option<RekeyId>,
    /// In bytes.
    bytes: u64,
    /// The figure of the process that is in it already.
    seen_bytes: u64,
}

/// The totals.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct KeyUse {
    process: Process,
    totals: BTreeMap<VolumeId, Total>,
}

impl KeyUse {
    /// Bytes that were encrypted under the volume's present key.
    pub(crate) fn of(&self, volume: VolumeId) -> Option<u64> {
        self.totals.get(&volume).map(|total| total.bytes)
    }

    /// Adds what a data plane says. Returns what is to be said of volumes that passed a limit.
    pub(crate) fn add(
        &mut self,
        bundle: &HostBundle,
        process: Process,
        said: &[VolumeStatus],
    ) -> Vec<String> {
        if self.process != process {
            self.process = process;
            for total in self.totals.values_mut() {
                total.seen_bytes = 0;
            }
        }
        let mut warnings = Vec::new();
        for volume in bundle.volumes.iter().filter(|v| v.is_encrypted()) {
            let Some(status) = said.iter().find(|status| status.volume == volume.id) else {
                continue;
            };
            let total = self.totals.entry(volume.id).or_default();
            let before = total.bytes;
            total.add(volume, status.written_bytes);
            warnings.extend(warning(volume, before, total.bytes));
        }
        if self.totals.len() > MAX_REMEMBERED {
            self.totals.retain(|id, _| bundle.volume(*id).is_some());
        }
        warnings
    }

    /// As it is kept.
    pub(crate) fn to_text(&self) -> String {
        let Process { pid, generation } = self.process;
        let line = |(id, total): (&VolumeId, &Total)| {
            let rekey = total
                .rekey
                .map_or("-".to_owned(), |rekey| rekey.to_string());
            format!("volume {id} {rekey} {} {}\n", total.bytes, total.seen_bytes)
        };
        let lines: String = self.totals.iter().map(line).collect();
        format!("{KIND}\ndataplane {pid} {generation}\n{lines}")
    }

    /// From what was kept; none if the agent would not have written it.
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let kind = lines.next()?;
        let (pid, generation) = lines.next()?.strip_prefix("dataplane ")?.split_once(' ')?;
        let mut key_use = Self {
            process: Process {
                pid: pid.parse().ok()?,
                generation: generation.parse().ok()?,
            },
            totals: BTreeMap::new(),
        };
        for line in lines {
            let mut words = line.strip_prefix("volume ")?.split(' ');
            let id = words.next()?.parse().ok()?;
            let rekey = match words.next()? {
                "-" => None,
                rekey => Some(rekey.parse().ok()?),
            };
            let total = Total {
                rekey,
                bytes: words.next()?.parse().ok()?,
                seen_bytes: words.next()?.parse().ok()?,
            };
            key_use.totals.insert(id, total);
        }
        (kind == KIND && key_use.to_text() == text).then_some(key_use)
    }
}

impl Total {
    fn add(&mut self, volume: &Volume, written_bytes: u64) {
        let rekey = volume.rekey.as_ref().map(|rekey| rekey.id);
        if rekey.is_some() && rekey != self.rekey {
            // A key of its own, under which the whole volume is written once.
            *self = Self {
                rekey,
                bytes: volume.size_bytes,
                seen_bytes: written_bytes,
            };
            return;
        }
        // A figure that fell began anew: the volume was detached meanwhile.
        let more = match written_bytes.checked_sub(self.seen_bytes) {
            Some(more) => more,
            None => written_bytes,
        };
        self.bytes = self.bytes.saturating_add(more);
        self.seen_bytes = written_bytes;
    }
}

/// What is to be said when a total passes a limit.
fn warning(volume: &Volume, before: u64, now: u64) -> Option<String> {
    let passed = |limit: u64| before <= limit && now > limit;
    let limit = match (passed(MAX_BYTES), passed(ADVISED_BYTES)) {
        (true, _) => "256 TiB (2^44 cipher blocks), beyond which IEEE 1619 lets no key go",
        (false, true) => "1 TiB (2^36 cipher blocks), which IEEE 1619 advises as the most",
        (false, false) => return None,
    };
    Some(format!(
        "volume {}: {now} bytes were encrypted under its key on this host, more than {limit}: \
         re-key it (`bulkhead volume rekey`)",
        volume.name
    ))
}

impl Agent {
    /// Asks the data plane how much it wrote, when that is due.
    pub(crate) fn sample_key_use(&mut self, now: Instant) {
        let asked = self.sample_question.take_if(|q| q.deadline <= now);
        if asked.is_some() {
            tracing::debug!("the data plane did not say how much it wrote");
        }
        if now < self.sample_at {
            return;
        }
        self.sample_at = now + SAMPLE_EVERY;
        self.keep_key_use();
        let encrypted = self.known.accepted.as_ref().is_some_and(|stored| {
            let mut volumes = stored.bundle.volumes.iter();
            volumes.any(Volume::is_encrypted)
        });
        if !encrypted || !self.is_there(Peer::Dataplane) || self.sample_question.is_some() {
            return;
        }
        let request_id = self.fresh_id();
        self.sample_question = Some(Question {
            id: request_id,
            peer: Peer::Dataplane,
            deadline: now + ANSWER_TIME,
        });
        self.act(Action::Dataplane(
            AgentToDataplane::Status { request_id },
            Vec::new(),
        ));
    }

    /// Takes in the data plane's figures, whoever asked for them.
    pub(crate) fn count_key_use(&mut self, said: &[VolumeStatus]) {
        let mut processes = self.processes.iter();
        let Some(process) = processes.find(|process| process.role == Role::Dataplane) else {
            return;
        };
        let process = Process {
            pid: process.pid,
            generation: process.generation,
        };
        let Some(stored) = &self.known.accepted else {
            return;
        };
        for warning in self.key_use.add(&stored.bundle, process, said) {
            tracing::warn!("{warning}");
        }
    }

    /// Writes the totals down, if they changed.
    pub(crate) fn keep_key_use(&mut self) {
        if let Err(error) = self.store.put_key_use(&self.key_use) {
            tracing::warn!("how much was encrypted under the keys can't be kept: {error}");
        }
    }
}

#[cfg(test)]
#[path = "key_use_tests.rs"]
mod tests;
