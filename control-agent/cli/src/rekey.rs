//! Another key for a volume: made here and sealed, the old one kept as the previous key until the data
//! plane has encrypted everything anew, and dropped after that.
//!
//! A re-key begins from a record behind the volume's end, which is written here ([`prepare`]) and by
//! nobody else: a data plane that finds none doesn't begin, so that no mistaken bundle can.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use bulkhead_bundle::{RECOVERY_RECIPIENT, Rekey, SealedKeyEntry, Volume, private_file, source};
use bulkhead_files::text::to_hex;
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::rekey::{Found, RECORD_BYTES, Record, Stage, prepared};
use bulkhead_sealing::RecipientPublicKey;
use nix::fcntl::OFlag;

use crate::arguments::VolumeRekey;
use crate::failure::Failure;
use crate::image::{self, length_of};
use crate::output;
use crate::record::{self, damaged, percent};
use crate::reseal::the_volume;
use crate::volume::{
    advise, check, context_of, host_keys, random_uuid, recovery_public, sealed_keys,
};

/// `volume rekey`
pub(crate) fn rekey(arguments: &VolumeRekey) -> Result<(), Failure> {
    let volume = the_volume(&arguments.volume)?;
    match (&arguments.out, &arguments.file) {
        (Some(out), _) if arguments.finish => finish(volume, arguments, out),
        (Some(out), _) => begin(volume, arguments, out),
        (None, Some(file)) => prepare(&volume, file),
        (None, None) => Err(Failure::new("--out is missing")),
    }
}

/// Makes the key, and the stanza that has both.
fn begin(mut volume: Volume, arguments: &VolumeRekey, out: &Path) -> Result<(), Failure> {
    if let Some(rekey) = &volume.rekey {
        return Err(Failure::at(
            &arguments.volume,
            format!(
                "has a re-key already ({}): let it be done and finish it first (--finish)",
                rekey.id
            ),
        ));
    }
    let Some(context) = context_of(&volume) else {
        return Err(Failure::new(format!(
            "volume {:?} is plain: it has no key to replace",
            volume.name
        )));
    };
    let recipients = recipients(&volume, arguments)?;
    volume.rekey = Some(Rekey {
        id: RekeyId(random_uuid()?),
        previous_keys: previous_keys(&volume, arguments),
    });
    volume.sealed_keys = sealed_keys(&recipients, &context)?;
    check(&volume)?;
    output::must_be_new(out)?;
    write(&volume, out)?;
    match &arguments.file {
        // The stanza is there first: without it nobody would know the id that the file has.
        Some(file) => output::or_remove(out, prepare(&volume, file)),
        None => {
            println!(
                "next         bulkhead volume rekey --prepare --volume {} --file ..., where the file is",
                output::shell_quoted(&out.display().to_string())
            );
            Ok(())
        }
    }
}

/// Who gets the new key. Each host of before is named, kept or dropped: one that is forgotten would
/// lose the volume.
fn recipients(
    volume: &Volume,
    arguments: &VolumeRekey,
) -> Result<Vec<RecipientPublicKey>, Failure> {
    let mut recipients = host_keys(&arguments.hosts)?;
    for host in &recipients {
        let before = volume.sealed_for(&host.name);
        if before.is_none_or(|entry| entry.fingerprint[..] != host.fingerprint()[..]) {
            return Err(Failure::new(format!(
                "--host: the key of volume {:?} is not sealed to {:?} with the key {}, which has to open \
                 the previous key as well: seal it to that first (`bulkhead volume reseal`)",
                volume.name,
                host.name,
                to_hex(&host.fingerprint())
            )));
        }
    }
    for name in &arguments.dropped {
        if volume.sealed_for(name).is_none() || name == RECOVERY_RECIPIENT {
            return Err(Failure::new(format!(
                "--drop-host: the key of volume {:?} is not sealed to a host {name:?}",
                volume.name
            )));
        }
    }
    let forgotten: Vec<&str> = volume
        .sealed_keys
        .iter()
        .map(|entry| &entry.recipient)
        .filter(|name| *name != RECOVERY_RECIPIENT && !arguments.dropped.contains(name))
        .filter(|name| !recipients.iter().any(|host| host.name == **name))
        .map(String::as_str)
        .collect();
    if !forgotten.is_empty() {
        return Err(Failure::new(format!(
            "--host is missing for: {}; each host needs the new key (or --drop-host NAME)",
            forgotten.join(", ")
        )));
    }
    if let Some(path) = &arguments.recovery {
        let recovery = recovery_public(path)?;
        let before = volume.sealed_for(RECOVERY_RECIPIENT);
        if before.is_none_or(|entry| entry.fingerprint[..] != recovery.fingerprint()[..]) {
            eprintln!(
                "bulkhead: note: {} is another recovery key than the volume has: until the re-key is \
                 done, both are needed to recover it",
                path.display()
            );
        }
        recipients.push(recovery);
    }
    Ok(recipients)
}

