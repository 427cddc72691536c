//! A volume's key without any Bulkhead running: from what the bundle carries and the recovery
//! key, for the kernel's own dm-crypt. Of a volume whose re-key was interrupted, both keys, and which
//! part each is for.

use std::path::{Path, PathBuf};

use bulkhead_bundle::{SealedKeyEntry, Volume, private_file};
use bulkhead_crypto::SecretArena;
use bulkhead_protocol::keys::XTS_KEY_BYTES;
use bulkhead_sealing::{RecipientKey, SealedKey, VolumeContext, unseal};

use crate::arguments::VolumeRecover;
use crate::decrypt::checked;
use crate::failure::Failure;
use crate::image::check_existing;
use crate::output::{self, shell_quoted};
use crate::record::{self, Check, Parts};
use crate::show::Shown;
use crate::volume::{context_of, key_in, key_memory};

/// Bytes of a sector, the unit of cryptsetup's and dmsetup's numbers.
const SECTOR_BYTES: u64 = 512;

/// `volume recover`
pub(crate) fn recover(arguments: &VolumeRecover) -> Result<(), Failure> {
    let shown = Shown::load(&arguments.bundle)?;
    let volumes = shown.volumes();
    let volume = find(volumes, &arguments.volume)?;
    let context = context_of(volume).ok_or_else(|| {
        Failure::new(format!(
            "volume {:?} is plain: it has no key, and its file can be read as it is",
            volume.name
        ))
    })?;
    let parts = match (&arguments.file, &volume.rekey) {
        (Some(path), _) => {
            let file = check_existing(path, volume.size_bytes)?;
            Some(record::parts(&file, path, volume)?)
        }
        (None, None) => None,
        (None, Some(rekey)) => {
            return Err(Failure::new(format!(
                "volume {:?} has two keys (re-key {}), and which part is under which stands in its \
                 file: give that with --file",
                volume.name, rekey.id
            )));
        }
    };
    let recovery = RecipientKey::load(&arguments.recovery)?;
    let opener = Opener {
        recovery: &recovery,
        context,
        file: arguments.file.as_deref(),
    };
    let device = device(volume, arguments)?;
    let wiped = match parts {
        Some(parts) if parts.boundary_bytes < volume.size_bytes => {
            two_keys(volume, &opener, arguments, &device, parts)?
        }
        parts => {
            let check = parts.and_then(|parts| parts.check);
            let sealed = sealed_for(volume, &recovery.public().name)?;
            let key_file = opener.open(&sealed, check, &arguments.out)?;
            let whole = Mapping {
                from: 0,
                to: volume.size_bytes,
                suffix: "",
            };
            println!("{}", whole.cryptsetup_line(volume, &device, &key_file));
            vec![key_file]
        }
    };
    if arguments.file.is_none() && !volume.path.starts_with('/') {
        eprintln!(
            "bulkhead: note: {} is relative to the host's --volume-dir: run the line from there",
            volume.path
        );
    }
    let wiped: Vec<_> = wiped.iter().map(|path| quoted(path)).collect();
    eprintln!(
        "bulkhead: note: wipe {} when you are done: shred -u {}",
        if wiped.len() == 1 {
            "the key"
        } else {
            "the keys"
        },
        wiped.join(" ")
    );
    Ok(())
}

/// Opens sealed keys, into files.
struct Opener<'a> {
    recovery: &'a RecipientKey,
    context: VolumeContext,
    /// The volume's file, whose record says which keys they have to be.
    file: Option<&'a Path>,
}

impl Opener<'_> {
    fn open(
        &self,
        sealed: &SealedKey,
        check: Option<Check>,
        out: &Path,
    ) -> Result<PathBuf, Failure> {
        output::must_be_new(out)?;
        let mut memory = key_memory()?;
        let key = key_in(&mut memory)?;
        unseal(sealed, self.recovery, &self.context, key)?;
        if let Some(file) = self.file {
            let arena = SecretArena::new(1)
                .map_err(|e| Failure::new(format!("there is no secret memory for the key: {e}")))?;
            checked(&arena, key, check, file)?;
        }
        private_file::create(out, key)?;
        out.canonicalize().map_err(|e| Failure::at(out, e))
    }
}

