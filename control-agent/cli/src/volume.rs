//! Making a volume: a random key, sealed and forgotten, its file, and its stanza for a bundle.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bulkhead_bundle::validate::check_host_name;
use bulkhead_bundle::{
    Group, HostBundle, RECOVERY_RECIPIENT, SealedKeyEntry, SocketSpec, Volume, key_scope,
    private_file, source, validate,
};
use bulkhead_crypto::SecretMemory;
use bulkhead_files::text::to_hex;
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::keys::XTS_KEY_BYTES;
use bulkhead_protocol::limits::Limits;
use bulkhead_sealing::{RecipientPublicKey, VolumeContext, seal};

use crate::arguments::VolumeCreate;
use crate::failure::Failure;
use crate::image::Image;
use crate::output;

/// `volume create`
pub(crate) fn create(arguments: &VolumeCreate) -> Result<(), Failure> {
    let recipients = recipients(arguments)?;
    let mut volume = describe(arguments)?;
    if let Some(context) = context_of(&volume) {
        volume.sealed_keys = sealed_keys(&recipients, &context)?;
    }
    check(&volume)?;
    output::must_be_new(&arguments.out)?;
    let image = Image::prepare(arguments)?;
    let stanza = source::volume_to_toml(&volume);
    private_file::create_public(&arguments.out, stanza.as_bytes())?;
    image.keep();
    println!("volume       {}", volume.name);
    println!("id           {}", volume.id);
    println!("size         {}", output::size(volume.size_bytes));
    for recipient in &recipients {
        println!(
            "sealed to    {}  {}",
            recipient.name,
            to_hex(&recipient.fingerprint())
        );
    }
    if recipients.is_empty() {
        println!("sealed to    nobody: a plain volume, which the host's agent can read");
    }
    println!("stanza       {}", arguments.out.display());
    advise(&volume);
    Ok(())
}

/// What is made all the same, and should better not be.
pub(crate) fn advise(volume: &Volume) {
    if let Some(warning) = key_scope::warning(volume) {
        eprintln!("bulkhead: warning: {warning}");
    }
}

/// The hosts, then recovery. A file given for the wrong role is refused: a host's key as recovery
/// would make a volume that only its own host can open.
fn recipients(arguments: &VolumeCreate) -> Result<Vec<RecipientPublicKey>, Failure> {
    let mut recipients = host_keys(&arguments.hosts)?;
    if let Some(path) = &arguments.recovery {
        recipients.push(recovery_public(path)?);
    }
    Ok(recipients)
}

/// The public key of recovery, and of nobody else.
pub(crate) fn recovery_public(path: &Path) -> Result<RecipientPublicKey, Failure> {
    let recovery = RecipientPublicKey::load(path)?;
    if recovery.name != RECOVERY_RECIPIENT {
        return Err(Failure::at(
            path,
            format!(
                "is the public key of {:?}, not of recovery: give the .pub file that \
                 `bulkhead recovery new` made",
                recovery.name
            ),
        ));
    }
    Ok(recovery)
}

/// Hosts' public keys, and nobody else's.
pub(crate) fn host_keys(paths: &[PathBuf]) -> Result<Vec<RecipientPublicKey>, Failure> {
    let mut hosts = Vec::with_capacity(paths.len());
    for path in paths {
        let host = RecipientPublicKey::load(path)?;
        check_host_name(&host.name)
            .map_err(|e| Failure::at(path, format!("is not a host's public key: {e}")))?;
        hosts.push(host);
    }
    Ok(hosts)
}

/// The volume that the command line describes, still without sealed keys.
fn describe(arguments: &VolumeCreate) -> Result<Volume, Failure> {
    let id = VolumeId(random_uuid()?);
    let serial = arguments.serial.clone().unwrap_or_else(|| {
        let digits = to_hex(&id.0);
        digits.get(..20).unwrap_or_default().to_owned()
    });
    let data_unit_bytes = arguments.data_unit.bytes();
    let logical_block_bytes = match arguments.logical_block.as_deref() {
        Some("4096") => 4096,
        Some(_) => 512,
        None => data_unit_bytes.unwrap_or(512),
    };
    Ok(Volume {
        id,
        name: arguments.name.clone(),
        path: arguments.path.clone(),
        size_bytes: arguments.size,
        data_unit_bytes,
        logical_block_bytes,
        read_only: arguments.read_only,
        serial,
        discard: arguments.discard.into(),
        queues: arguments.queues,
        socket: SocketSpec {
            name: arguments.socket.clone(),
            uid: arguments.socket_uid.unwrap_or(arguments.allowed_uid),
            gid: arguments.socket_gid,
            mode: arguments.socket_mode,
        },
        allowed_uid: arguments.allowed_uid,
        force_removal: false,
        sealed_keys: Vec::new(),
        rekey: None,
        limits: arguments.limits.limits(),
        group: arguments.limits.group.clone(),
    })
}

