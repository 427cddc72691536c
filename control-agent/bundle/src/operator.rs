//! An operator's signing key: one ECDSA P-384 and one ML-DSA-87 key, always used together.
//!
//! The secret parts are held by AWS-LC, which wipes them when it frees them; what passes through
//! our own memory on the way is wiped here.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fmt;
use std::path::{Path, PathBuf};

use aws_lc_rs::encoding::{AsBigEndian, EcPrivateKeyBin};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P384_SHA384_FIXED, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair, ML_DSA_87,
    ML_DSA_87_SIGNING, PqdsaKeyPair, UnparsedPublicKey,
};
use sha2::{Digest, Sha384};
use zeroize::Zeroizing;

use crate::cose::Algorithm;
use crate::private_file::{self, PrivateFileError};
use crate::reader::{Document, SourceError, Table};
use crate::text;
use crate::validate::check_name;

/// Bytes of an uncompressed P-384 point.
const ESP384_PUBLIC_BYTES: usize = 97;
/// Bytes of an ML-DSA-87 public key (FIPS 204 table 2).
const MLDSA87_PUBLIC_BYTES: usize = 2592;
/// Bytes of a P-384 scalar.
const ESP384_PRIVATE_BYTES: usize = 48;
/// Bytes of the ML-DSA seed ξ.
const SEED_BYTES: usize = 32;
/// What is hashed before the two public keys.
const FINGERPRINT_DOMAIN: &[u8] = b"bulkhead operator key v1";

const PRIVATE_KIND: &str = "bulkhead operator private key v1";
const PUBLIC_KIND: &str = "bulkhead operator public key v1";

/// SHA-384 over both public keys of an operator: the `kid` of their signatures.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 48]);

impl Fingerprint {
    pub(crate) fn from_bytes(bytes: [u8; 48]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 48] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::to_hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// Why a key can't be made, read or used.
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
        source: std::io::Error,
    },
    /// The operator's name.
    #[error("the operator's name: {0}")]
    Name(String),
    /// The library refused; it does not say why.
    #[error(
        "the {0} key can't be made or used: the file is damaged, or the system has no randomness"
    )]
    Crypto(Algorithm),
}

/// Both public keys of an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperatorPublicKey {
    /// Who it is; for people.
    pub name: String,
    esp384: Vec<u8>,
    mldsa87: Vec<u8>,
}

impl OperatorPublicKey {
    /// The `kid` of this operator's signatures.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hash = Sha384::new();
        hash.update(FINGERPRINT_DOMAIN);
        hash.update(&self.esp384); // both have a fixed length, so that nothing can shift
        hash.update(&self.mldsa87);
        Fingerprint(hash.finalize().into())
    }

    /// The P-384 key, an uncompressed point of 97 bytes.
    #[must_use]
    pub fn esp384(&self) -> &[u8] {
        &self.esp384
    }

    /// The ML-DSA-87 key, 2592 bytes.
    #[must_use]
    pub fn mldsa87(&self) -> &[u8] {
        &self.mldsa87
    }

    pub(crate) fn verify(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        match algorithm {
            Algorithm::Esp384 => UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, &self.esp384)
                .verify(message, signature)
                .is_ok(),
            Algorithm::MlDsa87 => UnparsedPublicKey::new(&ML_DSA_87, &self.mldsa87)
                .verify(message, signature)
                .is_ok(),
        }
    }

    /// The fields of this key as TOML lines.
    pub(crate) fn to_toml_fields(&self) -> String {
        format!(
            "name = \"{}\"\nfingerprint = \"{}\"\nesp384 = \"{}\"\nmldsa87 = \"{}\"\n",
            self.name,
            self.fingerprint(),
            text::to_base64(&self.esp384),
            text::to_base64(&self.mldsa87)
        )
    }

    /// Reads those fields.
    pub(crate) fn from_table(table: &Table<'_, '_>) -> Result<Self, SourceError> {
        let name = table.string("name")?;
        check_name(name).map_err(|problem| table.error("name", problem))?;
        let key = Self {
            name: name.to_owned(),
            esp384: table.base64("esp384", ESP384_PUBLIC_BYTES)?.to_vec(),
            mldsa87: table.base64("mldsa87", MLDSA87_PUBLIC_BYTES)?.to_vec(),
        };
        let fingerprint = table.string("fingerprint")?;
        if fingerprint != key.fingerprint().to_string() {
            return Err(table.error(
                "fingerprint",
                format!(
                    "does not belong to these keys ({}): the file is damaged",
                    key.fingerprint()
                ),
            ));
        }
        Ok(key)
    }

    /// The text of a `.pub` file.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("kind = \"{PUBLIC_KIND}\"\n{}", self.to_toml_fields())
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
        let key = Self::from_table(&table)?;
        table.finish()?;
        Ok(key)
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

