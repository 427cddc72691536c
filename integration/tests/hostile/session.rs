//! vhost-user messages in pieces, out of order, with wrong headers, of unknown kinds.

use std::error::Error;
use std::fs;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bulkhead_integration::arena::Arena;
use bulkhead_integration::disk::{Disk, Options, PATIENCE, feature};
use bulkhead_integration::frontend::message::{
    self, FLAG_NEED_REPLY, FLAG_REPLY, VERSION, request,
};
use bulkhead_integration::frontend::{Frontend, FrontendError};
use bulkhead_integration::processes::Process;
use nix::errno::Errno;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, send};

use crate::End::{Accepted, Closed, Refused, Silent};
use crate::guest::{attach, fate, probe};
use crate::{Attack, Case};

const WORKS: &str = "a stream has no message boundaries: any pieces are the same message";
const HEADER: &str = "a header that can't be of this protocol ends the connection";
const LENGTH: &str = "a body of another length than its kind has is refused or ends the connection";
const ORDER: &str =
    "the specification leaves wrong order open: taken, refused or closed, never unsafe";
const UNKNOWN: &str =
    "a request that is not known or not negotiated is refused or ends the connection";
const BOUNDS: &str =
    "outside the configuration space: zeroes, a refusal, or the end; never other bytes";

