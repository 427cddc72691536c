//! Talking to a host's agent: one request, one answer, over its admin socket.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use bulkhead_protocol::admin::{AdminReply, AdminRequest};
use bulkhead_protocol::envelope::{self, MAX_ENVELOPE_BYTES};
use bulkhead_protocol::{Channel, ChannelError};
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::arguments::{Apply, Status};
use crate::failure::Failure;
use crate::nics::NetStatus;
use crate::output::{self, printable};
use crate::status;

/// How long an answer may take: applying a large bundle waits for keyd and the data plane, an upgrade
/// for a new data plane that maps all guest memory.
const PATIENCE_SECONDS: i64 = 180;

/// `apply`
pub(crate) fn apply(arguments: &Apply) -> Result<(), Failure> {
    // A copy, so that what the agent sees is one file that nobody changes meanwhile.
    let bytes = output::read_capped(&arguments.file, MAX_ENVELOPE_BYTES)?;
    let envelope = envelope::to_memfd(&bytes)?;
    let request = AdminRequest::Apply {
        dry_run: arguments.dry_run,
    };
    match ask(&arguments.admin.socket, &request, &[envelope.as_fd()])? {
        AdminReply::Applied {
            epoch,
            steps,
            pending,
        } => report(arguments.dry_run, epoch, &steps, &pending),
        AdminReply::Refused { reason } => Err(Failure::new(format!(
            "refused, and nothing changed: {}",
            printable(&reason)
        ))),
        AdminReply::Open { reason } => Err(Failure::new(format!(
            "not decided yet: {}",
            printable(&reason)
        ))),
        _ => Err(unexpected()),
    }
}

fn report(dry_run: bool, epoch: u64, steps: &[String], pending: &[String]) -> Result<(), Failure> {
    let (done, step_done) = if dry_run {
        ("would apply", "would")
    } else {
        ("applied", "done")
    };
    println!("{done} epoch {epoch}");
    for step in steps {
        println!("  {step_done}: {}", printable(step));
    }
    if steps.is_empty() {
        println!("  nothing to do: the host is as the bundle says");
    }
    for step in pending {
        println!("  pending: {}", printable(step));
    }
    match pending.len() {
        0 => Ok(()),
        n => Err(Failure::new(format!(
            "the bundle was accepted, but {n} step(s) failed; the host tries again by itself: \
             see `bulkhead status`"
        ))),
    }
}

/// `status`
pub(crate) fn status(arguments: &Status) -> Result<(), Failure> {
    let socket = &arguments.admin.socket;
    match ask(socket, &AdminRequest::Status, &[])? {
        AdminReply::Status { status } => {
            let networks = match status.nics {
                None | Some(0) => NetStatus::default(),
                Some(_) => NetStatus::ask(socket)?,
            };
            if arguments.json {
                println!("{}", status::to_json(&status, &networks));
            } else {
                print!("{}", status::to_text(&status, &networks));
            }
            Ok(())
        }
        AdminReply::Refused { reason } => {
            Err(Failure::new(format!("refused: {}", printable(&reason))))
        }
        _ => Err(unexpected()),
    }
}

pub(crate) fn unexpected() -> Failure {
    Failure::new("the agent answered another question: it is of another version than this program")
}

/// Asks a host's agent.
pub(crate) fn ask(
    path: &Path,
    request: &AdminRequest,
    fds: &[BorrowedFd<'_>],
) -> Result<AdminReply, Failure> {
    let channel = Channel::from(connected(path)?);
    let failed = |error: ChannelError| {
        Failure::at(
            path,
            match error {
                ChannelError::Closed => {
                    "the agent closed the connection without an answer: is another command \
                     running, or did it restart? Ask `bulkhead status`"
                        .to_owned()
                }
                ChannelError::WouldBlock => format!(
                    "no answer within {PATIENCE_SECONDS} s; the agent may still be at it: \
                     ask `bulkhead status`"
                ),
                other => format!("{other}: is the agent of this program's version?"),
            },
        )
    };
    channel.send(request, fds).map_err(failed)?;
    let mut reply = channel.receive::<AdminReply>().map_err(failed)?;
    reply.take_fds::<0>().map_err(failed)?;
    Ok(reply.message)
}

fn connected(path: &Path) -> Result<OwnedFd, Failure> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE_SECONDS))?;
    let address = UnixAddr::new(path).map_err(|e| Failure::at(path, io::Error::from(e)))?;
    connect(socket.as_raw_fd(), &address).map_err(|error| {
        let hint = match error {
            Errno::ENOENT => {
                "no admin socket here: is bulkhead-rot running? Else name its admin.sock by --admin"
            }
            Errno::ECONNREFUSED => "nobody listens here: bulkhead-rot is not running",
            Errno::EACCES | Errno::EPERM => {
                "only the socket's owner (--admin-uid of bulkhead-rot) may use it"
            }
            Errno::EPROTOTYPE | Errno::ENOTSOCK => {
                "this is not the admin socket of a Bulkhead host"
            }
            _ => error.desc(),
        };
        Failure::at(path, hint)
    })?;
    Ok(socket)
}
