//! Debian packages: what is missing is installed, after a line that says what and why.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use bulkhead_integration::processes::installed;

/// A program that is needed.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Its name; of what is no program, the path of a file.
    pub program: &'static str,
    /// The package that has it.
    pub package: &'static str,
    /// What for.
    pub why: &'static str,
    /// Oldest version that does, as (major, minor); none: any.
    pub at_least: Option<(u32, u32)>,
}

const fn need(program: &'static str, package: &'static str, why: &'static str) -> Need {
    Need {
        program,
        package,
        why,
        at_least: None,
    }
}

/// What guests need.
pub const GUEST: &[Need] = &[
    Need {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
        why: "boots the guests",
        // `reconnect-ms` of a chardev.
        at_least: Some((9, 2)),
    },
    need("busybox", "busybox-static", "is the guests' user land"),
    need("lz4", "lz4", "unpacks the guests' kernel"),
    need("mkfs.ext4", "e2fsprogs", "makes the guests' file systems"),
];

/// What tests need beside that.
pub const TESTS: &[Need] = &[
    need(
        "cryptsetup",
        "cryptsetup-bin",
        "opens volumes with dm-crypt in a guest",
    ),
    QEMU_STORAGE_DAEMON,
    FIO,
    need("ip", "iproute2", "makes the interfaces of network tests"),
    need("iperf3", "iperf3", "loads the guests' network cards"),
    need(
        "ethtool",
        "ethtool",
        "switches offloads of the guests' network cards on and off",
    ),
    need(
        "ethtool",
        "ethtool",
        "switches offloads of these on and off",
    ),
    need(
        "/usr/lib/systemd/systemd",
        "systemd",
        "is rot's parent in a container of its own",
    ),
    need(
        "valgrind",
        "valgrind",
        "follows secrets through the cipher, to branches and addresses",
    ),
    OPENSSL,
];

/// What `cargo xtask bench crypto` needs.
pub const BENCH: &[Need] = &[
    OPENSSL,
    need(
        "llvm-mca-19",
        "llvm-19",
        "shows which execution ports a loop fills",
    ),
    need("objdump", "binutils", "takes the loops out of a program"),
];

/// What `cargo xtask bench block` needs.
pub const BLOCK: &[Need] = &[QEMU_STORAGE_DAEMON, FIO];

/// What `cargo xtask bench net` needs.
pub const NET: &[Need] = &[
    TESTPMD,
    need(
        "ip",
        "iproute2",
        "makes the interfaces that frames leave by",
    ),
];

/// DPDK's program for measurements; its package brings all drivers along.
const TESTPMD: Need = need(
    "dpdk-testpmd",
    "dpdk-dev",
    "drives network cards without a guest, and is a peer that they are measured beside",
);

/// Load on bare files.
const FIO: Need = need(
    "fio",
    "fio",
    "shows what a bare file gives, without a guest's rings",
);

/// QEMU's back-end.
const QEMU_STORAGE_DAEMON: Need = need(
    "qemu-storage-daemon",
    "qemu-utils",
    "is the peer that the tests' own frontend is checked against, and that disks are measured beside",
);

/// Debian's OpenSSL, linked statically. The path is also in `benches/crypto/build.rs`.
const OPENSSL: Need = need(
    "/usr/lib/x86_64-linux-gnu/libcrypto.a",
    "libssl-dev",
    "is a peer that the ciphers are measured beside",
);

/// Installs what is missing; a line for people, with the packages that were installed.
///
/// # Errors
/// When something is missing and can't be installed, with what to do.
pub fn ensure(needs: &[&Need]) -> Result<String, Box<dyn Error>> {
    let missing: Vec<&&Need> = needs.iter().filter(|need| !is_there(need)).collect();
    if missing.is_empty() {
        return Ok("everything needed is installed".to_owned());
    }
    for need in &missing {
        println!(
            "  installing {}: {} {}",
            need.package, need.program, need.why
        );
    }
    let packages: BTreeSet<&str> = missing.iter().map(|need| need.package).collect();
    let list = packages.iter().copied().collect::<Vec<_>>().join(" ");
    if !nix::unistd::getuid().is_root() {
        return Err(format!("only root can install packages; run: apt-get install {list}").into());
    }
    if missing.iter().any(|need| need.at_least.is_some()) {
        add_backports()?;
    }
    apt(&["update"])?;
    for need in &missing {
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        let backports = format!("{}-backports", codename());
        if need.at_least.is_some() && backports_are_known(&backports) {
            arguments.extend(["-t", &backports]);
        }
        arguments.push(need.package);
        apt(&arguments)?;
    }
    if let Some(need) = missing.iter().find(|need| !is_there(need)) {
        return Err(format!(
            "{} is still missing, or too old, after {} was installed",
            need.program, need.package
        )
        .into());
    }
    Ok(format!("installed {list}"))
}

