//! A shred whose every step is the last before the power fails: what the next start finds always
//! serves the volumes that remain, and never both has the shred done and the old key there.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bulkhead_bundle::{OperatorKey, Rekey, SealedKeyEntry, SocketSpec, Volume, sign};
use bulkhead_crypto::secret::SecretMemory;
use bulkhead_protocol::envelope::to_memfd;
use bulkhead_protocol::limits::Limits;
use bulkhead_protocol::{DiscardPolicy, RekeyId};
use bulkhead_sealing::{RecipientPublicKey, VolumeContext, seal};

use super::*;

const HOST: &str = "host-a";
/// The volume that is shredded, and one that remains.
const IDS: [VolumeId; 2] = [VolumeId([1; 16]), VolumeId([2; 16])];

fn volume(id: VolumeId, to: &RecipientPublicKey) -> Volume {
    let (size_bytes, unit) = (1 << 20, 512);
    let context = VolumeContext {
        id,
        size_bytes,
        data_unit_bytes: unit,
        logical_block_bytes: unit,
    };
    let sealed = |key: [u8; 64]| {
        let sealed = seal(&key, to, &context).expect("sealed");
        vec![SealedKeyEntry {
            recipient: sealed.recipient,
            fingerprint: sealed.fingerprint,
            enc: sealed.enc,
            ciphertext: sealed.ciphertext,
        }]
    };
    Volume {
        id,
        name: format!("disk{}", id.0[0]),
        path: format!("disk{}.img", id.0[0]),
        size_bytes,
        data_unit_bytes: Some(unit),
        logical_block_bytes: unit,
        read_only: false,
        serial: String::new(),
        discard: DiscardPolicy::Ignore,
        queues: 1,
        socket: SocketSpec {
            name: format!("vm{}", id.0[0]).parse().expect("name"),
            uid: 0,
            gid: 0,
            mode: 0o600,
        },
        allowed_uid: 0,
        force_removal: false,
        sealed_keys: sealed(keys_of(id)[0]),
        rekey: Some(Rekey {
            id: RekeyId([id.0[0]; 16]),
            previous_keys: sealed(keys_of(id)[1]),
        }),
        limits: Limits::default(),
        group: None,
    }
}

/// The key of a volume that is being re-keyed, and its previous one; the halves of each differ.
fn keys_of(id: VolumeId) -> [[u8; 64]; 2] {
    [0xfe, 0xff].map(|last| {
        let mut key = [id.0[0]; 64];
        key[63] = last;
        key
    })
}

/// A host with both volumes, and the envelope that shreds the first.
struct World {
    dir: tempfile::TempDir,
    operator: OperatorKey,
    /// The key that the host was made with.
    old: RecipientKey,
    volumes: [Volume; 2],
    shredding: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let old = RecipientKey::generate(HOST).expect("key");
        let path = dir.path().join("host.key");
        old.save(&path).expect("save");
        // A second name for the file, so that it is not enough to take its name away.
        fs::hard_link(&path, dir.path().join("link")).expect("link");
        let operator = OperatorKey::generate("alice").expect("key");
        let volumes = IDS.map(|id| volume(id, old.public()));
        let both = bundle(1, volumes.to_vec(), &[]);
        let shredding = bundle(2, volumes[1..].to_vec(), &IDS[..1]);
        let world = Self {
            shredding: sign(&shredding, &[&operator]).expect("valid"),
            dir,
            operator,
            old,
            volumes,
        };
        let (mut custody, mut vault) = world.start();
        let envelope = sign(&both, &[&world.operator]).expect("valid");
        accept(&mut custody, &mut vault, &envelope).expect("accepted");
        world
    }

    /// As a keyd starts.
    fn start(&self) -> (Custody, Vault) {
        start(self.dir.path(), &self.operator)
    }

    fn serves(&self, vault: &Vault, which: usize) -> bool {
        let opened = vault.unseal(&self.volumes[which]);
        opened.is_ok_and(|pages| {
            let keys: Vec<_> = pages.iter().map(SecretMemory::as_bytes).collect();
            keys == keys_of(IDS[which]).each_ref()
        })
    }

    /// Whether the key that the host was made with can be had from any file, by whatever name.
    fn old_key_is_there(&self) -> bool {
        let text =
            |path: &Path| String::from_utf8_lossy(&fs::read(path).expect("read")).into_owned();
        let seed = {
            let aside = tempfile::tempdir().expect("dir");
            self.old.save(&aside.path().join("key")).expect("save");
            let whole = text(&aside.path().join("key"));
            let field = whole.lines().find_map(|l| l.strip_prefix("xwing_seed = "));
            field.expect("a seed").trim_matches('"').to_owned()
        };
        let mut files = fs::read_dir(self.dir.path()).expect("list");
        files.any(|file| text(&file.expect("entry").path()).contains(&seed))
    }
}

