//! How many worker threads a data plane has, and on which CPUs: in the bundle, in what keyd tells the
//! data plane, and as text.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt::{self, Write as _};

use minicbor::{Decode, Encode};

/// Most workers: more cores than one host has for its disks.
pub const MAX_WORKERS: u16 = 64;
/// Highest number of a CPU.
pub const MAX_CPU: u16 = 1023;

/// The workers of a data plane.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Workers {
    /// How many, 1 to [`MAX_WORKERS`].
    #[n(0)]
    pub count: u16,
    /// The CPU of each, in their order; empty: none is bound to a CPU.
    #[n(1)]
    #[cbor(skip_if = "Vec::is_empty")]
    pub cpus: Vec<u16>,
}

impl Default for Workers {
    /// One, on any CPU.
    fn default() -> Self {
        Self {
            count: 1,
            cpus: Vec::new(),
        }
    }
}

impl Workers {
    /// What somebody asks for: without a count as many as there are CPUs, without both the default.
    ///
    /// # Errors
    /// See [`Workers::check`].
    pub fn new(count: Option<u16>, cpus: Vec<u16>) -> Result<Self, String> {
        let as_many = u16::try_from(cpus.len().max(1)).unwrap_or(u16::MAX);
        let workers = Self {
            count: count.unwrap_or(as_many),
            cpus,
        };
        workers.check().map(|()| workers)
    }

    /// Checks the count, and that each CPU is used once.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn check(&self) -> Result<(), String> {
        let Self { count, cpus } = self;
        if !(1..=MAX_WORKERS).contains(count) {
            return Err(format!("{count} workers: there are 1 to {MAX_WORKERS}"));
        }
        if !cpus.is_empty() && cpus.len() != usize::from(*count) {
            return Err(format!(
                "{count} workers, but {} CPUs for them: give each its own, or leave the CPUs out",
                cpus.len()
            ));
        }
        for (index, cpu) in cpus.iter().enumerate() {
            if *cpu > MAX_CPU {
                return Err(format!("CPU {cpu}: there is none above {MAX_CPU}"));
            }
            if cpus.iter().take(index).any(|other| other == cpu) {
                return Err(format!(
                    "CPU {cpu} is named twice: two workers on one CPU only take turns"
                ));
            }
        }
        Ok(())
    }

    /// The CPU of a worker; none if it is bound to none.
    #[must_use]
    pub fn cpu_of(&self, index: usize) -> Option<u16> {
        self.cpus.get(index).copied()
    }
}

impl fmt::Display for Workers {
    /// In words, like `2 on CPUs 2-3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, cpus } = self;
        match cpus.len() {
            0 => write!(f, "{count}"),
            1 => write!(f, "{count} on CPU {}", format_cpus(cpus)),
            _ => write!(f, "{count} on CPUs {}", format_cpus(cpus)),
        }
    }
}

/// Reads a list of CPUs like `2,4-7`.
///
/// # Errors
/// The part of it that is none.
pub fn parse_cpus(text: &str) -> Result<Vec<u16>, String> {
    let number = |text: &str| text.parse::<u16>().ok().filter(|cpu| *cpu <= MAX_CPU);
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = number(first).zip(number(last)).map(|(a, b)| a..=b);
        let Some(range) = range.filter(|range| !range.is_empty()) else {
            return Err(format!(
                "{part:?} is neither a CPU nor a range of CPUs like 4-7 (0 to {MAX_CPU})"
            ));
        };
        cpus.extend(range);
        if cpus.len() > usize::from(MAX_WORKERS) {
            return Err(format!(
                "{text:?} has more CPUs than there can be workers, {MAX_WORKERS}"
            ));
        }
    }
    Ok(cpus)
}

/// A list of CPUs as [`parse_cpus`] reads it, neighbours as a range; empty for none.
#[must_use]
pub fn format_cpus(cpus: &[u16]) -> String {
    let mut out = String::new();
    let mut rest = cpus;
    while let Some(&first) = rest.first() {
        let run = (first..=u16::MAX).zip(rest).take_while(|(a, b)| a == *b);
        let length = run.count();
        let comma = if out.is_empty() { "" } else { "," };
        // Writing to a String does not fail.
        let _ = write!(out, "{comma}{first}");
        if let Some(last) = rest.get(length - 1).filter(|_| length > 1) {
            let _ = write!(out, "-{last}");
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_and_written() {
        for (text, cpus) in [
            ("7", vec![7]),
            ("2-3", vec![2, 3]),
            ("3,5-6", vec![3, 5, 6]),
            ("9,8,0-1", vec![9, 8, 0, 1]),
        ] {
            assert_eq!(parse_cpus(text), Ok(cpus.clone()));
            assert_eq!(format_cpus(&cpus), text);
        }
        assert_eq!(format_cpus(&[]), "");
        assert_eq!(format_cpus(&[u16::MAX]), "65535");
        for bad in [
            "",
            "x",
            "5-3",
            "-3",
            "1-",
            "1,,2",
            "1024",
            "0-1023",
            "0-99999999",
        ] {
            assert!(parse_cpus(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_worker_has_its_own_cpu_or_none_has() {
        let workers = |count, cpus: &[u16]| Workers::new(count, cpus.to_vec());
        assert_eq!(workers(None, &[]), Ok(Workers::default()));
        let two = workers(None, &[3, 5]).expect("good");
        let one = workers(None, &[4]).expect("good");
        let words = [Workers::default(), one, two.clone()].map(|w| w.to_string());
        assert_eq!(words, ["1", "1 on CPU 4", "2 on CPUs 3,5"]);
        assert_eq!(
            (two.count, two.cpu_of(1), two.cpu_of(2)),
            (2, Some(5), None)
        );
        assert_eq!(workers(Some(64), &[]).map(|w| w.count), Ok(64));
        for (count, cpus, problem) in [
            (Some(0), &[][..], "there are 1 to 64"),
            (Some(65), &[], "there are 1 to 64"),
            (Some(2), &[1], "but 1 CPUs"),
            (None, &[4, 4], "named twice"),
            (None, &[1024], "none above"),
        ] {
            let error = workers(count, cpus).expect_err("refused");
            assert!(error.contains(problem), "{error}");
        }
    }
}
