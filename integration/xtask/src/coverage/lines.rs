//! Lines of source, and whether a test ran them: read from kcov's reports, put together, shown.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;

/// What was measured: by file (relative to the sources' folder), by line.
#[derive(Debug, Default)]
pub struct Lines {
    files: BTreeMap<String, BTreeMap<usize, bool>>,
    /// The text of each file, for listings.
    texts: BTreeMap<String, String>,
}

/// A share of lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Share {
    covered: usize,
    all: usize,
}

impl Share {
    fn percent(self) -> f64 {
        if self.all == 0 {
            return 0.0;
        }
        // Lines of one crate: far below 2^32.
        let float = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        100.0 * float(self.covered) / float(self.all)
    }
}

/// The value of an attribute in a line of XML as kcov writes it.
fn attribute<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

/// Which lines of a source (formatted by rustfmt, as all are) tests could run, from the first on. Tests
/// stand at its end; code that an attribute makes was not written here, and it seems to lie on the
/// attribute or on the fields of the type below it.
fn countable(text: &str) -> Vec<bool> {
    let mut lines = Vec::new();
    let mut closes: Option<String> = None;
    for line in text.lines().take_while(|line| *line != "#[cfg(test)]") {
        let code = line.trim_start();
        if let Some(end) = &closes {
            lines.push(false);
            if line == end {
                closes = None;
            }
            continue;
        }
        let opens_type = code
            .split_whitespace()
            .take_while(|word| !word.contains('='))
            .any(|word| word == "struct" || word == "enum");
        let is_comment = code.starts_with("//");
        if opens_type && !is_comment && code.ends_with('{') {
            closes = Some(format!("{}}}", &line[..line.len() - code.len()]));
        }
        lines.push(!is_comment && !opens_type && !code.starts_with("#["));
    }
    lines
}

/// Whether a file holds the tests of the module beside it.
fn is_of_tests(file: &str) -> bool {
    file.split('/')
        .any(|part| part == "tests" || part == "tests.rs")
}

impl Lines {
    /// Reads every report below `dir` about files in `source`.
    ///
    /// # Errors
    /// When there is none, or one can't be read.
    pub fn read(dir: &Path, source: &Path) -> Result<Self, Box<dyn Error>> {
        let mut lines = Self::default();
        for entry in fs::read_dir(dir)?.flatten() {
            let report = entry.path().join("cov.xml");
            if report.is_file() {
                lines.add(&fs::read_to_string(&report)?, source);
            }
        }
        if lines.files.is_empty() {
            return Err(format!("kcov wrote no report below {}", dir.display()).into());
        }
        Ok(lines)
    }

    /// Adds one report in Cobertura's format.
    fn add(&mut self, report: &str, source: &Path) {
        let mut file = String::new();
        let mut countable = Vec::new();
        for line in report.lines() {
            if let Some(name) = attribute(line, "filename") {
                name.clone_into(&mut file);
                let text = self
                    .texts
                    .entry(file.clone())
                    .or_insert_with(|| fs::read_to_string(source.join(name)).unwrap_or_default());
                countable = self::countable(text);
                if is_of_tests(name) {
                    countable.clear();
                }
                continue;
            }
            let number = attribute(line, "line number").and_then(|n| n.parse::<usize>().ok());
            let (Some(number), Some(hits)) = (number, attribute(line, "hits")) else {
                continue;
            };
            if countable.get(number.wrapping_sub(1)) == Some(&true) {
                let lines = self.files.entry(file.clone()).or_default();
                *lines.entry(number).or_default() |= hits != "0";
            }
        }
    }

    /// The part that a file belongs to: `virtqueue/split.rs` to `virtqueue`.
    fn part(file: &str) -> &str {
        file.split_once('/').map_or("the rest", |(part, _)| part)
    }

    fn share_of(&self, mut these: impl FnMut(&str) -> bool) -> Share {
        let mut share = Share::default();
        for lines in self
            .files
            .iter()
            .filter(|(file, _)| these(file))
            .map(|(_, l)| l)
        {
            share.all += lines.len();
            share.covered += lines.values().filter(|covered| **covered).count();
        }
        share
    }

