//! What is done to the processes, each with a number of times: small ones in the tests, full ones in
//! `cargo xtask soak survive`.

use std::fmt;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use super::disk::{Base, DiskSpec};
use super::finding::Report;
use super::fleet::{Fleet, Scene};
use super::kills::{
    Away, BACK_PATIENCE, Child, KillError, Plan, Seen, Serve, Victim as _, die_at, kill_often,
    successor_dies_at,
};
use super::load::{Load, LoadSpec};
use super::points::{MESSAGE_POINTS, REQUEST_POINTS, SUCCESSOR_POINTS};
use crate::host::Host;
use crate::random::Random;

/// What the data plane says of a connection that it had to close, since its predecessor died within a reply.
const IN_A_REPLY: &str = "died while it sent a reply";

/// How a scenario went.
#[derive(Debug)]
pub struct Row {
    /// What was done.
    pub what: String,
    /// What was seen of the deaths.
    pub away: Away,
    /// What the load says.
    pub report: Report,
    /// Connections that had to be made again although they were to be kept.
    pub unexpected_disconnects: u64,
    /// Why it ended early, if it did; with what the processes printed last.
    pub problem: Option<String>,
}

impl Row {
    /// Whether nothing was lost, completed twice, corrupt or disconnected.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let report = &self.report;
        self.problem.is_none() && report.findings.is_empty() && self.unexpected_disconnects == 0
    }

    /// What is wrong, a line each.
    #[must_use]
    pub fn problems(&self) -> String {
        let mut text = self.report.problems();
        if self.unexpected_disconnects > 0 {
            text.push_str(&format!(
                "\n{} connections ended that were to be kept",
                self.unexpected_disconnects
            ));
        }
        text.push('\n');
        text.push_str(self.problem.as_deref().unwrap_or_default());
        text
    }
}

/// Above the rows of a table.
pub const HEADING: &str = "\
| what | deaths | requests | messages | lost | twice | other | reconnects | away p50 / p99 / max | until ready | \
until the fence | behind the fence |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (away, report) = (&self.away, &self.report);
        write!(
            f,
            "| {}{} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.what,
            if self.is_good() { "" } else { " **FAILED**" },
            away.kills,
            report.requests(),
            report.messages,
            report.lost(),
            report.doubled(),
            report.others(),
            report.disconnects,
            away.whole,
            away.without_fence,
            away.fence,
            away.behind_fence,
        )
    }
}

/// How many connections a data plane says it had to close, since nobody can know whether its predecessor had sent a
/// reply.
#[must_use]
pub fn explained(log: &str) -> u64 {
    log.matches(IN_A_REPLY).count() as u64
}

/// Writes a scenario's whole log into the folder that `BULKHEAD_SURVIVE_LOGS` names, if it names one.
fn keep_log(what: &str, log: &str) {
    if let Some(dir) = std::env::var_os("BULKHEAD_SURVIVE_LOGS") {
        let path = std::path::Path::new(&dir).join(format!("{what}.log"));
        if let Err(error) = std::fs::write(&path, log) {
            eprintln!("{}: {error}", path.display());
        }
    }
}

/// The last lines of a log.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

fn failed(what: &str, error: &KillError) -> Row {
    Row {
        what: what.to_owned(),
        away: Away::default(),
        report: Report::default(),
        unexpected_disconnects: 0,
        problem: Some(error.to_string()),
    }
}

/// Starts a host with a scene on it, does something to its processes, and reads everything.
pub fn on_host(
    what: &str,
    scene: &Scene,
    act: impl FnOnce(&mut Host, &mut Load, &mut Random) -> Result<Away, KillError>,
) -> Row {
    let mut random = Random::named(what);
    let started = folder()
        .map_err(KillError::from)
        .and_then(|dir| Ok((Fleet::start(dir.path(), scene, random.next_u64())?, dir)));
    let (fleet, _dir) = match started {
        Ok(started) => started,
        Err(error) => return failed(what, &error),
    };
    let Fleet { mut host, mut load } = fleet;
    let acted = act(&mut host, &mut load, &mut random);
    let report = load.finish();
    let log = host.log();
    keep_log(what, &log);
    let (away, mut problem) = match acted {
        Ok(away) => (away, None),
        Err(error) => (
            Away::default(),
            Some(format!("{error}\n--- log:\n{}", tail(&log))),
        ),
    };
    let unexpected_disconnects = if scene.may_reconnect {
        0
    } else {
        report.disconnects.saturating_sub(explained(&log))
    };
    if problem.is_none() && !(report.findings.is_empty() && unexpected_disconnects == 0) {
        problem = Some(format!("--- log:\n{}", tail(&log)));
    }
    Row {
        what: what.to_owned(),
        away,
        unexpected_disconnects,
        problem,
        report,
    }
}

