//! Bundles that are refused, each with its own message, and with nothing changed: not the state on
//! disk, nor an open file, nor anything a peer holds.

use std::fs;
use std::os::unix::fs::symlink;

use bulkhead_bundle::sign::sign_payload;
use bulkhead_bundle::{HostBundle, Volume, sign};
use bulkhead_protocol::admin::AdminReply;
use bulkhead_protocol::envelope::MAX_ENVELOPE_BYTES;
use minicbor::{Decoder, Encoder};
use nix::sys::stat::Mode;

use crate::bundles::{alice, bundle, id, mallory, now, signed, volume};
use crate::world::World;

/// A host with volume 1 in use, by a bundle of epoch 5.
fn world() -> World {
    let mut world = World::new();
    world.apply_fully(&bundle(5, vec![volume(1)]));
    world.peers.connected.insert(id(1));
    world
}

/// The next bundle: volume 1 stays, this one comes.
fn next(volume_2: Volume) -> HostBundle {
    bundle(6, vec![volume(1), volume_2])
}

/// The envelope is refused with these words, and nothing is changed.
fn refused(world: &mut World, envelope: &[u8], words: &[&str]) {
    let before = world.snapshot();
    match world.apply(envelope) {
        AdminReply::Refused { reason } => {
            for words in words {
                assert!(reason.contains(words), "{reason:?} does not say {words:?}");
            }
        }
        other => panic!("not refused: {other:?}"),
    }
    assert_eq!(world.snapshot(), before);
    // And the host goes on as ever: a good bundle is applied.
    world.peers.keyd_refuses = None;
    world.apply_fully(&next(volume(2)));
}

/// The path of volume 2 is refused.
fn refused_path(world: &mut World, path: &str, words: &[&str]) {
    let mut volume_2 = volume(2);
    volume_2.path = path.to_owned();
    refused(world, &signed(&next(volume_2)), words);
}

/// An envelope as written, without one of its signatures.
fn without_signature(envelope: &[u8], index: u64) -> Vec<u8> {
    let mut d = Decoder::new(envelope);
    d.tag().expect("tag");
    d.array().expect("COSE_Sign");
    for _ in 0..3 {
        d.skip().expect("headers and payload");
    }
    let head = d.position();
    let count = d.array().expect("signatures").expect("of known length");
    let mut out = envelope[..head].to_vec();
    out.extend(
        Encoder::new(Vec::new())
            .array(count - 1)
            .expect("array")
            .writer(),
    );
    for number in 0..count {
        let start = d.position();
        d.skip().expect("signature");
        if number != index {
            out.extend(&envelope[start..d.position()]);
        }
    }
    out
}

#[test]
fn refused_one_signature_missing() {
    let envelope = signed(&next(volume(2)));
    for (index, algorithm) in [(0, "ESP384"), (1, "ML-DSA-87")] {
        let text = format!("the {algorithm} signature of operator alice is missing");
        refused(&mut world(), &without_signature(&envelope, index), &[&text]);
    }
}

#[test]
fn refused_wrong_key() {
    let envelope = sign(&next(volume(2)), &[mallory()]).expect("signs");
    refused(
        &mut world(),
        &envelope,
        &["unknown key", "trust root does not name"],
    );
}

#[test]
fn refused_changed_after_signing() {
    let mut envelope = signed(&next(volume(2)));
    let name = envelope.windows(5).position(|bytes| bytes == b"disk2");
    envelope[name.expect("a name") + 4] = b'3';
    refused(
        &mut world(),
        &envelope,
        &["ESP384 signature of operator alice is wrong"],
    );
}

#[test]
fn refused_other_host() {
    let mut other = next(volume(2));
    other.host = "host-b".to_owned();
    refused(
        &mut world(),
        &signed(&other),
        &["is for host \"host-b\", this is \"host-a\""],
    );
}

#[test]
fn refused_epoch_not_above_the_floor() {
    for epoch in [4, 5] {
        let old = bundle(epoch, vec![volume(1), volume(2)]);
        refused(&mut world(), &signed(&old), &["is not above the floor 5"]);
    }
}

#[test]
fn refused_expired() {
    let mut late = next(volume(2));
    (late.not_before, late.expires) = (now() - 20, now() - 10);
    refused(&mut world(), &signed(&late), &["the bundle expired at"]);
}

#[test]
fn refused_not_yet_valid() {
    let mut early = next(volume(2));
    early.not_before = now() + 600;
    refused(&mut world(), &signed(&early), &["not valid before"]);
}

