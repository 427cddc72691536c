//! Recipients of sealed keys, hosts and the recovery recipient alike: an X-Wing key pair with a
//! name, and the two files it is kept in. The secret file has mode 0600 and is refused if others
//! can read it.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_files::SourceError;
use bulkhead_files::name::check_name;
use bulkhead_files::private_file::{self, PrivateFileError};
use bulkhead_files::reader::{Document, Table};
use bulkhead_files::text;
use sha2::{Digest, Sha384};
use zeroize::Zeroizing;

use crate::hybrid::{self, PUBLIC_BYTES, Public, SECRET_BYTES, Secret};

/// What is hashed before the public key.
const FINGERPRINT_DOMAIN: &[u8] = b"bulkhead recipient key v1";

const PRIVATE_KIND: &str = "bulkhead recipient private key v1";
const PUBLIC_KIND: &str = "bulkhead recipient public key v1";

/// Why a recipient's key can't be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// Its text.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The public key's file can't be read.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The recipient's name.
    #[error("the recipient's name: {0}")]
    Name(String),
    /// The kernel gave no random bytes.
    #[error("the system has no randomness: {0}")]
    Randomness(getrandom::Error),
    /// The library refused; it does not say why.
    #[error("the X-Wing key can't be made: the file is damaged")]
    Crypto,
}

/// A recipient's name and X-Wing public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecipientPublicKey {
    /// The host's name, or that of the recovery recipient.
    pub name: String,
    key: Public,
}

impl RecipientPublicKey {
    /// SHA-384 over a constant and the public key: how sealed keys name whom they are sealed to.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 48] {
        let mut hash = Sha384::new();
        hash.update(FINGERPRINT_DOMAIN);
        hash.update(hybrid::public_bytes(&self.key));
        hash.finalize().into()
    }

    pub(crate) fn key(&self) -> &Public {
        &self.key
    }

    /// The text of a `.pub` file.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!(
            "kind = \"{PUBLIC_KIND}\"\nname = \"{}\"\nfingerprint = \"{}\"\nxwing = \"{}\"\n",
            self.name,
            text::to_hex(&self.fingerprint()),
            text::to_base64(&hybrid::public_bytes(&self.key))
        )
    }

    /// Reads the text of a `.pub` file; `file` is its name for errors.
    ///
    /// # Errors
    /// Where it is not one.
    pub fn from_text(file: &str, text: &str) -> Result<Self, SourceError> {
        let document = Document { file, text };
        let parsed = document.parse()?;
        let table = Table::root(document, &parsed);
        table.expect_kind(PUBLIC_KIND)?;
        let name = table.string("name")?;
        check_name(name).map_err(|problem| table.error("name", problem))?;
        let fingerprint = table.string("fingerprint")?;
        let bytes = table.base64("xwing", PUBLIC_BYTES)?;
        table.finish()?;
        let key = hybrid::public_from(&bytes)
            .map_err(|_| table.error("xwing", "is not an X-Wing public key: it is damaged"))?;
        let recipient = Self {
            name: name.to_owned(),
            key,
        };
        let actual = text::to_hex(&recipient.fingerprint());
        if fingerprint != actual {
            return Err(table.error(
                "fingerprint",
                format!("does not belong to this key ({actual}): the file is damaged"),
            ));
        }
        Ok(recipient)
    }

    /// Writes a `.pub` file, mode 0644 less the umask.
    ///
    /// # Errors
    /// If the file exists or can't be written.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        Ok(private_file::create_public(
            path,
            self.to_text().as_bytes(),
        )?)
    }

    /// Reads a `.pub` file.
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

/// A recipient's secret key, wiped when dropped.
pub struct RecipientKey {
    public: RecipientPublicKey,
    // In a box, so that moving a RecipientKey leaves no copy of the secret behind.
    secret: Box<Secret>,
}

impl fmt::Debug for RecipientKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecipientKey")
            .field("name", &self.public.name)
            .field("fingerprint", &text::to_hex(&self.public.fingerprint()))
            .finish_non_exhaustive()
    }
}

impl RecipientKey {
    /// A new key for a recipient of that name.
    ///
    /// # Errors
    /// If the name is none, or there is no randomness.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        check_name(name).map_err(KeyError::Name)?;
        let mut seed = Zeroizing::new([0; SECRET_BYTES]);
        getrandom::fill(seed.as_mut_slice()).map_err(KeyError::Randomness)?;
        Self::from_seed(name, seed.as_slice())
    }

    fn from_seed(name: &str, seed: &[u8]) -> Result<Self, KeyError> {
        let secret = Box::new(hybrid::secret_from(seed).map_err(|_| KeyError::Crypto)?);
        Ok(Self {
            public: RecipientPublicKey {
                name: name.to_owned(),
                key: hybrid::public_of(&secret),
            },
            secret,
        })
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> &RecipientPublicKey {
        &self.public
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Writes the secret key to a new file of mode 0600.
    ///
    /// # Errors
    /// If the file exists or can't be written.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        // Longer than what follows, so that the text never moves and leaves a copy behind.
        let mut out = Zeroizing::new(String::with_capacity(1024));
        out.push_str("# Bulkhead recipient key. Secret: it opens every volume key sealed to it.\n");
        out.push_str("kind = \"");
        out.push_str(PRIVATE_KIND);
        out.push_str("\"\nname = \"");
        out.push_str(&self.public.name);
        out.push_str("\"\nfingerprint = \"");
        out.push_str(&text::to_hex(&self.public.fingerprint()));
        out.push_str("\"\nxwing_seed = \"");
        text::push_base64(&mut out, hybrid::secret_bytes(&self.secret).as_slice());
        out.push_str("\"\n");
        Ok(private_file::create(path, out.as_bytes())?)
    }

    /// Reads a secret key file.
    ///
    /// # Errors
    /// If others may read it, or it is not one.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let bytes = private_file::read(path)?;
        let file = path.display().to_string();
        let text = std::str::from_utf8(&bytes).map_err(|_| SourceError {
            file: file.clone(),
            line: None,
            field: String::new(),
            problem: "is not text: not a recipient's private key".to_owned(),
        })?;
        // The parser borrows its strings from `text`, which is wiped.
        let document = Document { file: &file, text };
        let parsed = document.parse()?;
        let table = Table::root(document, &parsed);
        table.expect_kind(PRIVATE_KIND)?;
        let name = table.string("name")?;
        check_name(name).map_err(|problem| table.error("name", problem))?;
        let fingerprint = table.string("fingerprint")?;
        let seed = table.base64("xwing_seed", SECRET_BYTES)?;
        table.finish()?;
        let key = Self::from_seed(name, &seed)?;
        if fingerprint != text::to_hex(&key.public.fingerprint()) {
            return Err(table
                .error(
                    "fingerprint",
                    "does not belong to this key: the file is damaged",
                )
                .into());
        }
        Ok(key)
    }
}
