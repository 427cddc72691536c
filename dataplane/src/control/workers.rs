//! The workers that there are, and those that there are to be: what the start made of the host's arguments
//! or the bundle, and what keyd says later.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::control::{WorkerLoad, WorkersStatus};
use bulkhead_protocol::keys::DataplaneToKeyd;
use bulkhead_protocol::workers::{Workers, format_cpus};

use super::Control;
use super::answer::Keyd;
use crate::server::{Server, WorkerStatus};

/// Most characters of a problem.
const MAX_PROBLEM_CHARS: usize = 200;

/// The workers of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staff {
    /// As they were asked for.
    asked: Workers,
    /// By the host's own arguments, before which no bundle goes.
    by_host: bool,
    /// The CPU of each, where it can be bound to the one that was asked for.
    cpus: Vec<Option<usize>>,
    problem: Option<String>,
    /// What the bundle asks for by now, if that is something else.
    pending: Option<Workers>,
    /// What a successor was told of last, if that is not what there is.
    told: Option<Workers>,
}

impl Staff {
    /// What the host's arguments say, or else the bundle, on a process that may use these CPUs (in
    /// ascending order). A worker whose CPU is none of them is bound to none: what is served matters more.
    #[must_use]
    pub fn new(host: Option<Workers>, bundle: Option<Workers>, usable: &[u16]) -> Self {
        let by_host = host.is_some();
        let asked = host.or(bundle).unwrap_or_default();
        let mut lost = Vec::new();
        let mut usable_cpu = |cpu: u16| {
            let is_usable = usable.contains(&cpu);
            if !is_usable {
                lost.push(cpu);
            }
            is_usable.then_some(usize::from(cpu))
        };
        let cpus = (0..usize::from(asked.count))
            .map(|index| asked.cpu_of(index).and_then(&mut usable_cpu))
            .collect();
        let problem = (!lost.is_empty()).then(|| {
            let text = format!(
                "CPU {} is not there, or the process may not use it (it may use {}): its worker is \
                 bound to none",
                format_cpus(&lost),
                format_cpus(usable)
            );
            text.chars().take(MAX_PROBLEM_CHARS).collect()
        });
        Self {
            asked,
            by_host,
            cpus,
            problem,
            pending: None,
            told: None,
        }
    }

    /// What was asked for.
    #[must_use]
    pub fn asked(&self) -> &Workers {
        &self.asked
    }

    /// The CPU of each worker; none: any.
    pub fn cpus(&self) -> impl Iterator<Item = Option<usize>> {
        self.cpus.iter().copied()
    }

    /// What is wrong with what was asked for, for the operator.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Takes in what the bundle asks for by now; whether another start would change something.
    pub(super) fn hear(&mut self, bundle: Option<Workers>) -> bool {
        let wanted = bundle.unwrap_or_default();
        self.pending = (!self.by_host && wanted != self.asked).then_some(wanted);
        self.pending.is_some()
    }

    /// The workers that the next start is to have, if they are others than was said last.
    fn next_if_changed(&mut self) -> Option<&Workers> {
        if self.told == self.pending {
            return None;
        }
        self.told = self.pending.clone();
        Some(self.pending.as_ref().unwrap_or(&self.asked))
    }

    /// For the agent.
    pub(super) fn status(&self, server: &mut Server) -> WorkersStatus {
        let loads = server.worker_status().into_iter().map(load);
        let moves = server.moves();
        WorkersStatus {
            loads: loads.collect(),
            queue_moves: moves.done,
            queue_moves_given_up: moves.given_up,
            ..self.wanted()
        }
    }

    /// What was asked for.
    fn wanted(&self) -> WorkersStatus {
        WorkersStatus {
            workers: self.asked.clone(),
            by_host: self.by_host,
            pending: self.pending.clone(),
            problem: self.problem.clone(),
            loads: Vec::new(),
            queue_moves: 0,
            queue_moves_given_up: 0,
        }
    }
}

fn load(worker: WorkerStatus) -> WorkerLoad {
    WorkerLoad {
        // A CPU that a bundle can name.
        cpu: worker.cpu.and_then(|cpu| u16::try_from(cpu).ok()),
        busy_permille: worker.busy_permille,
        queues: worker.queues,
    }
}

impl Control {
    /// The bundle's workers, by now. Others than there are come with another start: now, if that costs
    /// nobody anything.
    pub(super) fn hear_workers(&mut self, server: &Server, keyd: Keyd, workers: Option<Workers>) {
        let others = self.staff.hear(workers);
        if let Some(next) = self.staff.next_if_changed()
            && let Err(error) = self.volumes.keeper.keep_workers(next)
        {
            tracing::error!("a successor will have the workers that there are: {error}");
        }
        let restarts = others && self.volumes.serves_nothing() && self.nics.serves_nothing();
        if let Some(link) = self.keyd.link_of(keyd.0) {
            let holds = self.volumes.with_keys();
            link.send(DataplaneToKeyd::WorkersHeard { restarts, holds });
        }
        if restarts {
            tracing::info!("ending, to be started with the workers of the bundle");
            self.ended = true;
            server.stop();
        } else if others {
            tracing::warn!("the bundle asks for other workers: they come with the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers(cpus: &[u16]) -> Workers {
        Workers::new(None, cpus.to_vec()).expect("workers")
    }

    fn cpus(staff: &Staff) -> Vec<Option<usize>> {
        staff.cpus().collect()
    }

    #[test]
    fn the_host_goes_before_the_bundle_and_both_before_the_default() {
        let usable = [0, 1, 2];
        let default = Staff::new(None, None, &usable);
        assert_eq!(cpus(&default), [None]);
        let bundle = Staff::new(None, Some(workers(&[1, 2])), &usable);
        assert_eq!(cpus(&bundle), [Some(1), Some(2)]);
        let host = Staff::new(Some(workers(&[0])), Some(workers(&[1, 2])), &usable);
        assert_eq!(cpus(&host), [Some(0)]);
        assert!(host.wanted().by_host && host.problem().is_none());
    }

    #[test]
    fn a_cpu_that_is_not_there_costs_the_binding_and_nothing_else() {
        let staff = Staff::new(None, Some(workers(&[1, 9, 7])), &[0, 1]);
        assert_eq!(cpus(&staff), [Some(1), None, None]);
        let problem = staff.problem().expect("one");
        assert!(
            problem.starts_with(
                "CPU 9,7 is not there, or the process may not use it (it may use 0-1)"
            ),
            "{problem}"
        );
    }

    #[test]
    fn another_start_is_wanted_while_the_bundle_says_something_else() {
        let mut staff = Staff::new(None, None, &[0, 1]);
        assert!(!staff.hear(None) && !staff.hear(Some(workers(&[]))));
        assert!(staff.hear(Some(workers(&[0, 1]))));
        assert_eq!(staff.wanted().pending, Some(workers(&[0, 1])));
        assert_eq!(staff.next_if_changed(), Some(&workers(&[0, 1])));
        assert_eq!(staff.next_if_changed(), None, "said already");
        assert!(!staff.hear(None), "taken back");
        assert_eq!(staff.wanted().pending, None);
        assert_eq!(staff.next_if_changed(), Some(&Workers::default()));
        let mut host = Staff::new(Some(workers(&[0])), None, &[0, 1]);
        assert!(!host.hear(Some(workers(&[0, 1]))), "the host's own hold");
    }
}
