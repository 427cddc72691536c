//! A shred by the real keyd: what is gone afterwards, what goes on, and that a kill at any moment
//! leaves nothing in between.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_bundle::text::{from_base64, to_hex};
use bulkhead_bundle::{SealedKeyEntry, Volume};
use bulkhead_protocol::VolumeId;
use bulkhead_protocol::keys::{HostKeys, KeydToDataplane, ShredState};
use bulkhead_sealing::{RecipientKey, RecipientPublicKey, SealedKey, VolumeContext, unseal};

use crate::bundles::{bundle, encrypted, host_key, id, random_key, sealed, signed};
use crate::host::{Host, yes_to};
use crate::secrets::{assert_not_in_memory, occurrences};

/// An envelope with these volumes that shreds others.
fn shredding(epoch: u64, volumes: &[Volume], shred: &[VolumeId]) -> Vec<u8> {
    let mut bundle = bundle(epoch, volumes.to_vec());
    bundle.shred = shred.to_vec();
    signed(&bundle)
}

/// Whether anything in a directory opens a volume's key: each key file with what the bundle has
/// sealed, and with everything that keyd sealed anew.
fn opens(directory: &Path, volume: &Volume) -> bool {
    let mut keys = Vec::new();
    let mut candidates = vec![volume.sealed_keys[0].clone()];
    for entry in fs::read_dir(directory).expect("list") {
        let path = entry.expect("entry").path();
        keys.extend(RecipientKey::load(&path).ok());
        candidates.extend(resealed(&fs::read_to_string(&path).unwrap_or_default()));
    }
    let mut pairs = keys
        .iter()
        .flat_map(|key| candidates.iter().map(move |candidate| (key, candidate)));
    pairs.any(|(key, candidate)| opens_with(key, candidate, volume))
}

/// Every sealed key in a text of keyd's.
fn resealed(text: &str) -> Vec<SealedKeyEntry> {
    let key = |line: &str| -> Option<SealedKeyEntry> {
        let mut words = line.strip_prefix("key ")?.split(' ').skip(2);
        Some(SealedKeyEntry {
            recipient: crate::bundles::HOST.to_owned(),
            fingerprint: Vec::new(),
            enc: from_base64(words.next()?)?.to_vec(),
            ciphertext: from_base64(words.next()?)?.to_vec(),
        })
    };
    text.lines().filter_map(key).collect()
}

fn opens_with(key: &RecipientKey, entry: &SealedKeyEntry, volume: &Volume) -> bool {
    let sealed = SealedKey {
        recipient: entry.recipient.clone(),
        // Whatever it says: what counts is what opens.
        fingerprint: key.public().fingerprint().to_vec(),
        enc: entry.enc.clone(),
        ciphertext: entry.ciphertext.clone(),
    };
    let context = VolumeContext {
        id: volume.id,
        size_bytes: volume.size_bytes,
        data_unit_bytes: volume.data_unit_bytes.expect("encrypted"),
        logical_block_bytes: volume.logical_block_bytes,
    };
    unseal(&sealed, key, &context, &mut [0; 64]).is_ok()
}

/// The seed of the key file of a host, as it is in memory.
fn seed(directory: &Path) -> Vec<u8> {
    let text = fs::read_to_string(directory.join("host.key")).expect("read");
    let field = text.lines().find_map(|l| l.strip_prefix("xwing_seed = "));
    let field = field.expect("a seed").trim_matches('"');
    from_base64(field).expect("base64").to_vec()
}

fn public(directory: &Path) -> RecipientPublicKey {
    RecipientPublicKey::load(&directory.join("host.pub")).expect("host.pub")
}

/// Three volumes in force, and their keys.
fn served() -> (Host, [[u8; 64]; 3], [Volume; 3]) {
    let keys = [random_key(), random_key(), random_key()];
    let volumes = [1, 2, 3].map(|n| encrypted(n, &keys[usize::from(n) - 1]));
    let mut host = Host::new();
    host.apply(&shredding(1, &volumes, &[]), 3);
    (host, keys, volumes)
}

