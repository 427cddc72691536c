//! Release statements as operators make and read them.

use crate::Folder;

fn with_keys() -> Folder {
    let folder = Folder::new();
    folder.ok("operator new --name alice --out alice.key");
    folder.ok("operator new --name bob --out bob.key");
    folder.ok("trust new --operator alice.key.pub --out trust.toml");
    folder.write("binary", "the bytes of a program");
    folder
}

const SIGN: &str =
    "release sign --binary binary --program keyd --version 7 --name 0.7 --out keyd.release";

#[test]
fn a_statement_is_signed_and_shown() {
    let folder = with_keys();
    let signed = folder.ok(&format!("{SIGN} --key alice.key"));
    let shown = folder.ok("release show keyd.release --trust trust.toml --binary binary");
    for line in [
        "program      keyd\n",
        "version      7\n",
        "name         0.7\n",
    ] {
        assert!(signed.contains(line), "{signed}");
        assert!(shown.contains(line), "{shown}");
    }
    assert!(shown.contains("verified     alice\n"), "{shown}");
    assert!(shown.contains("is the one"), "{shown}");
    let unverified = folder.ok("release show keyd.release");
    assert!(unverified.contains("not verified"), "{unverified}");
}

#[test]
fn refused_statements() {
    let folder = with_keys();
    folder.ok(&format!("{SIGN} --key bob.key"));
    folder.refused(
        "release show keyd.release --trust trust.toml",
        &["unknown key"],
    );
    folder.ok(&format!("{SIGN} --key alice.key"));
    folder.write("binary", "other bytes");
    folder.refused(
        "release show keyd.release --binary binary",
        &["binary: is not the binary of this statement"],
    );
    let fetch = SIGN.replace("keyd", "fetch");
    folder.refused(&format!("{fetch} --key alice.key"), &["none of rot, keyd"]);
    let zero = SIGN.replace("--version 7", "--version 0");
    folder.refused(&format!("{zero} --key alice.key"), &["version is 0"]);
    folder.refused("release show trust.toml", &["trust.toml", "malformed"]);
    folder.refused(
        "release sign --binary none --program keyd --version 1 --name x --key alice.key --out o",
        &["none"],
    );
    assert!(!folder.exists("o"));
}
