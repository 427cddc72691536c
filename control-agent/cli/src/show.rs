//! What an envelope, a bundle's source or a stanza says, in words.

use std::collections::BTreeSet;
use std::path::Path;

use bulkhead_bundle::verify::Inspected;
use bulkhead_bundle::{
    HostBundle, Nic, SealedKeyEntry, SourceError, Switch, TrustRoot, Volume, inspect, source,
    validate,
};
use bulkhead_files::text::to_hex;
use bulkhead_protocol::DiscardPolicy;
use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;
use bulkhead_protocol::net::PortSpec;

use crate::arguments::Show;
use crate::failure::Failure;
use crate::output;
use crate::volume::bundle_of;

/// CBOR tag 98, COSE_Sign: the first two bytes of every envelope, and of no TOML.
const ENVELOPE_TAG: [u8; 2] = [0xd8, 98];

/// A file that holds volumes. Whatever is in it keeps the rules of bundles, so that names and
/// paths of it are safe to print; an envelope's signatures are not verified.
#[derive(Debug)]
pub(crate) enum Shown {
    /// Signed, by whomever.
    Envelope {
        /// What it claims.
        inspected: Box<Inspected>,
        /// The file's bytes.
        bytes: Vec<u8>,
    },
    /// What people write and sign.
    Source(Box<HostBundle>),
    /// Volumes and NICs alone.
    Stanza(Vec<Volume>, Vec<Nic>),
}

impl Shown {
    /// Reads a file of any of the three kinds.
    pub(crate) fn load(path: &Path) -> Result<Self, Failure> {
        let bytes = output::read_capped(path, MAX_ENVELOPE_BYTES)?;
        if bytes.starts_with(&ENVELOPE_TAG) {
            let inspected = inspect(&bytes).map_err(|e| Failure::at(path, e))?;
            validate(&inspected.claimed).map_err(|e| Failure::at(path, e))?;
            return Ok(Self::Envelope {
                inspected: Box::new(inspected),
                bytes,
            });
        }
        match source::load(path) {
            Ok(bundle) => Ok(Self::Source(Box::new(bundle))),
            Err(error) => Self::stanza(path, error),
        }
    }

    /// A file that is no whole bundle may still be a stanza; if not, the first error counts.
    fn stanza(path: &Path, error: SourceError) -> Result<Self, Failure> {
        let (volumes, nics) = match source::load_stanzas(path) {
            Ok((volumes, nics)) if !volumes.is_empty() || !nics.is_empty() => (volumes, nics),
            _ => return Err(error.into()),
        };
        let mut bundle = bundle_of(volumes);
        bundle.switches = switches_of(&nics);
        bundle.nics = nics;
        validate(&bundle).map_err(|e| Failure::at(path, e))?;
        Ok(Self::Stanza(bundle.volumes, bundle.nics))
    }

    /// Its volumes.
    pub(crate) fn volumes(&self) -> &[Volume] {
        match self {
            Self::Envelope { inspected, .. } => &inspected.claimed.volumes,
            Self::Source(bundle) => &bundle.volumes,
            Self::Stanza(volumes, _) => volumes,
        }
    }

    /// Its NICs.
    fn nics(&self) -> &[Nic] {
        match self {
            Self::Envelope { inspected, .. } => &inspected.claimed.nics,
            Self::Source(bundle) => &bundle.nics,
            Self::Stanza(_, nics) => nics,
        }
    }
}

/// The switches that NICs name, to hold these against the rules of bundles.
fn switches_of(nics: &[Nic]) -> Vec<Switch> {
    let names: BTreeSet<_> = nics
        .iter()
        .filter_map(|nic| match &nic.port {
            PortSpec::Switch { switch } => Some(switch.clone()),
            _ => None,
        })
        .collect();
    let switch = |name| Switch { name, uplink: None };
    names.into_iter().map(switch).collect()
}

/// `show`
pub(crate) fn show(arguments: &Show) -> Result<(), Failure> {
    let shown = Shown::load(&arguments.file)?;
    let trust = arguments
        .trust
        .as_deref()
        .map(TrustRoot::load)
        .transpose()?;
    match &shown {
        Shown::Envelope { inspected, .. } => {
            println!("kind         envelope");
            println!("digest       {}", to_hex(&inspected.digest));
            show_bundle(&inspected.claimed);
        }
        Shown::Source(bundle) => {
            println!("kind         bundle source, not signed");
            show_bundle(bundle);
        }
        Shown::Stanza(_, nics) if nics.is_empty() => {
            println!("kind         volumes alone, not signed");
        }
        Shown::Stanza(..) => println!("kind         volumes and NICs alone, not signed"),
    }
    for volume in shown.volumes() {
        show_volume(volume);
    }
    for nic in shown.nics() {
        show_nic(nic);
    }
    println!();
    match (&shown, trust) {
        (Shown::Envelope { bytes, .. }, Some(trust)) => show_signers(bytes, &trust),
        (Shown::Envelope { inspected, .. }, None) => {
            show_claimed_signers(inspected);
            Ok(())
        }
        (_, Some(_)) => Err(Failure::at(
            &arguments.file,
            "is not signed, so that there is nothing to hold against --trust: \
             sign it first, or leave --trust out",
        )),
        (_, None) => Ok(()),
    }
}

