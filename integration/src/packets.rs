//! Frames to send, and what must be true of one that arrives: headers, lengths and checksums, word by word as the
//! RFCs have them. Shares no code with the data plane.

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Of IPv4.
pub const IPV4: u16 = 0x0800;
/// Of ARP.
pub const ARP: u16 = 0x0806;
/// Of IPv6.
pub const IPV6: u16 = 0x86dd;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMPv6.
pub const ICMPV6: u8 = 58;

/// Addresses of an IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ip {
    /// IPv4: source, destination.
    V4([u8; 4], [u8; 4]),
    /// IPv6: source, destination.
    V6([u8; 16], [u8; 16]),
}

/// A frame with an IP packet, to be written down.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// VLAN tags, the outer one first: EtherType and control information.
    pub tags: Vec<(u16, u16)>,
    /// Addresses.
    pub ip: Ip,
    /// IPv4 identification.
    pub id: u16,
    /// IPv4: options, whole words. IPv6: extension headers, each with its number, without its first byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// IP protocol.
    pub protocol: u8,
    /// Source and destination port of TCP and UDP.
    pub ports: (u16, u16),
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP flags.
    pub flags: u8,
    /// TCP options, whole words.
    pub options: Vec<u8>,
    /// What the transport carries.
    pub payload: Vec<u8>,
}

/// The first of two stations.
pub const A: Mac = [0x02, 0, 0, 0, 0, 0xa];
/// The second.
pub const B: Mac = [0x02, 0, 0, 0, 0, 0xb];

impl Packet {
    /// From A to B, of one protocol.
    #[must_use]
    pub fn v4(protocol: u8, payload: &[u8]) -> Self {
        Self {
            dst: B,
            src: A,
            tags: Vec::new(),
            ip: Ip::V4([10, 0, 0, 1], [10, 0, 0, 2]),
            id: 0x1234,
            extensions: Vec::new(),
            protocol,
            ports: (40_000, 5201),
            sequence: 0xffff_ff00,
            flags: 0x10,
            options: Vec::new(),
            payload: payload.to_vec(),
        }
    }

    /// The same over IPv6.
    #[must_use]
    pub fn v6(protocol: u8, payload: &[u8]) -> Self {
        let address = |last: u8| {
            let mut address = [0; 16];
            (address[0], address[1], address[15]) = (0xfd, 0x12, last);
            address
        };
        Self {
            ip: Ip::V6(address(1), address(2)),
            ..Self::v4(protocol, payload)
        }
    }

    /// Ethernet's header and the tags.
    #[must_use]
    pub fn link(&self) -> Vec<u8> {
        let kind = if matches!(self.ip, Ip::V4(..)) {
            IPV4
        } else {
            IPV6
        };
        let mut bytes = [self.dst, self.src].concat();
        for (ethertype, control) in &self.tags {
            bytes.extend(ethertype.to_be_bytes());
            bytes.extend(control.to_be_bytes());
        }
        bytes.extend(kind.to_be_bytes());
        bytes
    }

