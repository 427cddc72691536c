//! `volume shred`: the order that destroys a volume's key on its hosts, as lines to be signed; and the
//! end of the sealed copies that the operator has here. A host carries the order out when it
//! applies a bundle with it, and `bulkhead status` shows the proof.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;

use bulkhead_bundle::{RECOVERY_RECIPIENT, Volume};
use bulkhead_files::text::to_hex;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};

use crate::arguments::VolumeShred;
use crate::failure::Failure;
use crate::image::length_of;
use crate::reseal::the_volume;
use crate::show::Shown;

/// What no command can reach, said every time.
const OUT_OF_REACH: &str = "\
not reached from here, and up to you:
  every other copy of this stanza and of the envelopes that name the volume, backups too: together
  with the recovery key they open it as long as they exist. Destroy the copies, or the recovery key
  (and with it the recovery of every other volume)
  hosts that the volume was sealed to before and is no longer: old envelopes open there until they
  shred it, too
  what file systems and disks keep of overwritten bytes: snapshots, copy-on-write, flash
  keys that were taken out with `volume recover`, and bytes that were taken out with `volume export`";

/// What a bundle with the order does to volumes that it leaves out.
const NAMES_THE_OTHERS: &str = "\
that bundle has to name every volume that the host is still to serve: one that it leaves out can't be
opened there any more, until `bulkhead volume reseal` has sealed it anew with the recovery key";

/// `volume shred`
pub(crate) fn shred(arguments: &VolumeShred) -> Result<(), Failure> {
    let volume = the_volume(&arguments.volume)?;
    if !volume.is_encrypted() {
        return Err(Failure::new(format!(
            "volume {:?} is plain: it has no key whose end would be the end of its bytes; \
             overwrite its file (`shred`, `blkdiscard`) instead",
            volume.name
        )));
    }
    for copy in &arguments.copies {
        check_copy(copy, &volume)?;
    }
    let image = arguments.file.as_deref().map(lock_image).transpose()?;
    print_order(&volume);
    // The stanza last: with it, what is left after a failure can be named again.
    let copies = arguments.copies.iter().chain([&arguments.volume]);
    println!();
    if arguments.yes {
        if let (Some(file), Some(path)) = (&image, &arguments.file) {
            discard(file, path)?;
            println!("discarded    {}", path.display());
        }
        for path in copies {
            destroy(path).map_err(|e| Failure::at(path, format!("may still be there: {e}")))?;
            println!("destroyed    {}", path.display());
        }
    } else {
        for path in arguments.file.iter().chain(copies) {
            println!("would end    {}", path.display());
        }
        println!(
            "nothing is destroyed yet: when `bulkhead status` shows the volume as destroyed on \
             each host, give --yes"
        );
    }
    println!("\n{OUT_OF_REACH}");
    Ok(())
}

/// The lines for the bundles, and for whom: during a re-key for those of the previous key, too.
fn print_order(volume: &Volume) {
    println!("volume       {}", volume.name);
    println!("id           {}", volume.id);
    let previous = volume.rekey.iter().flat_map(|rekey| &rekey.previous_keys);
    let recipients: BTreeSet<(&str, &[u8])> = volume
        .sealed_keys
        .iter()
        .chain(previous)
        .map(|entry| (entry.recipient.as_str(), entry.fingerprint.as_slice()))
        .collect();
    for (recipient, fingerprint) in &recipients {
        println!("sealed to    {recipient}  {}", to_hex(fingerprint));
    }
    println!("\nin the next bundle of each of these hosts, in the place of the volume:");
    let mut hosts: Vec<&str> = recipients.iter().map(|recipient| recipient.0).collect();
    hosts.dedup();
    for host in hosts.into_iter().filter(|name| *name != RECOVERY_RECIPIENT) {
        println!("# {host}");
        println!("shred = [\"{}\"]", volume.id);
    }
    println!("{NAMES_THE_OTHERS}");
}

/// A copy is destroyed only if it is one, and nothing that is still needed goes with it.
fn check_copy(path: &Path, volume: &Volume) -> Result<(), Failure> {
    let shown = Shown::load(path)?;
    if !shown.volumes().iter().any(|other| other.id == volume.id) {
        return Err(Failure::at(
            path,
            format!(
                "does not name volume {:?} ({}), and is left alone",
                volume.name, volume.id
            ),
        ));
    }
    let others = shown.volumes().len() - 1;
    match shown {
        Shown::Envelope { .. } => Ok(()),
        Shown::Source(_) => Err(Failure::at(
            path,
            "is a bundle's source: take the volume out of it, and write its id into `shred`",
        )),
        Shown::Stanza(_, nics) if !nics.is_empty() => Err(Failure::at(
            path,
            format!(
                "has {} NIC(s), which would be lost: take them out first",
                nics.len()
            ),
        )),
        Shown::Stanza(..) if others > 0 => Err(Failure::at(
            path,
            format!("has {others} more volume(s), which would be lost: take them out first"),
        )),
        Shown::Stanza(..) => Ok(()),
    }
}

/// Overwrites a file where it lies, through to the disk, and removes it.
fn destroy(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    file.write_all(&vec![0; length])?;
    file.sync_all()?;
    fs::remove_file(path)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// The volume's own file or device, which nobody uses any more.
fn lock_image(path: &Path) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)
        .map_err(|e| Failure::at(path, e))?;
    length_of(&file, path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Failure::at(
            path,
            "is in use: apply the bundle that shreds the volume first, then discard its bytes",
        )),
        Err(fs::TryLockError::Error(error)) => Err(Failure::at(path, error)),
    }
}

/// Gives all of its blocks back, so that not even the encrypted bytes are read again.
fn discard(file: &File, path: &Path) -> Result<(), Failure> {
    let at = |error: io::Error| Failure::at(path, format!("its bytes can't be discarded: {error}"));
    let length = length_of(file, path)?;
    let length = i64::try_from(length)
        .map_err(io::Error::other)
        .map_err(at)?;
    if length > 0 {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, hole, 0, length).map_err(|e| at(e.into()))?;
    }
    file.sync_all().map_err(at)?;
    let is_device = file.metadata().map_err(at)?.file_type().is_block_device();
    if !is_device {
        fs::remove_file(path).map_err(at)?;
    }
    Ok(())
}