fn is_there(need: &Need) -> bool {
    let sbin = Path::new("/usr/sbin").join(need.program);
    let path = installed(need.program).or_else(|| sbin.is_file().then_some(sbin));
    let Some(path) = path else {
        return false;
    };
    let Some(at_least) = need.at_least else {
        return true;
    };
    let output = Command::new(path).arg("--version").output();
    output.is_ok_and(|o| version_in(&String::from_utf8_lossy(&o.stdout)) >= Some(at_least))
}

/// The first word like `10.0.2` or `43+dfsg-1` in a text.
fn version_in(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let digits = |text: &str| {
            text.find(|c: char| !c.is_ascii_digit())
                .unwrap_or(text.len())
        };
        let (major, rest) = word.split_at(digits(word));
        let rest = rest.strip_prefix('.').unwrap_or_default();
        let minor = rest.split_at(digits(rest)).0;
        Some((major.parse().ok()?, minor.parse().unwrap_or(0)))
    })
}

fn apt(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    let output = Command::new("apt-get")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("apt-get can't be started ({e}): is this Debian?"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("apt-get {} failed:\n{text}", arguments.join(" ")).into())
}

fn codename() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let line = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    line.unwrap_or("stable").trim_matches('"').to_owned()
}

/// Debian 12 has an old QEMU; its backports have a new one, on the same mirror.
fn add_backports() -> Result<(), Box<dyn Error>> {
    let codename = codename();
    let suite = format!("{codename}-backports");
    if codename != "bookworm" || backports_are_known(&suite) {
        return Ok(());
    }
    let mirror = mirror(&codename).ok_or("no mirror of Debian is configured for apt")?;
    let source = format!(
        "Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\n\
         Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    println!("  adding {suite}, from the mirror that apt uses");
    Ok(fs::write(
        format!("/etc/apt/sources.list.d/{suite}.sources"),
        source,
    )?)
}

fn apt_sources() -> Vec<String> {
    let folder = fs::read_dir("/etc/apt/sources.list.d");
    let files = folder.into_iter().flatten().flatten().map(|e| e.path());
    files
        .chain(["/etc/apt/sources.list".into()])
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect()
}

fn backports_are_known(suite: &str) -> bool {
    apt_sources().iter().any(|text| text.contains(suite))
}

/// Where apt gets the release from, in either of its two source formats.
fn mirror(codename: &str) -> Option<String> {
    for text in apt_sources() {
        for stanza in text.split("\n\n") {
            let field = |name: &str| {
                let line = stanza.lines().find_map(|l| l.strip_prefix(name))?;
                line.split_whitespace().next().map(str::to_owned)
            };
            if field("Suites:").as_deref() == Some(codename) {
                return field("URIs:");
            }
            let mut words = stanza
                .lines()
                .filter(|line| line.starts_with("deb "))
                .map(|line| line.split_whitespace().filter(|w| !w.starts_with('[')));
            let found = words.find_map(|mut line| {
                let (_, uri, suite) = (line.next()?, line.next()?, line.next()?);
                (suite == codename).then(|| uri.to_owned())
            });
            if found.is_some() {
                return found;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)";
        assert_eq!(version_in(text), Some((10, 0)));
        assert!(version_in("QEMU emulator version 7.2.17") < Some((9, 2)));
        assert_eq!(version_in("kcov 43+dfsg-1~bpo12+1"), Some((43, 0)));
        assert_eq!(version_in("none here"), None);
    }
}
