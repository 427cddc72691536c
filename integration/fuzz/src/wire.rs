//! Ethernet, IP, TCP and UDP as the RFCs' sentences have them, byte by byte: what targets of network frames compare
//! with. A frame of any bytes is looked at, and nothing of it is believed.

/// What a frame is, as far as it can be told from its first bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layers {
    pub ethertype: u16,
    pub tag: Option<u16>,
    pub l3: usize,
    /// 4, 6 or 0.
    pub ip: u8,
    /// An IPv4 fragment, or one of IPv6.
    pub fragment: bool,
    /// An IPv6 routing header came before.
    pub routed: bool,
    /// Where the transport begins, and its protocol; none of a fragment, and where it can't be found.
    pub transport: Option<(usize, u8)>,
}

pub fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from(*bytes.get(at)?) << 8 | u16::from(*bytes.get(at + 1)?))
}

/// The layers of a frame of which these are the first bytes; none without a whole Ethernet header.
pub fn layers(head: &[u8]) -> Option<Layers> {
    let mut found = Layers {
        ethertype: word(head, 12)?,
        l3: 14,
        ..Layers::default()
    };
    for _ in 0..2 {
        if ![0x8100, 0x88a8].contains(&found.ethertype) || head.len() < found.l3 + 4 {
            break;
        }
        let tag = word(head, found.l3)?;
        found.tag = found.tag.or(Some(tag));
        found.ethertype = word(head, found.l3 + 2)?;
        found.l3 += 4;
    }
    match found.ethertype {
        0x0800 => v4(head, &mut found),
        0x86dd => v6(head, &mut found),
        _ => {}
    }
    Some(found)
}

fn v4(head: &[u8], found: &mut Layers) {
    let packet = &head[found.l3..];
    let Some(first) = packet.first() else {
        return;
    };
    let length = usize::from(first % 16) * 4;
    if first / 16 != 4 || length < 20 || packet.len() < length {
        return;
    }
    found.ip = 4;
    found.fragment = packet[6] & 0x3f != 0 || packet[7] != 0;
    if !found.fragment {
        found.transport = Some((found.l3 + length, packet[9]));
    }
}

fn v6(head: &[u8], found: &mut Layers) {
    let packet = &head[found.l3..];
    if packet.len() < 40 || packet[0] / 16 != 6 {
        return;
    }
    found.ip = 6;
    let (mut at, mut next) = (found.l3 + 40, packet[6]);
    for _ in 0..9 {
        match next {
            0 | 43 | 60 | 51 => {}
            44 => {
                found.fragment = true;
                return;
            }
            _ => {
                found.transport = Some((at, next));
                return;
            }
        }
        let (Some(following), Some(length)) = (head.get(at), head.get(at + 1)) else {
            return;
        };
        found.routed |= next == 43;
        at += 8 + usize::from(*length) * if next == 51 { 4 } else { 8 };
        next = *following;
    }
}

/// The ones' complement sum of 16-bit words.
pub fn sum(bytes: impl IntoIterator<Item = u8>) -> u16 {
    let (mut sum, mut is_high) = (0u32, true);
    for byte in bytes {
        sum += if is_high {
            u32::from(byte) << 8
        } else {
            u32::from(byte)
        };
        sum = (sum & 0xffff) + (sum >> 16);
        is_high = !is_high;
    }
    u16::try_from(sum).expect("folded")
}

/// The payload of one segment of a frame whose layers are these: every length in it is right, every checksum good,
/// and the rest of its headers is the frame's.
pub fn payload_of<'a>(segment: &'a [u8], frame: &[u8], layers: &Layers) -> &'a [u8] {
    let (l4, protocol) = layers.transport.expect("it was cut");
    let l3 = layers.l3;
    let length = |at| usize::from(word(segment, at).expect("a header"));
    let addresses = if layers.ip == 4 {
        assert_eq!(length(l3 + 2), segment.len() - l3, "the length of IPv4");
        assert_eq!(
            sum(segment[l3..l4].iter().copied()),
            0xffff,
            "IPv4's checksum"
        );
        l3 + 12..l3 + 20
    } else {
        assert_eq!(
            length(l3 + 4),
            segment.len() - l3 - 40,
            "the length of IPv6"
        );
        l3 + 8..l3 + 40
    };
    let transport = u16::try_from(segment.len() - l4).expect("below 2^16");
    let pseudo = segment[addresses].iter().copied();
    let pseudo = pseudo.chain([0, protocol]).chain(transport.to_be_bytes());
    // Behind an even number of bytes.
    let all = pseudo.chain(segment[l4..].iter().copied());
    assert_eq!(sum(all), 0xffff, "the transport's checksum");
    let header = if protocol == 6 {
        usize::from(segment[l4 + 12] >> 4) * 4
    } else {
        assert_eq!(length(l4 + 4), segment.len() - l4, "the length of UDP");
        8
    };
    for at in 0..l4 + header {
        let may_change: &[usize] = match (layers.ip, protocol) {
            (4, 6) => &[l3 + 2, l3 + 3, l3 + 4, l3 + 5, l3 + 10, l3 + 11],
            (4, _) => &[
                l3 + 2,
                l3 + 3,
                l3 + 4,
                l3 + 5,
                l3 + 10,
                l3 + 11,
                l4 + 4,
                l4 + 5,
            ],
            (_, 6) => &[l3 + 4, l3 + 5],
            _ => &[l3 + 4, l3 + 5, l4 + 4, l4 + 5],
        };
        let of_tcp = protocol == 6 && [l4 + 4, l4 + 5, l4 + 6, l4 + 7, l4 + 13].contains(&at);
        let is_checksum = at == l4 + if protocol == 6 { 16 } else { 6 }
            || at == l4 + if protocol == 6 { 17 } else { 7 };
        if !may_change.contains(&at) && !of_tcp && !is_checksum {
            assert_eq!(segment[at], frame[at], "byte {at} of the headers");
        }
    }
    &segment[l4 + header..]
}