/// The table.
pub const CASES: &[Case] = &[
    Case::once("messages_byte_by_byte", &[Accepted], WORKS, |a| {
        pieces(a, 1)
    }),
    Case::once("messages_in_pieces_of_five", &[Accepted], WORKS, |a| {
        pieces(a, 5)
    }),
    Case::once("messages_header_then_body", &[Accepted], WORKS, |a| {
        pieces(a, 12)
    }),
    Case::once("messages_joined", &[Accepted], WORKS, joined),
    Case::once(
        "half_a_header_held",
        &[Accepted],
        "half a message stalls nobody else",
        |a| held(a, &message::header(request::SET_VRING_NUM, VERSION, 8)[..7]),
    ),
    Case::once(
        "half_a_body_held",
        &[Accepted],
        "half a message stalls nobody else",
        |a| {
            held(
                a,
                &message::encode(request::SET_VRING_NUM, VERSION, &[0; 8])[..15],
            )
        },
    ),
    Case::once("size_all_ones", &[Closed], HEADER, |a| size(a, u32::MAX)),
    Case::once("size_one_mebibyte", &[Closed], HEADER, |a| size(a, 1 << 20)),
    Case::once("size_past_longest_message", &[Closed], HEADER, |a| {
        size(a, 8192)
    }),
    Case::once("version_zero", &[Closed, Refused], HEADER, |a| flags(a, 0)),
    Case::once("version_two", &[Closed, Refused], HEADER, |a| flags(a, 2)),
    Case::once("version_three", &[Closed, Refused], HEADER, |a| flags(a, 3)),
    Case::once(
        "reply_flag_from_frontend",
        &[Closed, Refused],
        HEADER,
        |a| flags(a, VERSION | FLAG_REPLY),
    ),
    Case::once(
        "reserved_flags",
        &[Closed, Refused, Accepted],
        HEADER,
        |a| flags(a, VERSION | 0xffff_fff0),
    ),
    Case::once("body_missing", &[Closed, Refused], LENGTH, |a| {
        body(a, request::SET_FEATURES, 0)
    }),
    Case::once("body_short", &[Closed, Refused], LENGTH, |a| {
        body(a, request::SET_FEATURES, 4)
    }),
    Case::once("body_long", &[Closed, Refused], LENGTH, |a| {
        body(a, request::SET_FEATURES, 16)
    }),
    Case::once(
        "body_where_none_belongs",
        &[Closed, Refused, Accepted],
        LENGTH,
        |a| body(a, request::SET_OWNER, 8),
    ),
    Case::once("vring_addr_short", &[Closed, Refused], LENGTH, |a| {
        body(a, request::SET_VRING_ADDR, 32)
    }),
    Case::once("mem_table_without_body", &[Closed, Refused], LENGTH, |a| {
        body(a, request::SET_MEM_TABLE, 0)
    }),
    Case::once("mem_table_half_a_region", &[Closed, Refused], LENGTH, |a| {
        body(a, request::SET_MEM_TABLE, 24)
    }),
    Case::once(
        "kick_before_memory",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            let kick = EventFd::new()?;
            fate(
                disk.frontend
                    .set_vring_fd(request::SET_VRING_KICK, 0, Some(kick.as_fd())),
            )
        },
    ),
    Case::once(
        "addresses_before_memory",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            let body = message::vring_addresses(0, 0x7000, 0x8000, 0x9000);
            fate(disk.frontend.set(request::SET_VRING_ADDR, &body, &[]))
        },
    ),
    Case::once(
        "queue_started_before_memory",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            let started = disk.start_queue(0);
            disk.rings[0].kick.write(1)?;
            match started {
                Ok(()) => Ok(Accepted),
                Err(bulkhead_integration::disk::DiskError::Frontend(e)) => fate(Err(e)),
                Err(other) => Err(other.into()),
            }
        },
    ),
    Case::once(
        "kick_without_addresses",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            disk.share_memory()?;
            let kick = EventFd::from_value(1)?;
            let end = fate(disk.frontend.set_vring_fd(
                request::SET_VRING_KICK,
                0,
                Some(kick.as_fd()),
            ))?;
            if end == Accepted {
                fate(
                    disk.frontend
                        .set_vring_state(request::SET_VRING_ENABLE, 0, 1),
                )
            } else {
                Ok(end)
            }
        },
    ),
    Case::once(
        "enable_before_owner",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| unready(a, request::SET_VRING_ENABLE, &message::halves(&[0, 1])),
    ),
    Case::once(
        "features_before_owner",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            unready(
                a,
                request::SET_FEATURES,
                &message::words(&[feature::VERSION_1]),
            )
        },
    ),
    Case::once(
        "memory_before_features",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| unready(a, request::SET_MEM_TABLE, &message::memory_table(0, &[])),
    ),
    Case::once(
        "config_before_negotiation",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let frontend = Frontend::connect(&a.socket, PATIENCE)?;
            let result = frontend.get_config(0, 60);
            fate(result.map(drop).or_else(protocol_is_refusal))
        },
    ),
    Case::once("owner_twice", &[Accepted, Refused, Closed], ORDER, |a| {
        let disk = Disk::negotiate(&a.socket, &Options::default())?;
        fate(disk.frontend.set(request::SET_OWNER, &[], &[]))
    }),
    Case::once(
        "get_base_of_a_queue_never_started",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            fate(disk.frontend.get_vring_base(0).map(drop))
        },
    ),
    Case::once(
        "reset_owner_while_running",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let mut disk = attach(a)?;
            probe(&mut disk, 0)?;
            fate(disk.frontend.set(request::RESET_OWNER, &[], &[]))
        },
    ),
    Case::once(
        "reset_device_not_negotiated",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let mut disk = attach(a)?;
            probe(&mut disk, 0)?;
            fate(disk.frontend.set(request::RESET_DEVICE, &[], &[]))
        },
    ),
    Case::once(
        "features_changed_while_running",
        &[Accepted, Refused, Closed],
        ORDER,
        |a| {
            let mut disk = attach(a)?;
            probe(&mut disk, 0)?;
            let features = disk.features ^ feature::EVENT_IDX;
            fate(
                disk.frontend
                    .set(request::SET_FEATURES, &message::words(&[features]), &[]),
            )
        },
    ),
    Case::once(
        "features_not_offered",
        &[Refused, Closed],
        "only what was offered",
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            fate(
                disk.frontend
                    .set(request::SET_FEATURES, &message::words(&[u64::MAX]), &[]),
            )
        },
    ),
    Case::once(
        "protocol_features_not_offered",
        &[Refused, Closed, Accepted],
        "only what was offered counts",
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            let all = message::words(&[u64::MAX]);
            fate(disk.frontend.set(request::SET_PROTOCOL_FEATURES, &all, &[]))
        },
    ),
    Case::once("request_zero", &[Closed, Refused], UNKNOWN, |a| {
        unknown(a, 0)
    }),
    Case::once("request_unknown", &[Closed, Refused], UNKNOWN, |a| {
        unknown(a, 1000)
    }),
    Case::once("request_all_ones", &[Closed, Refused], UNKNOWN, |a| {
        unknown(a, u32::MAX)
    }),
    Case::once(
        "request_postcopy_advise",
        &[Closed, Refused],
        UNKNOWN,
        |a| unknown(a, 28),
    ),
    Case::once("request_iotlb", &[Closed, Refused], UNKNOWN, |a| {
        unknown(a, 22)
    }),
    Case::once("request_in_band_kick", &[Closed, Refused], UNKNOWN, |a| {
        unknown(a, 35)
    }),
    Case::once(
        "request_inflight_not_negotiated",
        &[Closed, Refused, Accepted],
        UNKNOWN,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            let result = disk.frontend.ask(request::GET_INFLIGHT_FD, &[0; 24], &[]);
            fate(result.map(drop).or_else(protocol_is_refusal))
        },
    ),
    Case::once(
        "config_past_the_end",
        &[Accepted, Refused, Closed],
        BOUNDS,
        |a| config(a, 250, 16),
    ),
    Case::once(
        "config_offset_all_ones",
        &[Accepted, Refused, Closed],
        BOUNDS,
        |a| config(a, u32::MAX, 8),
    ),
    Case::once(
        "config_nothing",
        &[Accepted, Refused, Closed],
        BOUNDS,
        |a| config(a, 0, 0),
    ),
    Case::once(
        "config_longer_than_space",
        &[Accepted, Refused, Closed],
        BOUNDS,
        |a| config(a, 0, 257),
    ),
    Case::once("config_size_lies", &[Refused, Closed], BOUNDS, |a| {
        let disk = Disk::negotiate(&a.socket, &Options::default())?;
        let body = message::config(0, 200, 0, &[0; 8]);
        let result = disk.frontend.ask(request::GET_CONFIG, &body, &[]);
        refusal_of_config(result)
    }),
    Case::once(
        "config_write_to_capacity",
        &[Accepted, Refused, Closed],
        BOUNDS,
        |a| {
            let disk = Disk::negotiate(&a.socket, &Options::default())?;
            let body = message::config(0, 8, 0, &[0xff; 8]);
            let end = fate(disk.frontend.set(request::SET_CONFIG, &body, &[]))?;
            if end != Closed && disk.capacity_sectors()? == u64::MAX {
                return Err("a frontend changed the capacity".into());
            }
            Ok(end)
        },
    ),
    Case::once(
        "replies_never_read",
        &[Silent, Closed],
        "the backend stops reading or ends the connection; it neither stalls nor hoards",
        replies_never_read,
    ),
    Case::once(
        "requests_without_end",
        &[Accepted],
        "a frontend gets its turn, and so do the others",
        |a| {
            // So many at once that there is always more to read.
            let messages = message::encode(request::SET_OWNER, VERSION, &[]).repeat(1024);
            without_end(a, messages, request::SET_OWNER)
        },
    ),
    Case::once(
        "changes_without_end",
        &[Accepted],
        "a frontend gets its turn, and what it sends does not pile up at a worker",
        |a| {
            let message = message::encode(
                request::SET_VRING_CALL,
                VERSION,
                &message::vring_fd(0, true),
            );
            without_end(a, message, request::SET_VRING_CALL)
        },
    ),
    Case::once(
        "disconnect_in_a_header",
        &[Closed],
        "an end is an end",
        |a| {
            let frontend = Frontend::connect(&a.socket, PATIENCE)?;
            frontend.send_raw(&message::header(1, VERSION, 0)[..5], &[])?;
            frontend.shut_down_sending()?;
            Ok(if frontend.closes_within(PATIENCE) {
                Closed
            } else {
                Silent
            })
        },
    ),
    Case::once(
        "connections_by_the_hundred",
        &[Accepted],
        "connections don't pile up",
        hundred,
    ),
    Case::once(
        "second_frontend",
        &[Accepted],
        "the first connection goes on, whatever becomes of a second one",
        second_frontend,
    ),
];

