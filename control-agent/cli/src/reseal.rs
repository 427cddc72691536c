//! A volume's key sealed anew, by whoever has the recovery key: to hosts that were not named when the
//! volume was made, or for a greater size. The key itself, and the volume's bytes, stay as they are; of a
//! volume with a re-key, both keys.

use std::path::Path;

use bulkhead_bundle::{RECOVERY_RECIPIENT, SealedKeyEntry, Volume, private_file, source};
use bulkhead_files::text::to_hex;
use bulkhead_sealing::{RecipientKey, RecipientPublicKey, SealedKey, unseal};

use crate::arguments::VolumeReseal;
use crate::failure::Failure;
use crate::image;
use crate::output;
use crate::recover::{previous_sealed_for, sealed_for};
use crate::show::Shown;
use crate::volume::{advise, check, context_of, host_keys, key_in, key_memory, seal_to};

/// `volume reseal`
pub(crate) fn reseal(arguments: &VolumeReseal) -> Result<(), Failure> {
    let old = the_volume(&arguments.volume)?;
    let mut new = old.clone();
    new.size_bytes = new_size(&old, arguments.size)?;
    if old.is_encrypted() {
        seal_anew(&old, &mut new, arguments)?;
    } else if !arguments.hosts.is_empty() || !arguments.dropped.is_empty() {
        return Err(Failure::new(format!(
            "volume {:?} is plain: it has no key to seal to a host",
            old.name
        )));
    }
    check(&new)?;
    output::must_be_new(&arguments.out)?;
    if let Some(path) = &arguments.grow_file {
        // Before the stanza is there: a bundle with it is refused while the file is too short.
        let grown = image::grow(path, new.size_bytes)?;
        let done = if grown { "enlarged" } else { "is large enough" };
        println!("file         {} {done}", path.display());
    }
    private_file::create_public(&arguments.out, source::volume_to_toml(&new).as_bytes())?;
    println!("volume       {}", new.name);
    println!("id           {}", new.id);
    println!("size         {}", output::size(new.size_bytes));
    for entry in &new.sealed_keys {
        println!(
            "sealed to    {}  {}",
            entry.recipient,
            to_hex(&entry.fingerprint)
        );
    }
    println!("stanza       {}", arguments.out.display());
    advise(&new);
    Ok(())
}

/// The one volume of a stanza.
pub(crate) fn the_volume(path: &Path) -> Result<Volume, Failure> {
    let Shown::Stanza(mut volumes, nics) = Shown::load(path)? else {
        return Err(Failure::at(
            path,
            "is a bundle: give the volume's stanza, as `bulkhead volume create` wrote it",
        ));
    };
    if !nics.is_empty() {
        let problem = format!(
            "has {} NIC(s) beside volumes: give a stanza with one volume",
            nics.len()
        );
        return Err(Failure::at(path, problem));
    }
    match (volumes.pop(), volumes.len()) {
        (Some(volume), 0) => Ok(volume),
        (_, others) => Err(Failure::at(
            path,
            format!("has {} volumes: give a stanza with one of them", others + 1),
        )),
    }
}

fn new_size(old: &Volume, wanted: Option<u64>) -> Result<u64, Failure> {
    match wanted {
        Some(size) if size < old.size_bytes => Err(Failure::new(format!(
            "--size: volume {:?} has {}, and a volume never shrinks: what lies beyond {} would \
             be lost",
            old.name,
            output::size(old.size_bytes),
            output::size(size)
        ))),
        Some(size) if size > old.size_bytes && old.rekey.is_some() => Err(Failure::new(format!(
            "--size: volume {:?} is re-keyed, and keeps its size until that is finished: the record of \
             the re-key lies behind its end",
            old.name
        ))),
        Some(size) => Ok(size),
        None => Ok(old.size_bytes),
    }
}

/// Seals a volume's key, and with a re-key the previous one, to the hosts given, to those of before that
/// still can open it, and to recovery.
fn seal_anew(old: &Volume, new: &mut Volume, arguments: &VolumeReseal) -> Result<(), Failure> {
    let hosts = host_keys(&arguments.hosts)?;
    let recovery = recovery_key(old, arguments.recovery.as_deref())?;
    let (Some(old_context), Some(new_context)) = (context_of(old), context_of(new)) else {
        return Ok(());
    };
    let anew = |sealed: SealedKey, before: &[SealedKeyEntry]| {
        let mut memory = key_memory()?;
        let key = key_in(&mut memory)?;
        unseal(&sealed, &recovery, &old_context, key)?;
        let stay = stays(old, before, &hosts, arguments)?;
        let mut entries: Vec<SealedKeyEntry> = stay.into_iter().cloned().collect();
        for recipient in hosts.iter().chain([recovery.public()]) {
            entries.push(seal_to(key, recipient, &new_context)?);
        }
        Ok::<_, Failure>(entries)
    };
    new.sealed_keys = anew(sealed_for(old, RECOVERY_RECIPIENT)?, &old.sealed_keys)?;
    if let Some(rekey) = &mut new.rekey {
        let sealed = previous_sealed_for(old, RECOVERY_RECIPIENT)?;
        let before = std::mem::take(&mut rekey.previous_keys);
        rekey.previous_keys = anew(sealed, &before)?;
    }
    Ok(())
}

/// What was sealed to hosts before and stays: nothing of it opens for another size.
fn stays<'a>(
    old: &Volume,
    sealed: &'a [SealedKeyEntry],
    hosts: &[RecipientPublicKey],
    arguments: &VolumeReseal,
) -> Result<Vec<&'a SealedKeyEntry>, Failure> {
    let is_host = |entry: &&SealedKeyEntry| entry.recipient != RECOVERY_RECIPIENT;
    let before: Vec<_> = sealed.iter().filter(is_host).collect();
    for name in &arguments.dropped {
        if !before.iter().any(|entry| entry.recipient == *name) {
            return Err(Failure::new(format!(
                "--drop-host: the key of volume {:?} is not sealed to {name:?}",
                old.name
            )));
        }
    }
    let given = |name: &String| hosts.iter().any(|host| host.name == *name);
    let untouched: Vec<_> = before
        .into_iter()
        .filter(|entry| !given(&entry.recipient) && !arguments.dropped.contains(&entry.recipient))
        .collect();
    let grows = arguments.size.is_some_and(|size| size != old.size_bytes);
    if grows && !untouched.is_empty() {
        let names: Vec<_> = untouched.iter().map(|e| e.recipient.as_str()).collect();
        return Err(Failure::new(format!(
            "--host is missing for: {}; a sealed key holds for one size, so that with another \
             --size each host's public key is needed again (or --drop-host NAME)",
            names.join(", ")
        )));
    }
    Ok(untouched)
}

fn recovery_key(volume: &Volume, path: Option<&Path>) -> Result<RecipientKey, Failure> {
    let path = path.ok_or_else(|| {
        Failure::new(format!(
            "volume {:?} is encrypted: give its recovery key with --recovery",
            volume.name
        ))
    })?;
    let key = RecipientKey::load(path)?;
    if key.public().name != RECOVERY_RECIPIENT {
        return Err(Failure::at(
            path,
            format!(
                "is the key of {:?}, not of recovery, to which the key has to be sealed again",
                key.public().name
            ),
        ));
    }
    Ok(key)
}