/// A random UUID (RFC 9562 version 4: six bits say that it is one).
pub(crate) fn random_uuid() -> Result<[u8; 16], Failure> {
    let mut id = [0; 16];
    random(&mut id)?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

/// What the key of a volume is bound to; none for a plain volume.
pub(crate) fn context_of(volume: &Volume) -> Option<VolumeContext> {
    Some(VolumeContext {
        id: volume.id,
        size_bytes: volume.size_bytes,
        data_unit_bytes: volume.data_unit_bytes?,
        logical_block_bytes: volume.logical_block_bytes,
    })
}

/// Makes the key, seals it to everybody, and forgets it: it is only ever in secret memory.
pub(crate) fn sealed_keys(
    recipients: &[RecipientPublicKey],
    context: &VolumeContext,
) -> Result<Vec<SealedKeyEntry>, Failure> {
    let mut memory = key_memory()?;
    let key = key_in(&mut memory)?;
    random(key)?;
    let mut entries = Vec::with_capacity(recipients.len());
    for recipient in recipients {
        entries.push(seal_to(key, recipient, context)?);
    }
    Ok(entries)
}

/// The key, sealed to one recipient. A key with equal halves is refused.
pub(crate) fn seal_to(
    key: &[u8; XTS_KEY_BYTES],
    recipient: &RecipientPublicKey,
    context: &VolumeContext,
) -> Result<SealedKeyEntry, Failure> {
    let sealed = seal(key, recipient, context)?;
    Ok(SealedKeyEntry {
        recipient: sealed.recipient,
        fingerprint: sealed.fingerprint,
        enc: sealed.enc,
        ciphertext: sealed.ciphertext,
    })
}

/// Room for one volume key in memory that no other process, core file or swap shows; it is wiped
/// when dropped.
pub(crate) fn key_memory() -> Result<SecretMemory, Failure> {
    SecretMemory::new(XTS_KEY_BYTES)
        .map_err(|e| Failure::new(format!("there is no secret memory for the key: {e}")))
}

/// The key in that memory.
pub(crate) fn key_in(memory: &mut SecretMemory) -> Result<&mut [u8; XTS_KEY_BYTES], Failure> {
    Ok(memory.as_mut_bytes().try_into()?)
}

fn random(bytes: &mut [u8]) -> Result<(), Failure> {
    getrandom::fill(bytes).map_err(|e| Failure::new(format!("the system has no randomness: {e}")))
}

/// Holds the volume against the bundle's own rules, so that the mistake is named here and not when
/// the bundle is signed.
pub(crate) fn check(volume: &Volume) -> Result<(), Failure> {
    validate(&bundle_of(vec![volume.clone()])).map_err(|error| {
        let option = match error.field {
            "sealed_key" => "host".to_owned(),
            "rekey" => "volume".to_owned(),
            // It says by itself which of them.
            "limits" => return Failure::new(error.problem),
            field => field.replace('_', "-"),
        };
        Failure::new(format!("--{option}: {}", error.problem))
    })
}

/// A bundle of nothing but these volumes and the groups they name, to hold them against the rules of
/// bundles.
pub(crate) fn bundle_of(volumes: Vec<Volume>) -> HostBundle {
    let mut recipients = volumes.iter().flat_map(|volume| &volume.sealed_keys);
    let host = recipients.find(|entry| entry.recipient != RECOVERY_RECIPIENT);
    let groups: BTreeSet<_> = volumes.iter().filter_map(|v| v.group.clone()).collect();
    let group = |name| Group {
        name,
        limits: Limits::default(),
    };
    let groups = groups.into_iter().map(group).collect();
    HostBundle {
        host: host.map_or("any-host", |entry| &entry.recipient).to_owned(),
        epoch: 1,
        supersedes: Vec::new(),
        not_before: 0,
        expires: 1,
        volumes,
        force_remove: Vec::new(),
        shred: Vec::new(),
        groups,
        workers: None,
        switches: Vec::new(),
        nics: Vec::new(),
        force_remove_nics: Vec::new(),
    }
}
