//! The demo's network: a switch with two cards and a TAP of the host's as its way out, in a network namespace of the
//! demo's own. A guest pings the host and fetches a file from it; another fetches one from that guest, and then says
//! that it is somebody else.

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use bulkhead_integration::guest::boot::Boot;
use bulkhead_integration::guest::{BOOT_PATIENCE, Guest, GuestNic, GuestSpec, Machine, value_in};
use bulkhead_integration::host::nics::{NicSpec, switch};
use bulkhead_integration::host::{Host, uid_of};
use bulkhead_integration::network::{enter_namespace, has_taps, ip, make_tap};
use bulkhead_integration::processes::{Process, installed};
use bulkhead_integration::random::Random;

use super::WORK;
use crate::report::Step;

/// The switch's way out.
const TAP: &str = "bh-lan";
/// Names of the cards, their addresses, and those of the host and of both guests.
const CARDS: [(&str, &str); 2] = [("net1", "52:54:00:00:00:01"), ("net2", "52:54:00:00:00:02")];
const HOST: &str = "10.7.0.254";
const GUESTS: [&str; 2] = ["10.7.0.1", "10.7.0.2"];
/// Whom the second guest says it is.
const STRANGER: &str = "52:54:00:00:00:99";
/// Bytes of the file that is fetched.
const FILE_BYTES: usize = 8 << 20;

/// The network around the host.
#[derive(Debug)]
pub struct Network {
    /// Serves the file.
    _httpd: Process,
    /// The file's SHA-256.
    sum: String,
}

impl Network {
    /// Makes the namespace and the TAP; none, after a line that says why, where this user may not.
    ///
    /// # Errors
    /// When a step fails that should not.
    pub fn make(host: &Host) -> Result<Option<Self>, Box<dyn Error>> {
        if !enter_namespace("network") || !has_taps("network") {
            return Ok(None);
        }
        make_tap(TAP, uid_of("agent"));
        ip(&format!("addr add {HOST}/24 dev {TAP}"));
        let folder = host.path("www");
        fs::create_dir_all(&folder)?;
        let file = folder.join("file");
        fs::write(&file, Random::new(7).bytes(FILE_BYTES))?;
        let sum = Command::new("sha256sum").arg(&file).output()?;
        let sum = String::from_utf8_lossy(&sum.stdout);
        let sum = sum.get(..64).ok_or("no sum of the file")?.to_owned();
        let busybox = installed("busybox").ok_or("busybox is not installed")?;
        let at = format!("{HOST}:80");
        let folder = folder.display().to_string();
        let arguments = ["httpd", "-f", "-p", &at, "-h", &folder];
        Ok(Some(Self {
            _httpd: Process::start(&busybox, &arguments)?,
            sum,
        }))
    }

    /// What the bundle says of it.
    pub fn stanzas() -> String {
        let mut stanzas = switch("lan", Some(TAP));
        for (name, mac) in CARDS {
            stanzas.push_str(&NicSpec::on_switch(name, mac, "lan").stanza());
        }
        stanzas
    }

    /// Two guests at once.
    pub fn show(&self, host: &Host, boot: &Boot) -> Step {
        let mut first = start(host, boot, 0, &serving())?;
        first.wait_for("serves=1", BOOT_PATIENCE + WORK)?;
        let mut second = start(host, boot, 1, &fetching())?;
        let console = second.finish(BOOT_PATIENCE + WORK)?;
        fs::write(host.path("guest-net1.log"), first.console())?;
        fs::write(host.path("guest-net2.log"), &console)?;
        for (console, from) in [(first.console(), "the host"), (console.clone(), "a guest")] {
            if value_in(&console, "fetched").as_ref() != Some(&self.sum) {
                return Err(
                    format!("what was fetched from {from} is not the file:\n{console}").into(),
                );
            }
        }
        let dropped = host.tx_drops(CARDS[1].0, "spoofed_mac")?;
        if value_in(&console, "stranger").as_deref() != Some("unheard") || dropped == 0 {
            return Err(format!("{dropped} frames of a stranger dropped:\n{console}").into());
        }
        Ok(format!(
            "{} pinged the host and fetched {} MiB from it over {TAP}; {} fetched the same from {} through the switch, \
             SHA-256 {}…; as {STRANGER} it was not heard, {dropped} frames dropped as spoofed_mac",
            CARDS[0].0,
            FILE_BYTES >> 20,
            CARDS[1].0,
            CARDS[0].0,
            self.sum.get(..16).unwrap_or(&self.sum)
        ))
    }
}

fn start(host: &Host, boot: &Boot, index: usize, script: &str) -> Result<Guest, Box<dyn Error>> {
    let (name, mac) = CARDS[index];
    let dir: PathBuf = host.path(name);
    fs::create_dir_all(&dir)?;
    let spec = GuestSpec {
        dir: &dir,
        disks: &[],
        script,
        programs: &[],
        files: &[],
        modules: &[],
        uid: None,
        machine: Machine {
            nics: vec![GuestNic::new(host.socket(name), mac)],
            ..Machine::default()
        },
    };
    Ok(Guest::start(boot, &spec)?)
}

/// Brings a guest's card up, and fetches the file from an address.
fn fetch(index: usize, from: &str) -> String {
    format!(
        "ip link set lo up\n\
         ip addr add {}/24 dev eth0\n\
         ip link set eth0 up\n\
         ping -c 1 -W 60 {from}\n\
         wget -q -O /tmp/file http://{from}/file\n\
         echo fetched=$(sha256sum < /tmp/file | cut -c1-64)\n",
        GUESTS[index]
    )
}

/// The first guest: fetches from the host, then serves what it has until the demo ends it.
fn serving() -> String {
    format!(
        "{}httpd -h /tmp\necho serves=1\nwhile sleep 1; do :; done",
        fetch(0, HOST)
    )
}

/// The second: fetches from the first, then sends with another address than its card's.
fn fetching() -> String {
    format!(
        "{}\
         ip link set eth0 down\n\
         ip link set eth0 address {STRANGER}\n\
         ip link set eth0 up\n\
         if ping -c 2 -W 1 {}; then echo stranger=heard; else echo stranger=unheard; fi",
        fetch(1, GUESTS[0]),
        GUESTS[0]
    )
}
