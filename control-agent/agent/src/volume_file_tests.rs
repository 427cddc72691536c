//! Tests of opening volumes that need no agent: what is opened and how. The refusals, by name, are
//! in `tests/agent/refused.rs`.

use std::fs;
use std::os::unix::fs::symlink;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::*;
use crate::examples;

fn volume(path: &str, size_bytes: u64) -> Volume {
    Volume {
        path: path.to_owned(),
        size_bytes,
        ..examples::volume(1)
    }
}

fn directories(dir: &tempfile::TempDir) -> VolumeDirectories {
    VolumeDirectories::open(&[dir.path().to_owned()]).expect("open")
}

#[test]
fn the_data_plane_gets_a_blocking_descriptor_of_the_right_access() {
    let dir = tempfile::tempdir().expect("dir");
    fs::write(dir.path().join("f"), [0; 1024]).expect("write");
    for read_only in [false, true] {
        let mut volume = volume("f", 1024);
        volume.read_only = read_only;
        let file = directories(&dir).open_volume(&volume).expect("opened");
        let descriptor = file.into_descriptor();
        let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL).expect("flags"));
        let access = if read_only {
            OFlag::O_RDONLY
        } else {
            OFlag::O_RDWR
        };
        assert_eq!(flags & OFlag::O_ACCMODE, access);
        assert!(!flags.contains(OFlag::O_NONBLOCK));
    }
}

#[test]
fn a_walk_never_leaves_the_directory() {
    // Bundles with such paths don't validate; the kernel would not take them either.
    let dir = tempfile::tempdir().expect("dir");
    fs::create_dir(dir.path().join("volumes")).expect("mkdir");
    fs::write(dir.path().join("secret"), [0; 512]).expect("write");
    symlink("../secret", dir.path().join("volumes/link")).expect("link");
    let directories = VolumeDirectories::open(&[dir.path().join("volumes")]).expect("open");
    let open = |path: &str| directories.open_volume(&volume(path, 512));
    assert!(matches!(
        open("../secret"),
        Err(VolumeFileError::Escapes(_))
    ));
    assert!(matches!(
        open("link"),
        Err(VolumeFileError::SymbolicLink(_))
    ));
    let climbing = format!("{}/volumes/../secret", dir.path().display());
    assert!(matches!(open(&climbing), Err(VolumeFileError::Escapes(_))));
}

#[test]
fn a_directory_has_to_be_absolute_and_there() {
    for path in ["volumes", "/nonexistent/volumes", "/etc/passwd"] {
        let error = VolumeDirectories::open(&[PathBuf::from(path)]).expect_err("refused");
        assert!(error.to_string().contains(path), "{error}");
    }
}
