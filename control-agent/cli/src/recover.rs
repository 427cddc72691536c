//! A volume's key without any Bulkhead running: from what the bundle carries and the recovery
//! key, for the kernel's own dm-crypt.

use std::path::Path;

use bulkhead_bundle::{Volume, private_file};
use bulkhead_protocol::keys::XTS_KEY_BYTES;
use bulkhead_sealing::{RecipientKey, SealedKey, unseal};

use crate::arguments::VolumeRecover;
use crate::failure::Failure;
use crate::output::{self, shell_quoted};
use crate::show::Shown;
use crate::volume::{context_of, key_in, key_memory};

/// Bytes of a sector, the unit of cryptsetup's `--size`.
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
    output::must_be_new(&arguments.out)?;
    let recovery = RecipientKey::load(&arguments.recovery)?;
    let sealed = sealed_for(volume, &recovery.public().name)?;
    let mut memory = key_memory()?;
    let key = key_in(&mut memory)?;
    unseal(&sealed, &recovery, &context, key)?;
    private_file::create(&arguments.out, key)?;
    let key_file = arguments
        .out
        .canonicalize()
        .map_err(|e| Failure::at(&arguments.out, e))?;
    println!("{}", cryptsetup_line(volume, &key_file));
    if !volume.path.starts_with('/') {
        eprintln!(
            "bulkhead: note: {} is relative to the host's --volume-dir: run the line from there",
            volume.path
        );
    }
    eprintln!(
        "bulkhead: note: wipe the key when you are done: shred -u {}",
        shell_quoted(&key_file.display().to_string())
    );
    Ok(())
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
    let entry = volume.sealed_for(recipient).ok_or_else(|| {
        let names = volume.sealed_keys.iter().map(|e| e.recipient.as_str());
        Failure::new(format!(
            "the key of volume {:?} is not sealed to {recipient:?}, only to: {}",
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

/// The line that opens the volume with dm-crypt: the same cipher, tweak and data unit, and no byte
/// beyond the volume.
fn cryptsetup_line(volume: &Volume, key_file: &Path) -> String {
    let mut line = format!(
        "cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 \
         --key-file {} --keyfile-size {XTS_KEY_BYTES}",
        shell_quoted(&key_file.display().to_string())
    );
    if volume.data_unit_bytes == Some(4096) {
        line.push_str(" --sector-size 4096 --iv-large-sectors");
    }
    line.push_str(&format!(" --size {}", volume.size_bytes / SECTOR_BYTES));
    if volume.read_only {
        line.push_str(" --readonly");
    }
    line.push_str(&format!(
        " {} {}",
        shell_quoted(&device_argument(&volume.path)),
        shell_quoted(&format!("bulkhead-{}", volume.name))
    ));
    line
}

/// The path as an argument that can't be taken for an option.
fn device_argument(path: &str) -> String {
    if path.starts_with('-') {
        return format!("./{path}");
    }
    path.to_owned()
}
