//! The trust root: which operators' signatures a host takes, and how many it needs.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::Path;

use crate::operator::{KeyError, OperatorPublicKey};
use crate::reader::{Document, SourceError, Table};

/// Most operators of a trust root.
pub const MAX_OPERATORS: usize = 16;

const KIND: &str = "bulkhead trust root v1";

/// A set of operators and a threshold. A value of this type is consistent: at least one operator,
/// no key in it twice, a threshold between 1 and their number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRoot {
    operators: Vec<OperatorPublicKey>,
    threshold: usize,
}

impl TrustRoot {
    /// A trust root of these operators.
    ///
    /// # Errors
    /// Says what is inconsistent.
    pub fn new(operators: Vec<OperatorPublicKey>, threshold: usize) -> Result<Self, String> {
        if operators.is_empty() || operators.len() > MAX_OPERATORS {
            return Err(format!("there must be 1 to {MAX_OPERATORS} operators"));
        }
        if threshold == 0 || threshold > operators.len() {
            return Err(format!(
                "the threshold {threshold} is not between 1 and the number of operators, {}",
                operators.len()
            ));
        }
        for (index, a) in operators.iter().enumerate() {
            for b in operators.iter().take(index) {
                // One shared half would let one key holder count twice for that half.
                if a.name == b.name || a.esp384() == b.esp384() || a.mldsa87() == b.mldsa87() {
                    return Err(format!(
                        "operators {:?} and {:?} share a name or a key: each counts once",
                        b.name, a.name
                    ));
                }
            }
        }
        Ok(Self {
            operators,
            threshold,
        })
    }

    /// The operators.
    #[must_use]
    pub fn operators(&self) -> &[OperatorPublicKey] {
        &self.operators
    }

    /// How many of them have to sign.
    #[must_use]
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The text of a trust root file.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut out = format!("kind = \"{KIND}\"\nthreshold = {}\n", self.threshold);
        for operator in &self.operators {
            out.push_str("\n[[operator]]\n");
            out.push_str(&operator.to_toml_fields());
        }
        out
    }

    /// Reads the text of a trust root file; `file` is its name for errors.
    ///
    /// # Errors
    /// Where it is not one.
    pub fn from_text(file: &str, text: &str) -> Result<Self, SourceError> {
        let document = Document { file, text };
        let parsed = document.parse()?;
        let root = Table::root(document, &parsed);
        root.expect_kind(KIND)?;
        let threshold = root.integer("threshold", MAX_OPERATORS as u64)?;
        let mut operators = Vec::new();
        for table in root.tables("operator")? {
            operators.push(OperatorPublicKey::from_table(&table)?);
            table.finish()?;
        }
        root.finish()?;
        let threshold = usize::try_from(threshold).unwrap_or(usize::MAX);
        Self::new(operators, threshold).map_err(|problem| root.error("operator", problem))
    }

    /// Reads a trust root file.
    ///
    /// # Errors
    /// If it can't be read or is not one.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let text = std::fs::read_to_string(path).map_err(|source| KeyError::Io {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::from_text(&path.display().to_string(), &text)?)
    }
}
