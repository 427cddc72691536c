//! Reading TOML that people write, field by field, with errors that name file, line and field.
//! A field that nobody asked for is an error: a misspelt `read_only` must not become a writable
//! volume.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};
use zeroize::Zeroizing;

use crate::text;

/// A mistake in a file, where it is and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceError {
    /// The file, as it was named.
    pub file: String,
    /// Line from 1; none where the file as a whole is meant.
    pub line: Option<usize>,
    /// The field, as a path like `volume[1].socket.mode`; empty where none is meant.
    pub field: String,
    /// What is wrong and what to do.
    pub problem: String,
}

impl std::error::Error for SourceError {}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// A text and the name of the file it came from.
#[derive(Debug, Clone, Copy)]
pub struct Document<'a> {
    /// For error messages.
    pub file: &'a str,
    /// What it says.
    pub text: &'a str,
}

impl<'a> Document<'a> {
    /// Parses the text.
    ///
    /// # Errors
    /// Where it is not TOML.
    pub fn parse(&self) -> Result<Spanned<DeTable<'a>>, SourceError> {
        DeTable::parse(self.text).map_err(|error| SourceError {
            file: self.file.to_owned(),
            line: error.span().map(|span| self.line_of(&span)),
            field: String::new(),
            problem: format!("not TOML: {}", error.message()),
        })
    }

    fn line_of(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        1 + before.iter().filter(|&&byte| byte == b'\n').count()
    }
}

/// A table being read. Call [`Table::finish`] after the last field.
#[derive(Debug)]
pub struct Table<'d, 'i> {
    document: Document<'i>,
    entries: &'d DeTable<'i>,
    line: usize,
    path: String,
    asked: RefCell<Vec<&'static str>>,
}

impl<'d, 'i> Table<'d, 'i> {
    /// The table that a document is.
    #[must_use]
    pub fn root(document: Document<'i>, parsed: &'d Spanned<DeTable<'i>>) -> Self {
        Self {
            document,
            entries: parsed.get_ref(),
            line: 1,
            path: String::new(),
            asked: RefCell::default(),
        }
    }

    /// Line of each field that is there, and of the table itself under the empty name.
    #[must_use]
    pub fn lines(&self) -> HashMap<String, usize> {
        let fields = self.entries.keys().map(|key| {
            (
                key.get_ref().as_ref().to_owned(),
                self.document.line_of(&key.span()),
            )
        });
        fields.chain([(String::new(), self.line)]).collect()
    }

    /// An error about a field: its line if it is there, else the table's.
    #[must_use]
    pub fn error(&self, field: &str, problem: impl Into<String>) -> SourceError {
        let key = self.entries.keys().find(|key| key.get_ref() == field);
        SourceError {
            file: self.document.file.to_owned(),
            line: Some(key.map_or(self.line, |key| self.document.line_of(&key.span()))),
            field: format!("{}{field}", self.path),
            problem: problem.into(),
        }
    }

    /// The value of a field, if it is there.
    pub fn value(&self, field: &'static str) -> Option<&'d DeValue<'i>> {
        self.asked.borrow_mut().push(field);
        self.entries.get(field).map(Spanned::get_ref)
    }