fn pieces(arena: &mut Arena, bytes: usize) -> Attack {
    let options = Options {
        queues: 2,
        piece_bytes: Some(bytes),
        ..Options::default()
    };
    let mut disk = arena.attach(&options)?;
    probe(&mut disk, 0)?;
    probe(&mut disk, 1)?;
    Ok(Accepted)
}

/// Several messages in one write, two of them with answers.
fn joined(arena: &mut Arena) -> Attack {
    let frontend = Frontend::connect(&arena.socket, PATIENCE)?;
    let mut bytes = message::encode(request::SET_OWNER, VERSION, &[]);
    bytes.extend(message::encode(request::GET_FEATURES, VERSION, &[]));
    bytes.extend(message::encode(
        request::GET_PROTOCOL_FEATURES,
        VERSION,
        &[],
    ));
    frontend.send_raw(&bytes, &[])?;
    frontend.answer(request::GET_FEATURES)?;
    frontend.answer(request::GET_PROTOCOL_FEATURES)?;
    Ok(Accepted)
}

/// Leaves the backend with part of a message while the other device works.
fn held(arena: &mut Arena, part: &[u8]) -> Attack {
    let mut disk = attach(arena)?;
    disk.frontend.send_raw(part, &[])?;
    std::thread::sleep(Duration::from_millis(20));
    arena.check_other()?;
    probe(&mut disk, 0)?;
    Ok(Accepted)
}

