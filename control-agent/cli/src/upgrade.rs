//! `upgrade`: hands a release statement to a host's agent, and waits for what comes of it.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_protocol::admin::{AdminReply, AdminRequest};
use bulkhead_protocol::envelope::{self, MAX_ENVELOPE_BYTES};
use bulkhead_protocol::release::Release;

use crate::admin::{ask, unexpected};
use crate::arguments::Upgrade;
use crate::failure::Failure;
use crate::output::{self, printable};

/// How long the agent may take to come up again: rot gives it 5 s to stop and 15 s to start, and then
/// starts the old one.
const AGENT_BACK_WITHIN: Duration = Duration::from_secs(40);
const ASK_EVERY: Duration = Duration::from_millis(200);

/// `upgrade`
pub(crate) fn upgrade(arguments: &Upgrade) -> Result<(), Failure> {
    let bytes = output::read_capped(&arguments.file, MAX_ENVELOPE_BYTES)?;
    let statement = envelope::to_memfd(&bytes)?;
    let socket = &arguments.admin.socket;
    match ask(socket, &AdminRequest::Upgrade, &[statement.as_fd()])? {
        AdminReply::Upgraded { release } => {
            done(&release);
            Ok(())
        }
        AdminReply::UpgradeBegun { release } => wait_for_the_agent(socket, &release),
        AdminReply::Refused { reason } => Err(failed(&reason)),
        _ => Err(unexpected()),
    }
}

fn done(release: &Release) {
    println!(
        "upgraded {} to version {}",
        release.component, release.version
    );
}

fn failed(reason: &str) -> Failure {
    Failure::new(format!(
        "not upgraded, what ran goes on: {}",
        printable(reason)
    ))
}

/// The agent ended to come up as the new one: the next to answer tells which it is.
fn wait_for_the_agent(socket: &Path, release: &Release) -> Result<(), Failure> {
    let end = Instant::now() + AGENT_BACK_WITHIN;
    while Instant::now() < end {
        sleep(ASK_EVERY);
        // Nobody listens for a moment, or who does is about to end.
        let Ok(AdminReply::Status { status }) = ask(socket, &AdminRequest::Status, &[]) else {
            continue;
        };
        let mut programs = status.programs.into_iter();
        let Some(program) = programs.find(|p| p.component == release.component) else {
            continue;
        };
        if let Some(reason) = program.failed {
            return Err(failed(&reason));
        }
        let runs = program.version == Some(release.version);
        if runs && program.measurement == release.measurement {
            done(release);
            return Ok(());
        }
    }
    Err(Failure::new(
        "the agent is not back as the new one yet: see `bulkhead status` and rot's log",
    ))
}
