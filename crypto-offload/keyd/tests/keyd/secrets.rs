//! Where keys are not: in memory that anyone could read, in the log, in the state.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use bulkhead_bundle::digest_of;
use bulkhead_bundle::text::to_hex;

use crate::bundles::{bundle, encrypted, random_key, rekeyed, signed};
use crate::host::{Host, wait_for};

/// How often some bytes stand in the memory of a process, as far as root can read it.
pub fn occurrences(pid: u32, needle: &[u8]) -> usize {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("mem");
    let mut found = 0;
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').expect("a range");
        if !rest.starts_with('r') {
            continue;
        }
        let (from, to) = range.split_once('-').expect("a range");
        let number = |hex| u64::from_str_radix(hex, 16).expect("an address");
        let (from, to) = (number(from), number(to));
        let mut bytes = vec![0; usize::try_from(to - from).expect("fits")];
        // Secret memory, and what the kernel maps for itself, can't be read.
        if memory.read_exact_at(&mut bytes, from).is_ok() {
            found += bytes.windows(needle.len()).filter(|w| *w == needle).count();
        }
    }
    found
}

pub fn assert_not_in_memory(pid: u32, key: &[u8; 64]) {
    for part in [&key[..], &key[..32], &key[32..]] {
        assert_eq!(occurrences(pid, part), 0, "{} bytes of a key", part.len());
    }
}

#[test]
fn key_bytes_are_in_no_readable_memory_after_a_grant() {
    let keys = [random_key(), random_key(), random_key()];
    let volumes = vec![rekeyed(1, &keys[0], &keys[2]), encrypted(2, &keys[1])];
    let envelope = signed(&bundle(1, volumes));
    let mut host = Host::new();
    host.ask(&envelope);
    let first = host.delivered();
    assert_eq!(first.key, Some(keys[0]));
    assert_eq!(first.previous, Some(keys[2]));
    // keyd waits for the answer.
    for key in &keys {
        assert_not_in_memory(host.pid(), key);
    }
    host.say(&crate::host::yes_to(&first.message));
    host.take(1);
    host.accepted();
    for key in &keys {
        assert_not_in_memory(host.pid(), key);
    }
    // What is there is found: keyd keeps the digest of what it accepted.
    assert!(occurrences(host.pid(), &digest_of(&envelope)) > 0);
}

#[test]
fn key_bytes_are_in_no_readable_memory_when_the_data_plane_is_gone() {
    let key = random_key();
    let mut host = Host::new();
    host.ask(&signed(&bundle(1, vec![encrypted(1, &key)])));
    // The key is on its way, and never received.
    wait_for(|| !host.is_quiet());
    host.dataplane = None;
    host.accepted();
    assert_not_in_memory(host.pid(), &key);
}

#[test]
fn key_bytes_are_neither_logged_nor_kept() {
    let key = random_key();
    let mut host = Host::new();
    host.apply(&signed(&bundle(1, vec![encrypted(1, &key)])), 1);
    let log = fs::read(host.path("log")).expect("log");
    let state = fs::read(host.path("keyd/accepted")).expect("state");
    let forms = [key[..8].to_vec(), to_hex(&key[..8]).into_bytes()];
    for text in [log, state] {
        assert!(!text.is_empty());
        for form in &forms {
            assert!(!text.windows(form.len()).any(|w| w == form));
        }
    }
}

#[test]
fn it_is_locked_in_before_it_says_hello() {
    let host = Host::without_peers();
    let status = fs::read_to_string(format!("/proc/{}/status", host.pid())).expect("status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect("a field").trim().to_owned()
    };
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NoNewPrivs:"), "1");
    for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    if field("VmLck:") == "0 kB" {
        // Said, where the limit on locked memory can't be raised.
        assert!(host.log().contains("memory can't be locked"));
        println!("skipped: locked memory: RLIMIT_MEMLOCK can't be raised here");
    }
    // Not dumpable: its /proc files are root's, whoever it runs as, and ours to read as root.
    let fds = fs::read_dir(format!("/proc/{}/fd", host.pid())).expect("list");
    // The standard streams are whoever's started the tests.
    let standard = |path: &std::path::Path| ["0", "1", "2"].iter().any(|n| path.ends_with(n));
    let open: Vec<_> = fds
        .map(|fd| fd.expect("entry").path())
        .filter(|path| !standard(path))
        .filter_map(|path| fs::read_link(path).ok())
        .collect();
    let inside = |path: &std::path::PathBuf| path.starts_with(host.path("keyd"));
    let files = open.iter().filter(|path| path.is_absolute());
    let others: Vec<_> = files
        .filter(|p| !inside(p) && !p.starts_with("/dev"))
        .collect();
    assert_eq!(others, Vec::<&std::path::PathBuf>::new());
}
