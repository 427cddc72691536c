//! Messages: numbers, layouts, and how many descriptors belong to each.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::os::fd::OwnedFd;

use crate::memory::RegionSpec;

/// Bytes of a header: request, flags, size.
pub const HEADER_BYTES: usize = 12;
/// Longest body that is taken. The longest that is known has 268 bytes or 8 regions.
pub const MAX_BODY_BYTES: u32 = 4096;
/// Most regions of one SET_MEM_TABLE.
pub const MAX_TABLE_REGIONS: usize = 8;
/// Most regions at a time, with ADD_MEM_REG.
pub const MAX_REGIONS: u64 = 32;

const FLAG_VERSION_MASK: u32 = 0x3;
const FLAG_VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 0x100;
/// `VHOST_VRING_F_LOG`, a flag of SET_VRING_ADDR.
const VRING_LOG: u32 = 1;
const CONFIG_HEADER_BYTES: usize = 12;

/// Request numbers.
pub mod code {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// A header that is not of this protocol.
    #[error("a message header is not valid: {0}")]
    Header(&'static str),
    /// The frontend sent more descriptors than any message has, or they were cut off.
    #[error("a message came with more descriptors than it may have, or than are free here")]
    TooManyFds,
    /// A request was refused that asked for no acknowledgement: the frontend could not know.
    #[error("request {code} was refused: {reason}")]
    Refused {
        /// Its number.
        code: u32,
        /// Why.
        reason: String,
    },
    /// The process before this one died while it sent a reply: nobody can tell whether the frontend has it.
    #[error("the process before died while it sent a reply: the frontend has to connect again")]
    ReplyUnsure,
    /// What a predecessor left of the connection can't go on.
    #[error("the connection can't be taken over: {0}")]
    Resume(String),
    /// The frontend cut the file behind its memory.
    #[error("guest memory went away while it was used: the frontend truncated its file")]
    MemoryLost,
    /// The socket.
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
}

/// A header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Number of the request.
    pub code: u32,
    /// An acknowledgement is asked for.
    pub need_reply: bool,
    /// Bytes of the body.
    pub body_bytes: u32,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`ProtocolError::Header`].
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, ProtocolError> {
        let [c0, c1, c2, c3, f0, f1, f2, f3, s0, s1, s2, s3] = bytes;
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let body_bytes = u32::from_le_bytes([s0, s1, s2, s3]);
        if flags & FLAG_VERSION_MASK != FLAG_VERSION {
            return Err(ProtocolError::Header("its version is not 1"));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(ProtocolError::Header("it is marked as a reply"));
        }
        if body_bytes > MAX_BODY_BYTES {
            return Err(ProtocolError::Header("its body is longer than any message"));
        }
        Ok(Self {
            code: u32::from_le_bytes([c0, c1, c2, c3]),
            need_reply: flags & FLAG_NEED_REPLY != 0,
            body_bytes,
        })
    }
}

/// The bytes of a message that we begin and that has no body.
#[must_use]
pub fn notice(code: u32) -> [u8; HEADER_BYTES] {
    let [c0, c1, c2, c3] = code.to_le_bytes();
    let [f0, f1, f2, f3] = FLAG_VERSION.to_le_bytes();
    [c0, c1, c2, c3, f0, f1, f2, f3, 0, 0, 0, 0]
}

/// The bytes of a reply to a request.
#[must_use]
pub fn reply(code: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(code.to_le_bytes());
    bytes.extend((FLAG_VERSION | FLAG_REPLY).to_le_bytes());
    bytes.extend(u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// A whole message, as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its body.
    pub body: Vec<u8>,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// A request, typed. Every other descriptor that came with it is closed.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetMemTable(Vec<(RegionSpec, OwnedFd)>),
    GetMaxMemSlots,
    AddMemRegion(RegionSpec, OwnedFd),
    RemoveMemRegion(RegionSpec),
    SetVringNum {
        index: u32,
        size: u32,
    },
    SetVringAddr(VringAddresses),
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringCall {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringErr {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringEnable {
        index: u32,
        enabled: bool,
    },
    /// The MAC address of a guest that has come from another host.
    SendRarp([u8; 6]),
    NetSetMtu(u64),
    GetQueueNum,
    GetConfig {
        offset: u32,
        size: u32,
    },
    SetConfig {
        offset: u32,
        payload: Vec<u8>,
    },
    SetLogBase {
        bytes: u64,
        offset: u64,
        fd: OwnedFd,
    },
    SetLogFd,
    SetBackendReqFd(OwnedFd),
    GetInflightFd(Inflight),
    SetInflightFd(Inflight, OwnedFd),
    ResetDevice,
    SetStatus(u64),
    GetStatus,
}

/// The in-flight region (vhost-user, "Inflight description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inflight {
    /// Bytes to map.
    pub bytes: u64,
    /// Where in the file they begin.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// The body has the padding that a C compiler puts behind the last field.
    pub padded: bool,
}

impl Inflight {
    fn parse(body: &mut Fields<'_>) -> Option<Self> {
        let (bytes, offset, sizes) = (body.u64()?, body.u64()?, body.u32()?);
        let half = |shift: u32| u16::try_from((sizes >> shift) & 0xffff).unwrap_or(0);
        Some(Self {
            bytes,
            offset,
            queues: half(0),
            queue_size: half(16),
            padded: body.0.len() == 4 && body.u32().is_some(),
        })
    }

    /// As a body, as long as the one it was read from.
    #[must_use]
    pub fn body(self) -> Vec<u8> {
        let mut body = self.bytes.to_le_bytes().to_vec();
        body.extend(self.offset.to_le_bytes());
        body.extend(self.queues.to_le_bytes());
        body.extend(self.queue_size.to_le_bytes());
        if self.padded {
            body.extend([0; 4]);
        }
        body
    }
}

/// SET_VRING_ADDR, in frontend addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddresses {
    /// The queue.
    pub index: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Avail ring.
    pub avail: u64,
    /// Address of the used ring in the dirty log, if writes to the ring are to be marked
    /// (VHOST_VRING_F_LOG).
    pub log: Option<u64>,
}

/// Reads little-endian fields off the front of a body.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*first))
    }

    fn u64(&mut self) -> Option<u64> {
        let (first, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*first))
    }

    fn region(&mut self) -> Option<RegionSpec> {
        Some(RegionSpec {
            guest_addr: self.u64()?,
            bytes: self.u64()?,
            user_addr: self.u64()?,
            file_offset: self.u64()?,
        })
    }
}

