//! The host's secret key, and what it is for: volume keys, unsealed into secret memory; and what of it goes over
//! to the key that takes its place.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::io;

use bulkhead_bundle::{HostBundle, SealedKeyEntry, Volume, text};
use bulkhead_crypto::secret::SecretMemory;
use bulkhead_protocol::keys::XTS_KEY_BYTES;
use bulkhead_sealing::{
    KeyError, RecipientKey, SealError, SealedKey, UnsealError, VolumeContext, seal, unseal,
};
use subtle::ConstantTimeEq as _;

use crate::resealed::Resealed;
use crate::state::{Fingerprint, Rotation};

/// Why there is no key for a volume.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoKey {
    /// For other hosts.
    #[error("no key of the volume is sealed to this host, {0:?}")]
    NotForUs(String),
    /// For a key that this host had.
    #[error(
        "the volume key is sealed to a key of this host that was destroyed when epoch {epoch} \
         shredded a volume: seal it anew (`bulkhead volume reseal --host`) to the public key that \
         `bulkhead host public` prints, fingerprint {now}"
    )]
    Destroyed {
        /// Of the bundle that shredded.
        epoch: u64,
        /// Fingerprint of the key that the host has, in hex.
        now: String,
    },
    /// Sealed to us, but does not open.
    #[error(transparent)]
    Sealed(#[from] UnsealError),
    /// XTS with equal halves is no XTS.
    #[error(
        "the two halves of the volume key are equal, which XTS forbids: make the volume anew with \
         a random key"
    )]
    EqualHalves,
    /// The previous key, for other hosts.
    #[error("the previous key of the volume is not sealed to this host, {0:?}, which needs both")]
    PreviousNotForUs(String),
    /// The previous key does not open.
    #[error("the previous key: {0}")]
    Previous(UnsealError),
    /// A re-key that would replace nothing.
    #[error(
        "the key and the previous key of the volume are the same, so that the re-key would replace \
         nothing: make it anew with `bulkhead volume rekey`"
    )]
    NotReplaced,
    /// The kernel gave none.
    #[error("there is no secret memory for the volume key ({0}): is RLIMIT_MEMLOCK large enough?")]
    Memory(#[from] io::Error),
}

/// Why the host's key can't be given up for another; nothing has changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoSuccessor {
    /// The new key.
    #[error("a new key for the host can't be made: {0}")]
    Key(#[from] KeyError),
    /// What the old one opens.
    #[error("volume {volume}: its key can't go over to the host's new key: {problem}")]
    Volume {
        /// Name of the volume.
        volume: String,
        /// Why.
        problem: String,
    },
}

/// What unseals.
#[derive(Debug)]
pub(crate) struct Vault {
    key: RecipientKey,
    resealed: Resealed,
    /// Keys that the host had, and the epoch that destroyed each.
    destroyed: BTreeMap<Fingerprint, u64>,
}

impl Vault {
    /// A vault with the host's key, and what was sealed to it in the place of what bundles name.
    pub(crate) fn new(key: RecipientKey, resealed: Resealed) -> Self {
        Self {
            key,
            resealed,
            destroyed: BTreeMap::new(),
        }
    }

    /// Told of the keys that the host had.
    pub(crate) fn remember(&mut self, rotations: &[Rotation]) {
        let gone = rotations.iter().map(|r| (r.old, r.epoch));
        self.destroyed.extend(gone);
    }

    /// Name of the host, as keys are sealed to it.
    pub(crate) fn host(&self) -> &str {
        &self.key.public().name
    }

    /// The host's key.
    pub(crate) fn key(&self) -> &RecipientKey {
        &self.key
    }

    /// The keys of a volume, in the order in which a grant has them: its key, and behind it with a
    /// re-key the previous one; none for a plain volume. Each has a page of its own, which nobody
    /// else has yet and which is wiped when it is dropped.
    ///
    /// # Errors
    /// See [`NoKey`].
    pub(crate) fn unseal(&self, volume: &Volume) -> Result<Vec<SecretMemory>, NoKey> {
        let Some(context) = context_of(volume) else {
            return Ok(Vec::new());
        };
        let entry = volume
            .sealed_for(self.host())
            .ok_or_else(|| NoKey::NotForUs(self.host().to_owned()))?;
        let key = self.open(entry, &context)?;
        if volume.rekey.is_none() {
            return Ok(vec![key]);
        }
        let entry = volume
            .previous_sealed_for(self.host())
            .ok_or_else(|| NoKey::PreviousNotForUs(self.host().to_owned()))?;
        let previous = self.open(entry, &context).map_err(|error| match error {
            NoKey::Sealed(error) => NoKey::Previous(error),
            other => other,
        })?;
        if key.as_bytes().ct_eq(previous.as_bytes()).into() {
            return Err(NoKey::NotReplaced);
        }
        Ok(vec![key, previous])
    }