fn start(dir: &Path, operator: &OperatorKey) -> (Custody, Vault) {
    let file = StateFile::open(dir).expect("state");
    let named = file.state().and_then(State::host_key);
    let (key, resealed) = host_key::load(file.directory(), named).expect("a key");
    let trust = TrustRoot::new(vec![operator.public().clone()], 1).expect("consistent");
    let mut custody = Custody::new(HOST.to_owned(), trust, file, Releases::default());
    let mut vault = Vault::new(key, resealed);
    custody.recover(&mut vault);
    (custody, vault)
}

fn bundle(epoch: u64, volumes: Vec<Volume>, shred: &[VolumeId]) -> HostBundle {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since.expect("after 1970").as_secs();
    HostBundle {
        host: HOST.to_owned(),
        epoch,
        supersedes: Vec::new(),
        not_before: now - 60,
        expires: now + 3600,
        volumes,
        force_remove: Vec::new(),
        shred: shred.to_vec(),
        groups: Vec::new(),
        workers: None,
        switches: Vec::new(),
        nics: Vec::new(),
        force_remove_nics: Vec::new(),
    }
}

fn accept(custody: &mut Custody, vault: &mut Vault, envelope: &[u8]) -> Result<(), Refusal> {
    let fd = to_memfd(envelope).expect("memfd");
    custody.accept(fd.as_fd(), vault).map(drop)
}

/// Whether keyd would say that the first volume is destroyed.
fn is_told_destroyed(custody: &Custody, vault: &Vault) -> bool {
    let keys = custody.keys(vault);
    let on_disk = |shred: &Shred| shred.state == ShredState::KeyOnDisk;
    !keys.shreds.is_empty() && !keys.shreds.iter().any(on_disk)
}

/// What has to hold at any time. Returns whether the shred is in force.
fn check(world: &World, custody: &Custody, vault: &Vault, after: &str) -> bool {
    assert!(world.serves(vault, 1), "{after}: the other volume");
    let ordered = custody.floor() == 2;
    // Nothing is half in force.
    let state = custody.file.state().expect("a state");
    assert_eq!(state.shredded.contains_key(&IDS[0]), ordered, "{after}");
    assert_eq!(world.serves(vault, 0), !ordered, "{after}");
    if is_told_destroyed(custody, vault) {
        assert!(ordered && !world.old_key_is_there(), "{after}");
    }
    ordered
}

#[test]
fn the_power_may_fail_at_any_step_of_a_shred() {
    let mut interrupted = [0; 2];
    for steps in 0.. {
        let world = World::new();
        let (mut custody, mut vault) = world.start();
        custody.file.directory().steps_left.set(steps);
        let accepted = accept(&mut custody, &mut vault, &world.shredding);
        let after = format!("{steps} steps, before the restart ({accepted:?})");
        check(&world, &custody, &vault, &after);
        let whole = custody.unfinished.is_none() && accepted.is_ok();
        drop((custody, vault));
        let (mut custody, mut vault) = world.start();
        let after = format!("{steps} steps, restarted");
        let ordered = check(&world, &custody, &vault, &after);
        // The next start needs nobody to finish, or to undo.
        assert_eq!(custody.unfinished, None, "{after}");
        assert_eq!(world.old_key_is_there(), !ordered, "{after}");
        for name in ["host.key.new", "resealed.new"] {
            assert!(!world.dir.path().join(name).exists(), "{after}: {name}");
        }
        interrupted[usize::from(ordered)] += u32::from(!whole);
        // The order is carried out whenever it comes again.
        accept(&mut custody, &mut vault, &world.shredding).expect("accepted");
        assert!(check(&world, &custody, &vault, &after), "{after}");
        assert!(is_told_destroyed(&custody, &vault), "{after}");
        if whole {
            break;
        }
    }
    // Both sides of the point of no return were met.
    assert!(
        interrupted.iter().all(|times| *times >= 4),
        "{interrupted:?}"
    );
}

