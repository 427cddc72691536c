//! Recipients' key files: what is written, and every file that is refused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bulkhead_sealing::{RecipientKey, RecipientPublicKey};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A saved key and its file.
    fn key(&self) -> (RecipientKey, PathBuf) {
        let key = RecipientKey::generate("host-a").expect("key");
        let path = self.path("host.key");
        key.save(&path).expect("save");
        (key, path)
    }
}

/// The error of loading a secret key whose text was changed.
fn refusal(path: &Path, from: &str, to: &str) -> String {
    let text = fs::read_to_string(path).expect("read");
    assert!(text.contains(from), "{from:?} is not in {text}");
    fs::write(path, text.replacen(from, to, 1)).expect("write");
    let error = RecipientKey::load(path).expect_err("refused").to_string();
    fs::write(path, text).expect("restore");
    error
}

#[test]
fn both_files_round_trip() {
    let folder = Folder::new();
    let (key, path) = folder.key();
    let loaded = RecipientKey::load(&path).expect("load");
    assert_eq!(loaded.public(), key.public());
    let public_path = folder.path("host.pub");
    key.public().save(&public_path).expect("save");
    let public = RecipientPublicKey::load(&public_path).expect("load");
    assert_eq!(&public, key.public());
    assert_eq!(public.name, "host-a");
    assert_eq!(public.fingerprint(), key.public().fingerprint());
}

#[test]
fn a_secret_file_is_new_and_private() {
    let folder = Folder::new();
    let (key, path) = folder.key();
    let mode = fs::metadata(&path).expect("metadata").permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let before = fs::read(&path).expect("read");
    let error = key.save(&path).expect_err("refused").to_string();
    assert!(error.contains("never overwritten"), "{error}");
    assert_eq!(fs::read(&path).expect("read"), before);
}

#[test]
fn a_secret_file_that_others_can_read_is_refused() {
    let folder = Folder::new();
    let (_, path) = folder.key();
    for mode in [0o640, 0o604, 0o610, 0o602, 0o644] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        let error = RecipientKey::load(&path).expect_err("refused").to_string();
        assert!(error.contains("chmod 600"), "{mode:o}: {error}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).expect("chmod");
    assert!(RecipientKey::load(&path).is_ok());
}

#[test]
fn a_damaged_secret_file_is_refused_by_line_and_field() {
    let folder = Folder::new();
    let (_, path) = folder.key();
    for (from, to, expected) in [
        ("kind = \"bulkhead recipient private", "kind = \"x", "kind"),
        ("name = \"host-a\"", "name = \"a b\"", "is not a name"),
        ("fingerprint = \"", "fingerprint = \"0", "does not belong"),
        ("xwing_seed = \"", "xwing_seed = \"A", "32 bytes"),
        (
            "xwing_seed = \"",
            "extra = 1\nxwing_seed = \"",
            "unknown field",
        ),
        ("xwing_seed", "xwing_sead", "is missing"),
    ] {
        let error = refusal(&path, from, to);
        assert!(error.contains(expected), "{to}: {error}");
        assert!(error.contains("host.key:"), "no line in {error}");
    }
}

#[test]
fn an_error_never_shows_the_secret() {
    let folder = Folder::new();
    let (_, path) = folder.key();
    let text = fs::read_to_string(&path).expect("read");
    let seed = text.split("xwing_seed = \"").nth(1).expect("seed");
    let seed = seed.get(..20).expect("long").to_owned();
    for (from, to) in [
        ("xwing_seed = \"", "xwing_seed = \"="),
        ("fingerprint = \"", "fingerprint = \"0"),
        ("\"\n", "\n"),
        ("kind", "kind kind"),
    ] {
        let error = refusal(&path, from, to);
        assert!(!error.contains(&seed), "{error}");
    }
    let key = RecipientKey::load(&path).expect("load");
    assert!(!format!("{key:?}").contains(&seed));
}

#[test]
fn a_public_key_is_not_taken_for_a_secret_one_nor_the_reverse() {
    let folder = Folder::new();
    let (key, path) = folder.key();
    let error = RecipientPublicKey::load(&path).expect_err("refused");
    assert!(error.to_string().contains("public key v1"), "{error}");
    let public = folder.path("host.pub");
    key.public().save(&public).expect("save");
    fs::set_permissions(&public, fs::Permissions::from_mode(0o600)).expect("chmod");
    let error = RecipientKey::load(&public).expect_err("refused");
    assert!(error.to_string().contains("private key v1"), "{error}");
}

#[test]
fn a_damaged_public_key_is_refused() {
    let key = RecipientKey::generate("host-a").expect("key");
    let text = key.public().to_text();
    assert!(RecipientPublicKey::from_text("a.pub", &text).is_ok());
    // ML-KEM's coefficients are below 3329: twelve set bits are none (FIPS 203 section 7.2).
    let start = text.find("xwing = \"").expect("field") + "xwing = \"".len();
    let mut invalid = text.clone();
    invalid.replace_range(start..start + 4, "////");
    let error = RecipientPublicKey::from_text("a.pub", &invalid).expect_err("refused");
    assert_eq!(error.field, "xwing");
    assert!(error.problem.contains("damaged"), "{error}");
    // Another valid key under this fingerprint: X25519's last byte changed.
    let mut other = text.clone();
    let end = text.rfind('"').expect("end");
    let symbol = if text.get(end - 4..end - 3) == Some("A") {
        "B"
    } else {
        "A"
    };
    other.replace_range(end - 4..end - 3, symbol);
    let error = RecipientPublicKey::from_text("a.pub", &other).expect_err("refused");
    assert_eq!(error.field, "fingerprint", "{error}");
}

#[test]
fn a_name_is_one_word() {
    for bad in ["", "a b", "a/b", "\"", "-a"] {
        let error = RecipientKey::generate(bad).expect_err("refused");
        assert!(
            error.to_string().contains("is not a name"),
            "{bad:?}: {error}"
        );
    }
}