/// Applies with a data plane that says yes; what keyd says of the key, and the keys it delivered.
fn apply(host: &mut Host, envelope: &[u8], count: usize) -> (HostKeys, Vec<Option<[u8; 64]>>) {
    host.ask(envelope);
    let delivered = host.take(count);
    let (keys, undelivered) = host.accepted_with_keys();
    assert_eq!(undelivered, []);
    (keys, delivered.into_iter().map(|d| d.key).collect())
}

#[test]
fn what_is_shredded_is_gone_and_the_rest_goes_on() {
    let (mut host, keys, volumes) = served();
    let directory = host.path("keyd");
    let old_seed = seed(&directory);
    assert!(volumes.iter().all(|volume| opens(&directory, volume)));
    assert!(
        occurrences(host.pid(), &old_seed) > 0,
        "the search finds it"
    );
    let old = public(&directory).fingerprint();

    let envelope = shredding(2, &volumes[1..], &[id(1)]);
    host.ask(&envelope);
    let revoked = host.delivered();
    assert_eq!(
        revoked.message,
        KeydToDataplane::Revoke { id: id(1).into() }
    );
    host.say(&yes_to(&revoked.message));
    let granted: Vec<_> = host.take(2).into_iter().map(|d| d.key).collect();
    assert_eq!(granted, [Some(keys[1]), Some(keys[2])]);
    let (told, undelivered) = host.accepted_with_keys();
    assert_eq!(undelivered, []);

    let now = public(&directory).fingerprint();
    assert_ne!(now, old);
    assert_eq!((told.fingerprint, told.shreds_total), (now.into(), 1));
    assert_eq!(told.unfinished, None);
    let shred = &told.shreds[0];
    assert_eq!((shred.volume, shred.epoch), (id(1), 2));
    assert_eq!(shred.state, ShredState::Done);
    assert_eq!(
        (shred.destroyed_key, shred.new_key),
        (old.into(), now.into())
    );

    let opened = volumes.each_ref().map(|volume| opens(&directory, volume));
    assert_eq!(opened, [false, true, true]);
    assert_eq!(occurrences(host.pid(), &old_seed), 0, "the old key's seed");
    for key in &keys {
        assert_not_in_memory(host.pid(), key);
    }
    for line in [
        "no key of this host opens it",
        "the data plane has dropped its key",
    ] {
        let said =
            |log_line: &str| log_line.contains(line) && log_line.contains(&id(1).to_string());
        assert!(host.log().lines().any(said), "{line}: {}", host.log());
    }
    // And so after a restart, of keyd and of the data plane.
    host.start();
    host.connect();
    let (again, granted) = apply(&mut host, &envelope, 2);
    assert_eq!(granted, [Some(keys[1]), Some(keys[2])]);
    assert_eq!(again, told);
    assert_eq!(occurrences(host.pid(), &old_seed), 0);
}

#[test]
fn refused_a_volume_that_was_shredded() {
    let (mut host, _, volumes) = served();
    apply(&mut host, &shredding(2, &volumes[1..], &[id(1)]), 3);
    let state = fs::read(host.path("keyd/accepted")).expect("state");
    for _ in 0..2 {
        let reason = host.refuse(&shredding(3, &volumes, &[]));
        assert!(
            reason.contains("\"disk1\"") && reason.contains("was shredded by epoch 2"),
            "{reason}"
        );
        assert_eq!(fs::read(host.path("keyd/accepted")).expect("state"), state);
        host.start();
        host.connect();
    }
}