fn show_bundle(bundle: &HostBundle) {
    println!("host         {}", bundle.host);
    println!("epoch        {}", bundle.epoch);
    println!("not before   {}", output::utc(bundle.not_before));
    println!("expires      {}", output::utc(bundle.expires));
    for digest in &bundle.supersedes {
        println!("supersedes   {}", to_hex(&digest[..]));
    }
    for id in &bundle.force_remove {
        println!("remove       {id}, also while a frontend is connected");
    }
    for id in &bundle.force_remove_nics {
        println!("remove       NIC {id}, also while a frontend is connected");
    }
    for id in &bundle.shred {
        println!("shred        {id}: its key is destroyed for ever");
    }
    if let Some(workers) = &bundle.workers {
        println!("workers      {workers}");
    }
    for group in &bundle.groups {
        println!("group        {}: limits {}", group.name, group.limits);
    }
    for switch in &bundle.switches {
        let uplink = switch.uplink.as_ref();
        let uplink = uplink.map_or("none".to_owned(), ToString::to_string);
        println!("switch       {}: uplink {uplink}", switch.name);
    }
}

fn show_nic(nic: &Nic) {
    println!("\nNIC          {}", nic.name);
    println!("  id         {}", nic.id);
    println!("  address    {}, MTU {}", nic.mac, nic.mtu);
    println!(
        "  port       {}, {} queue pair(s)",
        nic.port, nic.queue_pairs
    );
    println!(
        "  socket     {}, owner {}:{}, mode {:04o}; uid {} may connect",
        nic.socket.name, nic.socket.uid, nic.socket.gid, nic.socket.mode, nic.allowed_uid
    );
    let mac = if nic.checks.mac { "its MAC" } else { "any MAC" };
    let sources: Vec<_> = nic.checks.sources.iter().map(ToString::to_string).collect();
    let sources = match sources.is_empty() {
        true => "any IP address".to_owned(),
        false => sources.join(" "),
    };
    println!("  may be     {mac}, {sources}");
    if !nic.checks.trusted.is_nothing() {
        println!("  trusted    {}", nic.checks.trusted.names().join(", "));
    }
    if !nic.limits.is_none() {
        println!("  limits     {}", nic.limits);
    }
    if let Some(mirror) = &nic.mirror {
        println!(
            "  mirror     {}, {} B of each frame, at most {}",
            mirror.file,
            mirror.snap_bytes,
            output::size(mirror.most_bytes)
        );
    }
    if nic.force_removal {
        println!("  removal    also while a frontend is connected");
    }
}

fn show_volume(volume: &Volume) {
    let cipher = match volume.data_unit_bytes {
        Some(unit) => format!("AES-256-XTS, data unit {unit} B"),
        None => "none: a plain volume".to_owned(),
    };
    let discard = match volume.discard {
        DiscardPolicy::Ignore => "ignored",
        DiscardPolicy::Pass => "passed on",
    };
    let access = if volume.read_only {
        "read only"
    } else {
        "read and write"
    };
    println!("\nvolume       {}", volume.name);
    println!("  id         {}", volume.id);
    println!("  path       {}", volume.path);
    println!(
        "  size       {}, logical block {} B",
        output::size(volume.size_bytes),
        volume.logical_block_bytes
    );
    println!("  encryption {cipher}");
    println!("  access     {access}, discard {discard}");
    println!("  serial     {}", volume.serial);
    println!(
        "  socket     {}, {} queue(s), owner {}:{}, mode {:04o}; uid {} may connect",
        volume.socket.name,
        volume.queues,
        volume.socket.uid,
        volume.socket.gid,
        volume.socket.mode,
        volume.allowed_uid
    );
    if !volume.limits.is_none() {
        println!("  limits     {}", volume.limits);
    }
    if let Some(group) = &volume.group {
        println!("  group      {group}");
    }
    if volume.force_removal {
        println!("  removal    also while a frontend is connected");
    }
    show_sealed("sealed to ", &volume.sealed_keys);
    if let Some(rekey) = &volume.rekey {
        println!("  re-key     {}, from a previous key", rekey.id);
        show_sealed("previous  ", &rekey.previous_keys);
    }
}

fn show_sealed(what: &str, keys: &[SealedKeyEntry]) {
    for key in keys {
        println!("  {what} {}  {}", key.recipient, to_hex(&key.fingerprint));
    }
}

fn show_signers(envelope: &[u8], trust: &TrustRoot) -> Result<(), Failure> {
    let names = Inspected::signers(envelope, trust)
        .map_err(|e| Failure::new(format!("NOT to be trusted: {e}")))?;
    for name in &names {
        println!("signed by    {name}");
    }
    println!(
        "signatures   good: {} operator(s) signed, {} needed",
        names.len(),
        trust.threshold()
    );
    Ok(())
}

fn show_claimed_signers(inspected: &Inspected) {
    // Each operator signs twice, side by side.
    let mut last = None;
    for (fingerprint, _) in &inspected.claimed_signers {
        if last != Some(fingerprint) {
            println!("signed by    {fingerprint}");
        }
        last = Some(fingerprint);
    }
    println!("signatures   not verified: give --trust");
}
