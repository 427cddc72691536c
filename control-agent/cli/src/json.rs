//! Just enough JSON to write (RFC 8259): objects and arrays of numbers, texts, booleans and null.

use std::fmt::Write as _;

/// A value.
#[derive(Debug)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(u64),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    /// A text.
    pub(crate) fn text(text: impl ToString) -> Self {
        Self::Text(text.to_string())
    }

    /// The value, or null.
    pub(crate) fn or_null<T>(value: Option<T>, json: impl FnOnce(T) -> Self) -> Self {
        value.map_or(Self::Null, json)
    }

    /// The value on one line.
    pub(crate) fn to_line(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            // Writing to a String does not fail.
            Self::Number(number) => {
                let _ = write!(out, "{number}");
            }
            Self::Text(text) => write_text(text, out),
            Self::Array(items) => write_list(out, ('[', ']'), items, |item, out| item.write(out)),
            Self::Object(fields) => write_list(out, ('{', '}'), fields, |(name, value), out| {
                write_text(name, out);
                out.push(':');
                value.write(out);
            }),
        }
    }
}

fn write_list<T>(
    out: &mut String,
    (open, close): (char, char),
    items: &[T],
    each: impl Fn(&T, &mut String),
) {
    out.push(open);
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        each(item, out);
    }
    out.push(close);
}

fn write_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            // Beyond what JSON asks for, so that a terminal is not steered by a reason's text.
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_is_written_as_json_has_it() {
        let value = Json::Object(vec![
            ("a", Json::Array(vec![Json::Number(u64::MAX), Json::Null])),
            ("b", Json::text("\"\\\n\u{1b}\u{9b}é")),
            ("c", Json::Bool(true)),
            ("d", Json::Object(Vec::new())),
        ]);
        assert_eq!(
            value.to_line(),
            r#"{"a":[18446744073709551615,null],"b":"\"\\\u000a\u001b\u009bé","c":true,"d":{}}"#
        );
    }
}
