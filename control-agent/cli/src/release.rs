//! Release statements: signing that a binary is a release, and reading what such a statement says.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use bulkhead_bundle::{
    OperatorKey, ReleaseStatement, TrustRoot, inspect_release, sign_release, verify_release,
};
use bulkhead_files::text::to_hex;
use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;
use sha2::{Digest, Sha384};

use crate::arguments::{ReleaseShow, ReleaseSign};
use crate::failure::Failure;
use crate::output;

/// `release sign`
pub(crate) fn sign(arguments: &ReleaseSign) -> Result<(), Failure> {
    let statement = ReleaseStatement {
        component: arguments.program.clone(),
        version: arguments.version,
        name: arguments.name.clone(),
        sha384: measured(&arguments.binary)?.into(),
    };
    let keys = arguments
        .keys
        .iter()
        .map(|path| OperatorKey::load(path))
        .collect::<Result<Vec<_>, _>>()?;
    let envelope = sign_release(&statement, &keys.iter().collect::<Vec<_>>())?;
    output::replace(&arguments.out, &envelope)?;
    println!("statement    {}", arguments.out.display());
    print(&statement);
    for key in &keys {
        let public = key.public();
        println!("signed by    {}  {}", public.name, public.fingerprint());
    }
    Ok(())
}

/// `release show`
pub(crate) fn show(arguments: &ReleaseShow) -> Result<(), Failure> {
    let path = &arguments.file;
    let bytes = output::read_capped(path, MAX_ENVELOPE_BYTES)?;
    let (statement, claimed) = inspect_release(&bytes).map_err(|e| Failure::at(path, e))?;
    print(&statement);
    match &arguments.trust {
        Some(trust) => {
            let trust = TrustRoot::load(trust)?;
            let verified = verify_release(&bytes, &trust).map_err(|e| Failure::at(path, e))?;
            println!("verified     {}", verified.signers().join(", "));
        }
        None => {
            for (kid, algorithm) in claimed {
                println!("claims       {kid} {algorithm} (not verified: give --trust)");
            }
        }
    }
    let Some(binary) = &arguments.binary else {
        return Ok(());
    };
    if measured(binary)? != *statement.sha384 {
        return Err(Failure::at(binary, "is not the binary of this statement"));
    }
    println!("binary       {} is the one", binary.display());
    Ok(())
}

fn print(statement: &ReleaseStatement) {
    println!("program      {}", statement.component);
    println!("version      {}", statement.version);
    println!("name         {}", statement.name);
    println!("sha384       {}", to_hex(&statement.sha384[..]));
}

/// SHA-384 of a file's bytes.
fn measured(path: &Path) -> Result<[u8; 48], Failure> {
    let failed = |error: io::Error| Failure::at(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let mut hash = Sha384::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hash.finalize().into()),
            n => hash.update(&buffer[..n]),
        }
    }
}
