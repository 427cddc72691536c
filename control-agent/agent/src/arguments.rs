//! The command line that rot starts the agent with.

use std::path::PathBuf;

use clap::Parser;

/// The control agent; `bulkhead-rot` starts it.
#[derive(Debug, Clone, Parser)]
#[command(name = "bulkhead-agent", version, about)]
pub struct Arguments {
    /// Name of this host, as bundles target it
    #[arg(long, value_name = "NAME")]
    pub host: String,
    /// Where the agent keeps the accepted bundle and the epoch floor; 0700, the agent's own
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The trust root: whose signatures count
    #[arg(long, value_name = "FILE")]
    pub trust: PathBuf,
    /// Where rot binds the vhost-user listeners (for the status alone; the agent can't write there)
    #[arg(long, value_name = "DIR")]
    pub vhost_dir: PathBuf,
    /// A directory that volumes may lie in; may be given several times
    #[arg(long = "volume-dir", value_name = "DIR", required = true, num_args = 1..)]
    pub volume_dirs: Vec<PathBuf>,
    /// The directory that mirrors of NICs are written in; the agent's user makes files there
    #[arg(long, value_name = "DIR")]
    pub mirror_dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_directories_may_be_given_in_either_form() {
        let fixed = ["agent", "--host", "a", "--state-dir", "s", "--trust", "t"];
        let dirs = |rest: &[&str]| {
            let all = fixed.iter().chain(&["--vhost-dir", "v"]).chain(rest);
            Arguments::try_parse_from(all).map(|a| a.volume_dirs)
        };
        let expected = vec![PathBuf::from("/a"), PathBuf::from("/b")];
        assert_eq!(
            dirs(&["--volume-dir", "/a", "--volume-dir", "/b"]).expect("repeated"),
            expected
        );
        assert_eq!(dirs(&["--volume-dir", "/a", "/b"]).expect("list"), expected);
        assert!(dirs(&[]).is_err(), "at least one directory is needed");
    }
}
