//! Limits, groups and workers in a host's status.

use std::fmt::Write as _;

use bulkhead_protocol::admin::HostStatus;
use bulkhead_protocol::control::{WorkerLoad, WorkersStatus};
use bulkhead_protocol::limits::{GroupGrant, Limits, Rate};
use bulkhead_protocol::workers::Workers;

use crate::json::Json;
use crate::output::{printable, table};

/// The lines about the workers.
pub(crate) fn workers(status: &WorkersStatus) -> String {
    let by_host = if status.by_host {
        " (the host's own setting)"
    } else {
        ""
    };
    let mut out = format!("workers {}{by_host}\n", status.workers);
    // Writing to a String does not fail.
    if let Some(pending) = &status.pending {
        let _ = writeln!(
            out,
            "        restart pending: {pending} in the bundle, from the data plane's next start on"
        );
    }
    if let Some(problem) = &status.problem {
        let _ = writeln!(out, "        {}", printable(problem));
    }
    for (number, load) in status.loads.iter().enumerate() {
        let at = match load.cpu {
            Some(cpu) => format!("CPU {cpu}"),
            None => format!("worker {number}"),
        };
        let busy_percent = load.busy_permille / 10;
        let queues = match load.queues {
            1 => "1 queue".to_owned(),
            count => format!("{count} queues"),
        };
        let _ = writeln!(out, "        {at}: {busy_percent} % busy, {queues}");
    }
    if status.queue_moves + status.queue_moves_given_up > 0 {
        let _ = writeln!(
            out,
            "        queues moved from one to another: {} ({} given up)",
            status.queue_moves, status.queue_moves_given_up
        );
    }
    out
}

/// What is limited, as a table; nothing if nothing is.
pub(crate) fn limits(status: &HostStatus) -> String {
    let row = |cells: [&str; 4]| cells.map(str::to_owned).to_vec();
    let mut rows = vec![row(["NAME", "GROUP", "THROTTLED", "LIMITS"])];
    for volume in &status.volumes {
        if volume.limits.is_none() && volume.group.is_none() {
            continue;
        }
        let group = volume.group.as_ref().map_or("-", |name| name.as_str());
        let limits = volume.limits.to_string();
        let state = volume.state.as_ref();
        let throttled = state.map_or("?".to_owned(), |state| seconds(state.throttled_ms));
        rows.push(row([&printable(&volume.name), group, &throttled, &limits]));
    }
    for group in &status.groups {
        let limits = group.limits.to_string();
        rows.push(row(["(all of it)", group.name.as_str(), "-", &limits]));
    }
    match rows.len() {
        1 => String::new(),
        _ => format!("\nlimits\n{}", table(&rows)),
    }
}

/// A time in seconds, with one digit behind the point, rounded down.
fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1000, ms % 1000 / 100)
}

/// [`WorkersStatus`] as an object.
pub(crate) fn workers_json(status: &WorkersStatus) -> Json {
    let workers = |workers: &Workers| {
        let cpus = workers.cpus.iter().map(|cpu| Json::Number((*cpu).into()));
        Json::Object(vec![
            ("count", Json::Number(workers.count.into())),
            ("cpus", Json::Array(cpus.collect())),
        ])
    };
    Json::Object(vec![
        ("workers", workers(&status.workers)),
        ("by_host", Json::Bool(status.by_host)),
        ("pending", Json::or_null(status.pending.as_ref(), workers)),
        (
            "problem",
            Json::or_null(status.problem.as_ref(), Json::text),
        ),
        (
            "loads",
            Json::Array(status.loads.iter().map(load_json).collect()),
        ),
        ("queue_moves", Json::Number(status.queue_moves)),
        (
            "queue_moves_given_up",
            Json::Number(status.queue_moves_given_up),
        ),
    ])
}

fn load_json(load: &WorkerLoad) -> Json {
    let number = |n: u16| Json::Number(n.into());
    Json::Object(vec![
        ("cpu", Json::or_null(load.cpu, number)),
        ("busy_permille", number(load.busy_permille)),
        ("queues", Json::Number(load.queues.into())),
    ])
}

/// [`Limits`] as an object.
pub(crate) fn limits_json(limits: &Limits) -> Json {
    let rate = |Rate { per_second, burst }: Rate| {
        Json::Object(vec![
            ("per_second", Json::Number(per_second)),
            ("burst", Json::Number(burst)),
        ])
    };
    Json::Object(vec![
        ("requests", Json::or_null(limits.requests, rate)),
        ("bytes", Json::or_null(limits.bytes, rate)),
    ])
}

/// The groups as a list of objects.
pub(crate) fn groups_json(groups: &[GroupGrant]) -> Json {
    let group = |group: &GroupGrant| {
        Json::Object(vec![
            ("name", Json::text(&group.name)),
            ("limits", limits_json(&group.limits)),
        ])
    };
    Json::Array(groups.iter().map(group).collect())
}
