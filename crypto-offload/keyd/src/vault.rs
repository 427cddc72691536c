//! The host's secret key, and what it is for: a volume's grant, with the volume key unsealed into
//! secret memory.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::io;

use bulkhead_bundle::{SealedKeyEntry, Volume};
use bulkhead_crypto::secret::SecretMemory;
use bulkhead_protocol::keys::{VolumeGrant, XTS_KEY_BYTES};
use bulkhead_sealing::{RecipientKey, SealedKey, UnsealError, VolumeContext, unseal};
use subtle::ConstantTimeEq as _;

/// Why there is no key for a volume.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoKey {
    /// For other hosts.
    #[error("no key of the volume is sealed to this host, {0:?}")]
    NotForUs(String),
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

/// What unseals.
#[derive(Debug)]
pub(crate) struct Vault {
    key: RecipientKey,
}

impl Vault {
    /// A vault with the host's key.
    pub(crate) fn new(key: RecipientKey) -> Self {
        Self { key }
    }

    /// Name of the host, as keys are sealed to it.
    pub(crate) fn host(&self) -> &str {
        &self.key.public().name
    }

    /// The keys of a volume, in the order in which a grant has them: its key, and behind it with a
    /// re-key the previous one; none for a plain volume. Each has a page of its own, which nobody
    /// else has yet and which is wiped when it is dropped.
    ///
    /// # Errors
    /// See [`NoKey`].
    pub(crate) fn unseal(&self, volume: &Volume) -> Result<Vec<SecretMemory>, NoKey> {
        let Some(data_unit_bytes) = volume.data_unit_bytes else {
            return Ok(Vec::new());
        };
        let context = VolumeContext {
            id: volume.id,
            size_bytes: volume.size_bytes,
            data_unit_bytes,
            logical_block_bytes: volume.logical_block_bytes,
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

    fn open(&self, entry: &SealedKeyEntry, context: &VolumeContext) -> Result<SecretMemory, NoKey> {
        let mut page = SecretMemory::new(XTS_KEY_BYTES)?;
        let out = page
            .as_mut_bytes()
            .first_chunk_mut::<XTS_KEY_BYTES>()
            .ok_or(io::ErrorKind::UnexpectedEof)
            .map_err(io::Error::from)?;
        unseal(&sealed(entry), &self.key, context, out)?;
        let (data, tweak) = out.split_at(XTS_KEY_BYTES / 2);
        // In a time that says nothing about either. A sealer other than ours may have made such a key.
        if data.ct_eq(tweak).into() {
            return Err(NoKey::EqualHalves);
        }
        Ok(page)
    }
}

fn sealed(entry: &SealedKeyEntry) -> SealedKey {
    SealedKey {
        recipient: entry.recipient.clone(),
        fingerprint: entry.fingerprint.clone(),
        enc: entry.enc.clone(),
        ciphertext: entry.ciphertext.clone(),
    }
}

/// What keyd vouches for about a volume of a bundle with this epoch.
pub(crate) fn grant_of(volume: &Volume, epoch: u64) -> VolumeGrant {
    VolumeGrant {
        volume: volume.id,
        socket: volume.socket.name.clone(),
        allowed_uid: volume.allowed_uid,
        size_bytes: volume.size_bytes,
        logical_block_bytes: volume.logical_block_bytes,
        data_unit_bytes: volume.data_unit_bytes,
        read_only: volume.read_only,
        serial: volume.serial.clone(),
        queues: volume.queues,
        discard: volume.discard,
        epoch,
        rekey: volume.rekey.as_ref().map(|rekey| rekey.id),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_bundle::SocketSpec;
    use bulkhead_protocol::{DiscardPolicy, VolumeId};
    use bulkhead_sealing::RecipientPublicKey;
    use hpke::aead::ChaCha20Poly1305;
    use hpke::kdf::HkdfSha256;
    use hpke::kem::{Kem, XWing};
    use hpke::{Deserializable, OpModeS, Serializable};

    use super::*;

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
        let vault = Vault::new(host);
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
        let vault = Vault::new(RecipientKey::generate("host-a").expect("key"));
        let other = RecipientKey::generate("host-b").expect("key");
        let sealed = careless_seal(&[1; XTS_KEY_BYTES], other.public());
        let refused = vault.unseal(&volume(sealed));
        assert!(matches!(refused, Err(NoKey::NotForUs(_))), "{refused:?}");
    }
}
