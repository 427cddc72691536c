//! Kernel and modules: Debian's cloud kernel package, downloaded but never installed, its kernel
//! unpacked to the ELF that QEMU boots directly (PVH), kept in a cache folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The package that always depends on the newest kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A step failed.
    #[error("the guest's kernel can't be had ({step}): {problem}")]
    Step {
        /// Which.
        step: &'static str,
        /// What happened.
        problem: String,
    },
    /// A file.
    #[error("the guest's kernel: {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A module that the kernel does not have.
    #[error("the guest's kernel has no module {0}")]
    NoModule(String),
}

/// What a guest boots from.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The kernel as an ELF file.
    pub kernel: PathBuf,
    /// Where its modules lie: `kernel/` and below.
    pub modules: PathBuf,
}

fn failed(step: &'static str) -> impl Fn(String) -> BootError {
    move |problem| BootError::Step { step, problem }
}

fn io_failed(path: &Path) -> impl FnOnce(io::Error) -> BootError {
    let path = path.to_owned();
    move |source| BootError::Io { path, source }
}

impl Boot {
    /// The kernel from the cache, or unpacked into it from the package mirror.
    ///
    /// # Errors
    /// See [`BootError`].
    pub fn prepare(cache: &Path) -> Result<Self, BootError> {
        let kernel = cache.join("vmlinux");
        let root = cache.join("package");
        if !kernel.is_file() {
            let _ = fs::remove_dir_all(cache);
            fs::create_dir_all(cache).map_err(io_failed(cache))?;
            let package = download(cache)?;
            unpack(&package, &root)?;
            let image = only_file(&root.join("boot"), "vmlinuz-")?;
            let elf = extract(&image)?;
            let partial = cache.join("vmlinux.partial");
            fs::write(&partial, elf).map_err(io_failed(&partial))?;
            fs::rename(&partial, &kernel).map_err(io_failed(&kernel))?;
        }
        let modules = only_file(&root.join("lib/modules"), "")?;
        Ok(Self { kernel, modules })
    }

    /// The file of a module.
    ///
    /// # Errors
    /// [`BootError::NoModule`].
    pub fn module(&self, name: &str) -> Result<PathBuf, BootError> {
        let wanted = [
            format!("{name}.ko"),
            format!("{}.ko", name.replace('_', "-")),
        ];
        find(&self.modules, &wanted).ok_or_else(|| BootError::NoModule(name.to_owned()))
    }

    /// Modules with everything they need before them, each once.
    ///
    /// # Errors
    /// [`BootError::NoModule`].
    pub fn with_dependencies(&self, names: &[&str]) -> Result<Vec<PathBuf>, BootError> {
        let mut out = Vec::new();
        for name in names {
            self.add(name, &mut out)?;
        }
        Ok(out)
    }

    fn add(&self, name: &str, out: &mut Vec<PathBuf>) -> Result<(), BootError> {
        let path = self.module(name)?;
        if out.contains(&path) {
            return Ok(());
        }
        let bytes = fs::read(&path).map_err(io_failed(&path))?;
        for needed in dependencies(&bytes) {
            self.add(&needed, out)?;
        }
        out.push(path);
        Ok(())
    }
}

/// What a module's `.modinfo` says it needs.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next();
    String::from_utf8_lossy(value.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

fn find(folder: &Path, names: &[String]) -> Option<PathBuf> {
    for entry in fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, names) {
                return Some(found);
            }
        } else if names.iter().any(|n| entry.file_name() == n.as_str()) {
            return Some(path);
        }
    }
    None
}

/// The one entry of a folder that begins so.
fn only_file(folder: &Path, start: &str) -> Result<PathBuf, BootError> {
    let entries = fs::read_dir(folder).map_err(io_failed(folder))?;
    entries
        .flatten()
        .find(|e| e.file_name().to_string_lossy().starts_with(start))
        .map(|e| e.path())
        .ok_or_else(|| failed("look into the package")(format!("{}", folder.display())))
}

fn run(step: &'static str, command: &mut Command) -> Result<Vec<u8>, BootError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(step)(e.to_string()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(failed(step)(text));
    }
    Ok(output.stdout)
}

fn download(cache: &Path) -> Result<PathBuf, BootError> {
    let depends = run(
        "find the kernel's package",
        Command::new("apt-cache").args(["depends", META_PACKAGE]),
    )?;
    let depends = String::from_utf8_lossy(&depends).into_owned();
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .ok_or_else(|| {
            failed("find the kernel's package")(format!("apt-cache knows no {META_PACKAGE}"))
        })?;
    run(
        "download the kernel's package",
        Command::new("apt-get")
            .args(["download", "-q", package])
            .current_dir(cache),
    )?;
    only_file(cache, package)
}

fn unpack(package: &Path, root: &Path) -> Result<(), BootError> {
    let step = "unpack the kernel's package";
    run(
        step,
        Command::new("dpkg-deb").arg("-x").arg(package).arg(root),
    )
    .map(drop)?;
    fs::remove_file(package).map_err(io_failed(package))
}

/// The ELF inside a bzImage (`Documentation/x86/boot.rst`): its payload, decompressed.
fn extract(image: &Path) -> Result<Vec<u8>, BootError> {
    let step = failed("unpack the kernel");
    let bytes = fs::read(image).map_err(io_failed(image))?;
    let word = |at: usize| -> Option<usize> {
        let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let short = || step("its header is cut short".to_owned());
    let setup = usize::from(*bytes.get(0x1f1).ok_or_else(short)?);
    let start = (setup + 1) * 512 + word(0x248).ok_or_else(short)?;
    let length = word(0x24c).ok_or_else(short)?;
    // The last four bytes are the length once decompressed.
    let payload = bytes.get(start..start + length - 4).ok_or_else(short)?;
    let program = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => ["lz4", "-dc"],
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => ["xz", "-dc"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ["zstd", "-dc"],
        [0x1f, 0x8b, ..] => ["gzip", "-dc"],
        _ => return Err(step("its compression is not known".to_owned())),
    };
    let packed = image.with_extension("payload");
    fs::write(&packed, payload).map_err(io_failed(&packed))?;
    let elf = run(
        "unpack the kernel",
        Command::new(program[0]).arg(program[1]).arg(&packed),
    )?;
    if !elf.starts_with(b"\x7fELF") {
        return Err(step(format!("{} gave something else", program[0])));
    }
    Ok(elf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_off_a_module() {
        let module = b"junk\0license=GPL\0depends=virtio,virtio_ring\0name=x\0";
        assert_eq!(dependencies(module), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