#[test]
fn refused_not_canonical() {
    // The payload: the map's length in a longer form than need be.
    let mut payload = minicbor::to_vec(next(volume(2))).expect("encodes");
    assert_eq!(payload[0], 0xa7);
    payload.splice(0..1, [0xb8, 0x07]);
    let envelope = sign_payload(payload, &[alice()]).expect("signs");
    refused(&mut world(), &envelope, &["not canonical", "payload"]);
    // The envelope: a byte behind its end.
    let mut envelope = signed(&next(volume(2)));
    envelope.push(0);
    refused(
        &mut world(),
        &envelope,
        &["not canonical", "COSE structure"],
    );
}

#[test]
fn refused_over_the_size_cap() {
    let envelope = vec![0; MAX_ENVELOPE_BYTES + 1];
    refused(&mut world(), &envelope, &["over the size cap of 1048576"]);
}

#[test]
fn refused_unknown_field() {
    let mut payload = minicbor::to_vec(next(volume(2))).expect("encodes");
    payload[0] = 0xa8;
    payload.extend([0x0d, 0x00]);
    let envelope = sign_payload(payload, &[alice()]).expect("signs");
    refused(&mut world(), &envelope, &["unknown field 13"]);
}

#[test]
fn refused_not_an_envelope() {
    refused(
        &mut world(),
        b"host = \"host-a\"\n",
        &["the envelope is malformed"],
    );
}

#[test]
fn refused_path_outside_the_allowed_directories() {
    let mut world = world();
    let volumes = world.path("volumes").display().to_string();
    refused_path(
        &mut world,
        "/etc/passwd",
        &["volume disk2", "/etc/passwd is outside", &volumes],
    );
}

#[test]
fn refused_path_that_only_begins_like_an_allowed_one() {
    let mut world = world();
    let twin = world.path("volumes-of-others");
    fs::create_dir(&twin).expect("mkdir");
    let path = twin.join("disk2.img").display().to_string();
    refused_path(&mut world, &path, &["is outside the allowed directories"]);
}

#[test]
fn refused_path_with_dots() {
    let mut world = world();
    let mut volume_2 = volume(2);
    volume_2.path = "../other/disk2.img".to_owned();
    // Signing refuses it as well, so that it has to be signed unlooked at.
    let payload = minicbor::to_vec(next(volume_2)).expect("encodes");
    let envelope = sign_payload(payload, &[alice()]).expect("signs");
    refused(
        &mut world,
        &envelope,
        &["\"../other/disk2.img\" has an empty component, `.` or `..`"],
    );
}

#[test]
fn refused_file_that_is_not_there() {
    refused_path(
        &mut world(),
        "nowhere.img",
        &["nowhere.img is in none of the allowed"],
    );
}

#[test]
fn refused_symlink_as_final_component() {
    let mut world = world();
    symlink("disk2.img", world.path("volumes/link.img")).expect("link");
    refused_path(
        &mut world,
        "link.img",
        &["link.img goes through a symbolic link"],
    );
}

#[test]
fn refused_symlink_as_intermediate_component() {
    let mut world = world();
    fs::create_dir(world.path("volumes/real")).expect("mkdir");
    fs::rename(
        world.path("volumes/disk3.img"),
        world.path("volumes/real/disk3.img"),
    )
    .expect("mv");
    symlink("real", world.path("volumes/link")).expect("link");
    refused_path(
        &mut world,
        "link/disk3.img",
        &["goes through a symbolic link"],
    );
}

#[test]
fn refused_same_file_twice() {
    let mut world = world();
    // Volume 1 has it by its relative path.
    let path = world.path("volumes/disk1.img").display().to_string();
    refused_path(
        &mut world,
        &path,
        &["volumes disk1 and disk2", "the same file"],
    );
}

#[test]
fn refused_hard_link_to_the_same_file() {
    let mut world = world();
    fs::hard_link(
        world.path("volumes/disk1.img"),
        world.path("volumes/hard.img"),
    )
    .expect("link");
    refused_path(
        &mut world,
        "hard.img",
        &["volumes disk1 and disk2", "hard link"],
    );
}

#[test]
fn refused_same_new_file_twice() {
    let mut world = world();
    fs::hard_link(
        world.path("volumes/disk3.img"),
        world.path("volumes/hard.img"),
    )
    .expect("link");
    let mut twin = volume(2);
    twin.path = "hard.img".to_owned();
    let envelope = signed(&bundle(6, vec![volume(1), volume(3), twin]));
    refused(&mut world, &envelope, &["volumes disk3 and disk2"]);
}