    /// One sealed entry's key. An entry for a key that the host had is opened by way of what was
    /// sealed in its place.
    fn open(&self, entry: &SealedKeyEntry, context: &VolumeContext) -> Result<SecretMemory, NoKey> {
        let ours = self.key.public().fingerprint();
        let in_place = self.resealed.get(context.id, entry);
        let key = match (entry.fingerprint == ours, in_place) {
            (false, Some(in_place)) => in_place,
            (false, None) => {
                self.refuse_destroyed(entry)?;
                sealed(entry)
            }
            (true, _) => sealed(entry),
        };
        let mut page = SecretMemory::new(XTS_KEY_BYTES)?;
        let out = page
            .as_mut_bytes()
            .first_chunk_mut::<XTS_KEY_BYTES>()
            .ok_or(io::ErrorKind::UnexpectedEof)
            .map_err(io::Error::from)?;
        unseal(&key, &self.key, context, out)?;
        let (data, tweak) = out.split_at(XTS_KEY_BYTES / 2);
        // In a time that says nothing about either. A sealer other than ours may have made such a key.
        if data.ct_eq(tweak).into() {
            return Err(NoKey::EqualHalves);
        }
        Ok(page)
    }

    fn refuse_destroyed(&self, entry: &SealedKeyEntry) -> Result<(), NoKey> {
        let fingerprint = <&Fingerprint>::try_from(entry.fingerprint.as_slice()).ok();
        match fingerprint.and_then(|fingerprint| self.destroyed.get(fingerprint)) {
            None => Ok(()),
            Some(epoch) => Err(NoKey::Destroyed {
                epoch: *epoch,
                now: text::to_hex(&self.key.public().fingerprint()),
            }),
        }
    }

    /// A new key for the host, and everything that the present one opens for a bundle, sealed to it.
    /// What does not open is left out: it served nothing before, either.
    ///
    /// # Errors
    /// See [`NoSuccessor`].
    pub(crate) fn successor(
        &self,
        bundle: &HostBundle,
    ) -> Result<(RecipientKey, Resealed), NoSuccessor> {
        let key = RecipientKey::generate(self.host())?;
        let mut resealed = Resealed::new(key.public().fingerprint());
        for volume in &bundle.volumes {
            let Some(context) = context_of(volume) else {
                continue;
            };
            for entry in self.entries_of(volume) {
                let failed = |problem: String| NoSuccessor::Volume {
                    volume: volume.name.clone(),
                    problem,
                };
                match self.reseal(&context, entry, &key) {
                    Ok(sealed) => resealed.insert(volume.id, entry, sealed),
                    Err(error) if error.is_passing() => return Err(failed(error.to_string())),
                    Err(error) => tracing::warn!(
                        volume = volume.name,
                        "its key does not open, with the host's old key or the new one: {error}"
                    ),
                }
            }
        }
        Ok((key, resealed))
    }

    /// Every sealed entry of a volume that is for this host, those of a previous key too.
    fn entries_of<'a>(&'a self, volume: &'a Volume) -> impl Iterator<Item = &'a SealedKeyEntry> {
        let ours = |entry: &&SealedKeyEntry| entry.recipient == self.host();
        let previous = volume.rekey.iter().flat_map(|rekey| &rekey.previous_keys);
        volume.sealed_keys.iter().chain(previous).filter(ours)
    }

    fn reseal(
        &self,
        context: &VolumeContext,
        entry: &SealedKeyEntry,
        to: &RecipientKey,
    ) -> Result<SealedKey, NotResealed> {
        let page = self.open(entry, context)?;
        let bytes = page.as_bytes().first_chunk::<XTS_KEY_BYTES>();
        let bytes = bytes.ok_or(NoKey::Memory(io::ErrorKind::UnexpectedEof.into()))?;
        Ok(seal(bytes, to.public(), context)?)
    }

    /// Takes another key for the host, and what is sealed to it. The old one is wiped.
    pub(crate) fn adopt(&mut self, key: RecipientKey, resealed: Resealed) {
        self.key = key;
        self.resealed = resealed;
    }
}

/// Why an entry was not sealed anew.
#[derive(Debug, thiserror::Error)]
enum NotResealed {
    #[error(transparent)]
    Open(#[from] NoKey),
    #[error(transparent)]
    Seal(#[from] SealError),
}

impl NotResealed {
    /// Whether the entry itself may be good.
    fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Open(NoKey::Memory(_)) | Self::Seal(SealError::Randomness(_))
        )
    }
}