/// Both private keys of an operator.
pub struct OperatorKey {
    public: OperatorPublicKey,
    esp384: EcdsaKeyPair,
    mldsa87: PqdsaKeyPair,
    seed: Zeroizing<[u8; SEED_BYTES]>,
}

impl fmt::Debug for OperatorKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OperatorKey")
            .field("public", &self.public.fingerprint())
            .finish_non_exhaustive()
    }
}

impl OperatorKey {
    /// New keys for an operator of that name.
    ///
    /// # Errors
    /// If the name is none, or there is no randomness.
    pub fn generate(name: &str) -> Result<Self, KeyError> {
        check_name(name).map_err(KeyError::Name)?;
        let esp384 = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING)
            .map_err(|_| KeyError::Crypto(Algorithm::Esp384))?;
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        aws_lc_rs::rand::fill(seed.as_mut_slice())
            .map_err(|_| KeyError::Crypto(Algorithm::MlDsa87))?;
        Self::assemble(name, esp384, seed)
    }

    fn assemble(
        name: &str,
        esp384: EcdsaKeyPair,
        seed: Zeroizing<[u8; SEED_BYTES]>,
    ) -> Result<Self, KeyError> {
        let mldsa87 = PqdsaKeyPair::from_seed(&ML_DSA_87_SIGNING, seed.as_slice())
            .map_err(|_| KeyError::Crypto(Algorithm::MlDsa87))?;
        Ok(Self {
            public: OperatorPublicKey {
                name: name.to_owned(),
                esp384: esp384.public_key().as_ref().to_vec(),
                mldsa87: mldsa87.public_key().as_ref().to_vec(),
            },
            esp384,
            mldsa87,
            seed,
        })
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> &OperatorPublicKey {
        &self.public
    }

    pub(crate) fn sign(&self, algorithm: Algorithm, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match algorithm {
            Algorithm::Esp384 => self
                .esp384
                .sign(&SystemRandom::new(), message)
                .map(|signature| signature.as_ref().to_vec())
                .map_err(|_| KeyError::Crypto(algorithm)),
            Algorithm::MlDsa87 => {
                let mut signature = vec![0; ML_DSA_87_SIGNING.signature_len()];
                let length = self
                    .mldsa87
                    .sign(message, &mut signature)
                    .map_err(|_| KeyError::Crypto(algorithm))?;
                signature.truncate(length);
                Ok(signature)
            }
        }
    }

    /// Writes the private key to a new file of mode 0600.
    ///
    /// # Errors
    /// If the file exists or can't be written.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let scalar: EcPrivateKeyBin<'_> = self
            .esp384
            .private_key()
            .as_be_bytes()
            .map_err(|_| KeyError::Crypto(Algorithm::Esp384))?;
        // Longer than what follows, so that the text never moves and leaves a copy behind.
        let mut out = Zeroizing::new(String::with_capacity(1024));
        out.push_str("# Bulkhead operator key. Secret: whoever has it can sign.\n");
        out.push_str("kind = \"");
        out.push_str(PRIVATE_KIND);
        out.push_str("\"\nname = \"");
        out.push_str(&self.public.name);
        out.push_str("\"\nesp384_public = \"");
        text::push_base64(&mut out, &self.public.esp384);
        out.push_str("\"\nesp384_private = \"");
        text::push_base64(&mut out, scalar.as_ref());
        out.push_str("\"\nmldsa87_seed = \"");
        text::push_base64(&mut out, self.seed.as_slice());
        out.push_str("\"\n");
        Ok(private_file::create(path, out.as_bytes())?)
    }

    /// Reads a private key file.
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
            problem: "is not text: not an operator's private key".to_owned(),
        })?;
        // The parser borrows its strings from `text`, which is wiped.
        let document = Document { file: &file, text };
        let parsed = document.parse()?;
        let table = Table::root(document, &parsed);
        table.expect_kind(PRIVATE_KIND)?;
        let name = table.string("name")?;
        check_name(name).map_err(|problem| table.error("name", problem))?;
        let public = table.base64("esp384_public", ESP384_PUBLIC_BYTES)?;
        let scalar = table.base64("esp384_private", ESP384_PRIVATE_BYTES)?;
        let seed_bytes = table.base64("mldsa87_seed", SEED_BYTES)?;
        table.finish()?;
        let esp384 = EcdsaKeyPair::from_private_key_and_public_key(
            &ECDSA_P384_SHA384_FIXED_SIGNING,
            &scalar,
            &public,
        )
        .map_err(|_| KeyError::Crypto(Algorithm::Esp384))?;
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        seed.copy_from_slice(&seed_bytes);
        Self::assemble(name, esp384, seed)
    }
}