fn size(arena: &mut Arena, size: u32) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    let header = message::header(request::SET_FEATURES, VERSION, size);
    disk.frontend.send_raw(&header, &[])?;
    let _ = disk.frontend.send_raw(&[0; 4096], &[]);
    Ok(closed_or_silent(&disk.frontend))
}

fn closed_or_silent(frontend: &Frontend) -> crate::End {
    if frontend.closes_within(Duration::from_secs(3)) {
        Closed
    } else {
        Silent
    }
}

/// GET_FEATURES with other flags.
fn flags(arena: &mut Arena, flags: u32) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    let bytes = message::encode(request::GET_FEATURES, flags, &[]);
    disk.frontend.send_raw(&bytes, &[])?;
    fate(disk.frontend.answer(request::GET_FEATURES).map(drop))
}

fn body(arena: &mut Arena, request: u32, len: usize) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    fate(disk.frontend.set(request, &vec![0; len], &[]))
}

/// A message before SET_OWNER, then a question that shows whether the connection lives.
fn unready(arena: &mut Arena, request: u32, body: &[u8]) -> Attack {
    let frontend = Frontend::connect(&arena.socket, PATIENCE)?;
    frontend.set(request, body, &[])?;
    fate(frontend.ask_u64(request::GET_FEATURES).map(drop))
}

fn unknown(arena: &mut Arena, request: u32) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    fate(disk.frontend.set(request, &[0; 40], &[]))
}

/// An answer of another shape is how a backend says no to a question.
fn protocol_is_refusal(error: FrontendError) -> Result<(), FrontendError> {
    match error {
        FrontendError::Protocol { request, .. } => Err(FrontendError::Refused { request, code: 1 }),
        other => Err(other),
    }
}

fn config(arena: &mut Arena, offset: u32, size: u32) -> Attack {
    let disk = Disk::negotiate(&arena.socket, &Options::default())?;
    let body = message::config(offset, size, 0, &vec![0; size as usize]);
    let answer = match disk.frontend.ask(request::GET_CONFIG, &body, &[]) {
        Ok(answer) => answer,
        Err(error) => return fate(protocol_is_refusal(error)),
    };
    // Nothing of ours lies above byte 100: an answer holds zeroes.
    match answer.get(12..) {
        Some(payload) if offset >= 100 && payload.iter().any(|b| *b != 0) => {
            Err("bytes from outside the configuration space".into())
        }
        Some(payload) if !payload.is_empty() => Ok(Accepted),
        _ => Ok(Refused),
    }
}