/// A folder that other users can come through.
///
/// # Errors
/// What making it fails with.
pub fn folder() -> std::io::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

/// SIGKILL of the data plane, under load (T30, T31).
#[must_use]
pub fn kills(what: &str, scene: &Scene, count: u32) -> Row {
    let plan = Plan {
        kills: count,
        pause_ms: 40,
        again: None,
    };
    on_host(what, scene, |host, load, random| {
        kill_often(&mut Child::data_plane(host), load, &plan, random)
    })
}

/// SIGKILL of the data plane, and of its successors while they recover (T33).
#[must_use]
pub fn kills_in_recovery(what: &str, scene: &Scene, count: u32) -> Row {
    let plan = Plan {
        kills: count,
        pause_ms: 10,
        again: Some((2, 60)),
    };
    on_host(what, scene, |host, load, random| {
        kill_often(&mut Child::data_plane(host), load, &plan, random)
    })
}

/// The data plane dies at each named point along the way of a request (T32).
#[must_use]
pub fn request_points(what: &str, scene: &Scene, each: u32) -> Row {
    on_host(what, scene, |host, load, random| {
        let mut victim = Child::data_plane(host);
        let mut all = Away::default();
        for point in REQUEST_POINTS {
            all.add(die_at(&mut victim, load, point, each, 40, random)?);
        }
        Ok(all)
    })
}

/// The data plane dies at each place along the way of a message (T32).
#[must_use]
pub fn message_points(what: &str, scene: &Scene, each: u32) -> Row {
    let scene = Scene {
        message_every: 4,
        ..scene.clone()
    };
    on_host(what, &scene, |host, load, random| {
        let mut victim = Child::data_plane(host);
        let mut all = Away::default();
        for point in MESSAGE_POINTS {
            all.add(die_at(&mut victim, load, point, each, 10, random)?);
        }
        Ok(all)
    })
}

/// Successors of a killed data plane die at each named point on their way to where they serve (T32, T33).
#[must_use]
pub fn successor_points(what: &str, scene: &Scene, each: u32) -> Row {
    on_host(what, scene, |host, load, random| {
        let mut victim = Child::data_plane(host);
        let mut all = Away::default();
        for point in SUCCESSOR_POINTS {
            all.add(successor_dies_at(&mut victim, load, point, each, random)?);
        }
        Ok(all)
    })
}

/// Who dies together.
const TOGETHER: &[&[&str]] = &[
    &["keyd"],
    &["agent"],
    &["keyd", "dataplane"],
    &["agent", "dataplane"],
    &["keyd", "agent"],
    &["keyd", "agent", "dataplane"],
];