/// What the volume has now, less the hosts that are dropped.
fn previous_keys(volume: &Volume, arguments: &VolumeRekey) -> Vec<SealedKeyEntry> {
    let mut keys = volume.sealed_keys.clone();
    keys.retain(|entry| !arguments.dropped.contains(&entry.recipient));
    keys
}

/// Drops the previous key.
fn finish(mut volume: Volume, arguments: &VolumeRekey, out: &Path) -> Result<(), Failure> {
    if volume.rekey.take().is_none() {
        return Err(Failure::at(
            &arguments.volume,
            "has no re-key: there is no previous key to drop",
        ));
    }
    check(&volume)?;
    write(&volume, out)
}

fn write(volume: &Volume, out: &Path) -> Result<(), Failure> {
    private_file::create_public(out, source::volume_to_toml(volume).as_bytes())?;
    println!("volume       {}", volume.name);
    println!("id           {}", volume.id);
    if let Some(rekey) = &volume.rekey {
        println!("re-key       {}", rekey.id);
    }
    for entry in &volume.sealed_keys {
        println!(
            "sealed to    {}  {}",
            entry.recipient,
            to_hex(&entry.fingerprint)
        );
    }
    println!("stanza       {}", out.display());
    advise(volume);
    Ok(())
}

/// Makes room for the record and the journal behind the volume's end, and writes the first record. A file
/// that was prepared for this re-key stays as it is.
fn prepare(volume: &Volume, path: &Path) -> Result<(), Failure> {
    let Some((rekey, unit)) = volume.rekey.as_ref().zip(volume.data_unit_bytes) else {
        return Err(Failure::new(format!(
            "the stanza of volume {:?} has no re-key to prepare for: make one with \
             `bulkhead volume rekey --host ... --recovery ... --out ...`",
            volume.name
        )));
    };
    let layout = record::layout(volume)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|e| Failure::at(path, e))?;
    let length = length_of(&file, path)?;
    if length < volume.size_bytes {
        return Err(Failure::at(
            path,
            format!(
                "has {length} bytes, and the volume has {}: is it the right file?",
                volume.size_bytes
            ),
        ));
    }
    let found = record::find(&file, path, volume)?;
    if may_begin(&file, path, volume, rekey, found)? {
        image::grow(path, layout.end).map_err(|e| {
            Failure::new(format!(
                "{e} (the re-key's record and journal lie behind the volume, up to byte {})",
                layout.end
            ))
        })?;
        let first = prepared(volume.id, rekey.id, volume.size_bytes, unit);
        write_first(&file, layout.copies[0], &first).map_err(|e| Failure::at(path, e))?;
        println!("file         {} is prepared", path.display());
    } else {
        println!("file         {} was prepared already", path.display());
    }
    Ok(())
}

/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// Writes the first record, so that a power cut at any moment leaves what was there, nothing, or the
/// record, and never one that counts as damaged: a copy gets its first sector, with the magic, when the
/// rest of it is on the disk, and loses that of an older one before.
fn write_first(file: &File, at: u64, record: &[u8]) -> io::Result<()> {
    for step in first_record_steps(record) {
        for (offset, bytes) in step {
            file.write_all_at(bytes, at + offset)?;
        }
        file.sync_all()?;
    }
    Ok(())
}

/// What is written, as offsets and bytes; all of a step is on the disk before the next begins.
fn first_record_steps(record: &[u8]) -> [Vec<(u64, &[u8])>; 3] {
    let mut steps = [Vec::new(), Vec::new(), Vec::new()];
    for (index, copy) in record.chunks_exact(RECORD_BYTES).enumerate() {
        let at = (index * RECORD_BYTES) as u64;
        let (head, rest) = copy.split_at(SECTOR);
        steps[0].push((at, &[0; SECTOR][..]));
        steps[1].push((at + SECTOR as u64, rest));
        steps[2].push((at, head));
    }
    steps
}

