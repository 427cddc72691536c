//! What can be read of the data plane's memory from outside, by root.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::harness::{Host, grant, key, key_page};

/// What a search of a process's memory saw.
#[derive(Debug, Default)]
struct Search {
    found: Vec<String>,
    unreadable: usize,
}

/// Looks for any of the needles in everything that can be read of a process.
fn search(pid: u32, needles: &[&[u8]]) -> Search {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("mem");
    let mut search = Search::default();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().expect("range"), words.next().expect("rights"));
        let (start, end) = range.split_once('-').expect("a range");
        let address = |text| u64::from_str_radix(text, 16).expect("an address");
        let (start, end) = (address(start), address(end));
        if !rights.starts_with('r') || line.contains("[v") {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(end - start).expect("fits")];
        if memory.read_exact_at(&mut bytes, start).is_err() {
            search.unreadable += 1;
            continue;
        }
        for needle in needles {
            if bytes.windows(needle.len()).any(|window| window == *needle) {
                search.found.push(line.to_owned());
            }
        }
    }
    search
}

/// The quarters of a key: half of each half, and the first round keys.
fn quarters(key: &[u8; 64]) -> Vec<&[u8]> {
    key.chunks(16).collect()
}

#[test]
fn no_part_of_a_key_is_in_memory_that_can_be_read() {
    if !nix::unistd::geteuid().is_root() {
        println!(
            "skipped: no_part_of_a_key_is_in_memory_that_can_be_read: it takes root to read it"
        );
        return;
    }
    let mut host = Host::start();
    host.served(1);
    let serial = grant(1).serial;
    let control = search(host.pid(), &[serial.as_bytes()]);
    assert_ne!(
        control.found,
        Vec::<String>::new(),
        "the search finds what is there"
    );
    let key = key(1);
    let while_served = search(host.pid(), &quarters(&key));
    assert_eq!(while_served.found, Vec::<String>::new());
    if control.unreadable == 0 {
        println!("skipped: the arena is unreadable: no memfd_secret here");
    }
    host.revoke(1);
    let after = search(host.pid(), &quarters(&key));
    assert_eq!(after.found, Vec::<String>::new());
}

#[test]
fn the_page_that_brought_a_key_is_wiped() {
    let host = Host::start();
    let page = key_page(&key(1));
    let answer = host.grant(&grant(1), &[page.as_fd()]);
    assert!(
        matches!(
            answer,
            bulkhead_protocol::keys::DataplaneToKeyd::Granted { .. }
        ),
        "{answer:?}"
    );
    assert_eq!(page.as_bytes(), [0; 64]);
}

#[test]
fn its_threads_have_no_capability_no_new_privileges_and_a_filter() {
    let mut host = Host::start();
    host.served(1);
    let mut threads = 0;
    for entry in fs::read_dir(format!("/proc/{}/task", host.pid())).expect("threads") {
        let status = entry.expect("entry").path().join("status");
        let status = fs::read_to_string(status).expect("status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect("the field").trim().to_owned()
        };
        // The kernel's own threads of a ring are listed here, too.
        if field("Name:").starts_with("iou-") {
            continue;
        }
        threads += 1;
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let held = u64::from_str_radix(&field(set), 16);
            assert_eq!(held, Ok(0), "{} {set}", field("Name:"));
        }
        assert_eq!(
            (field("NoNewPrivs:"), field("Seccomp:")),
            ("1".into(), "2".into())
        );
    }
    assert_eq!(
        threads, 4,
        "the control thread, two workers and the rekeyer"
    );
    let limits = fs::read_to_string(format!("/proc/{}/limits", host.pid())).expect("limits");
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    assert_eq!(
        core.map(|line| line.split_whitespace().rev().nth(1)),
        Some(Some("0"))
    );
}