#[test]
fn refused_special_files() {
    let mut world = world();
    nix::unistd::mkfifo(&world.path("volumes/pipe"), Mode::S_IRWXU).expect("fifo");
    refused_path(
        &mut world,
        "pipe",
        &["is a named pipe", "regular file or a block device"],
    );
    let mut world = self::world();
    let null = nix::sys::stat::makedev(1, 3);
    let kind = nix::sys::stat::SFlag::S_IFCHR;
    nix::sys::stat::mknod(&world.path("volumes/null"), kind, Mode::S_IRWXU, null).expect("mknod");
    refused_path(&mut world, "null", &["is a character device"]);
    let mut world = self::world();
    fs::create_dir(world.path("volumes/directory")).expect("mkdir");
    refused_path(&mut world, "directory", &["is a directory"]);
    let mut world = self::world();
    refused_path(&mut world, "/dev/null", &["/dev/null is outside"]);
}

#[test]
fn refused_file_too_small() {
    let mut world = world();
    world.make_file("small.img", 4096);
    refused_path(
        &mut world,
        "small.img",
        &["has 4096 bytes, the volume 1048576"],
    );
}

#[test]
fn refused_larger_than_the_file_it_has() {
    let mut world = world();
    world.peers.connected.clear();
    let mut grown = volume(1);
    grown.size_bytes *= 2;
    let envelope = signed(&bundle(6, vec![grown]));
    refused(
        &mut world,
        &envelope,
        &["volume disk1", "has 1048576 bytes, the volume 2097152"],
    );
}

#[test]
fn refused_shrinking() {
    let mut world = world();
    let mut smaller = volume(1);
    smaller.size_bytes /= 2;
    refused(
        &mut world,
        &signed(&bundle(6, vec![smaller, volume(2)])),
        &[
            "volume disk1: it has 1048576 bytes, and the bundle gives it 524288",
            "never shrinks",
        ],
    );
}

#[test]
fn refused_removal_in_use_without_force() {
    let mut world = world();
    let envelope = signed(&bundle(6, vec![volume(2)]));
    let words = [
        "volume disk1 is in use",
        "a frontend is connected",
        "force_remove",
    ];
    refused(&mut world, &envelope, &words);
}

#[test]
fn refused_change_in_use_without_force_undoes_what_was_prepared() {
    let mut world = World::new();
    world.apply_fully(&bundle(5, vec![volume(1), volume(2)]));
    world.peers.connected.insert(id(2));
    let mut changed = volume(2);
    changed.serial = "other".to_owned();
    let before = world.snapshot();
    world.peers.log.clear();
    let reply = world.apply(&signed(&bundle(6, vec![changed])));
    assert!(matches!(reply, AdminReply::Refused { reason } if reason.contains("volume disk2")));
    let log = [
        "dataplane status",
        "dataplane prepare 1 force=false",
        "dataplane prepare 2 force=false",
        "dataplane cancel 1",
        "dataplane cancel 2",
    ];
    assert_eq!(world.peers.log, log);
    assert_eq!(world.snapshot(), before);
}

#[test]
fn refused_by_keyd() {
    let mut world = world();
    world.peers.connected.clear();
    world.peers.keyd_refuses = Some("no key is sealed to me\nreally".to_owned());
    let envelope = signed(&bundle(6, vec![volume(2)]));
    let words = ["keyd refused the bundle: no key is sealed to me really"];
    let before = world.snapshot();
    match world.apply(&envelope) {
        AdminReply::Refused { reason } => assert_eq!(reason, words[0]),
        other => panic!("{other:?}"),
    }
    assert!(
        world
            .peers
            .log
            .ends_with(&["keyd accept 6".to_owned(), "dataplane cancel 1".to_owned()])
    );
    assert_eq!(world.snapshot(), before);
    world.peers.keyd_refuses = None;
    world.apply_fully(&bundle(6, vec![volume(2)]));
}

#[test]
fn refused_old_bundle_by_keyd_alone() {
    // keyd has a floor of its own: one that lies above the agent's is not passed.
    let mut world = world();
    let last_digest = world.peers.last_digest;
    world.peers.floor = 9;
    let before = world.snapshot();
    let reply = world.apply(&signed(&next(volume(2))));
    let AdminReply::Refused { reason } = reply else {
        panic!("{reply:?}")
    };
    assert!(
        reason.contains("epoch 6 is not above the floor 9"),
        "{reason}"
    );
    assert_eq!(world.snapshot(), before);
    assert_eq!(world.peers.last_digest, last_digest);
}