/// keyd, the agent, each with the data plane, and all three die; the frontends' connections stay.
#[must_use]
pub fn other_deaths(what: &str, scene: &Scene, rounds: u32) -> Row {
    on_host(what, scene, |host, load, random| {
        let mut roles: Vec<(&str, Child<'_>)> = ["keyd", "agent", "dataplane"]
            .map(|role| (role, Child::of(host, role)))
            .into();
        let mut away = Away::default();
        for round in 0..rounds as usize {
            let together = TOGETHER
                .get(round % TOGETHER.len())
                .copied()
                .unwrap_or_default();
            std::thread::sleep(Duration::from_millis(random.below(100)));
            let mut killed = None;
            for (role, child) in &mut roles {
                if together.contains(role) {
                    let at = child.kill()?;
                    away.kills += 1;
                    killed = (*role == "dataplane").then_some(at);
                }
            }
            if let (Some(at), Some((_, child))) = (killed, roles.last_mut()) {
                load.killed(at);
                let times = load.wait_back(BACK_PATIENCE)?;
                away.note(at, child.seen(), &times);
            }
            // The next death is of processes that were started again.
            for (_, child) in &mut roles {
                child.pid()?;
            }
        }
        Ok(away)
    })
}

/// rot is killed, and all processes with it; it is started again. What it stored is lost where no systemd keeps it: the
/// frontends connect again.
#[must_use]
pub fn deaths_of_rot(what: &str, scene: &Scene, count: u32) -> Row {
    let scene = Scene {
        may_reconnect: true,
        ..scene.clone()
    };
    on_host(what, &scene, |host, load, random| {
        let mut away = Away::default();
        for _ in 0..count {
            std::thread::sleep(Duration::from_millis(random.below(100)));
            let at = host.kill_rot();
            load.killed(at);
            away.kills += 1;
            host.start()?;
            let times = load.wait_back(BACK_PATIENCE)?;
            away.note(at, Seen::default(), &times);
        }
        Ok(away)
    })
}

/// Large writes are in flight when the data plane dies, and what they wrote is written again at once (T36): nothing old may
/// come over it.
#[must_use]
pub fn slow_writes(what: &str, count: u32) -> Row {
    let scene = Scene {
        disks: 1,
        queues: 4,
        data_unit: None,
        size: "96MiB",
        depth: 16,
        most_sectors: 2048,
        rewrite: true,
        ..Scene::default()
    };
    kills(what, &scene, count)
}

/// Upgrades of the data plane onto the same binary under load, as an operator does them (T37): the pauses of the disks.
#[must_use]
pub fn upgrades(what: &str, scene: &Scene, count: u32) -> Row {
    let scene = Scene {
        own_binaries: true,
        ..scene.clone()
    };
    on_host(what, &scene, |host, load, random| {
        let mut away = Away::default();
        for version in 1..=count {
            host.install("dataplane", u64::from(version))?;
            let statement = host.release("dataplane", u64::from(version))?;
            std::thread::sleep(Duration::from_millis(random.below(50)));
            load.watch();
            host.upgrade_to(&statement)?;
            away.kills += 1;
            away.whole.extend(load.longest_pauses(BACK_PATIENCE)?);
        }
        Ok(away)
    })
}

/// What a reconnect scenario's frontend is like.
#[derive(Debug, Clone, Copy)]
pub struct Reconnect {
    /// Packed rings.
    pub packed: bool,
    /// Chains are used in order.
    pub in_order: bool,
    /// The base it gives.
    pub base: Base,
    /// The disk is encrypted.
    pub is_encrypted: bool,
}

/// `serve` is killed under load and started again; its frontend keeps its in-flight region and connects
/// again (T35).
#[must_use]
pub fn reconnects(what: &str, how: Reconnect, count: u32) -> Row {
    match try_reconnects(what, how, count) {
        Ok(row) => row,
        Err(error) => failed(what, &error),
    }
}

fn try_reconnects(what: &str, how: Reconnect, count: u32) -> Result<Row, KillError> {
    let dir = folder()?;
    let (socket, image) = (dir.path().join("a.sock"), dir.path().join("disk.img"));
    std::fs::File::create(&image)?.set_len(4 << 20)?;
    let blk = format!("file:{}", image.display());
    let path = socket.display().to_string();
    let mut arguments = vec!["--socket", &path, "--blk", &blk, "--queues", "2"];
    let key = dir.path().join("key");
    let mut random = Random::named(what);
    std::fs::write(&key, random.bytes(64))?;
    let key = key.display().to_string();
    if how.is_encrypted {
        arguments.extend(["--xts", "--key-file", &key]);
    }
    let mut serve = Serve::start(&arguments)?;
    let disk = DiskSpec {
        packed: how.packed,
        in_order: how.in_order,
        base: how.base,
        queues: 2,
        ..DiskSpec::new(socket)
    };
    let mut load = Load::start(&LoadSpec::new(vec![disk], random.next_u64()))?;
    load.wait_filled(Duration::from_secs(60))?;
    let plan = Plan {
        kills: count,
        pause_ms: 20,
        again: None,
    };
    let acted = kill_often(&mut serve, &mut load, &plan, &mut random);
    let report = load.finish();
    let (away, problem) = match acted {
        Ok(away) => (away, None),
        Err(error) => (Away::default(), Some(format!("{error}\n{}", serve.log()))),
    };
    Ok(Row {
        what: what.to_owned(),
        away,
        report,
        unexpected_disconnects: 0,
        problem,
    })
}
