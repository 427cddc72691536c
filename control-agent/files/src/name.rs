//! Names of operators, hosts, volumes and recipients: one word that is safe in a path, a log line
//! and a TOML string.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

/// Longest name in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// Whether a text can name an operator, a host, a volume or a recipient.
///
/// # Errors
/// What a name has to look like.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !starts || name.len() > MAX_NAME_BYTES || !name.chars().all(good) {
        return Err(format!(
            "{:?} is not a name: it has 1 to {MAX_NAME_BYTES} characters of A-Z a-z 0-9 . _ -, \
             the first a letter or digit",
            name.chars().take(MAX_NAME_BYTES + 1).collect::<String>()
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_harmless_word() {
        for good in ["a", "Host-7.rack_2", "0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "a".repeat(MAX_NAME_BYTES + 1);
        for bad in ["", ".", "-a", "a b", "a/b", "a\"", "é", long.as_str()] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
