//! When people are told that a device's storage is slow, hangs, or does well again: once when it gets worse, and
//! once when it has done better for a while, so that a storage that comes and goes does not fill the log.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::time::{Duration, Instant};

use crate::blk::{Level, Patience, Summary};

/// How long it has to do better before that is said.
const CALM: Duration = Duration::from_secs(2);

/// The alarm of a device.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    /// As people were told last.
    level: Level,
    better_since: Option<Instant>,
}

impl Alarm {
    /// As people were told last.
    pub(super) fn level(&self) -> Level {
        self.level
    }

    /// Takes in how the storage does now; whether that is to be told.
    pub(super) fn take(&mut self, now: Instant, level: Level) -> bool {
        if level == self.level {
            self.better_since = None;
            return false;
        }
        if level < self.level {
            let since = *self.better_since.get_or_insert(now);
            if now.saturating_duration_since(since) < CALM {
                return false;
            }
        }
        self.level = level;
        self.better_since = None;
        true
    }

    /// Whether it is to be asked again soon, without anybody saying so.
    pub(super) fn is_raised(&self) -> bool {
        self.level != Level::Fine
    }
}

/// How a storage does, in words.
#[derive(Debug)]
pub(super) struct InWords {
    pub(super) level: Level,
    pub(super) summary: Summary,
    pub(super) patience: Patience,
}

impl fmt::Display for InWords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.level {
            Level::Fine => return f.write_str("its storage answers in time again"),
            Level::Slow => "its storage is slow",
            Level::Hung => "its storage does not answer",
        };
        write!(
            f,
            "{what}: {} requests older than {} ms, the oldest {} ms",
            self.summary.old,
            self.patience.slow.as_millis(),
            self.summary.oldest.as_millis()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worse_is_told_at_once_and_better_after_a_while() {
        let mut alarm = Alarm::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert!(!alarm.take(at(0), Level::Fine) && !alarm.is_raised());
        assert!(alarm.take(at(1), Level::Slow) && alarm.is_raised());
        assert!(!alarm.take(at(2), Level::Slow));
        assert!(alarm.take(at(3), Level::Hung));
        // It comes and goes.
        for ms in (100..10_000).step_by(200) {
            assert!(!alarm.take(at(ms), Level::Fine));
            assert!(!alarm.take(at(ms + 100), Level::Hung));
        }
        assert!(!alarm.take(at(20_000), Level::Fine));
        assert!(!alarm.take(at(21_999), Level::Fine));
        assert!(alarm.take(at(22_000), Level::Fine) && !alarm.is_raised());
    }
}
