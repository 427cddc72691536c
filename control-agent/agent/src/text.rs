//! Text that came from another process and goes to the operator's terminal and the log.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Longest reason taken from a peer, in characters.
const MAX_REASON_CHARS: usize = 500;
/// Most lines in a list of an answer; a message between processes is capped.
const MAX_LINES: usize = 64;

/// A peer's words on one line, cut, and without anything a terminal would act on.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .take(MAX_REASON_CHARS)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The first lines of a list, and how many more there are.
pub(crate) fn first_lines(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MAX_LINES {
        let more = lines.len() - MAX_LINES;
        lines.truncate(MAX_LINES);
        lines.push(format!("... and {more} more (see the agent's log)"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_can_not_drive_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc\u{9b}d"), "a [2Jb c d");
        assert_eq!(plain(&"x".repeat(2000)).len(), MAX_REASON_CHARS);
    }

    #[test]
    fn a_long_list_says_how_long_it_was() {
        let lines: Vec<String> = (0..70).map(|n| n.to_string()).collect();
        let short = first_lines(lines.clone());
        assert_eq!(short.len(), 65);
        assert_eq!(
            short.last().map(String::as_str),
            Some("... and 6 more (see the agent's log)")
        );
        assert_eq!(
            first_lines(lines.iter().take(64).cloned().collect()).len(),
            64
        );
    }
}
