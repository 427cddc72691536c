//! An interrupted re-key without us: the lines that `bulkhead volume recover` prints for it give, with real
//! dm-crypt in a guest, one disk that holds the bytes that were written.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;

use bulkhead_bundle::source;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey, key_check};
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::host::{Host, HostError, VolumeSpec};
use bulkhead_integration::random::stamp;
use bulkhead_protocol::rekey::{Record, Stage, Zone, journal_digest, layout};

use crate::support::{Outcome, boot, ensure, folder};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_rekey_interrupted_opens_with_dmcrypt_512",
        needs: &[Need::Guest],
        run: || opens_with_dmcrypt(512),
    },
    Test {
        name: "system_rekey_interrupted_opens_with_dmcrypt_4096",
        needs: &[Need::Guest],
        run: || opens_with_dmcrypt(4096),
    },
];

const MIB: usize = 1 << 20;
const SEED: u64 = 77;

/// Makes the re-key of `disk.toml` while the volume is in use: `rekeyed.toml`, and `finished.toml` for
/// when it is done.
pub fn begin(host: &Host, file_of: &Host, also: &str) -> Outcome {
    let image = file_of.image("disk").display().to_string();
    let mut make = vec![
        "volume",
        "rekey",
        "--volume",
        "disk.toml",
        "--host",
        "state/host.pub",
        "--recovery",
        "keys/recovery.key.pub",
        "--file",
        &image,
        "--out",
        "rekeyed.toml",
    ];
    if also != "state/host.pub" {
        make.extend(["--host", also]);
    }
    host.cli(&make)?;
    host.cli(&[
        "volume",
        "rekey",
        "--finish",
        "--volume",
        "rekeyed.toml",
        "--out",
        "finished.toml",
    ])?;
    Ok(())
}

/// What the command line prints for an interrupted re-key gives one disk with the right bytes. A crash
/// came in the middle of a piece: what is in its place is neither the old nor the new.
fn opens_with_dmcrypt(data_unit: u32) -> Outcome {
    let dir = folder()?;
    let host = Host::create(dir.path())?;
    host.create_volume(&VolumeSpec::new("disk", "8MiB", data_unit))?;
    let mut bytes = vec![0; 8 * MIB];
    stamp(&mut bytes, 0, SEED);
    begin(&host, &host, "state/host.pub")?;
    interrupted(&host, data_unit, &bytes)?;
    let image = host.image("disk").display().to_string();
    let lines = recover(&host, "rekeyed.toml", "disk.key", &["--file", &image])?;
    ensure(
        lines.contains("conv=notrunc") && lines.contains("dmsetup create"),
        || lines.clone(),
    )?;
    let key_path = fs::canonicalize(host.path("disk.key"))?
        .display()
        .to_string();
    let image = fs::canonicalize(host.image("disk"))?.display().to_string();
    // The guest has no udev to make the node.
    let script = format!(
        "{}\ndmsetup mknodes\ncmp /dev/mapper/bulkhead-disk /expected\necho the-bytes-are-the-same=yes\n",
        lines.replace(&key_path, "/key").replace(&image, "/dev/vda")
    );
    let read = |name: &str| fs::read(host.path(name));
    let files = [
        ("key", read("disk.key")?),
        ("key.previous", read("disk.key.previous")?),
        ("expected", bytes),
    ];
    let spec = GuestSpec {
        dir: dir.path(),
        disks: &[GuestDisk::Raw(host.image("disk"))],
        script: &script,
        programs: &["cryptsetup", "dmsetup"],
        files: &files,
        modules: &["dm_mod", "dm_crypt", "xts", "aesni_intel"],
        uid: None,
        machine: Machine::default(),
    };
    let mut guest = Guest::start(&boot()?, &spec)?;
    let console = guest.finish(BOOT_PATIENCE)?;
    ensure(console.contains("the-bytes-are-the-same=yes"), || {
        format!("dm-crypt showed other bytes:\n{lines}\n{console}")
    })
}

/// Writes these bytes and the record as a data plane leaves them that is killed while it writes a piece.
fn interrupted(host: &Host, data_unit: u32, bytes: &[u8]) -> Outcome {
    let volume = source::load_stanza(&host.path("rekeyed.toml"))?.remove(0);
    let rekey = volume.rekey.ok_or("no re-key")?.id;
    let unit = DataUnit::new(data_unit).ok_or("no such data unit")?;
    let places = layout(volume.size_bytes).ok_or("no layout")?;
    let arena = SecretArena::new(2)?;
    let key = |stanza: &str| -> Result<XtsKey, Box<dyn std::error::Error>> {
        let out = format!("{stanza}.key");
        recover(host, stanza, &out, &[])?;
        let key: [u8; 64] = fs::read(host.path(&out))?.as_slice().try_into()?;
        Ok(XtsKey::new(&arena, &key)?)
    };
    let (new, old) = (key("finished.toml")?, key("disk.toml")?);
    let (frontier, length) = (3 * MIB + 4096, MIB - 8192);
    let encrypt = |key: &XtsKey, from: usize, to: usize| {
        let mut out = vec![0; to - from];
        let first = from as u64 / u64::from(unit.bytes());
        key.encrypt(unit, first, &bytes[from..to], &mut out)
            .map(|()| out)
    };
    let file = OpenOptions::new().write(true).open(host.image("disk"))?;
    file.write_all_at(&encrypt(&new, 0, frontier)?, 0)?;
    file.write_all_at(&encrypt(&old, frontier, bytes.len())?, frontier as u64)?;
    let journal = encrypt(&new, frontier, frontier + length)?;
    file.write_all_at(&journal, places.journal)?;
    file.write_all_at(&journal[..length / 2], frontier as u64)?;
    file.write_all_at(&[0x5a; 512], (frontier + length / 2) as u64)?;
    let record = Record {
        volume: volume.id,
        rekey,
        size_bytes: volume.size_bytes,
        data_unit_bytes: data_unit,
        sequence: 40,
        stage: Stage::Running {
            frontier_bytes: frontier as u64,
            zone: Some(Zone {
                bytes: length as u64,
                journal_sha256: journal_digest(&journal),
            }),
            previous_check: key_check(&old, &rekey.0)?,
            check: key_check(&new, &rekey.0)?,
        },
    };
    file.write_all_at(&record.encode(), places.copy_for(record.sequence))?;
    Ok(())
}

fn recover(host: &Host, stanza: &str, out: &str, more: &[&str]) -> Result<String, HostError> {
    let mut arguments = vec!["volume", "recover", "--bundle", stanza, "--volume", "disk"];
    arguments.extend(["--recovery", "keys/recovery.key", "--out", out]);
    arguments.extend(more);
    host.cli(&arguments)
}
