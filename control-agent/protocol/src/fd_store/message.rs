//! The text of the store's messages. What a child sends is untrusted until parsed here.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::MAX_FDS;
use super::name::{FdName, MAX_NAME_BYTES};

/// Longest message of a child's in bytes: all five lines with the longest name, and some.
pub const MAX_NOTIFICATION_BYTES: usize = 128;

/// Longest message of rot's in bytes.
pub const MAX_HAND_OVER_BYTES: usize = 64 + MAX_FDS * (MAX_NAME_BYTES + 1);

/// From a child to rot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notification {
    /// Store the descriptors, 1 to [`MAX_FDS`], behind all others.
    Store {
        /// Under which name; it may be taken already.
        name: FdName,
    },
    /// Drop every descriptor of a name, if there are any. No descriptors.
    Remove {
        /// Which.
        name: FdName,
    },
    /// Close this one descriptor when everything before was handled.
    Barrier,
}

/// What rot tells a candidate of what the process before it did meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Followed {
    /// Descriptors of these names were stored, in this order.
    Stored(Vec<FdName>),
    /// Every descriptor of a name was dropped.
    Removed(FdName),
}

impl Followed {
    /// Reads a message of rot's; none if it makes no sense.
    #[must_use]
    pub fn parse(message: &[u8]) -> Option<Self> {
        if let Some(names) = parse_hand_over(message) {
            return Some(Self::Stored(names));
        }
        match Notification::parse(message, 0) {
            Ok(Notification::Remove { name }) => Some(Self::Removed(name)),
            _ => None,
        }
    }
}

/// A message that is refused, with its descriptors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the store refuses a message: {0}")]
pub struct BadNotification(pub String);

fn bad<T>(reason: impl Into<String>) -> Result<T, BadNotification> {
    Err(BadNotification(reason.into()))
}

/// The lines of a message, each at most once.
#[derive(Default)]
struct Lines<'a> {
    store: Option<&'a [u8]>,
    remove: Option<&'a [u8]>,
    barrier: Option<&'a [u8]>,
    poll: Option<&'a [u8]>,
    name: Option<&'a [u8]>,
}

impl<'a> Lines<'a> {
    fn parse(message: &'a [u8]) -> Result<Self, BadNotification> {
        let mut lines = Self::default();
        let message = message.strip_suffix(b"\n").unwrap_or(message);
        for line in message.split(|&byte| byte == b'\n') {
            let at = line.iter().position(|&byte| byte == b'=');
            let Some((key, value)) = at.and_then(|at| line.split_at_checked(at)) else {
                return bad("a line has no '='");
            };
            let place = match key {
                b"FDSTORE" => &mut lines.store,
                b"FDSTOREREMOVE" => &mut lines.remove,
                b"BARRIER" => &mut lines.barrier,
                b"FDPOLL" => &mut lines.poll,
                b"FDNAME" => &mut lines.name,
                _ => return bad("a line is none of the store's"),
            };
            if place.is_some() {
                return bad("a line is there twice");
            }
            *place = value.get(1..);
        }
        Ok(lines)
    }

    fn name(&self) -> Result<FdName, BadNotification> {
        match self.name.map(FdName::try_from) {
            Some(Ok(name)) => Ok(name),
            Some(Err(error)) => bad(error.to_string()),
            None => bad("it lacks FDNAME="),
        }
    }
}

impl Notification {
    /// Reads a message that came with `fds` descriptors.
    ///
    /// # Errors
    /// [`BadNotification`] says what is wrong.
    pub fn parse(message: &[u8], fds: usize) -> Result<Self, BadNotification> {
        let lines = Lines::parse(message)?;
        let one = Some(&b"1"[..]);
        match (lines.store, lines.remove, lines.barrier, lines.poll) {
            // Without FDPOLL=0 systemd would watch them and drop what hangs up; rot never looks.
            (store, None, None, Some(b"0")) if store == one => match fds {
                1..=MAX_FDS => Ok(Self::Store {
                    name: lines.name()?,
                }),
                _ => bad(format!("{fds} descriptors to store, not 1 to {MAX_FDS}")),
            },
            (store, None, None, _) if store == one => bad("FDSTORE=1 goes with FDPOLL=0"),
            (None, remove, None, None) if remove == one => match fds {
                0 => Ok(Self::Remove {
                    name: lines.name()?,
                }),
                _ => bad("FDSTOREREMOVE=1 goes without descriptors"),
            },
            (None, None, barrier, None) if barrier == one && lines.name.is_none() => match fds {
                1 => Ok(Self::Barrier),
                _ => bad(format!("BARRIER=1 with {fds} descriptors, not one")),
            },
            _ => bad("it is none of FDSTORE=1, FDSTOREREMOVE=1 and BARRIER=1"),
        }
    }

    /// The message as it travels.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Store { name } => format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"),
            Self::Remove { name } => format!("FDSTOREREMOVE=1\nFDNAME={name}"),
            Self::Barrier => "BARRIER=1".to_owned(),
        }
    }
}

