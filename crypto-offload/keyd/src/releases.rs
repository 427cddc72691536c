//! Which release of each program ran last, in a file of keyd's directory (`docs/formats/keyd-state.md`):
//! nothing older is approved.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;

use bulkhead_bundle::digest_of;
use bulkhead_bundle::text::{from_hex, to_hex};
use bulkhead_protocol::release::{Component, Release};

use crate::directory::Directory;

const NAME: &str = "releases";
const ASIDE: &str = "releases.new";
const KIND: &str = "bulkhead keyd releases v1";
/// Longest file in bytes; one line for each program takes less than 1 KiB.
const MAX_BYTES: usize = 4096;

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ReleasesError {
    /// It can't be read.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// It is not what keyd wrote.
    #[error(
        "{0} is damaged: keyd does not start without knowing which releases ran. Restore the whole \
         directory from a backup; without the file older releases would be approved again"
    )]
    Damaged(PathBuf),
}

/// The release of each program that ran last, of those that the host was upgraded to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Releases {
    last: BTreeMap<Component, Release>,
}

impl Releases {
    /// Reads what is kept; no file means that nothing was ever upgraded.
    ///
    /// # Errors
    /// See [`ReleasesError`].
    pub(crate) fn read(directory: &Directory) -> Result<Self, ReleasesError> {
        let path = directory.path(NAME);
        let bytes = match directory.read(NAME, MAX_BYTES) {
            Ok(None) => return Ok(Self::default()),
            Ok(Some(bytes)) => bytes,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(ReleasesError::Damaged(path));
            }
            Err(source) => return Err(ReleasesError::Io { path, source }),
        };
        let text = std::str::from_utf8(&bytes).ok();
        text.and_then(Self::from_text)
            .ok_or(ReleasesError::Damaged(path))
    }

    /// May this release follow the one that ran last?
    ///
    /// # Errors
    /// Why not, for the operator.
    pub(crate) fn check(&self, release: &Release) -> Result<(), String> {
        let Some(last) = self.last.get(&release.component) else {
            return Ok(());
        };
        let (component, version) = (release.component, release.version);
        if version < last.version {
            return Err(format!(
                "version {version} of {component} is older than {}, which ran here: sign the \
                 binary as a later version if it is to run again",
                last.version
            ));
        }
        if version == last.version && release.measurement != last.measurement {
            return Err(format!(
                "version {version} of {component} ran here with other bytes: give this binary a \
                 version of its own"
            ));
        }
        Ok(())
    }

    /// Keeps a release that runs, on disk before this returns. One that may not follow changes
    /// nothing.
    ///
    /// # Errors
    /// What the kernel says; then it counts all the same as long as this process lives.
    pub(crate) fn keep(&mut self, directory: &Directory, release: Release) -> io::Result<()> {
        if self.check(&release).is_err() || self.last.get(&release.component) == Some(&release) {
            return Ok(());
        }
        self.last.insert(release.component, release);
        directory.write(ASIDE, self.to_text().as_bytes())?;
        directory.rename(ASIDE, NAME)?;
        directory.sync()
    }

    fn to_text(&self) -> String {
        let mut out = format!("{KIND}\n");
        // Writing to a String can't fail.
        for release in self.last.values() {
            let (component, version) = (release.component, release.version);
            let sha384 = to_hex(&release.measurement[..]);
            let _ = writeln!(out, "release {component} {version} {sha384}");
        }
        let checksum = to_hex(&digest_of(out.as_bytes()));
        let _ = writeln!(out, "sha384 {checksum}");
        out
    }

    fn from_text(given: &str) -> Option<Self> {
        let mut releases = Self::default();
        for line in given.lines() {
            let Some(line) = line.strip_prefix("release ") else {
                continue;
            };
            let mut words = line.split(' ');
            let component = Component::named(words.next()?)?;
            let version = words.next()?.parse().ok()?;
            let measurement: [u8; 48] = from_hex(words.next()?)?.try_into().ok()?;
            let release = Release {
                component,
                version,
                measurement: measurement.into(),
            };
            releases.last.insert(component, release);
        }
        // One content has one text, and the checksum is part of it.
        (releases.to_text() == given).then_some(releases)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(component: Component, version: u64, byte: u8) -> Release {
        Release {
            component,
            version,
            measurement: [byte; 48].into(),
        }
    }

    #[test]
    fn what_runs_is_kept_and_nothing_older_follows() {
        let dir = tempfile::tempdir().expect("dir");
        let directory = Directory::open(dir.path()).expect("open");
        let mut releases = Releases::read(&directory).expect("none yet");
        let seven = release(Component::Dataplane, 7, 1);
        assert_eq!(releases.check(&seven), Ok(()));
        releases.keep(&directory, seven).expect("kept");
        releases
            .keep(&directory, release(Component::Keyd, 2, 9))
            .expect("kept");
        let mut read = Releases::read(&directory).expect("read");
        assert_eq!(read, releases);
        assert_eq!(read.check(&seven), Ok(()), "the same again");
        assert_eq!(read.check(&release(Component::Dataplane, 8, 2)), Ok(()));
        let older = release(Component::Dataplane, 6, 1);
        assert!(
            read.check(&older)
                .expect_err("older")
                .contains("older than 7")
        );
        let other = release(Component::Dataplane, 7, 2);
        assert!(
            read.check(&other)
                .expect_err("other")
                .contains("other bytes")
        );
        // Each program has its own.
        assert_eq!(read.check(&release(Component::Keyd, 2, 9)), Ok(()));
        assert!(read.check(&release(Component::Keyd, 1, 9)).is_err());
        // Even if rot says so.
        read.keep(&directory, older).expect("nothing to do");
        assert_eq!(Releases::read(&directory).expect("read"), releases);
    }

    #[test]
    fn what_can_not_be_kept_counts_while_keyd_lives() {
        let dir = tempfile::tempdir().expect("dir");
        let directory = Directory::open(dir.path()).expect("open");
        let mut releases = Releases::default();
        std::fs::create_dir(dir.path().join(ASIDE)).expect("in the way");
        let seven = release(Component::Rot, 7, 1);
        assert!(releases.keep(&directory, seven).is_err());
        assert!(releases.check(&release(Component::Rot, 6, 1)).is_err());
    }

    #[test]
    fn a_file_that_is_not_whole_is_not_taken_for_none() {
        let dir = tempfile::tempdir().expect("dir");
        let directory = Directory::open(dir.path()).expect("open");
        let mut releases = Releases::default();
        releases
            .keep(&directory, release(Component::Agent, 3, 5))
            .expect("kept");
        let path = dir.path().join(NAME);
        let whole = std::fs::read(&path).expect("read");
        let mut odd = whole.clone();
        odd[KIND.len() + 16] ^= 1;
        let longer = [&whole[..], b"x"].concat();
        for bytes in [
            &whole[..whole.len() - 1],
            &whole[..20],
            b"",
            &odd,
            &longer,
            &[0xff; 5000],
        ] {
            std::fs::write(&path, bytes).expect("write");
            let read = Releases::read(&directory);
            assert!(matches!(read, Err(ReleasesError::Damaged(_))), "{read:?}");
        }
    }
}
