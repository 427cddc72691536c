//! The keys that volumes are sealed to: a host's, and that of recovery.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, lchown};
use std::path::Path;

use bulkhead_bundle::RECOVERY_RECIPIENT;
use bulkhead_bundle::validate::check_host_name;
use bulkhead_files::text::to_hex;
use bulkhead_sealing::{RecipientKey, RecipientPublicKey};

use crate::arguments::{HostInit, HostPublic, RecoveryNew};
use crate::failure::Failure;
use crate::output;

/// `recovery new`
pub(crate) fn recovery(arguments: &RecoveryNew) -> Result<(), Failure> {
    let public_path = output::public_path(&arguments.out);
    output::must_be_new(&public_path)?;
    let key = RecipientKey::generate(RECOVERY_RECIPIENT)?;
    key.save(&arguments.out)?;
    output::or_remove(&arguments.out, key.public().save(&public_path))?;
    println!("recovery     {}", to_hex(&key.public().fingerprint()));
    println!("secret key   {}", arguments.out.display());
    println!("public key   {}", public_path.display());
    println!("Put the secret key into a safe, offline: it opens every volume sealed to it.");
    Ok(())
}

/// `host init`
pub(crate) fn host(arguments: &HostInit) -> Result<(), Failure> {
    check_host_name(&arguments.name).map_err(|e| Failure::new(format!("--name: {e}")))?;
    let directory = arguments.state_dir.join("keyd");
    let secret_path = directory.join("host.key");
    let public_path = arguments.state_dir.join("host.pub");
    output::must_be_new(&public_path)?;
    fs::create_dir_all(&arguments.state_dir).map_err(|e| Failure::at(&arguments.state_dir, e))?;
    make_private_directory(&directory, arguments.uid)?;
    let key = RecipientKey::generate(&arguments.name)?;
    key.save(&secret_path)?;
    output::or_remove(&secret_path, give_to(&secret_path, arguments.uid))?;
    output::or_remove(&secret_path, key.public().save(&public_path))?;
    // The public key to standard output, so that it can be taken from a host by `ssh` and `>`.
    print!("{}", key.public().to_text());
    eprintln!("secret key   {}", secret_path.display());
    eprintln!("public key   {}", public_path.display());
    Ok(())
}

/// `host public`
pub(crate) fn public(arguments: &HostPublic) -> Result<(), Failure> {
    let made = arguments.state_dir.join("host.pub");
    let current = arguments.state_dir.join("keyd").join("host.pub");
    // keyd writes it at its first start: before that, the key is the one that was made.
    let is_there = current.try_exists().map_err(|e| Failure::at(&current, e))?;
    let key = RecipientPublicKey::load(if is_there { &current } else { &made })?;
    let text = key.to_text();
    print!("{text}");
    if fs::read(&made).ok().as_deref() == Some(text.as_bytes()) {
        return Ok(());
    }
    match output::replace(&made, text.as_bytes()) {
        Ok(()) => eprintln!("{} was out of date and is renewed", made.display()),
        Err(error) => eprintln!("bulkhead: warning: out of date, and not renewed: {error}"),
    }
    Ok(())
}

/// keyd's directory, mode 0700; one that rot made already stays as it is.
fn make_private_directory(path: &Path, uid: Option<u32>) -> Result<(), Failure> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => give_to(path, uid),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(Failure::at(path, error)),
    }
}

fn give_to(path: &Path, uid: Option<u32>) -> Result<(), Failure> {
    if uid.is_none() {
        return Ok(());
    }
    // Never through a symbolic link: from here on the directory is somebody else's.
    lchown(path, uid, None).map_err(|e| Failure::at(path, format!("can't change its owner: {e}")))
}
