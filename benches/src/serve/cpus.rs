//! CPUs to serve on.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A CPU that can't be served on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// Not there, or not for this process.
    #[error("--cpu {cpu}: this process may run on {allowed} only: choose one of them")]
    NotAllowed {
        /// The CPU.
        cpu: usize,
        /// Those that it may run on.
        allowed: String,
    },
    /// The system refused.
    #[error("can't choose CPUs: {0}")]
    System(#[from] nix::Error),
}

/// Checks that this process may run on each.
///
/// # Errors
/// [`CpuError::NotAllowed`] names the first where it may not.
pub fn check(cpus: &[usize]) -> Result<(), CpuError> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let allowed: Vec<usize> = (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect();
    match cpus.iter().find(|cpu| !allowed.contains(cpu)) {
        None => Ok(()),
        Some(&cpu) => Err(CpuError::NotAllowed {
            cpu,
            allowed: format!("{allowed:?}"),
        }),
    }
}

/// Makes this thread, and those it starts, run on these CPUs only; on any, if none is named.
///
/// # Errors
/// [`CpuError::System`].
pub fn pin(cpus: &[usize]) -> Result<(), CpuError> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cpus_of_this_process_will_do() {
        let set = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
        let first = (0..CpuSet::count()).find(|cpu| set.is_set(*cpu) == Ok(true));
        let first = first.expect("at least one");
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[first, first]), Ok(()));
        let error = check(&[first, 100_000]).expect_err("not there");
        assert!(error.to_string().contains(&first.to_string()), "{error}");
        assert!(matches!(error, CpuError::NotAllowed { cpu: 100_000, .. }));
    }
}