/// rot's message with stored descriptors of these names, in order.
#[must_use]
pub fn hand_over_text(names: &[FdName]) -> String {
    let list: Vec<&str> = names.iter().map(FdName::as_str).collect();
    format!(
        "LISTEN_FDS={}\nLISTEN_FDNAMES={}",
        names.len(),
        list.join(":")
    )
}

/// The names in a message of rot's.
#[must_use]
pub fn parse_hand_over(message: &[u8]) -> Option<Vec<FdName>> {
    let text = std::str::from_utf8(message).ok()?;
    let (count, names) = text.split_once('\n')?;
    let count: usize = count.strip_prefix("LISTEN_FDS=")?.parse().ok()?;
    let names = names.strip_prefix("LISTEN_FDNAMES=")?.split(':');
    let names: Vec<FdName> = names.map(|name| name.parse().ok()).collect::<Option<_>>()?;
    (names.len() == count).then_some(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> FdName {
        text.parse().unwrap()
    }

    #[test]
    fn each_message_reads_back() {
        let longest = name("sixteen.letters!");
        let all = [
            (Notification::Store { name: longest }, 1),
            (Notification::Store { name: longest }, MAX_FDS),
            (Notification::Remove { name: name("a") }, 0),
            (Notification::Barrier, 1),
        ];
        for (message, fds) in all {
            let text = message.text();
            assert!(text.len() <= MAX_NOTIFICATION_BYTES);
            assert_eq!(Notification::parse(text.as_bytes(), fds), Ok(message));
            let line = format!("{text}\n");
            assert_eq!(Notification::parse(line.as_bytes(), fds), Ok(message));
        }
        let names = vec![longest; MAX_FDS];
        let text = hand_over_text(&names);
        assert!(text.len() <= MAX_HAND_OVER_BYTES);
        assert_eq!(parse_hand_over(text.as_bytes()), Some(names));
    }

    #[test]
    fn refused_by_the_word_that_is_wrong() {
        let refused = [
            ("FDSTORE=1\nFDPOLL=0", 1, "lacks FDNAME"),
            ("FDSTORE=1\nFDNAME=a", 1, "FDPOLL=0"),
            ("FDSTORE=1\nFDNAME=a\nFDPOLL=1", 1, "FDPOLL=0"),
            ("FDSTORE=1\nFDNAME=a\nFDPOLL=0", 0, "0 descriptors"),
            ("FDSTORE=1\nFDNAME=a\nFDPOLL=0", 129, "129 descriptors"),
            ("FDSTORE=1\nFDNAME=a:b\nFDPOLL=0", 1, "a:b"),
            ("FDSTORE=1\nFDNAME=\nFDPOLL=0", 1, "descriptor name"),
            ("FDSTORE=0\nFDNAME=a\nFDPOLL=0", 1, "none of FDSTORE=1"),
            ("FDSTORE=1\nFDSTOREREMOVE=1\nFDNAME=a", 1, "none of"),
            ("FDNAME=a\nFDNAME=b", 0, "twice"),
            ("FDSTOREREMOVE=1\nFDNAME=a", 1, "without descriptors"),
            ("FDSTOREREMOVE=1", 0, "lacks FDNAME"),
            ("BARRIER=1", 0, "0 descriptors"),
            ("BARRIER=1", 2, "2 descriptors"),
            ("BARRIER=1\nFDNAME=a", 1, "none of"),
            ("READY=1", 0, "none of the store's"),
            ("FDSTORE", 1, "no '='"),
            ("", 0, "no '='"),
            ("\n\n", 0, "no '='"),
        ];
        for (text, fds, word) in refused {
            let error = Notification::parse(text.as_bytes(), fds).unwrap_err();
            assert!(error.to_string().contains(word), "{text:?}: {error}");
        }
        for text in [
            "LISTEN_FDS=2\nLISTEN_FDNAMES=a",
            "LISTEN_FDS=1",
            "LISTEN_FDS=x\nLISTEN_FDNAMES=a",
            "LISTEN_FDS=0\nLISTEN_FDNAMES=",
        ] {
            assert_eq!(parse_hand_over(text.as_bytes()), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..200), fds in 0usize..300,
        ) {
            let _ = Notification::parse(&bytes, fds);
            let _ = parse_hand_over(&bytes);
        }

        #[test]
        fn shuffled_lines_are_parsed_or_refused(
            lines in prop::collection::vec("(FDSTORE|FDNAME|FDPOLL|FDSTOREREMOVE|BARRIER)=[01a:]{0,3}", 0..6),
            fds in 0usize..3,
        ) {
            let text = lines.join("\n");
            if let Ok(message) = Notification::parse(text.as_bytes(), fds) {
                prop_assert_eq!(Notification::parse(message.text().as_bytes(), fds), Ok(message));
            }
        }
    }
}
