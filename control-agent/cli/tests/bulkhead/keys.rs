//! Key files: who can read them, and that none is ever overwritten.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::Folder;

#[test]
fn secret_files_are_private_and_public_ones_are_not() {
    let folder = Folder::with_keys();
    for secret in ["alice.key", "recovery.key", "state/keyd/host.key"] {
        assert_eq!(folder.mode(secret), 0o600, "{secret}");
    }
    assert_eq!(folder.mode("state/keyd"), 0o700);
    for public in [
        "alice.key.pub",
        "recovery.key.pub",
        "state/host.pub",
        "trust.toml",
    ] {
        assert_eq!(folder.mode(public) & 0o444, 0o444, "{public}");
    }
}

#[test]
fn a_hosts_key_belongs_to_keyd() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a_hosts_key_belongs_to_keyd needs root, to give files away");
        return;
    }
    let folder = Folder::new();
    let stdout = folder.ok("host init --name host-a --state-dir state --uid 4990");
    assert_eq!(
        stdout,
        folder.read("state/host.pub"),
        "prints what it writes"
    );
    for path in ["state/keyd", "state/keyd/host.key"] {
        let metadata = fs::metadata(folder.path(path)).expect(path);
        assert_eq!(metadata.uid(), 4990, "{path}");
    }
    let metadata = fs::metadata(folder.path("state")).expect("state");
    assert_eq!(metadata.uid(), 0, "the state directory stays ours");
}

#[test]
fn a_host_is_set_up_in_a_directory_that_is_there() {
    let folder = Folder::new();
    fs::create_dir_all(folder.path("state/keyd")).expect("directory");
    folder.ok("host init --name host-a --state-dir state");
    assert_eq!(folder.mode("state/keyd/host.key"), 0o600);
}

#[test]
fn no_key_is_overwritten() {
    let folder = Folder::with_keys();
    let before = folder.files();
    for line in [
        "operator new --name alice --out alice.key",
        "recovery new --out recovery.key",
        "host init --name host-a --state-dir state",
        "trust new --operator alice.key.pub --out trust.toml",
    ] {
        folder.refused(line, &["never overwritten", "move it away"]);
    }
    // The secret half is gone, the public half is still there: also then.
    fs::remove_file(folder.path("alice.key")).expect("remove");
    folder.refused(
        "operator new --name alice --out alice.key",
        &["alice.key.pub"],
    );
    assert!(!folder.exists("alice.key"));
    let mut after = folder.files();
    after.sort();
    let mut expected: Vec<_> = before
        .into_iter()
        .filter(|(path, _)| !path.ends_with("alice.key"))
        .collect();
    expected.sort();
    assert_eq!(after, expected);
}

#[test]
fn secret_keys_that_others_can_read_are_not_used() {
    let folder = Folder::with_keys();
    folder.write_bundle(&[]);
    fs::set_permissions(folder.path("alice.key"), fs::Permissions::from_mode(0o640))
        .expect("chmod");
    folder.refused(
        "sign --bundle bundle.toml --key alice.key --out b.cose",
        &["alice.key can be read by others (mode 0640)", "chmod 600"],
    );
    assert!(!folder.exists("b.cose"));
}

#[test]
fn names_are_checked_before_anything_is_made() {
    let folder = Folder::new();
    folder.refused("operator new --name a/b --out a.key", &["is not a name"]);
    folder.refused(
        "host init --name recovery --state-dir state",
        &["--name", "recovery recipient"],
    );
    folder.refused("host init --name a@b --state-dir state", &["is not a name"]);
    assert!(folder.files().is_empty());
    assert!(!folder.exists("state"));
}

#[test]
fn a_trust_root_is_consistent() {
    let folder = Folder::with_keys();
    folder.refused(
        "trust new --operator alice.key.pub --operator alice.key.pub --out t.toml",
        &["share a name or a key"],
    );
    folder.refused(
        "trust new --operator alice.key.pub --threshold 2 --out t.toml",
        &["threshold 2 is not between 1"],
    );
    folder.refused(
        "trust new --operator recovery.key.pub --out t.toml",
        &["kind", "operator public key"],
    );
    folder.refused(
        "trust new --operator nobody.pub --out t.toml",
        &["nobody.pub: No such file"],
    );
    assert!(!folder.exists("t.toml"));
}