/// The lines for a volume of which at least a part is under its previous key, whose key file gets
/// `.previous` behind its name. Returns the key files.
fn two_keys(
    volume: &Volume,
    opener: &Opener<'_>,
    arguments: &VolumeRecover,
    device: &str,
    parts: Parts,
) -> Result<Vec<PathBuf>, Failure> {
    let recipient = &opener.recovery.public().name;
    let mut previous_out = arguments.out.clone().into_os_string();
    previous_out.push(".previous");
    let previous = previous_sealed_for(volume, recipient)?;
    let previous = opener.open(&previous, parts.previous_check, Path::new(&previous_out))?;
    let boundary = parts.boundary_bytes;
    let upper = Mapping {
        from: boundary,
        to: volume.size_bytes,
        suffix: if boundary == 0 { "" } else { "-previous" },
    };
    let upper_line = upper.cryptsetup_line(volume, device, &previous);
    if boundary == 0 {
        println!("# nothing is re-keyed: all of it is under the previous key\n{upper_line}");
        return Ok(vec![previous]);
    }
    let sealed = sealed_for(volume, recipient)?;
    let key = output::or_remove(&previous, opener.open(&sealed, parts.check, &arguments.out))?;
    if let Some(journal) = parts.journal {
        println!("# the piece that was being written, from its journal to its place");
        println!(
            "dd if={device} of={device} bs={SECTOR_BYTES} skip={} seek={} count={} conv=notrunc,fsync",
            journal.journal_at / SECTOR_BYTES,
            journal.zone_at / SECTOR_BYTES,
            journal.bytes / SECTOR_BYTES
        );
    }
    let lower = Mapping {
        from: 0,
        to: boundary,
        suffix: "-key",
    };
    println!("# up to byte {boundary}, under the key");
    println!("{}", lower.cryptsetup_line(volume, device, &key));
    println!("# from byte {boundary} on, under the previous key\n{upper_line}");
    println!("# both as one disk");
    let mapper = |suffix| format!("/dev/mapper/bulkhead-{}{suffix}", volume.name);
    println!(
        "printf '0 {0} linear {1} 0\\n{0} {2} linear {3} 0\\n' | dmsetup create bulkhead-{4}",
        boundary / SECTOR_BYTES,
        mapper("-key"),
        (volume.size_bytes - boundary) / SECTOR_BYTES,
        mapper("-previous"),
        volume.name
    );
    Ok(vec![key, previous])
}

/// The volume's file or device, as an argument.
fn device(volume: &Volume, arguments: &VolumeRecover) -> Result<String, Failure> {
    match &arguments.file {
        Some(path) => {
            let path = path.canonicalize().map_err(|e| Failure::at(path, e))?;
            Ok(quoted(&path))
        }
        None => Ok(shell_quoted(&device_argument(&volume.path))),
    }
}

fn quoted(path: &Path) -> String {
    shell_quoted(&path.display().to_string())
}

/// The volume of that name or id.
pub(crate) fn find<'a>(volumes: &'a [Volume], wanted: &str) -> Result<&'a Volume, Failure> {
    let found = volumes
        .iter()
        .find(|volume| volume.name == wanted || volume.id.to_string() == wanted);
    found.ok_or_else(|| {
        let names: Vec<&str> = volumes.iter().map(|v| v.name.as_str()).collect();
        Failure::new(format!(
            "there is no volume {wanted:?}; there are: {}",
            names.join(", ")
        ))
    })
}

/// The volume's key as it is sealed to a recipient.
pub(crate) fn sealed_for(volume: &Volume, recipient: &str) -> Result<SealedKey, Failure> {
    let sealed = volume.sealed_for(recipient);
    sealed_or(volume, "key", sealed, &volume.sealed_keys, recipient)
}

/// The previous key of a re-key, sealed to a recipient.
pub(crate) fn previous_sealed_for(volume: &Volume, recipient: &str) -> Result<SealedKey, Failure> {
    let sealed = volume.previous_sealed_for(recipient);
    let all = volume.rekey.as_ref().map(|rekey| &rekey.previous_keys[..]);
    let all = all.unwrap_or_default();
    sealed_or(volume, "previous key", sealed, all, recipient)
}

fn sealed_or(
    volume: &Volume,
    what: &str,
    sealed: Option<&SealedKeyEntry>,
    all: &[SealedKeyEntry],
    recipient: &str,
) -> Result<SealedKey, Failure> {
    let entry = sealed.ok_or_else(|| {
        let names = all.iter().map(|e| e.recipient.as_str());
        Failure::new(format!(
            "the {what} of volume {:?} is not sealed to {recipient:?}, only to: {}",
            volume.name,
            names.collect::<Vec<_>>().join(", ")
        ))
    })?;
    Ok(SealedKey {
        recipient: entry.recipient.clone(),
        fingerprint: entry.fingerprint.clone(),
        enc: entry.enc.clone(),
        ciphertext: entry.ciphertext.clone(),
    })
}

/// A part of a volume under one key, as a device of dm-crypt.
struct Mapping {
    /// First byte.
    from: u64,
    /// Byte behind the last.
    to: u64,
    /// What follows the volume's name in that of the device; nothing for the whole volume.
    suffix: &'static str,
}

impl Mapping {
    /// The line that opens it with dm-crypt: the same cipher, tweak and data unit, and no byte
    /// beyond it.
    fn cryptsetup_line(&self, volume: &Volume, device: &str, key_file: &Path) -> String {
        let mut line = format!(
            "cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 \
             --key-file {} --keyfile-size {XTS_KEY_BYTES}",
            quoted(key_file)
        );
        if volume.data_unit_bytes == Some(4096) {
            line.push_str(" --sector-size 4096 --iv-large-sectors");
        }
        if self.from > 0 {
            // Where it lies, and with which number its data units begin.
            let sector = self.from / SECTOR_BYTES;
            line.push_str(&format!(" --offset {sector} --skip {sector}"));
        }
        line.push_str(&format!(" --size {}", (self.to - self.from) / SECTOR_BYTES));
        if !self.suffix.is_empty() {
            line.push_str(" --shared"); // with the mapping of the other part
        }
        if volume.read_only {
            line.push_str(" --readonly");
        }
        let name = format!("bulkhead-{}{}", volume.name, self.suffix);
        line.push_str(&format!(" {device} {}", shell_quoted(&name)));
        line
    }
}

/// The path as an argument that can't be taken for an option.
fn device_argument(path: &str) -> String {
    if path.starts_with('-') {
        return format!("./{path}");
    }
    path.to_owned()
}