impl Message {
    /// How many descriptors belong to it by what it is and says.
    #[must_use]
    pub fn wanted_fds(&self) -> usize {
        let mut body = Fields(&self.body);
        match self.header.code {
            code::SET_MEM_TABLE => body.u32().and_then(|n| usize::try_from(n).ok()),
            code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
                body.u64().map(|word| usize::from(word & VRING_NO_FD == 0))
            }
            other => Some(usize::from(takes_fds(other))),
        }
        .unwrap_or(0)
    }

    /// The typed request.
    ///
    /// # Errors
    /// Says what is wrong; all descriptors are closed.
    pub fn parse(self) -> Result<Request, String> {
        let code = self.header.code;
        let mut body = Fields(&self.body);
        let mut fds = self.fds.into_iter();
        let parsed = parse(code, &mut body, &mut fds)?;
        let Some(request) = parsed else {
            return Err(format!("a body of {} bytes is too short", self.body.len()));
        };
        let any_body = matches!(
            request,
            Request::SetOwner | Request::ResetOwner | Request::ResetDevice | Request::SetLogFd
        );
        if !body.0.is_empty() && !any_body {
            return Err(format!("a body of {} bytes is too long", self.body.len()));
        }
        if fds.next().is_some() && takes_fds(code) {
            return Err("more descriptors came with it than belong to it".to_owned());
        }
        Ok(request)
    }
}

fn takes_fds(code: u32) -> bool {
    matches!(
        code,
        code::SET_MEM_TABLE
            | code::ADD_MEM_REG
            | code::SET_VRING_KICK
            | code::SET_VRING_CALL
            | code::SET_VRING_ERR
            | code::SET_LOG_BASE
            | code::SET_LOG_FD
            | code::SET_BACKEND_REQ_FD
            | code::SET_INFLIGHT_FD
    )
}

/// None: the body is too short.
fn parse(
    code: u32,
    body: &mut Fields<'_>,
    fds: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Option<Request>, String> {
    let request = match code {
        code::GET_FEATURES => Some(Request::GetFeatures),
        code::SET_FEATURES => body.u64().map(Request::SetFeatures),
        code::SET_OWNER => Some(Request::SetOwner),
        code::RESET_OWNER => Some(Request::ResetOwner),
        code::GET_PROTOCOL_FEATURES => Some(Request::GetProtocolFeatures),
        code::SET_PROTOCOL_FEATURES => body.u64().map(Request::SetProtocolFeatures),
        code::SET_MEM_TABLE => return memory_table(body, fds),
        code::GET_MAX_MEM_SLOTS => Some(Request::GetMaxMemSlots),
        code::ADD_MEM_REG | code::REM_MEM_REG => return memory_region(code, body, fds),
        code::SET_VRING_NUM => pair(body).map(|(index, size)| Request::SetVringNum { index, size }),
        code::SET_VRING_ADDR => vring_addresses(body).map(Request::SetVringAddr),
        code::SET_VRING_BASE => {
            pair(body).map(|(index, base)| Request::SetVringBase { index, base })
        }
        code::GET_VRING_BASE => pair(body).map(|(index, _)| Request::GetVringBase { index }),
        code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
            return vring_fd(code, body, fds);
        }
        code::SET_VRING_ENABLE => pair(body).map(|(index, state)| Request::SetVringEnable {
            index,
            enabled: state != 0,
        }),
        code::SEND_RARP => body.u64().map(|word| Request::SendRarp(mac_of(word))),
        code::NET_SET_MTU => body.u64().map(Request::NetSetMtu),
        code::GET_QUEUE_NUM => Some(Request::GetQueueNum),
        code::GET_CONFIG | code::SET_CONFIG => return config(code, body),
        code::SET_LOG_BASE => return log_base(body, fds),
        code::SET_LOG_FD => {
            // To be signalled when something was marked; nobody waits for it. It is closed.
            let _ = fds.next();
            Some(Request::SetLogFd)
        }
        code::SET_BACKEND_REQ_FD => Some(Request::SetBackendReqFd(needed(fds)?)),
        code::GET_INFLIGHT_FD => Inflight::parse(body).map(Request::GetInflightFd),
        code::SET_INFLIGHT_FD => match Inflight::parse(body) {
            Some(region) => Some(Request::SetInflightFd(region, needed(fds)?)),
            None => None,
        },
        code::RESET_DEVICE => Some(Request::ResetDevice),
        code::SET_STATUS => body.u64().map(Request::SetStatus),
        code::GET_STATUS => Some(Request::GetStatus),
        _ => return Err("it is not known, or was not negotiated".to_owned()),
    };
    Ok(request)
}