    fn transport(&self) -> Vec<u8> {
        let (source, destination) = self.ports;
        let mut bytes = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        match self.protocol {
            TCP => {
                bytes.extend(self.sequence.to_be_bytes());
                bytes.extend([0; 4]);
                let words = u8::try_from(5 + self.options.len() / 4).unwrap_or(0);
                bytes.extend([words << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
                bytes.extend(&self.options);
            }
            UDP => {
                bytes.extend(length(8 + self.payload.len()).to_be_bytes());
                bytes.extend([0; 2]);
            }
            _ => bytes.clear(),
        }
        bytes
    }

    fn network(&self, carried: usize) -> Vec<u8> {
        match self.ip {
            Ip::V4(source, destination) => {
                let options: Vec<u8> = self
                    .extensions
                    .iter()
                    .flat_map(|(_, o)| o.clone())
                    .collect();
                let words = u8::try_from(5 + options.len() / 4).unwrap_or(0);
                let total = length(20 + options.len() + carried);
                let mut bytes = vec![0x40 | words, 0];
                bytes.extend(total.to_be_bytes());
                bytes.extend(self.id.to_be_bytes());
                bytes.extend([0x40, 0, 64, self.protocol, 0, 0]);
                bytes.extend(source);
                bytes.extend(destination);
                bytes.extend(options);
                let check = !sum(&bytes, 0);
                bytes[10..12].copy_from_slice(&check.to_be_bytes());
                bytes
            }
            Ip::V6(source, destination) => {
                let mut chain = Vec::new();
                for (i, (_, header)) in self.extensions.iter().enumerate() {
                    let next = self
                        .extensions
                        .get(i + 1)
                        .map_or(self.protocol, |(kind, _)| *kind);
                    chain.push(next);
                    chain.extend(header);
                }
                let first = self
                    .extensions
                    .first()
                    .map_or(self.protocol, |(kind, _)| *kind);
                let mut bytes = vec![0x60, 0, 0, 0];
                bytes.extend(length(chain.len() + carried).to_be_bytes());
                bytes.extend([first, 64]);
                bytes.extend(source);
                bytes.extend(destination);
                bytes.extend(chain);
                bytes
            }
        }
    }

    fn pseudo(&self, transport: usize) -> u32 {
        let addresses = match self.ip {
            Ip::V4(a, b) => [a, b].concat(),
            Ip::V6(a, b) => [a, b].concat(),
        };
        // Of more than 2^16 bytes it means nothing, as with a sender that offloads.
        u32::from(sum(&addresses, 0)) + u32::from(self.protocol) + u32::from(length(transport))
    }

    /// The frame, with complete checksums.
    #[must_use]
    pub fn complete(&self) -> Vec<u8> {
        let (mut frame, places) = self.parts();
        // A message that is too short for one has none.
        if let Some((start, at)) = places.filter(|(_, at)| at + 2 <= frame.len()) {
            let value = match !sum(&frame[start..], self.pseudo(frame.len() - start)) {
                0 => 0xffff,
                other => other,
            };
            frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
        }
        frame
    }

    /// The frame, its transport's checksum left to the device, and where that begins and stands behind that.
    #[must_use]
    pub fn partial(&self) -> (Vec<u8>, u16, u16) {
        let (mut frame, places) = self.parts();
        let (start, at) = places.unwrap_or((0, 0));
        let value = sum(&[], self.pseudo(frame.len() - start));
        frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
        (frame, length(start), length(at - start))
    }

    /// Bytes of all headers.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        self.parts().0.len() - self.payload.len()
    }

    /// Without the transport's checksum; where the transport begins and where that stands.
    fn parts(&self) -> (Vec<u8>, Option<(usize, usize)>) {
        let transport = [self.transport(), self.payload.clone()].concat();
        let mut frame = self.link();
        frame.extend(self.network(transport.len()));
        let start = frame.len();
        frame.extend(transport);
        let at = match self.protocol {
            TCP => 16,
            UDP => 6,
            ICMPV6 => 2,
            _ => return (frame, None),
        };
        (frame, Some((start, start + at)))
    }
}

fn length(bytes: usize) -> u16 {
    u16::try_from(bytes & 0xffff).unwrap_or(0)
}

/// The ones' complement sum of 16-bit words, on top of another.
#[must_use]
pub fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum = (sum & 0xffff) + (sum >> 16);
    u16::try_from(sum & 0xffff).unwrap_or(0)
}

/// What a frame that arrived is, if all of it is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Source and destination port.
    pub ports: (u16, u16),
    /// IPv4 identification; 0 of IPv6.
    pub id: u16,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP flags.
    pub flags: u8,
    /// What the transport carries.
    pub payload: Vec<u8>,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], String> {
    let part = bytes.get(at..).and_then(|rest| rest.first_chunk());
    part.copied()
        .ok_or_else(|| format!("{} bytes end before {at}", bytes.len()))
}

fn word(bytes: &[u8], at: usize) -> Result<u16, String> {
    Ok(u16::from_be_bytes(field(bytes, at)?))
}

