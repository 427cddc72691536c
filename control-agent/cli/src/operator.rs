//! What operators do with their keys: make them, put them into a trust root, sign with them.

use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_bundle::{
    HostBundle, OperatorKey, OperatorPublicKey, TrustRoot, digest_of, private_file, source,
};
use bulkhead_files::text::to_hex;

use crate::arguments::{OperatorNew, Sign, TrustNew};
use crate::failure::Failure;
use crate::output;
use crate::volume::advise;

/// `operator new`
pub(crate) fn new(arguments: &OperatorNew) -> Result<(), Failure> {
    let public_path = output::public_path(&arguments.out);
    output::must_be_new(&public_path)?;
    let key = OperatorKey::generate(&arguments.name)?;
    key.save(&arguments.out)?;
    let public = key.public();
    let saved = private_file::create_public(&public_path, public.to_text().as_bytes());
    output::or_remove(&arguments.out, saved)?;
    println!("operator     {}", public.name);
    println!("fingerprint  {}", public.fingerprint());
    println!("secret key   {}", arguments.out.display());
    println!("public key   {}", public_path.display());
    Ok(())
}

/// `trust new`
pub(crate) fn trust(arguments: &TrustNew) -> Result<(), Failure> {
    let operators = arguments
        .operators
        .iter()
        .map(|path| OperatorPublicKey::load(path))
        .collect::<Result<Vec<_>, _>>()?;
    let threshold = arguments.threshold.unwrap_or(operators.len());
    let trust = TrustRoot::new(operators, threshold)
        .map_err(|problem| Failure::new(format!("no trust root was made: {problem}")))?;
    private_file::create_public(&arguments.out, trust.to_text().as_bytes())?;
    println!("trust root   {}", arguments.out.display());
    println!(
        "threshold    {} of {} operators",
        trust.threshold(),
        trust.operators().len()
    );
    for operator in trust.operators() {
        println!("operator     {}  {}", operator.name, operator.fingerprint());
    }
    println!("Compare each fingerprint with its operator before a host trusts this file.");
    Ok(())
}

/// `sign`
pub(crate) fn sign(arguments: &Sign) -> Result<(), Failure> {
    let bundle = source::load(&arguments.bundle)?;
    let keys = arguments
        .keys
        .iter()
        .map(|path| OperatorKey::load(path))
        .collect::<Result<Vec<_>, _>>()?;
    let envelope = bulkhead_bundle::sign(&bundle, &keys.iter().collect::<Vec<_>>())?;
    output::replace(&arguments.out, &envelope)?;
    println!("envelope     {}", arguments.out.display());
    println!("host         {}", bundle.host);
    println!("epoch        {}", bundle.epoch);
    println!("not before   {}", output::utc(bundle.not_before));
    println!("expires      {}", output::utc(bundle.expires));
    println!("volumes      {}", bundle.volumes.len());
    if !bundle.nics.is_empty() {
        println!("NICs         {}", bundle.nics.len());
    }
    for key in &keys {
        let public = key.public();
        println!("signed by    {}  {}", public.name, public.fingerprint());
    }
    println!("digest       {}", to_hex(&digest_of(&envelope)));
    warn_about(&bundle);
    Ok(())
}

/// What is signed all the same, but is hardly meant.
fn warn_about(bundle: &HostBundle) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    if now.is_ok_and(|now| now.as_secs() >= bundle.expires) {
        eprintln!(
            "bulkhead: warning: the bundle has expired already; no host takes it: set `expires` later"
        );
    }
    let recovery = bulkhead_bundle::RECOVERY_RECIPIENT;
    for volume in &bundle.volumes {
        advise(volume);
        if volume.is_encrypted() && volume.sealed_for(recovery).is_none() {
            eprintln!(
                "bulkhead: warning: volume {:?} is not sealed to {recovery:?}: if its hosts are lost, so is it",
                volume.name
            );
        }
    }
}