/// The descriptor that a message has to come with.
fn needed(fds: &mut impl Iterator<Item = OwnedFd>) -> Result<OwnedFd, String> {
    fds.next()
        .ok_or_else(|| "it came without its descriptor".to_owned())
}

fn log_base(
    body: &mut Fields<'_>,
    fds: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Option<Request>, String> {
    let (Some(bytes), Some(offset)) = (body.u64(), body.u64()) else {
        return Ok(None);
    };
    let fd = needed(fds)?;
    Ok(Some(Request::SetLogBase { bytes, offset, fd }))
}

/// A MAC address, in the six low bytes of a word in its order.
fn mac_of(word: u64) -> [u8; 6] {
    let [a, b, c, d, e, f, ..] = word.to_le_bytes();
    [a, b, c, d, e, f]
}

fn pair(body: &mut Fields<'_>) -> Option<(u32, u32)> {
    Some((body.u32()?, body.u32()?))
}

fn memory_table(
    body: &mut Fields<'_>,
    fds: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Option<Request>, String> {
    let Some((count, _padding)) = pair(body) else {
        return Ok(None);
    };
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if count > MAX_TABLE_REGIONS {
        return Err(format!("{count} regions, the most is {MAX_TABLE_REGIONS}"));
    }
    let mut regions = Vec::with_capacity(count);
    for _ in 0..count {
        let Some(spec) = body.region() else {
            return Ok(None);
        };
        let fd = fds.next().ok_or("a region came without its descriptor")?;
        regions.push((spec, fd));
    }
    Ok(Some(Request::SetMemTable(regions)))
}

fn memory_region(
    code: u32,
    body: &mut Fields<'_>,
    fds: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Option<Request>, String> {
    let (Some(_padding), Some(spec)) = (body.u64(), body.region()) else {
        return Ok(None);
    };
    if code == code::REM_MEM_REG {
        // Some frontends send the region's descriptor here too; it is closed.
        return Ok(Some(Request::RemoveMemRegion(spec)));
    }
    let fd = fds.next().ok_or("a region came without its descriptor")?;
    Ok(Some(Request::AddMemRegion(spec, fd)))
}

fn vring_addresses(body: &mut Fields<'_>) -> Option<VringAddresses> {
    let (index, flags) = pair(body)?;
    let (desc, used, avail, log) = (body.u64()?, body.u64()?, body.u64()?, body.u64()?);
    Some(VringAddresses {
        index,
        desc,
        used,
        avail,
        log: (flags & VRING_LOG != 0).then_some(log),
    })
}

fn vring_fd(
    code: u32,
    body: &mut Fields<'_>,
    fds: &mut impl Iterator<Item = OwnedFd>,
) -> Result<Option<Request>, String> {
    let Some(word) = body.u64() else {
        return Ok(None);
    };
    let index = u32::try_from(word & VRING_INDEX_MASK).unwrap_or(u32::MAX);
    let fd = if word & VRING_NO_FD != 0 {
        None
    } else {
        Some(needed(fds)?)
    };
    Ok(Some(match code {
        code::SET_VRING_KICK => Request::SetVringKick { index, fd },
        code::SET_VRING_CALL => Request::SetVringCall { index, fd },
        _ => Request::SetVringErr { index, fd },
    }))
}

fn config(code: u32, body: &mut Fields<'_>) -> Result<Option<Request>, String> {
    let (Some(offset), Some(size), Some(_flags)) = (body.u32(), body.u32(), body.u32()) else {
        return Ok(None);
    };
    let payload = std::mem::take(&mut body.0);
    if usize::try_from(size).ok() != Some(payload.len()) {
        return Err(format!(
            "it says {size} bytes of configuration and has {}",
            payload.len()
        ));
    }
    Ok(Some(match code {
        code::GET_CONFIG => Request::GetConfig { offset, size },
        _ => Request::SetConfig {
            offset,
            payload: payload.to_vec(),
        },
    }))
}

/// The body of a reply to GET_CONFIG.
#[must_use]
pub fn config_body(offset: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(CONFIG_HEADER_BYTES + payload.len());
    body.extend(offset.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    body.extend(payload);
    body
}