/// What the keys of a volume are bound to; none for a plain volume.
fn context_of(volume: &Volume) -> Option<VolumeContext> {
    Some(VolumeContext {
        id: volume.id,
        size_bytes: volume.size_bytes,
        data_unit_bytes: volume.data_unit_bytes?,
        logical_block_bytes: volume.logical_block_bytes,
    })
}

fn sealed(entry: &SealedKeyEntry) -> SealedKey {
    SealedKey {
        recipient: entry.recipient.clone(),
        fingerprint: entry.fingerprint.clone(),
        enc: entry.enc.clone(),
        ciphertext: entry.ciphertext.clone(),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_bundle::SocketSpec;
    use bulkhead_protocol::limits::Limits;
    use bulkhead_protocol::{DiscardPolicy, VolumeId};
    use bulkhead_sealing::RecipientPublicKey;
    use hpke::aead::ChaCha20Poly1305;
    use hpke::kdf::HkdfSha256;
    use hpke::kem::{Kem, XWing};
    use hpke::{Deserializable, OpModeS, Serializable};

    use super::*;

    fn vault(key: RecipientKey) -> Vault {
        let resealed = Resealed::new(key.public().fingerprint());
        Vault::new(key, resealed)
    }

    const CONTEXT: VolumeContext = VolumeContext {
        id: VolumeId([1; 16]),
        size_bytes: 1 << 20,
        data_unit_bytes: 512,
        logical_block_bytes: 4096,
    };

    fn volume(key: SealedKeyEntry) -> Volume {
        Volume {
            id: CONTEXT.id,
            name: "disk".to_owned(),
            path: "disk.img".to_owned(),
            size_bytes: CONTEXT.size_bytes,
            data_unit_bytes: Some(CONTEXT.data_unit_bytes),
            logical_block_bytes: CONTEXT.logical_block_bytes,
            read_only: false,
            serial: String::new(),
            discard: DiscardPolicy::Ignore,
            queues: 1,
            socket: SocketSpec {
                name: "vm".parse().expect("name"),
                uid: 0,
                gid: 0,
                mode: 0o600,
            },
            allowed_uid: 0,
            force_removal: false,
            sealed_keys: vec![key],
            rekey: None,
            limits: Limits::default(),
            group: None,
        }
    }

    /// A sealer that does not look at what it seals, as ours does.
    fn careless_seal(key: &[u8; XTS_KEY_BYTES], to: &RecipientPublicKey) -> SealedKeyEntry {
        let text = to.to_text();
        let field = text.lines().find_map(|line| line.strip_prefix("xwing = "));
        let base64 = field.expect("a key").trim_matches('"');
        let bytes = bulkhead_bundle::text::from_base64(base64).expect("base64");
        let public = <XWing as Kem>::PublicKey::from_bytes(&bytes).expect("a key");
        let info = minicbor::to_vec(("bulkhead volume key v1", to.name.as_str())).expect("info");
        let aad = minicbor::to_vec(CONTEXT).expect("aad");
        let (enc, ciphertext) = hpke::single_shot_seal::<ChaCha20Poly1305, HkdfSha256, XWing>(
            &OpModeS::Base,
            &public,
            &info,
            key,
            &aad,
        )
        .expect("sealed");
        SealedKeyEntry {
            recipient: to.name.clone(),
            fingerprint: to.fingerprint().to_vec(),
            enc: enc.to_bytes().to_vec(),
            ciphertext,
        }
    }

    #[test]
    fn refused_equal_halves() {
        let host = RecipientKey::generate("host-a").expect("key");
        let to = host.public().clone();
        let vault = vault(host);
        let mut key = [0x5a; XTS_KEY_BYTES];
        let equal = vault.unseal(&volume(careless_seal(&key, &to)));
        assert!(matches!(equal, Err(NoKey::EqualHalves)), "{equal:?}");
        // One bit of difference is enough, and the sealer is not what is refused.
        key[XTS_KEY_BYTES - 1] ^= 1;
        let page = vault.unseal(&volume(careless_seal(&key, &to)));
        let [page] = &page.expect("unsealed")[..] else {
            panic!("one page");
        };
        assert_eq!(page.as_bytes(), key);
    }

    #[test]
    fn refused_keys_for_others() {
        let vault = vault(RecipientKey::generate("host-a").expect("key"));
        let other = RecipientKey::generate("host-b").expect("key");
        let sealed = careless_seal(&[1; XTS_KEY_BYTES], other.public());
        let refused = vault.unseal(&volume(sealed));
        assert!(matches!(refused, Err(NoKey::NotForUs(_))), "{refused:?}");
    }
}
