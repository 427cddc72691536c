//! Everything that a guest does with a disk, by split and packed rings, with one queue and four: random
//! requests against a model, discard and zeroes, a driver that comes and goes, growth without a reboot,
//! and a file system that is sound on the host, decrypted by `bulkhead volume export`.

use std::process::Command;
use std::time::Duration;

use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestDisk, GuestSpec, Machine};
use bulkhead_integration::host::{BundleSpec, Host, HostError, VolumeSpec};

use crate::support::{Outcome, boot, ensure, folder, guest_io};
use crate::{Need, Test};

/// The table.
pub const TESTS: &[Test] = &[
    Test {
        name: "system_whole_disk_split_1_queue",
        needs: &[Need::Guest],
        run: || whole_disk(false, 1),
    },
    Test {
        name: "system_whole_disk_split_4_queues",
        needs: &[Need::Guest],
        run: || whole_disk(false, 4),
    },
    Test {
        name: "system_whole_disk_packed_1_queue",
        needs: &[Need::Guest],
        run: || whole_disk(true, 1),
    },
    Test {
        name: "system_whole_disk_packed_4_queues",
        needs: &[Need::Guest],
        run: || whole_disk(true, 4),
    },
];

/// How long each part of a guest's work may take.
const WORK: Duration = Duration::from_secs(120);
/// Sizes of the volume in MiB: at first, and grown.
const SIZES: [u64; 2] = [24, 40];

fn whole_disk(packed: bool, queues: u16) -> Outcome {
    let dir = folder()?;
    let mut host = Host::create(dir.path())?;
    // Both data units, each with both ring formats.
    let data_unit = if queues == 1 { 512 } else { 4096 };
    let mut spec = VolumeSpec::new("disk", &format!("{}MiB", SIZES[0]), data_unit);
    spec.queues = queues;
    spec.more = vec!["--discard".to_owned(), "pass".to_owned()];
    host.create_volume(&spec)?;
    let envelope = host.sign(&BundleSpec::new(1, &["disk"]))?;
    host.start()?;
    host.apply(&envelope)?;
    let mut guest = start(&host, packed, queues)?;
    guest.wait_for("waits=growth", BOOT_PATIENCE + WORK)?;
    facts(&guest, packed, queues)?;
    in_use(&host)?;
    grow(&host)?;
    let console = guest.finish(WORK)?;
    ensure(console.contains("all-is-well=yes"), || {
        format!("{console}\n{}", host.log())
    })?;
    sound_on_the_host(&host, &guest)
}

fn start(host: &Host, packed: bool, queues: u16) -> Result<Guest, Box<dyn std::error::Error>> {
    let disks = [GuestDisk::VhostUser {
        socket: host.socket("disk"),
        queues,
        packed,
        platform: queues > 1,
    }];
    let script = script(queues);
    let spec = GuestSpec {
        dir: host.dir(),
        disks: &disks,
        script: &script,
        programs: &["mkfs.ext4", "blkdiscard"],
        files: &[guest_io()?],
        modules: &[],
        uid: None,
        machine: Machine {
            cpus: queues,
            ..Machine::default()
        },
    };
    Ok(Guest::start(&boot()?, &spec)?)
}

/// The guest's side. Each line that fails ends it.
fn script(queues: u16) -> String {
    let sectors = SIZES[1] << 11;
    let tail = (SIZES[1] - 8) << 20;
    format!(
        "disk=/sys/block/vda\n\
         driver=/sys/bus/virtio/drivers/virtio_blk\n\
         echo queues=$(ls $disk/mq | wc -l)\n\
         echo packed=$(cut -c35 $disk/device/features)\n\
         echo platform=$(cut -c34 $disk/device/features)\n\
         echo discard=$(cat $disk/queue/discard_max_bytes)\n\
         echo zeroes=$(cat $disk/queue/write_zeroes_max_bytes)\n\
         guest-io check /dev/vda {queues} 400\n\
         guest-io fill /dev/vda 0 8388608 1\n\
         /sbin/blkdiscard -o 2097152 -l 1048576 /dev/vda\n\
         /sbin/blkdiscard -z -o 4194304 -l 1048576 /dev/vda\n\
         sync\n\
         guest-io expect /dev/vda 0 2097152 1\n\
         guest-io zeroes /dev/vda 4194304 1048576\n\
         name=$(basename $(readlink $disk/device))\n\
         i=0\n\
         while [ $i -lt 100 ]; do\n\
             echo $name > $driver/unbind\n\
             echo $name > $driver/bind\n\
             until [ -b /dev/vda ]; do sleep 0.01; done\n\
             guest-io expect /dev/vda 0 65536 1\n\
             i=$((i+1))\n\
         done\n\
         guest-io zeroes /dev/vda 4194304 1048576\n\
         echo unbound-and-bound=$i\n\
         guest-io fill /dev/vda 0 1048576 3\n\
         echo waits=growth\n\
         until [ $(cat $disk/size) = {sectors} ]; do sleep 0.05; done\n\
         guest-io expect /dev/vda 0 1048576 3\n\
         guest-io fill /dev/vda {tail} 8388608 2\n\
         mkfs.ext4 -q -F /dev/vda\n\
         mount -t ext4 /dev/vda /mnt\n\
         mkdir /mnt/many\n\
         i=0; while [ $i -lt 200 ]; do echo $i > /mnt/many/$i; i=$((i+1)); done\n\
         dd if=/dev/urandom of=/mnt/full bs=65536 2>/dev/null || true\n\
         echo filled=$(($(stat -c %s /mnt/full) > 16777216))\n\
         rm /mnt/many/1*\n\
         fstrim /mnt\n\
         sync\n\
         echo full=$(sha256sum < /mnt/full | cut -c1-64)\n\
         umount /mnt\n\
         mount -t ext4 /dev/vda /mnt\n\
         echo again=$(sha256sum < /mnt/full | cut -c1-64)\n\
         umount /mnt\n\
         if dmesg | grep -i 'i/o error'; then false; fi\n\
         echo all-is-well=yes\n"
    )
}

