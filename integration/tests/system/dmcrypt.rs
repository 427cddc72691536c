//! An emergency without us: the volume's file opens with real dm-crypt in a guest, with the key and
//! the parameters that `bulkhead volume recover` gives, and holds the bytes that were written.

use bulkhead_integration::disk::{Disk, Options};
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::host::{BundleSpec, Host, VolumeSpec};
use bulkhead_integration::random::Random;

use crate::support::{Outcome, boot, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_dmcrypt_opens_512",
        needs: &[Need::Guest],
        run: || opens(512),
    },
    Test {
        name: "system_dmcrypt_opens_4096",
        needs: &[Need::Guest],
        run: || opens(4096),
    },
];

const VOLUME_BYTES: usize = 16 << 20;

fn opens(data_unit: u32) -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "16MiB", data_unit))?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    let bytes = Random::named("dmcrypt").bytes(VOLUME_BYTES);
    let mut disk = Disk::attach(&host.socket("disk"), &Options::default())?;
    for (sector, part) in (0..).step_by(2048).zip(bytes.chunks(1 << 20)) {
        disk.write(0, sector, part)?;
    }
    disk.flush(0)?;
    drop(disk);
    host.stop();
    let line = host.cli(&[
        "volume",
        "recover",
        "--bundle",
        &envelope,
        "--volume",
        "disk",
        "--recovery",
        "keys/recovery.key",
        "--out",
        "disk.key",
    ])?;
    let script = script(&line)?;
    let key = std::fs::read(host.path("disk.key"))?;
    let spec = GuestSpec {
        dir: dir.path(),
        disks: &[GuestDisk::Raw(host.image("disk"))],
        script: &script,
        programs: &["cryptsetup"],
        files: &[("key", key), ("expected", bytes)],
        modules: &["dm_mod", "dm_crypt", "xts", "aesni_intel"],
        uid: None,
        machine: Machine::default(),
    };
    let mut guest = Guest::start(&boot()?, &spec)?;
    let console = guest.finish(BOOT_PATIENCE)?;
    ensure(console.contains("the-bytes-are-the-same=yes"), || {
        format!("dm-crypt showed other bytes:\n{line}\n{console}")
    })
}

/// The printed line, with the guest's names for key file, device and mapping.
fn script(line: &str) -> Result<String, Box<dyn std::error::Error>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [options @ .., _device, _name] = words.as_slice() else {
        return Err(format!("not a cryptsetup line: {line}").into());
    };
    ensure(options.starts_with(&["cryptsetup", "open"]), || {
        line.to_owned()
    })?;
    let mut command = Vec::new();
    let mut is_key = false;
    for word in options {
        command.push(if is_key { "/key" } else { word });
        is_key = *word == "--key-file";
    }
    Ok(format!(
        "{} /dev/vda opened\n\
         cmp /dev/mapper/opened /expected\n\
         echo the-bytes-are-the-same=yes\n",
        command.join(" ")
    ))
}