    /// A field as text.
    ///
    /// # Errors
    /// If it is not there, or no string.
    pub fn string(&self, field: &'static str) -> Result<&'d str, SourceError> {
        self.optional_string(field)?
            .ok_or_else(|| self.error(field, "is missing"))
    }

    /// A field as text, if it is there.
    ///
    /// # Errors
    /// If it is no string.
    pub fn optional_string(&self, field: &'static str) -> Result<Option<&'d str>, SourceError> {
        match self.value(field) {
            None => Ok(None),
            Some(DeValue::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(field, "a string", other)),
        }
    }

    /// Refuses a file of another kind, by name: its field `kind`.
    ///
    /// # Errors
    /// Says which kind it is and which was wanted.
    pub fn expect_kind(&self, expected: &str) -> Result<(), SourceError> {
        match self.string("kind")? {
            kind if kind == expected => Ok(()),
            kind => Err(self.error(
                "kind",
                format!("this is a {kind:?}, where a {expected:?} belongs"),
            )),
        }
    }

    /// A field as base64 of so many bytes, which are wiped when dropped.
    ///
    /// # Errors
    /// If it is not there, or anything else.
    pub fn base64(
        &self,
        field: &'static str,
        length_bytes: usize,
    ) -> Result<Zeroizing<Vec<u8>>, SourceError> {
        text::from_base64(self.string(field)?)
            .filter(|bytes| bytes.len() == length_bytes)
            .ok_or_else(|| self.error(field, format!("is not base64 of {length_bytes} bytes")))
    }

    /// A field as a number from 0 to `max`, if it is there.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn optional_integer(
        &self,
        field: &'static str,
        max: u64,
    ) -> Result<Option<u64>, SourceError> {
        match self.value(field) {
            None => Ok(None),
            Some(DeValue::Integer(number)) => {
                match u64::from_str_radix(number.as_str(), number.radix()) {
                    Ok(number) if number <= max => Ok(Some(number)),
                    _ => Err(self.error(field, format!("{number} is not between 0 and {max}"))),
                }
            }
            Some(other) => Err(self.wrong_type(field, "an integer", other)),
        }
    }

    /// A field as a number from 0 to `max`.
    ///
    /// # Errors
    /// If it is not there, or anything else.
    pub fn integer(&self, field: &'static str, max: u64) -> Result<u64, SourceError> {
        self.optional_integer(field, max)?
            .ok_or_else(|| self.error(field, "is missing"))
    }

    /// A field as true or false; `default` if it is not there.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn boolean(&self, field: &'static str, default: bool) -> Result<bool, SourceError> {
        match self.value(field) {
            None => Ok(default),
            Some(DeValue::Boolean(value)) => Ok(*value),
            Some(other) => Err(self.wrong_type(field, "true or false", other)),
        }
    }

    /// A field as a list of texts; a single text is a list of one; none is an empty list.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn strings(&self, field: &'static str) -> Result<Vec<&'d str>, SourceError> {
        match self.value(field) {
            None => Ok(Vec::new()),
            Some(DeValue::String(text)) => Ok(vec![text]),
            Some(DeValue::Array(items)) => items
                .iter()
                .map(|item| match item.get_ref() {
                    DeValue::String(text) => Ok(text.as_ref()),
                    other => Err(self.wrong_type(field, "a list of strings", other)),
                })
                .collect(),
            Some(other) => Err(self.wrong_type(field, "a list of strings", other)),
        }
    }

    /// A field as a table.
    ///
    /// # Errors
    /// If it is not there, or no table.
    pub fn table(&self, field: &'static str) -> Result<Table<'d, 'i>, SourceError> {
        match self.value(field) {
            None => Err(self.error(field, "is missing")),
            Some(DeValue::Table(entries)) => Ok(Table {
                document: self.document,
                entries,
                line: self.error(field, "").line.unwrap_or(self.line),
                path: format!("{}{field}.", self.path),
                asked: RefCell::default(),
            }),
            Some(other) => Err(self.wrong_type(field, "a table", other)),
        }
    }

    /// A field as a list of tables (`[[field]]`); none is an empty list.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn tables(&self, field: &'static str) -> Result<Vec<Table<'d, 'i>>, SourceError> {
        let wanted = format!("a list of tables, each begun with [[{field}]]");
        let items = match self.value(field) {
            None => return Ok(Vec::new()),
            Some(DeValue::Array(items)) => items,
            Some(other) => return Err(self.wrong_type(field, &wanted, other)),
        };
        let table = |(index, item): (usize, &'d Spanned<DeValue<'i>>)| match item.get_ref() {
            DeValue::Table(entries) => Ok(Table {
                document: self.document,
                entries,
                line: self.document.line_of(&item.span()),
                path: format!("{}{field}[{index}].", self.path),
                asked: RefCell::default(),
            }),
            other => Err(self.wrong_type(field, &wanted, other)),
        };
        items.iter().enumerate().map(table).collect()
    }

    /// Refuses fields that were not asked for.
    ///
    /// # Errors
    /// Names the first of them and the fields there are.
    pub fn finish(&self) -> Result<(), SourceError> {
        let asked = self.asked.borrow();
        let unknown = self
            .entries
            .keys()
            .filter(|key| !asked.contains(&key.get_ref().as_ref()))
            .min_by_key(|key| key.span().start);
        match unknown {
            None => Ok(()),
            Some(key) => Err(self.error(
                key.get_ref(),
                format!("is an unknown field; there are: {}", asked.join(", ")),
            )),
        }
    }

    fn wrong_type(&self, field: &str, wanted: &str, found: &DeValue<'_>) -> SourceError {
        self.error(
            field,
            format!("must be {wanted}, not a value of type {}", found.type_str()),
        )
    }
}