#[test]
fn later_bundles_name_old_entries_and_new_ones() {
    let (mut host, keys, volumes) = served();
    let (first, _) = apply(&mut host, &shredding(2, &volumes[1..], &[id(1)]), 3);
    // The list may stay in the source; what is destroyed is not destroyed again.
    let (again, granted) = apply(&mut host, &shredding(3, &volumes[1..], &[id(1)]), 2);
    assert_eq!(again, first);
    assert_eq!(granted, [Some(keys[1]), Some(keys[2])]);

    let (late, fresh) = (encrypted(4, &keys[0]), &mut encrypted(5, &keys[0]));
    fresh.sealed_keys = vec![sealed(&keys[0], &public(&host.path("keyd")), fresh)];
    host.ask(&shredding(
        4,
        &[volumes[2].clone(), late, fresh.clone()],
        &[],
    ));
    let granted: Vec<_> = host.take(3).into_iter().map(|d| d.key).collect();
    assert_eq!(granted, [None, Some(keys[2]), Some(keys[0])]);
    let (_, undelivered) = host.accepted_with_keys();
    assert_eq!(undelivered.len(), 1);
    let reason = &undelivered[0].reason;
    assert!(
        undelivered[0].id == id(4).into() && reason.contains("destroyed when epoch 2"),
        "{reason}"
    );
    assert!(reason.contains("bulkhead host public"), "{reason}");
    assert!(
        reason.contains(&to_hex(&first.fingerprint[..])[..40]),
        "{reason}"
    );
}

#[test]
fn it_is_not_told_as_done_before_the_data_plane_dropped_the_key() {
    let (mut host, _, volumes) = served();
    let envelope = shredding(2, &volumes[1..], &[id(1)]);
    host.dataplane = None;
    host.ask(&envelope);
    let (told, undelivered) = host.accepted_with_keys();
    assert_eq!(undelivered.len(), 2);
    assert_eq!(told.shreds[0].state, ShredState::HeldByDataplane);
    assert!(!opens(&host.path("keyd"), &volumes[0]));
    // One that was just started may have taken it over.
    host.new_dataplane();
    let (told, _) = apply(&mut host, &envelope, 3);
    assert_eq!(told.shreds[0].state, ShredState::Done);
}

#[test]
fn a_disk_that_refuses_shreds_nothing() {
    let (mut host, keys, volumes) = served();
    let directory = host.path("keyd");
    // In the way of the new store: a directory is not replaced.
    fs::create_dir(directory.join("resealed.new")).expect("mkdir");
    let reason = host.refuse(&shredding(2, &volumes[1..], &[id(1)]));
    assert!(reason.contains("nothing was shredded"), "{reason}");
    assert!(reason.contains("resealed.new"), "{reason}");
    assert!(opens(&directory, &volumes[0]));
    fs::remove_dir(directory.join("resealed.new")).expect("rmdir");
    let (_, granted) = apply(&mut host, &shredding(2, &volumes[1..], &[id(1)]), 3);
    assert_eq!(granted[1..], [Some(keys[1]), Some(keys[2])]);
}

#[test]
fn killed_at_any_moment_of_a_shred() {
    let (mut host, keys, volumes) = served();
    let directory = host.path("keyd");
    let mut ordered = 0;
    // How long a shred takes here: the kills are spread over it.
    let measured = Instant::now();
    apply(&mut host, &shredding(2, &volumes[1..], &[id(1)]), 3);
    let whole = measured.elapsed().min(Duration::from_millis(300));
    for round in 0..24u32 {
        fs::remove_dir_all(&directory).expect("remove");
        fs::create_dir(&directory).expect("mkdir");
        host_key().save(&directory.join("host.key")).expect("save");
        host.start();
        host.connect();
        host.apply(&shredding(1, &volumes, &[]), 3);
        let envelope = shredding(2, &volumes[1..], &[id(1)]);
        host.ask(&envelope);
        std::thread::sleep(whole * round / 20);
        host.kill();
        host.start();
        let state = fs::read_to_string(directory.join("accepted")).expect("state");
        let is_ordered = state.contains("shredded ");
        ordered += u32::from(is_ordered);
        assert_eq!(opens(&directory, &volumes[0]), !is_ordered, "round {round}");
        assert!(!directory.join("host.key.new").exists(), "round {round}");
        host.connect();
        let (told, granted) = apply(&mut host, &envelope, 3);
        assert_eq!(granted, [None, Some(keys[1]), Some(keys[2])]);
        assert_eq!(told.shreds[0].state, ShredState::Done, "round {round}");
        assert!(!opens(&directory, &volumes[0]), "round {round}");
    }
    println!("{ordered} of 24 kills came after the point of no return");
}
