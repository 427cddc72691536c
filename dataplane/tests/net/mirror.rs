//! What a card sends and receives, in a file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bulkhead_dataplane::port::mirror::MirrorFile;
use bulkhead_integration::card::{Card, Options};
use bulkhead_protocol::net::MirrorSpec;

use crate::rig::{PATIENCE, Rig, frame, mac};

/// A mirror, and its file to be read.
fn mirror(snap_bytes: u32) -> (Arc<MirrorFile>, File) {
    let named = tempfile::NamedTempFile::new_in(".").expect("a file");
    let file = OpenOptions::new().append(true).open(named.path());
    let spec = MirrorSpec {
        file: "a card".to_owned(),
        snap_bytes,
        most_bytes: 1 << 20,
    };
    let mirror = MirrorFile::begin(file.expect("open").into(), "a card", &spec);
    (mirror.expect("begun"), named.reopen().expect("open"))
}

fn holds(file: &File, bytes: &[u8]) -> bool {
    let length = file.metadata().expect("its length").len();
    let mut all = vec![0; usize::try_from(length).expect("short")];
    file.read_exact_at(&mut all, 0).expect("read");
    all.windows(bytes.len()).any(|window| window == bytes)
}

fn wait_for(file: &File, bytes: &[u8]) {
    let until = std::time::Instant::now() + PATIENCE;
    while !holds(file, bytes) {
        assert!(std::time::Instant::now() < until, "it is not mirrored");
        std::thread::yield_now();
    }
}

#[test]
fn a_mirror_has_what_its_card_sends_and_receives_while_it_is_one() {
    let mut rig = Rig::new();
    let usual = Options::default();
    let [(of_a, mut a), (_, mut b)] = rig.two(&usual, &usual);
    let ((first, first_file), (second, second_file)) = (mirror(2000), mirror(60));
    let set = |rig: &Rig, a: &Card, to: Option<&Arc<MirrorFile>>| {
        let (id, to) = (of_a.id, to.map(Arc::clone));
        let set = rig.ask(move |server| server.set_mirror(id, to));
        set.expect("it is attached");
        // Its worker answers, and has done what it was told before.
        a.enable(0, true).expect("enabled");
    };
    let unseen = frame(1, mac(2), (1, 1), 100);
    a.send(0, &unseen).expect("sent");
    b.receive(0).expect("received");
    set(&rig, &a, Some(&first));
    let (out, back) = (frame(1, mac(2), (2, 2), 900), frame(2, mac(1), (3, 3), 200));
    a.send(0, &out).expect("sent");
    b.receive(0).expect("received");
    b.send(0, &back).expect("sent");
    a.receive(0).expect("received");
    wait_for(&first_file, &out);
    wait_for(&first_file, &back);
    assert!(!holds(&first_file, &unseen));
    // Another one, which has the beginnings of frames.
    set(&rig, &a, Some(&second));
    let next = frame(1, mac(2), (4, 4), 300);
    a.send(0, &next).expect("sent");
    wait_for(&second_file, &next[..60]);
    assert!(!holds(&second_file, &next[..61]) && !holds(&first_file, &next[..60]));
    set(&rig, &a, None);
    let last = frame(1, mac(2), (5, 5), 300);
    a.send(0, &last).expect("sent");
    for expected in [&next, &last] {
        assert_eq!(&b.receive(0).expect("received").frame, expected);
    }
    // It ends with what it had, and the process with it.
    drop(rig);
    assert!(!holds(&second_file, &last[..60]));
    assert_eq!(second.counts().frames, 1);
    assert_eq!((first.counts().frames, first.counts().dropped), (2, 0));
}
