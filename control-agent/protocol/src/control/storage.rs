//! How the storage of a volume does, and how that is said.

use minicbor::{Decode, Encode};

/// How the storage of a volume does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StorageStatus {
    /// In a word.
    #[n(0)]
    pub state: StorageState,
    /// Requests under way for longer than `slow_after_ms`; once it was given up, all that are left.
    #[n(1)]
    pub old_requests: u32,
    /// Age of the oldest of them in milliseconds.
    #[n(2)]
    pub oldest_ms: u64,
    /// What is too long, in milliseconds.
    #[n(3)]
    pub slow_after_ms: u64,
    /// Requests that took longer than that since the volume was attached, those under way included.
    #[n(4)]
    pub slow_total: u64,
    /// How long stored requests took since it was attached; none before one ended.
    #[n(5)]
    pub latency: Option<Latency>,
}

/// What the storage of a volume is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum StorageState {
    /// It answers in time.
    #[n(0)]
    Fine,
    /// Some requests are under way for too long.
    #[n(1)]
    Slow,
    /// Some requests are under way for so long that they may never end.
    #[n(2)]
    Hung,
    /// The volume was detached without waiting for its storage: requests are still with the kernel, and it
    /// can't be attached again before they have ended.
    #[n(3)]
    GivenUp,
}

/// How long requests took, in microseconds, each rounded up to a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Latency {
    /// Half of them took no longer.
    #[n(0)]
    pub median_us: u64,
    /// 99 of 100 took no longer.
    #[n(1)]
    pub p99_us: u64,
    /// 999 of 1,000 took no longer.
    #[n(2)]
    pub p999_us: u64,
}

impl std::fmt::Display for StorageStatus {
    /// As in `slow: 12 requests older than 1 s, oldest 14 s`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (requests, word) = (self.old_requests, plural(self.old_requests));
        let (limit, oldest) = (Seconds(self.slow_after_ms), Seconds(self.oldest_ms));
        match self.state {
            StorageState::Fine => f.write_str("answers in time"),
            StorageState::Slow => {
                write!(
                    f,
                    "slow: {requests} {word} older than {limit}, oldest {oldest}"
                )
            }
            StorageState::Hung => {
                write!(
                    f,
                    "hung: {requests} {word} older than {limit}, oldest {oldest}"
                )
            }
            StorageState::GivenUp => write!(
                f,
                "given up: {requests} {word} still with the kernel, oldest {oldest}; can be attached again \
                 when they have ended"
            ),
        }
    }
}

fn plural(requests: u32) -> &'static str {
    if requests == 1 { "request" } else { "requests" }
}

/// Milliseconds, for people.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0 / 1000, self.0 % 1000) {
            (seconds @ 10.., _) | (seconds, 0) => write!(f, "{seconds} s"),
            (seconds, rest) => write!(f, "{seconds}.{} s", rest / 100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_in_words() {
        let slow = StorageStatus {
            state: StorageState::Slow,
            old_requests: 12,
            oldest_ms: 14_321,
            slow_after_ms: 1000,
            slow_total: 40,
            latency: None,
        };
        assert_eq!(
            slow.to_string(),
            "slow: 12 requests older than 1 s, oldest 14 s"
        );
        let one = StorageStatus {
            state: StorageState::Hung,
            old_requests: 1,
            oldest_ms: 1_250,
            ..slow
        };
        assert_eq!(
            one.to_string(),
            "hung: 1 request older than 1 s, oldest 1.2 s"
        );
        let left = StorageStatus {
            state: StorageState::GivenUp,
            ..slow
        };
        assert!(
            left.to_string()
                .starts_with("given up: 12 requests still with the kernel")
        );
    }
}