    /// Prints a table, by part, with the files of those in `held`; whether one of them is below `least`.
    #[must_use]
    pub fn print(&self, held: &[&str], least: f64) -> bool {
        let mut low = false;
        println!("\n{:<32} {:>6} {:>8}", "", "lines", "covered");
        let row = |name: &str, share: Share, note: &str| {
            let percent = share.percent();
            println!("{name:<32} {:>6} {percent:>7.1} %{note}", share.all);
        };
        for part in held {
            let share = self.share_of(|file| Self::part(file) == *part);
            let short = share.percent() < least;
            low |= short;
            let note = if short {
                format!("  below {least} %")
            } else {
                String::new()
            };
            row(part, share, &note);
            for file in self.files.keys().filter(|file| Self::part(file) == *part) {
                row(&format!("  {file}"), self.share_of(|f| f == file), "");
            }
        }
        let mut others: Vec<&str> = self.files.keys().map(|file| Self::part(file)).collect();
        others.dedup();
        others.retain(|part| !held.contains(part));
        others.sort_by_key(|part| (*part == "the rest", *part));
        others.dedup();
        println!("also measured:");
        for part in others {
            row(part, self.share_of(|file| Self::part(file) == part), "");
        }
        row("all", self.share_of(|_| true), "");
        low
    }

    /// Prints each line of these parts that no test ran.
    pub fn print_uncovered(&self, parts: &[&str]) {
        for (file, lines) in self
            .files
            .iter()
            .filter(|(file, _)| parts.contains(&Self::part(file)))
        {
            let text: Vec<&str> = self
                .texts
                .get(file)
                .map(|t| t.lines().collect())
                .unwrap_or_default();
            for number in lines
                .iter()
                .filter(|(_, covered)| !**covered)
                .map(|(n, _)| *n)
            {
                let line = text.get(number - 1).copied().unwrap_or_default();
                println!("dataplane/src/{file}:{number}: {}", line.trim());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with the sources that the reports are about.
    fn sources() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(dir.path().join("a/b")).expect("a folder");
        for file in ["a/b.rs", "a/b/tests.rs"] {
            fs::write(dir.path().join(file), "one();\ntwo();\nthree();\n").expect("a source");
        }
        dir
    }

    fn report(hits: [u32; 3]) -> String {
        let line = |(number, hits): (usize, &u32)| {
            format!("<line number=\"{}\" hits=\"{hits}\"/>\n", number + 1)
        };
        let lines: String = hits.iter().enumerate().map(line).collect();
        format!(
            "<class name=\"a_rs__0\" filename=\"a/b.rs\" line-rate=\"0.0\">\n<lines>\n{lines}</lines>\n"
        )
    }

    #[test]
    fn a_line_that_one_report_has_is_covered() {
        let mut lines = Lines::default();
        lines.add(&report([0, 1, 0]), sources().path());
        lines.add(&report([2, 0, 0]), sources().path());
        assert_eq!(lines.share_of(|_| true), Share { covered: 2, all: 3 });
        assert_eq!(lines.share_of(|file| Lines::part(file) == "b").all, 0);
        assert!(!lines.print(&["a"], 66.0));
        assert!(lines.print(&["a"], 67.0));
    }

    #[test]
    fn a_file_of_tests_is_left_out() {
        let mut lines = Lines::default();
        let report = report([1, 1, 1]).replace("a/b.rs", "a/b/tests.rs");
        lines.add(&report, sources().path());
        assert_eq!(lines.share_of(|_| true).all, 0);
    }

    #[test]
    fn a_part_that_was_not_measured_is_low() {
        assert!(Lines::default().print(&["blk"], 0.1));
    }

    #[test]
    fn tests_attributes_and_types_don_t_count() {
        let text = "fn f() {}\n#[derive(Debug)]\nstruct A {\n    a: u8,\n}\nfn g() {}\n\
                    enum E { B }\n// c\n#[cfg(test)]\nmod tests {\n}\n";
        let counted: Vec<usize> = (1usize..)
            .zip(countable(text))
            .filter(|(_, counts)| *counts)
            .map(|(number, _)| number)
            .collect();
        assert_eq!(counted, [1, 6]);
    }
}