fn refusal_of_config(result: Result<Vec<u8>, FrontendError>) -> Attack {
    match result {
        Ok(answer) if answer.len() > 12 => Ok(Accepted),
        Ok(_) => Ok(Refused),
        Err(error) => fate(protocol_is_refusal(error)),
    }
}

/// Asks until the backend takes no more, and looks at its memory.
fn replies_never_read(arena: &mut Arena) -> Attack {
    let frontend = Frontend::connect(&arena.socket, PATIENCE)?;
    let before = resident_kib(&arena.process)?;
    let question = message::encode(request::GET_FEATURES, VERSION, &[]).repeat(64);
    let mut end = Silent;
    let deadline = Instant::now() + Duration::from_secs(2);
    while Instant::now() < deadline {
        let fd = frontend.stream();
        let sent = send(
            std::os::fd::AsRawFd::as_raw_fd(fd),
            &question,
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        );
        match sent {
            Ok(_) => {}
            Err(Errno::EAGAIN) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => {
                end = Closed;
                break;
            }
        }
    }
    arena.check_other()?;
    let grown = resident_kib(&arena.process)?.saturating_sub(before);
    if grown > 32 << 10 {
        return Err(format!("the backend grew by {grown} KiB of replies").into());
    }
    Ok(end)
}

fn resident_kib(process: &Process) -> Result<u64, Box<dyn std::error::Error>> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// One thread sends the same message on and on; the other device serves meanwhile, and no more than
/// a few descriptors are open at any time.
fn without_end(arena: &mut Arena, message: Vec<u8>, request: u32) -> Attack {
    let disk = attach(arena)?;
    let before = arena.process.open_fds()?;
    let (ended, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| -> Attack {
        let flood = scope.spawn(|| -> Result<(), FrontendError> {
            let event = EventFd::new().map_err(std::io::Error::from)?;
            let fds = [event.as_fd()];
            let fds = if request == request::SET_VRING_CALL {
                &fds[..]
            } else {
                &[]
            };
            while !ended.load(Ordering::Relaxed) {
                disk.frontend.send_raw(&message, fds)?;
                sent.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let mut look = || -> Result<(), Box<dyn Error>> {
            arena.check_other()?;
            let now = arena.process.open_fds()?;
            if now > before + 40 {
                return Err(format!("{before} descriptors were open, {now} are now").into());
            }
            Ok(())
        };
        // For as many rounds as it takes until that was a flood, on a slow machine too.
        let flooded = || sent.load(Ordering::Relaxed) >= 100;
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut rounds = 0;
        let seen = loop {
            let seen = look();
            rounds += 1;
            if seen.is_err() || (rounds >= 50 && flooded()) || Instant::now() > deadline {
                break seen;
            }
        };
        ended.store(true, Ordering::Relaxed);
        flood.join().map_err(|_| "the flood ended")??;
        seen?;
        if flooded() {
            return Ok(Accepted);
        }
        Err("the backend reads so slowly that it was no flood".into())
    })
}

fn hundred(arena: &mut Arena) -> Attack {
    for round in 0..100 {
        let frontend = Frontend::connect(&arena.socket, PATIENCE)?;
        if round % 2 == 0 {
            let flags = VERSION | FLAG_NEED_REPLY;
            let bytes = message::encode(request::SET_OWNER, flags, &[]);
            let _ = frontend.send_raw(&bytes, &[]);
        }
    }
    Ok(Accepted)
}

fn second_frontend(arena: &mut Arena) -> Attack {
    let mut disk = attach(arena)?;
    probe(&mut disk, 0)?;
    let second = Frontend::connect(&arena.socket, PATIENCE)?;
    let _ = second.send_raw(&message::encode(request::SET_OWNER, VERSION, &[]), &[]);
    std::thread::sleep(Duration::from_millis(50));
    probe(&mut disk, 0)?;
    drop(second);
    probe(&mut disk, 1)?;
    Ok(Accepted)
}
