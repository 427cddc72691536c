//! A volume's plain bytes, read from its file with the keys that its stanza has: one key, or two where a
//! re-key is under way.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use bulkhead_bundle::Volume;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey, key_check};
use bulkhead_sealing::{RecipientKey, SealedKey, unseal};

use crate::failure::Failure;
use crate::record::{self, Check, Journal};
use crate::recover::{previous_sealed_for, sealed_for};
use crate::volume::{context_of, key_in, key_memory};

/// What decrypts a volume.
#[derive(Debug)]
pub(crate) struct Plain<'a> {
    file: &'a File,
    journal: Option<Journal>,
    /// Where one key ends and the next begins: (up to this byte, under this key), ascending.
    parts: Vec<(u64, XtsKey)>,
    unit: Option<DataUnit>,
}

impl<'a> Plain<'a> {
    /// The volume in a file. `recovery` opens its keys; a plain volume needs none.
    ///
    /// # Errors
    /// If a key is missing, does not open, or is not the one that the file says.
    pub(crate) fn of(
        volume: &Volume,
        recovery: Option<&Path>,
        file: &'a File,
        path: &Path,
    ) -> Result<Self, Failure> {
        let mut plain = Self {
            file,
            journal: None,
            parts: Vec::new(),
            unit: None,
        };
        let Some(context) = context_of(volume) else {
            return Ok(plain);
        };
        let recovery = recovery.ok_or_else(|| {
            Failure::new(format!(
                "volume {:?} is encrypted: give its recovery key with --recovery",
                volume.name
            ))
        })?;
        plain.unit = Some(DataUnit::new(context.data_unit_bytes).ok_or_else(|| {
            Failure::new(format!(
                "a data unit of {} bytes is not known",
                context.data_unit_bytes
            ))
        })?);
        let recovery = RecipientKey::load(recovery)?;
        let name = &recovery.public().name;
        let parts = record::parts(file, path, volume)?;
        plain.journal = parts.journal;
        let arena = SecretArena::new(2)
            .map_err(|e| Failure::new(format!("there is no secret memory for the keys: {e}")))?;
        let open = |sealed: SealedKey, check: Option<Check>| -> Result<XtsKey, Failure> {
            let mut memory = key_memory()?;
            let key = key_in(&mut memory)?;
            unseal(&sealed, &recovery, &context, key)?;
            checked(&arena, key, check, path)
        };
        // A key that no byte is under is not needed, and need not open.
        if parts.boundary_bytes > 0 {
            let key = open(sealed_for(volume, name)?, parts.check)?;
            plain.parts.push((parts.boundary_bytes, key));
        }
        if parts.boundary_bytes < volume.size_bytes {
            let key = open(previous_sealed_for(volume, name)?, parts.previous_check)?;
            plain.parts.push((volume.size_bytes, key));
        }
        Ok(plain)
    }

    /// The plain bytes from `at` on, a multiple of the data unit. `stored` is room for as many.
    pub(crate) fn read(
        &self,
        mut at: u64,
        stored: &mut [u8],
        plain: &mut [u8],
    ) -> Result<(), Failure> {
        self.read_stored(stored, at)
            .map_err(|e| Failure::new(format!("at byte {at}: {e}")))?;
        let Some(unit) = self.unit else {
            plain.copy_from_slice(stored);
            return Ok(());
        };
        let (mut stored, mut plain) = (&*stored, plain);
        for (end, key) in &self.parts {
            let here = end.saturating_sub(at).min(stored.len() as u64);
            let here = usize::try_from(here)?;
            let (now, later) = stored.split_at(here);
            let (out, rest) = plain.split_at_mut(here);
            key.decrypt(unit, at / u64::from(unit.bytes()), now, out)?;
            (stored, plain) = (later, rest);
            at += here as u64;
        }
        Ok(())
    }

    /// What is stored, with the zone of an interrupted re-key as its journal has it.
    fn read_stored(&self, stored: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(stored, at)?;
        let Some(journal) = self.journal else {
            return Ok(());
        };
        let end = at + stored.len() as u64;
        let from = journal.zone_at.max(at);
        let to = (journal.zone_at + journal.bytes).min(end);
        if from >= to {
            return Ok(());
        }
        let offset = |of: u64| usize::try_from(of - at).map_err(io::Error::other);
        let place = stored.get_mut(offset(from)?..offset(to)?);
        match place {
            Some(place) => self
                .file
                .read_exact_at(place, journal.journal_at + (from - journal.zone_at)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// A key that is ready, if it is the one that the record in the file speaks of.
pub(crate) fn checked(
    arena: &Arc<SecretArena>,
    key: &[u8; bulkhead_protocol::keys::XTS_KEY_BYTES],
    check: Option<Check>,
    path: &Path,
) -> Result<XtsKey, Failure> {
    let key = XtsKey::new(arena, key)?;
    if let Some(check) = check
        && key_check(&key, &check.rekey)? != check.value
    {
        return Err(Failure::at(
            path,
            "is not encrypted with the key that the bundle has for it, as its re-key record says: \
             give the bundle or stanza of the newest re-key",
        ));
    }
    Ok(key)
}
