//! The command line: everything rot knows about its host. It reads no configuration.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::ffi::{OsStr, OsString};
use std::io;
use std::num::NonZeroU32;
use std::path::PathBuf;

use bulkhead_interfaces::InterfaceName;
use bulkhead_protocol::rot::Role;
use clap::Parser;

/// The root of trust: measures, starts, connects and restarts the other processes of a host.
#[derive(Debug, Clone, PartialEq, Eq, Parser)]
#[command(name = "bulkhead-rot", version, about)]
pub struct Arguments {
    /// Name of this host, as bundles target it
    #[arg(long, value_name = "NAME")]
    pub host: String,
    /// Where bulkhead-keyd, bulkhead-agent and bulkhead-dataplane lie
    #[arg(long, value_name = "DIR")]
    pub bin_dir: PathBuf,
    /// Where keyd and the agent keep what outlives them; made if its parent is there
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where the sockets are bound; made if its parent is there; one instance for each
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// The agent's trust root: whose signatures count
    #[arg(long, value_name = "FILE")]
    pub trust: PathBuf,
    /// keyd's own trust root [default: the same file]
    #[arg(long, value_name = "FILE")]
    pub keyd_trust: Option<PathBuf>,
    /// A directory that volumes may lie in; may be given several times
    #[arg(long = "volume-dir", value_name = "DIR", required = true)]
    pub volume_dirs: Vec<PathBuf>,
    /// The directory that mirrors of NICs are written in; the agent's user makes files there
    #[arg(long, value_name = "DIR")]
    pub mirror_dir: Option<PathBuf>,
    /// An interface that NICs may use by AF_XDP, whole queues of it; may be given several times
    #[arg(long = "xdp", value_name = "INTERFACE")]
    pub xdp: Vec<InterfaceName>,
    /// User and group id of keyd [default: rot's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..i64::from(u32::MAX)))]
    pub keyd_uid: Option<u32>,
    /// User and group id of the agent [default: rot's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..i64::from(u32::MAX)))]
    pub agent_uid: Option<u32>,
    /// User and group id of the data plane [default: rot's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..i64::from(u32::MAX)))]
    pub dataplane_uid: Option<u32>,
    /// Owner of the admin socket [default: rot's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..i64::from(u32::MAX)))]
    pub admin_uid: Option<u32>,
    /// Worker threads of the data plane, whatever the bundle says [default: as the bundle says, or 1]
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroU32>,
    /// CPUs of those workers, like 2,4-6, whatever the bundle says
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<String>,
}

impl Arguments {
    /// The same with absolute paths without a trailing slash: rot leaves its working directory,
    /// and a slash after a symbolic link would have it followed.
    ///
    /// # Errors
    /// An empty path, or a working directory that is gone.
    pub fn with_absolute_paths(mut self) -> io::Result<Self> {
        let fixed = [
            &mut self.bin_dir,
            &mut self.state_dir,
            &mut self.run_dir,
            &mut self.trust,
        ];
        for path in fixed
            .into_iter()
            .chain(&mut self.keyd_trust)
            .chain(&mut self.volume_dirs)
            .chain(&mut self.mirror_dir)
        {
            *path = std::path::absolute(&*path)?.components().collect();
        }
        Ok(self)
    }

    /// The words of a command line that says the same, without the name.
    #[must_use]
    pub fn to_words(&self) -> Vec<OsString> {
        let number = |n: u32| OsString::from(n.to_string());
        let one =
            |name: &str, value: &dyn AsRef<OsStr>| (name.to_owned(), value.as_ref().to_owned());
        let mut options = vec![
            one("--host", &self.host),
            one("--bin-dir", &self.bin_dir),
            one("--state-dir", &self.state_dir),
            one("--run-dir", &self.run_dir),
            one("--trust", &self.trust),
        ];
        options.extend(self.keyd_trust.iter().map(|path| one("--keyd-trust", path)));
        options.extend(
            self.volume_dirs
                .iter()
                .map(|path| one("--volume-dir", path)),
        );
        options.extend(self.mirror_dir.iter().map(|path| one("--mirror-dir", path)));
        options.extend(self.xdp.iter().map(|name| one("--xdp", &name.as_str())));
        let numbers = [
            ("--keyd-uid", self.keyd_uid),
            ("--agent-uid", self.agent_uid),
            ("--dataplane-uid", self.dataplane_uid),
            ("--admin-uid", self.admin_uid),
            ("--workers", self.workers.map(NonZeroU32::get)),
        ];
        let given = numbers.into_iter().filter_map(|(name, n)| Some((name, n?)));
        options.extend(given.map(|(name, n)| one(name, &number(n))));
        options.extend(self.cpus.iter().map(|cpus| one("--cpus", cpus)));
        let words = options.into_iter();
        words
            .flat_map(|(name, value)| [OsString::from(name), value])
            .collect()
    }

    /// The uid that a role is meant to run with; none is rot's own.
    #[must_use]
    pub fn uid(&self, role: Role) -> Option<u32> {
        match role {
            Role::Keyd => self.keyd_uid,
            Role::Agent => self.agent_uid,
            Role::Dataplane => self.dataplane_uid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(more: &[&str]) -> Result<Arguments, clap::Error> {
        let fixed = "rot --host h --bin-dir b --state-dir s/ --run-dir /r/./ --trust t";
        Arguments::try_parse_from(fixed.split(' ').chain(more.iter().copied()))
    }

    #[test]
    fn paths_become_absolute_and_lose_a_trailing_slash() {
        let arguments = parse(&["--volume-dir", "v"]).unwrap();
        let arguments = arguments.with_absolute_paths().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(arguments.state_dir, here.join("s"));
        assert!(!arguments.state_dir.to_str().unwrap().ends_with('/'));
        assert_eq!(arguments.run_dir.to_str().unwrap(), "/r");
        assert_eq!(arguments.volume_dirs, [here.join("v")]);
    }

    #[test]
    fn its_words_say_the_same() {
        let all = "--volume-dir v --volume-dir w --mirror-dir m --keyd-trust k --keyd-uid 1 --agent-uid 2 \
                   --dataplane-uid 3 --admin-uid 4 --workers 5 --cpus 1,3 --xdp eth1 --xdp eth2";
        for more in ["--volume-dir v", all] {
            let given = parse(&more.split_whitespace().collect::<Vec<_>>()).unwrap();
            let words = [vec![OsString::from("rot")], given.to_words()].concat();
            assert_eq!(Arguments::try_parse_from(words).unwrap(), given);
        }
    }

    #[test]
    fn refused_the_uid_that_means_unchanged() {
        let volume = ["--volume-dir", "v", "--keyd-uid"];
        assert!(parse(&[&volume[..], &["4294967294"]].concat()).is_ok());
        assert!(parse(&[&volume[..], &["4294967295"]].concat()).is_err());
    }

    #[test]
    fn refused_without_a_volume_directory() {
        assert!(parse(&[]).is_err());
    }
}
