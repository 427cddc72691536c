//! Requests that are measured: what they do, how large they are, and how many are in flight.
#![forbid(unsafe_code)]

/// What requests look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// They write; else they read.
    pub writes: bool,
    /// Bytes of each.
    pub bytes: u32,
    /// How many are in flight.
    pub depth: u16,
    /// One after the other; else anywhere.
    pub sequential: bool,
}

/// Small requests, as databases make them.
pub const SMALL: u32 = 4 << 10;
/// Large ones, as copies make them.
pub const LARGE: u32 = 128 << 10;

impl Shape {
    /// All that the storages are measured with; a few of them that stand for all in the short form.
    #[must_use]
    pub fn all(quick: bool) -> Vec<Self> {
        let small = |writes, depth| Self {
            writes,
            bytes: SMALL,
            depth,
            sequential: false,
        };
        let large = |writes| Self {
            writes,
            bytes: LARGE,
            depth: 32,
            sequential: true,
        };
        if quick {
            return vec![small(false, 32), small(true, 1), large(false)];
        }
        let small = [false, true]
            .into_iter()
            .flat_map(|writes| [1, 32, 128].map(|depth| small(writes, depth)));
        small.chain([large(false), large(true)]).collect()
    }

    /// What they do, without how many.
    #[must_use]
    pub fn kind(self) -> String {
        let order = if self.sequential {
            "sequential"
        } else {
            "random"
        };
        let what = if self.writes { "write" } else { "read" };
        format!("{} KiB {order} {what}", self.bytes >> 10)
    }

    /// As cases call it.
    #[must_use]
    pub fn name(self) -> String {
        format!("{}, depth {}", self.kind(), self.depth)
    }

    /// As options of `load`.
    #[must_use]
    pub fn options(self) -> Vec<String> {
        let mix = if self.writes { "write" } else { "read" };
        let pattern = if self.sequential {
            "sequential"
        } else {
            "random"
        };
        [
            ("--depth", self.depth.to_string()),
            ("--block-size", self.bytes.to_string()),
            ("--mix", mix.to_owned()),
            ("--pattern", pattern.to_owned()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_full_form_has_every_depth_both_ways() {
        let all = Shape::all(false);
        assert_eq!(all.len(), 8);
        let names: Vec<String> = all.iter().map(|shape| shape.name()).collect();
        assert!(names.contains(&"4 KiB random write, depth 128".to_owned()));
        assert!(names.contains(&"128 KiB sequential read, depth 32".to_owned()));
        for few in Shape::all(true) {
            assert!(all.contains(&few), "{few:?}");
        }
    }
}