/// What the guest sees of its disk.
fn facts(guest: &Guest, packed: bool, queues: u16) -> Outcome {
    let is = |name: &str, wanted: &str| -> Outcome {
        let value = guest.value(name);
        ensure(value.as_deref() == Some(wanted), || {
            format!("{name} is {value:?}, not {wanted}:\n{}", guest.console())
        })
    };
    is("queues", &queues.to_string())?;
    is("packed", if packed { "1" } else { "0" })?;
    is("platform", if queues > 1 { "1" } else { "0" })?;
    is("unbound-and-bound", "100")?;
    for name in ["discard", "zeroes"] {
        let bytes = guest.value(name).and_then(|v| v.parse::<u64>().ok());
        ensure(bytes.is_some_and(|bytes| bytes > 0), || {
            format!("the guest sees no {name}:\n{}", guest.console())
        })?;
    }
    Ok(())
}

/// While the guest runs, its volume is not read under it.
fn in_use(host: &Host) -> Outcome {
    match export(host, "disk.toml", "early") {
        Err(HostError::Command { reason, .. }) if reason.contains("is in use (locked)") => Ok(()),
        other => Err(format!("a volume in use was exported: {other:?}").into()),
    }
}

/// Through a signed configuration, with the frontend connected.
fn grow(host: &Host) -> Outcome {
    let image = host.image("disk").display().to_string();
    let size = format!("{}MiB", SIZES[1]);
    reseal(host, &size, &["--grow-file", &image])?;
    let envelope = host.sign(&BundleSpec::new(2, &["grown"]))?;
    let plan = host.cli(&["apply", &envelope, "--admin", "run/admin.sock", "--dry-run"])?;
    ensure(plan.contains("volume disk: grows from"), || plan)?;
    host.apply(&envelope)?;
    let status = host.status()?;
    let capacity = &status["volumes"][0]["state"]["capacity_bytes"];
    ensure(*capacity == SIZES[1] << 20, || status.to_string())
}

/// The stanza of the volume for another size, `grown.toml`.
pub fn reseal(host: &Host, size: &str, more: &[&str]) -> Result<String, HostError> {
    let mut arguments = vec![
        "volume",
        "reseal",
        "--volume",
        "disk.toml",
        "--recovery",
        "keys/recovery.key",
        "--host",
        "state/host.pub",
        "--size",
        size,
        "--out",
        "grown.toml",
    ];
    arguments.extend(more);
    host.cli(&arguments)
}

fn export(host: &Host, bundle: &str, out: &str) -> Result<String, HostError> {
    let image = host.image("disk").display().to_string();
    host.cli(&[
        "volume",
        "export",
        "--bundle",
        bundle,
        "--volume",
        "disk",
        "--recovery",
        "keys/recovery.key",
        "--file",
        &image,
        "--out",
        out,
    ])
}

/// The guest is off, the host still runs and has let go of the volume: decrypted, its file system is
/// sound, and the file that filled it is as the guest saw it.
fn sound_on_the_host(host: &Host, guest: &Guest) -> Outcome {
    export(host, "bundle-2.cose", "disk.raw")?;
    let run = |program: &str, arguments: &[&str]| -> Result<String, Box<dyn std::error::Error>> {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(host.dir())
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure(output.status.success(), || {
            format!("{program} {arguments:?}: {text}{errors}\n{}", host.log())
        })?;
        Ok(text)
    };
    run("e2fsck", &["-fn", "disk.raw"])?;
    run("debugfs", &["-R", "dump /full full", "disk.raw"])?;
    let sum = run("sha256sum", &["full"])?;
    let sum = sum.split_whitespace().next().map(str::to_owned);
    let (full, again) = (guest.value("full"), guest.value("again"));
    ensure(sum.is_some() && sum == full && full == again, || {
        format!("sums: {sum:?} on the host, {full:?} and {again:?} in the guest")
    })?;
    ensure(guest.value("filled").as_deref() == Some("1"), || {
        format!("the file system was not filled:\n{}", guest.console())
    })
}
