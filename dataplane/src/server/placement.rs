//! Which worker has each queue, and what waits while one is on its way to another (ADR 0022).
//!
//! A queue has a place from its start until it has stopped. While it moves, messages for it wait here in
//! their order; the first has its worker told to let it stay, so that nobody waits for the storage because
//! of a move. They go to whoever has the queue in the end.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::balance::{self, Permille};
use crate::worker::message::{DeviceId, QueueId, ToWorker};

/// How long a queue may drain before it moves: meanwhile its requests wait.
const LONGEST_DRAIN: Duration = Duration::from_millis(20);
/// How long a queue that has moved stays where it is, unless it is told to move.
const REST: Duration = Duration::from_secs(2);
/// And one whose move was given up.
const LONG_REST: Duration = Duration::from_secs(10);

/// Queues that one worker serves together, and that stay where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Together {
    /// All of the cards on the switch with this number: frames go from one to the other without a lock.
    Switch(u64),
    /// A queue pair of a card.
    Pair(DeviceId, u16),
}

/// Where a queue is.
#[derive(Debug)]
struct Place {
    worker: usize,
    /// With which others it is; none: it goes where there is room.
    together: Option<Together>,
    way: Option<Way>,
    /// Its worker has begun with it: one that may not start goes nowhere.
    runs: bool,
    /// It is told to stop, or is about to be: it goes nowhere any more.
    stops: bool,
    rests_until: Option<Instant>,
    /// What it had cost its workers at the last look.
    work: u64,
}

/// A queue's way to another worker.
#[derive(Debug)]
struct Way {
    to: usize,
    since: Instant,
    /// Its worker was told to let it stay, or is not to be.
    told_to_stay: bool,
    /// It goes nowhere: another process may take it.
    parks: bool,
    /// Messages for it.
    held: Vec<ToWorker>,
}

/// Where a move has led: who has the queue now, and what waited for it.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) worker: usize,
    pub(super) held: Vec<ToWorker>,
}

/// Moves since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moves {
    /// Queues that went to another worker.
    pub done: u64,
    /// Moves that were given up: the queue drained for too long, or a message for it came in between.
    pub given_up: u64,
}

/// The places of all queues.
#[derive(Debug, Default)]
pub(super) struct Placement {
    places: HashMap<QueueId, Place>,
    /// How many of them are on their way.
    under_way: usize,
    moves: Moves,
}

impl Placement {
    /// The worker for a message, and what to tell it; nothing if the message has to wait and its worker
    /// knows.
    pub(super) fn route(
        &mut self,
        (queue, together): (QueueId, Option<Together>),
        message: ToWorker,
        busy: &[Permille],
    ) -> (usize, Option<ToWorker>) {
        if let Some(place) = self.places.get_mut(&queue) {
            place.stops |= matches!(message, ToWorker::Stop { .. });
            let Some(way) = &mut place.way else {
                return (place.worker, Some(message));
            };
            way.held.push(message);
            let tell = !std::mem::replace(&mut way.told_to_stay, true);
            return (place.worker, tell.then_some(ToWorker::Stay { queue }));
        }
        let place = || balance::place(queue.device, busy, self.places());
        let worker = self.home_of(together).unwrap_or_else(place);
        if matches!(message, ToWorker::Start(_)) {
            let place = Place {
                worker,
                together,
                way: None,
                runs: false,
                stops: false,
                rests_until: None,
                work: 0,
            };
            self.places.insert(queue, place);
        }
        (worker, Some(message))
    }

    /// The worker of the queues that one is with, if any of them is somewhere.
    fn home_of(&self, together: Option<Together>) -> Option<usize> {
        let together = together?;
        let mut places = self.places.values();
        let other = places.find(|place| place.together == Some(together))?;
        Some(other.worker)
    }

    /// Every queue, with the worker that has it or is to have it.
    pub(super) fn places(&self) -> impl Iterator<Item = (QueueId, usize)> {
        let at = |place: &Place| place.way.as_ref().map_or(place.worker, |way| way.to);
        self.places
            .iter()
            .map(move |(queue, place)| (*queue, at(place)))
    }

    /// Its worker has begun with the queue.
    pub(super) fn begun(&mut self, queue: QueueId) {
        if let Some(place) = self.places.get_mut(&queue) {
            place.runs = true;
        }
    }

