//! What lies in a guest's root: a static busybox, modules, programs of this machine with the libraries
//! they need, and the script.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::boot::Boot;
use super::cpio::Archive;
use super::{GuestError, GuestSpec, nic};
use crate::processes::installed;

/// The last line of a guest's console.
pub const END: &str = "guest-script-ended=0";
/// Modules of virtio disks.
const DISK_MODULES: &[&str] = &["virtio_pci", "virtio_blk"];

/// The archive of a guest's initial ram disk.
///
/// # Errors
/// See [`GuestError`].
pub fn build(boot: &Boot, spec: &GuestSpec<'_>) -> Result<Vec<u8>, GuestError> {
    let mut archive = Archive::default();
    for folder in [
        "bin", "sbin", "dev", "proc", "sys", "tmp", "mnt", "run", "etc", "lib", "lib64", "usr",
        "usr/lib", "modules",
    ] {
        archive.folder(folder);
    }
    let busybox = program("busybox")?;
    archive.file("bin/busybox", &fs::read(busybox)?);
    archive.link("bin/sh", "busybox");
    let mut names: Vec<&str> = DISK_MODULES.iter().chain(spec.modules).copied().collect();
    if !spec.machine.nics.is_empty() {
        names.extend(nic::MODULES);
    }
    let mut load = String::new();
    for path in boot.with_dependencies(&names)? {
        let name = file_name(&path);
        archive.file(&format!("modules/{name}"), &fs::read(&path)?);
        load.push_str(&format!("insmod /modules/{name}\n"));
    }
    add_programs(&mut archive, spec.programs)?;
    for (path, contents) in spec.files {
        archive.file(path.trim_start_matches('/'), contents);
    }
    archive.file("script", script(spec.script).as_bytes());
    archive.file("init", init(&load).as_bytes());
    Ok(archive.finish())
}

/// The first process.
fn init(load: &str) -> String {
    format!(
        "#!/bin/sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin:/sbin\n\
         mount -t proc none /proc\n\
         mount -t sysfs none /sys\n\
         mount -t devtmpfs none /dev\n\
         mount -t tmpfs none /tmp\n\
         mount -t tmpfs none /run\n\
         {load}\
         sh /script\n\
         echo guest-script-ended=$?\n\
         sync\n\
         poweroff -f\n"
    )
}

/// A line that fails ends the script, and says which.
fn script(lines: &str) -> String {
    format!("set -e\nset -o pipefail\n{lines}\n")
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn program(name: &str) -> io::Result<PathBuf> {
    let sbin = ["/sbin", "/usr/sbin"].map(|dir| Path::new(dir).join(name));
    installed(name)
        .or_else(|| sbin.into_iter().find(|path| path.is_file()))
        .ok_or_else(|| io::Error::other(format!("{name} is not installed")))
}

fn add_programs(archive: &mut Archive, names: &[&str]) -> io::Result<()> {
    let mut libraries = BTreeSet::new();
    for name in names {
        let path = program(name)?;
        archive.file(&format!("sbin/{name}"), &fs::read(&path)?);
        libraries.extend(libraries_of(&path)?);
    }
    let mut folders = BTreeSet::new();
    for library in libraries {
        let mut parents: Vec<_> = library.ancestors().skip(1).collect();
        parents.reverse();
        for folder in parents {
            let folder = inside(folder);
            if !folder.is_empty() && folders.insert(folder.clone()) {
                archive.folder(&folder);
            }
        }
        archive.file(&inside(&library), &fs::read(&library)?);
    }
    Ok(())
}

fn inside(path: &Path) -> String {
    path.display()
        .to_string()
        .trim_start_matches('/')
        .to_owned()
}

/// The loader and libraries that a program is loaded with.
fn libraries_of(path: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .filter(|library| library.is_file())
        .collect())
}