/// Whether a record is to be written: not over one of this re-key, and never over one that is needed.
fn may_begin(
    file: &File,
    path: &Path,
    volume: &Volume,
    rekey: &Rekey,
    found: Found,
) -> Result<bool, Failure> {
    let record = match found {
        Found::Nothing => return Ok(true),
        Found::Damaged => return Err(damaged(path, volume)),
        Found::Record(record) => record,
    };
    let refused = |problem: String| Err(Failure::at(path, problem));
    if (record.volume, record.rekey) == (volume.id, rekey.id) {
        if matches!(record.stage, Stage::Over { .. }) {
            return refused(format!(
                "the re-key {} is over: all of the volume is under its new key, and to begin again \
                 would destroy it: apply a bundle without it (`bulkhead volume rekey --finish`). (If \
                 the volume was restored from a backup since, make another re-key for it.)",
                rekey.id
            ));
        }
        return Ok(false);
    }
    match record.stage {
        Stage::Over { .. } if record.volume == volume.id => Ok(true),
        Stage::Running { .. } => refused(format!(
            "its re-key {} stopped at {} %, and must be done first: apply the bundle that has it{}",
            record.rekey,
            percent(&record),
            of_other(&record, volume)
        )),
        Stage::Done { .. } if record.volume == volume.id => refused(format!(
            "its re-key {} is done and not finished: apply a bundle without it first \
             (`bulkhead volume rekey --finish`)",
            record.rekey
        )),
        // Of no use any more, unless a data plane is about to begin with it.
        Stage::Prepared | Stage::Done { .. } | Stage::Over { .. } => match file.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => refused(format!(
                "is prepared for the re-key {}, and in use: apply the bundle that has that, or stop \
                 the guest and try again{}",
                record.rekey,
                of_other(&record, volume)
            )),
            Err(TryLockError::Error(error)) => Err(Failure::at(path, error)),
        },
    }
}

fn of_other(record: &Record, volume: &Volume) -> String {
    if record.volume == volume.id {
        return String::new();
    }
    format!(
        " (the record is of another volume, {}: is it the right file?)",
        record.volume
    )
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::VolumeId;
    use bulkhead_protocol::rekey::{COPIES, find};

    use super::*;

    const SIZE: u64 = 1 << 20;
    const BYTES: usize = COPIES * RECORD_BYTES;

    fn first(rekey: u8) -> [u8; BYTES] {
        prepared(VolumeId([1; 16]), RekeyId([rekey; 16]), SIZE, 512)
    }

    /// The sectors of the record's place that a write covers, each with its new bytes.
    fn sectors<'a>(step: &[(u64, &'a [u8])]) -> Vec<(usize, &'a [u8])> {
        let mut sectors = Vec::new();
        for (offset, bytes) in step {
            let at = usize::try_from(*offset).expect("small");
            let parts = bytes.chunks(SECTOR).enumerate();
            sectors.extend(parts.map(|(index, part)| (at + index * SECTOR, part)));
        }
        sectors
    }

    #[test]
    fn a_power_cut_while_the_record_is_written_damages_nothing() {
        let record = first(2);
        for before in [[0; BYTES], first(1)] {
            let mut disk = before;
            for step in first_record_steps(&record) {
                let sectors = sectors(&step);
                // Any one sector alone, all but one, and any number of the first ones.
                for cut in 0..=sectors.len() {
                    for chosen in [
                        (0..sectors.len())
                            .filter(|at| *at == cut)
                            .collect::<Vec<_>>(),
                        (0..sectors.len()).filter(|at| *at != cut).collect(),
                        (0..cut).collect(),
                    ] {
                        let mut torn = disk;
                        for (at, bytes) in chosen.iter().map(|index| sectors[*index]) {
                            torn[at..at + SECTOR].copy_from_slice(bytes);
                        }
                        assert_ne!(find(&torn), Found::Damaged, "{chosen:?}");
                    }
                }
                for (at, bytes) in sectors {
                    disk[at..at + SECTOR].copy_from_slice(bytes);
                }
            }
            assert_eq!(disk, record);
        }
    }
}