    /// Queues whose workers were told to let them leave for nobody, and have not yet.
    pub(super) fn parking(&self) -> Vec<(QueueId, usize)> {
        let parks = |place: &Place| place.way.as_ref().is_some_and(|way| way.parks);
        let places = self.places.iter().filter(|(_, place)| parks(place));
        places
            .map(|(queue, place)| (*queue, place.worker))
            .collect()
    }

    /// The worker that has a queue, or is to have it.
    pub(super) fn worker_of(&self, queue: QueueId) -> Option<usize> {
        let mut places = self.places();
        places.find(|place| place.0 == queue).map(|place| place.1)
    }

    /// The queue has stopped, or did not start.
    pub(super) fn forget(&mut self, queue: QueueId) {
        if let Some(Place { way: Some(_), .. }) = self.places.remove(&queue) {
            debug_assert!(false, "a queue stopped that was on its way");
            self.under_way -= 1;
        }
    }

    /// A queue sets out for another worker; the one that it has, to be told. None: it has no worker, does not run
    /// yet, is on its way already, stops, is there, or stays with others.
    pub(super) fn set_out(&mut self, queue: QueueId, to: usize, now: Instant) -> Option<usize> {
        let place = self.places.get_mut(&queue)?;
        let stays = place.together.is_some() || place.way.is_some() || place.worker == to;
        if !place.runs || place.stops || stays {
            return None;
        }
        place.way = Some(Way {
            to,
            since: now,
            told_to_stay: false,
            parks: false,
            held: Vec::new(),
        });
        self.under_way += 1;
        Some(place.worker)
    }

    /// A queue is to be given to nobody: the worker to be told to let it leave. None: it was told, or the queue has not
    /// begun, or stops, or there is none.
    pub(super) fn park(&mut self, queue: QueueId, now: Instant) -> Option<usize> {
        let place = self.places.get_mut(&queue)?;
        if !place.runs || place.stops {
            return None;
        }
        if let Some(way) = &mut place.way {
            // However long it takes.
            way.told_to_stay = true;
            return None;
        }
        place.way = Some(Way {
            to: place.worker,
            since: now,
            told_to_stay: true,
            parks: true,
            held: Vec::new(),
        });
        self.under_way += 1;
        Some(place.worker)
    }

    /// Its worker has given it away.
    pub(super) fn moved(&mut self, queue: QueueId, now: Instant) -> Option<Arrival> {
        let place = self.places.get_mut(&queue)?;
        let way = place.way.take()?;
        self.under_way -= 1;
        place.worker = way.to;
        if !way.parks {
            self.moves.done += 1;
            place.rests_until = Some(now + REST);
        }
        Some(Arrival {
            worker: way.to,
            held: way.held,
        })
    }

    /// Its worker keeps it.
    pub(super) fn stays(&mut self, queue: QueueId, now: Instant) -> Option<Arrival> {
        let place = self.places.get_mut(&queue)?;
        let way = place.way.take()?;
        self.under_way -= 1;
        if !way.parks {
            self.moves.given_up += 1;
            place.rests_until = Some(now + LONG_REST);
        }
        Some(Arrival {
            worker: place.worker,
            held: way.held,
        })
    }

