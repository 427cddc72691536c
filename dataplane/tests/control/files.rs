//! Which files and devices the data plane takes as a volume's.

use std::fs::{File, OpenOptions};

use super::harness::{Host, VOLUME_BYTES, features};
use super::refused;

#[test]
fn a_file_that_can_not_be_the_volume_is_refused() {
    let mut host = Host::start();
    host.served(2);
    host.granted(1);
    host.listen(1);
    let short = host.file_of(1, VOLUME_BYTES - 4096);
    refused(host.attach_on(1, 1, &short), "its file has 1044480 bytes");
    let path = host.dir.path().join("file-1");
    let read_only = File::open(&path).expect("open");
    refused(host.attach_on(1, 1, &read_only), "not opened for writing");
    let append = OpenOptions::new().read(true).append(true).open(&path);
    refused(host.attach_on(1, 1, &append.expect("open")), "at its end");
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    refused(
        host.attach_on(1, 1, &null.expect("open")),
        "neither a regular file",
    );
    let directory = File::open(host.dir.path()).expect("open");
    refused(host.attach_on(1, 1, &directory), "neither a regular file");
    assert_eq!(host.attach(1), Ok(()), "nothing of it stuck");
}

/// A memfd lies on tmpfs, which does not say how direct I/O is to be aligned.
#[test]
fn a_file_whose_alignment_the_kernel_does_not_tell_is_tried() {
    let mut host = Host::start();
    host.granted(1);
    host.listen(1);
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file: File = nix::sys::memfd::memfd_create("volume", flags)
        .expect("memfd")
        .into();
    file.set_len(VOLUME_BYTES).expect("length");
    assert_eq!(host.attach_on(1, 1, &file), Ok(()));
    assert!(features(&mut host.frontend(1)).is_some());
}

#[test]
fn a_block_device_is_served() {
    let mut host = Host::start();
    drop(host.file(1));
    let Some(device) = LoopDevice::over(&host.dir.path().join("file-1")) else {
        println!("skipped: a_block_device_is_served: no loop device can be set up here");
        return;
    };
    let both = OpenOptions::new().read(true).write(true).clone();
    let file = both.open(&device.path).expect("open");
    host.granted(1);
    host.listen(1);
    assert_eq!(host.attach_on(1, 1, &file), Ok(()));
    assert!(features(&mut host.frontend(1)).is_some());
    // Another node of the same device is the same volume.
    host.granted(2);
    host.listen(2);
    let again = both.open(&device.path).expect("open");
    refused(host.attach_on(2, 2, &again), "its file is that of volume");
    drop((file, again, host));
}

/// A loop device over a file; taken down when it drops.
struct LoopDevice {
    path: String,
}

impl LoopDevice {
    fn over(file: &std::path::Path) -> Option<Self> {
        let mut setup = std::process::Command::new("losetup");
        let output = setup.args(["--find", "--show"]).arg(file).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !path.is_empty()).then_some(Self { path })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let mut down = std::process::Command::new("losetup");
        let _ = down.args(["--detach", &self.path]).status();
    }
}