#[test]
fn the_power_may_fail_at_any_step_of_finishing_at_the_start() {
    for steps in 0.. {
        let world = World::new();
        let (mut custody, mut vault) = world.start();
        // As far as the point of no return: from then on no step succeeds.
        custody.file.directory().steps_left.set(12);
        let _ = accept(&mut custody, &mut vault, &world.shredding);
        let committed = custody.floor() == 2;
        assert!(committed && custody.unfinished.is_some(), "{steps}");
        custody.file.directory().steps_left.set(steps);
        custody.finish(&vault);
        let whole = custody.unfinished.is_none();
        check(
            &world,
            &custody,
            &vault,
            &format!("{steps} steps of finishing"),
        );
        drop((custody, vault));
        let (custody, vault) = world.start();
        assert!(check(&world, &custody, &vault, "restarted"));
        assert!(is_told_destroyed(&custody, &vault));
        if whole {
            return;
        }
    }
}

#[test]
fn a_shred_can_follow_a_shred() {
    let world = World::new();
    let (mut custody, mut vault) = world.start();
    accept(&mut custody, &mut vault, &world.shredding).expect("accepted");
    let first = vault.key().public().fingerprint();
    let third = volume(VolumeId([3; 16]), vault.key().public());
    // The second volume still names an entry sealed to the first key, two keys ago by then.
    let next = bundle(
        3,
        vec![world.volumes[1].clone(), third.clone()],
        &[VolumeId([9; 16])],
    );
    let envelope = sign(&next, &[&world.operator]).expect("valid");
    accept(&mut custody, &mut vault, &envelope).expect("accepted");
    assert_ne!(vault.key().public().fingerprint(), first);
    drop((custody, vault));
    let (custody, vault) = world.start();
    assert!(world.serves(&vault, 1));
    assert!(vault.unseal(&third).expect("opened").len() == 2);
    let told = custody.keys(&vault).shreds;
    let order: Vec<_> = told.iter().map(|s| (s.epoch, s.volume)).collect();
    assert_eq!(order, [(3, VolumeId([9; 16])), (2, IDS[0])]);
    assert_eq!(told[0].destroyed_key, told[1].new_key);
}

#[test]
fn a_key_that_was_destroyed_does_not_come_back_from_a_backup() {
    let world = World::new();
    let (mut custody, mut vault) = world.start();
    accept(&mut custody, &mut vault, &world.shredding).expect("accepted");
    drop((custody, vault));
    let path = world.dir.path().join("host.key");
    fs::remove_file(&path).expect("remove");
    world.old.save(&path).expect("save");
    let file = StateFile::open(world.dir.path()).expect("state");
    let named = file.state().and_then(State::host_key);
    let error = host_key::load(file.directory(), named).expect_err("refused");
    assert!(error.to_string().contains("never used again"), "{error}");
}

#[test]
fn a_state_of_before_a_shred_is_not_taken_beside_the_key_of_after_it() {
    let world = World::new();
    let path = world.dir.path().join("accepted");
    let before = fs::read(&path).expect("state");
    let (mut custody, mut vault) = world.start();
    accept(&mut custody, &mut vault, &world.shredding).expect("accepted");
    drop((custody, vault));
    let after = fs::read(&path).expect("state");
    let refused = || {
        let file = StateFile::open(world.dir.path()).expect("state");
        let named = file.state().and_then(State::host_key);
        let error = host_key::load(file.directory(), named).expect_err("refused");
        assert!(error.to_string().contains("whole directory"), "{error}");
    };
    fs::write(&path, before).expect("write");
    refused();
    fs::remove_file(&path).expect("remove");
    refused();
    fs::write(&path, after).expect("write");
    let (_, vault) = world.start();
    assert!(world.serves(&vault, 1) && !world.serves(&vault, 0));
}

#[test]
fn a_next_key_that_never_came_into_force_is_destroyed_at_the_start() {
    let world = World::new();
    for (name, bytes) in [
        ("host.key.new", "half a ke"),
        ("resealed.new", "bulkhead k"),
    ] {
        fs::write(world.dir.path().join(name), bytes).expect("write");
    }
    let (custody, vault) = world.start();
    assert!(world.serves(&vault, 0) && custody.unfinished.is_none());
    for name in ["host.key.new", "resealed.new"] {
        assert!(!world.dir.path().join(name).exists(), "{name}");
    }
}