    /// Queues that have drained for too long, with their workers, which are to be told to let them stay.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<(QueueId, usize)> {
        if self.under_way == 0 {
            return Vec::new();
        }
        let late = |way: &mut Way| {
            now.saturating_duration_since(way.since) >= LONGEST_DRAIN
                && !std::mem::replace(&mut way.told_to_stay, true)
        };
        let places = self.places.iter_mut();
        places
            .filter_map(|(queue, place)| {
                let is_late = place.way.as_mut().is_some_and(late);
                is_late.then_some((*queue, place.worker))
            })
            .collect()
    }

    /// When the next of them will have.
    pub(super) fn next_overdue(&self) -> Option<Instant> {
        if self.under_way == 0 {
            return None;
        }
        let ways = self.places.values().filter_map(|place| place.way.as_ref());
        let open = ways.filter(|way| !way.told_to_stay);
        open.map(|way| way.since + LONGEST_DRAIN).min()
    }

    /// What each queue has cost since the last look, with its worker and whether it may move; queues on
    /// their way aside. `work` says what one has cost in all.
    pub(super) fn look(
        &mut self,
        now: Instant,
        work: impl Fn(QueueId) -> u64,
    ) -> Vec<(QueueId, usize, u64, bool)> {
        let places = self
            .places
            .iter_mut()
            .filter(|(_, place)| place.way.is_none());
        places
            .map(|(queue, place)| {
                let work = work(*queue);
                let cost = work.saturating_sub(std::mem::replace(&mut place.work, work));
                let rested = place.rests_until.is_none_or(|until| until <= now);
                let movable = rested && place.together.is_none();
                (*queue, place.worker, cost, movable)
            })
            .collect()
    }

    pub(super) fn moves(&self) -> Moves {
        self.moves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUE: QueueId = QueueId {
        device: DeviceId(1),
        index: 0,
    };

    fn stop() -> ToWorker {
        ToWorker::Stop { queue: QUEUE }
    }

    fn enable(enabled: bool) -> ToWorker {
        ToWorker::SetEnabled {
            queue: QUEUE,
            enabled,
        }
    }

    /// With a queue on worker 0 of two.
    fn placed() -> Placement {
        let mut placement = Placement::default();
        placement.places.insert(
            QUEUE,
            Place {
                worker: 0,
                together: None,
                way: None,
                runs: true,
                stops: false,
                rests_until: None,
                work: 0,
            },
        );
        placement
    }

    #[test]
    fn messages_wait_in_order_and_the_first_ends_the_move() {
        for goes in [true, false] {
            let (mut placement, now) = (placed(), Instant::now());
            assert!(matches!(
                placement.route((QUEUE, None), enable(true), &[0, 0]),
                (0, Some(ToWorker::SetEnabled { .. }))
            ));
            assert_eq!(placement.set_out(QUEUE, 1, now), Some(0));
            assert!(matches!(
                placement.route((QUEUE, None), enable(false), &[0, 0]),
                (0, Some(ToWorker::Stay { .. }))
            ));
            assert!(matches!(
                placement.route((QUEUE, None), stop(), &[0, 0]),
                (0, None)
            ));
            let arrival = if goes {
                placement.moved(QUEUE, now)
            } else {
                placement.stays(QUEUE, now)
            };
            let arrival = arrival.expect("it was on its way");
            assert_eq!(arrival.worker, usize::from(goes));
            assert!(matches!(
                arrival.held.as_slice(),
                [
                    ToWorker::SetEnabled { enabled: false, .. },
                    ToWorker::Stop { .. }
                ]
            ));
            let expected = Moves {
                done: u64::from(goes),
                given_up: u64::from(!goes),
            };
            assert_eq!(placement.moves(), expected);
            let (worker, message) = placement.route((QUEUE, None), stop(), &[0, 0]);
            assert!(message.is_some());
            assert_eq!(worker, usize::from(goes));
        }
    }

    #[test]
    fn only_a_queue_that_is_somewhere_else_sets_out_and_once() {
        let (mut placement, now) = (placed(), Instant::now());
        assert_eq!(placement.set_out(QUEUE, 0, now), None);
        let other = QueueId { index: 1, ..QUEUE };
        assert_eq!(placement.set_out(other, 1, now), None);
        assert_eq!(placement.set_out(QUEUE, 1, now), Some(0));
        assert_eq!(placement.set_out(QUEUE, 1, now), None);
        assert!(placement.moved(QUEUE, now).is_some());
        assert!(placement.moved(QUEUE, now).is_none());
        assert!(placement.stays(QUEUE, now).is_none());
        placement.forget(QUEUE);
        assert_eq!(placement.set_out(QUEUE, 0, now), None);
    }

    /// Its start may fail, and then whatever had waited for the end of its way would wait for ever.
    #[test]
    fn a_queue_that_has_not_begun_goes_nowhere() {
        let (mut placement, now) = (placed(), Instant::now());
        placement.places.get_mut(&QUEUE).expect("it is there").runs = false;
        assert_eq!(placement.set_out(QUEUE, 1, now), None);
        placement.begun(QUEUE);
        assert_eq!(placement.set_out(QUEUE, 1, now), Some(0));
    }

    #[test]
    fn a_queue_that_stops_goes_nowhere() {
        let (mut placement, now) = (placed(), Instant::now());
        let (_, sent) = placement.route((QUEUE, None), stop(), &[0, 0]);
        assert!(sent.is_some());
        assert_eq!(placement.set_out(QUEUE, 1, now), None);
        // Not even after a move that had begun before.
        let mut placement = placed();
        placement.set_out(QUEUE, 1, now);
        placement.route((QUEUE, None), stop(), &[0, 0]);
        assert!(placement.moved(QUEUE, now).is_some());
        assert_eq!(placement.set_out(QUEUE, 0, now), None);
    }

    #[test]
    fn a_drain_that_takes_too_long_is_given_up_once() {
        let (mut placement, now) = (placed(), Instant::now());
        assert_eq!(placement.next_overdue(), None);
        placement.set_out(QUEUE, 1, now);
        let late = placement.next_overdue().expect("a limit");
        assert_eq!(late, now + LONGEST_DRAIN);
        assert_eq!(placement.overdue(late - Duration::from_millis(1)), []);
        assert_eq!(placement.overdue(late), [(QUEUE, 0)]);
        assert_eq!(placement.overdue(late), []);
        assert_eq!(placement.next_overdue(), None);
    }

    #[test]
    fn a_queue_that_moved_rests_and_its_work_is_counted_from_look_to_look() {
        let (mut placement, now) = (placed(), Instant::now());
        assert_eq!(placement.look(now, |_| 100), [(QUEUE, 0, 100, true)]);
        assert_eq!(placement.look(now, |_| 130), [(QUEUE, 0, 30, true)]);
        placement.set_out(QUEUE, 1, now);
        assert_eq!(placement.look(now, |_| 140), []);
        placement.moved(QUEUE, now);
        assert_eq!(placement.look(now, |_| 150), [(QUEUE, 1, 20, false)]);
        assert_eq!(placement.look(now + REST, |_| 150), [(QUEUE, 1, 0, true)]);
        placement.set_out(QUEUE, 0, now);
        placement.stays(QUEUE, now);
        assert!(!placement.look(now + REST, |_| 150)[0].3);
        assert!(placement.look(now + LONG_REST, |_| 150)[0].3);
    }

    #[test]
    fn a_queue_on_its_way_counts_where_it_goes() {
        let (mut placement, now) = (placed(), Instant::now());
        placement.set_out(QUEUE, 1, now);
        assert_eq!(placement.places().collect::<Vec<_>>(), [(QUEUE, 1)]);
    }

    fn start(queue: QueueId) -> ToWorker {
        let (memory, _) = crate::memory::anonymous(4096).expect("memory");
        ToWorker::Start(Box::new(crate::worker::message::QueueStart {
            queue,
            memory: std::sync::Arc::new(memory),
            layout: crate::worker::message::RingLayout {
                size: 1,
                desc: 0,
                avail: 0,
                used: 0,
            },
            base: 0,
            log: None,
            region: None,
            anew: true,
            features: 0,
            enabled: true,
            kick: None,
            call: None,
            error: None,
        }))
    }

    /// Else two workers would have to share a switch.
    #[test]
    fn queues_of_one_switch_are_together_and_stay() {
        let (mut placement, now) = (Placement::default(), Instant::now());
        let queue = |device, index| QueueId {
            device: DeviceId(device),
            index,
        };
        let mut place = |queue, together, busy: [u16; 2]| {
            let (worker, _) = placement.route((queue, Some(together)), start(queue), &busy);
            worker
        };
        let lan = Together::Switch(1);
        assert_eq!(place(queue(1, 0), lan, [900, 0]), 1);
        for index in 1..4 {
            assert_eq!(place(queue(1, index), lan, [0, 900]), 1);
        }
        assert_eq!(place(queue(2, 0), lan, [0, 1000]), 1);
        assert_eq!(place(queue(3, 0), Together::Switch(2), [0, 1000]), 0);
        // Of another card each pair goes by itself, and its queues together.
        let pair = |pair| Together::Pair(DeviceId(4), pair);
        assert_eq!(place(queue(4, 0), pair(0), [0, 1000]), 0);
        assert_eq!(place(queue(4, 1), pair(0), [1000, 0]), 0);
        assert_eq!(place(queue(4, 2), pair(1), [1000, 0]), 1);
        placement.begun(queue(1, 0));
        assert_eq!(placement.set_out(queue(1, 0), 0, now), None);
        assert!(
            placement
                .look(now, |_| 0)
                .iter()
                .all(|(.., movable)| !movable)
        );
        // For a successor they all leave.
        assert_eq!(placement.park(queue(1, 0), now), Some(1));
    }
}
