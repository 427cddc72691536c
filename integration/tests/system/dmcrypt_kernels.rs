//! Each way in which AES is done here, against the kernel's own: a guest's dm-crypt reads what each of them
//! wrote, and each of them reads what dm-crypt wrote, with both data units. One guest for all.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_crypto::xts::{KEY_BYTES, Kernel};
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::random::Random;

use crate::support::{Outcome, boot, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "system_dmcrypt_agrees_with_each_cipher_kernel",
    needs: &[Need::Guest],
    run: agrees,
}];

const DISK_BYTES: usize = 1 << 20;
const UNITS: [DataUnit; 2] = [DataUnit::B512, DataUnit::B4096];

/// A disk of the guest, in the guest's order.
struct Image {
    path: PathBuf,
    unit: DataUnit,
    /// Who wrote it; none: the guest will.
    writer: Option<Kernel>,
}

fn agrees() -> Outcome {
    let dir = folder()?;
    let mut random = Random::named("dm-crypt and kernels");
    let key: [u8; KEY_BYTES] = random.bytes(KEY_BYTES).try_into().expect("64 bytes");
    let plain = random.bytes(DISK_BYTES);
    let images = images(dir.path(), &key, &plain)?;
    let disks: Vec<GuestDisk> = images
        .iter()
        .map(|image| GuestDisk::Raw(image.path.clone()))
        .collect();
    let spec = GuestSpec {
        dir: dir.path(),
        disks: &disks,
        script: &script(&images),
        programs: &["cryptsetup"],
        files: &[("key", key.to_vec()), ("expected", plain.clone())],
        modules: &["dm_mod", "dm_crypt", "xts", "aesni_intel"],
        uid: None,
        machine: Machine::default(),
    };
    let mut guest = Guest::start(&boot()?, &spec)?;
    let console = guest.finish(BOOT_PATIENCE)?;
    for (number, image) in images.iter().enumerate() {
        let line = format!("disk-{number}-is-right");
        ensure(console.contains(&line), || {
            format!("{} of {:?}:\n{console}", line, describe(image))
        })?;
    }
    for image in images.iter().filter(|image| image.writer.is_none()) {
        let stored = fs::read(&image.path)?;
        ensure(stored != plain, || "dm-crypt wrote plaintext".to_owned())?;
        for kernel in Kernel::available() {
            let mut read = vec![0; DISK_BYTES];
            expand(&key, kernel)?.decrypt(image.unit, 0, &stored, &mut read)?;
            ensure(read == plain, || {
                format!(
                    "{kernel} read other bytes than dm-crypt wrote, {:?}",
                    image.unit
                )
            })?;
        }
    }
    Ok(())
}

fn expand(key: &[u8; KEY_BYTES], kernel: Kernel) -> Result<XtsKey, Box<dyn std::error::Error>> {
    Ok(XtsKey::with_kernel(&SecretArena::new(1)?, key, kernel)?)
}

/// One written by each kernel with each data unit, and one with each data unit for the guest to write.
fn images(
    dir: &Path,
    key: &[u8; KEY_BYTES],
    plain: &[u8],
) -> Result<Vec<Image>, Box<dyn std::error::Error>> {
    let mut images = Vec::new();
    for unit in UNITS {
        let writers = Kernel::available().into_iter().map(Some);
        for writer in writers.chain([None]) {
            let path = dir.join(format!("disk-{}.img", images.len()));
            let mut stored = vec![0; DISK_BYTES];
            if let Some(kernel) = writer {
                expand(key, kernel)?.encrypt(unit, 0, plain, &mut stored)?;
            }
            fs::write(&path, &stored)?;
            images.push(Image { path, unit, writer });
        }
    }
    Ok(images)
}

fn script(images: &[Image]) -> String {
    let mut script = String::new();
    for (number, (image, letter)) in images.iter().zip('a'..='z').enumerate() {
        let unit = match image.unit {
            DataUnit::B512 => "",
            _ => "--sector-size 4096 --iv-large-sectors",
        };
        let work = match image.writer {
            Some(_) => format!("cmp /dev/mapper/disk{number} /expected"),
            None => format!("cat /expected > /dev/mapper/disk{number}"),
        };
        script += &format!(
            "cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file /key {unit} /dev/vd{letter} disk{number}\n\
             {work} && sync && cryptsetup close disk{number} && echo disk-{number}-is-right\n"
        );
    }
    script
}

fn describe(image: &Image) -> String {
    let writer = image.writer.map_or("the guest", Kernel::name);
    format!(
        "data unit {} bytes, written by {writer}",
        image.unit.bytes()
    )
}