/// Looks at a whole frame with TCP or UDP: every length fits, every checksum is good.
///
/// # Errors
/// What is not.
pub fn check(frame: &[u8]) -> Result<Seen, String> {
    let mut l3 = 14;
    let mut kind = word(frame, 12)?;
    while matches!(kind, 0x8100 | 0x88a8) {
        kind = word(frame, l3 + 2)?;
        l3 += 4;
    }
    let packet = frame.get(l3..).ok_or("no packet")?;
    let (transport, protocol, pseudo, id) = match kind {
        IPV4 => check_v4(packet)?,
        IPV6 => check_v6(packet)?,
        other => return Err(format!("EtherType {other:#x}")),
    };
    let total = u32::from(length(transport.len()));
    if sum(transport, pseudo + u32::from(protocol) + total) != 0xffff {
        return Err(format!("the checksum of protocol {protocol} is not good"));
    }
    let ports = (word(transport, 0)?, word(transport, 2)?);
    let (header, sequence, flags) = if protocol == TCP {
        let [words, flags] = field(transport, 12)?;
        let sequence = u32::from_be_bytes(field(transport, 4)?);
        (usize::from(words >> 4) * 4, sequence, flags)
    } else {
        if usize::from(word(transport, 4)?) != transport.len() {
            return Err("UDP has another length".to_owned());
        }
        (8, 0, 0)
    };
    let payload = transport.get(header..).ok_or("a short transport")?.to_vec();
    Ok(Seen {
        ports,
        id,
        sequence,
        flags,
        payload,
    })
}

type Carried<'a> = (&'a [u8], u8, u32, u16);

fn check_v4(packet: &[u8]) -> Result<Carried<'_>, String> {
    let [first] = field(packet, 0)?;
    let header = usize::from(first & 0xf) * 4;
    let bytes = packet.get(..header).ok_or("a short IPv4 header")?;
    if sum(bytes, 0) != 0xffff {
        return Err("the checksum of IPv4 is not good".to_owned());
    }
    if usize::from(word(packet, 2)?) != packet.len() {
        return Err(format!(
            "IPv4 says {} of {} bytes",
            word(packet, 2)?,
            packet.len()
        ));
    }
    let pseudo = u32::from(sum(&bytes[12..20], 0));
    let [protocol] = field(packet, 9)?;
    Ok((&packet[header..], protocol, pseudo, word(packet, 4)?))
}

fn check_v6(packet: &[u8]) -> Result<Carried<'_>, String> {
    if usize::from(word(packet, 4)?) + 40 != packet.len() {
        return Err(format!(
            "IPv6 says {} of {} bytes",
            word(packet, 4)?,
            packet.len()
        ));
    }
    let addresses: [u8; 32] = field(packet, 8)?;
    let [mut protocol] = field(packet, 6)?;
    let mut at = 40;
    while matches!(protocol, 0 | 43 | 60) {
        let [next, units] = field(packet, at)?;
        protocol = next;
        at += 8 + 8 * usize::from(units);
    }
    let carried = packet.get(at..).ok_or("a short IPv6 packet")?;
    Ok((carried, protocol, u32::from(sum(&addresses, 0)), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_found_right_and_any_wrong_byte_is_found() {
        for packet in [
            Packet::v4(TCP, b"odd"),
            Packet::v4(UDP, b"even"),
            Packet::v6(TCP, b"odd"),
            Packet {
                tags: vec![(0x88a8, 7), (0x8100, 9)],
                extensions: vec![(60, vec![0, 1, 4, 0, 0, 0, 0])],
                ..Packet::v6(UDP, b"behind an option")
            },
        ] {
            let frame = packet.complete();
            let seen = check(&frame).expect("good");
            assert_eq!((seen.ports, &seen.payload), (packet.ports, &packet.payload));
            let l4 = packet.header_bytes() - if packet.protocol == TCP { 20 } else { 8 };
            for at in l4..frame.len() {
                let mut wrong = frame.clone();
                wrong[at] ^= 0x10;
                assert!(check(&wrong).is_err(), "byte {at}");
            }
        }
    }
}
