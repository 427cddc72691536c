//! Adaptive polling (DESIGN D6): how long a worker looks for work before it sleeps. `docs/performance.md` has the
//! figures that led to one pause between looks and at most 100 us of them.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

/// Longest look for work.
const MAX_SPIN: Duration = Duration::from_micros(100);
/// First look after a sleep that was too short to be worth it.
const FIRST_SPIN: Duration = Duration::from_micros(10);
/// The clock is read once in so many empty turns.
const TURNS_PER_LOOK: u32 = 32;

/// What to do after an empty turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Look again.
    Spin,
    /// Arm the kicks and sleep.
    Sleep,
}

/// The policy of one worker.
#[derive(Debug)]
pub struct Polling {
    spin: Duration,
    idle_since: Option<Instant>,
    turns: u32,
}

impl Default for Polling {
    fn default() -> Self {
        Self {
            spin: MAX_SPIN,
            idle_since: None,
            turns: 0,
        }
    }
}

impl Polling {
    /// There was work.
    #[inline]
    pub fn busy(&mut self) {
        self.idle_since = None;
        self.turns = 0;
    }

    /// There was none.
    #[inline]
    pub fn idle(&mut self) -> Next {
        std::hint::spin_loop();
        self.turns = self.turns.wrapping_add(1);
        if !self.turns.is_multiple_of(TURNS_PER_LOOK) {
            return Next::Spin;
        }
        self.look(Instant::now())
    }

    fn look(&mut self, now: Instant) -> Next {
        match self.idle_since {
            None => {
                self.idle_since = Some(now);
                Next::Spin
            }
            Some(since) if now.saturating_duration_since(since) < self.spin => Next::Spin,
            Some(_) => Next::Sleep,
        }
    }

    /// It slept that long: work that comes soon after is worth waiting for, other work is not.
    pub fn slept(&mut self, duration: Duration) {
        self.busy();
        self.spin = if duration < MAX_SPIN {
            (self.spin * 2).clamp(FIRST_SPIN, MAX_SPIN)
        } else {
            self.spin / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sleeps_after_the_spin_and_adapts() {
        let mut polling = Polling::default();
        let start = Instant::now();
        assert_eq!(polling.look(start), Next::Spin);
        assert_eq!(polling.look(start + MAX_SPIN / 2), Next::Spin);
        assert_eq!(polling.look(start + MAX_SPIN), Next::Sleep);
        for _ in 0..20 {
            polling.slept(Duration::from_millis(1));
        }
        assert!(polling.spin < Duration::from_micros(1));
        polling.slept(Duration::from_micros(5));
        assert_eq!(polling.spin, FIRST_SPIN);
        for _ in 0..10 {
            polling.slept(Duration::from_micros(5));
        }
        assert_eq!(polling.spin, MAX_SPIN);
    }

    #[test]
    fn work_starts_the_look_anew() {
        let mut polling = Polling::default();
        let start = Instant::now();
        polling.look(start);
        polling.busy();
        assert_eq!(polling.look(start + MAX_SPIN * 2), Next::Spin);
    }
}
