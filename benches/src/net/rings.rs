//! What frontends negotiate, and what is sent: the cases that are measured.
#![forbid(unsafe_code)]

/// Entries of each ring, as QEMU's network cards have them.
pub const ENTRIES: u16 = 256;

/// What a frontend negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    /// Packed rings; else split ones.
    pub packed: bool,
    /// A frame may lie in several receive buffers (`MRG_RXBUF`).
    pub mergeable: bool,
}

impl Rings {
    /// All that are measured; two that stand for all in the short form.
    #[must_use]
    pub fn all(quick: bool) -> Vec<Self> {
        let all = [(false, true), (false, false), (true, true), (true, false)];
        let few = [(false, true), (true, false)];
        let chosen = if quick { &few[..] } else { &all[..] };
        let rings = chosen
            .iter()
            .map(|&(packed, mergeable)| Self { packed, mergeable });
        rings.collect()
    }

    /// As cases call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match (self.packed, self.mergeable) {
            (false, true) => "split, mergeable",
            (false, false) => "split",
            (true, true) => "packed, mergeable",
            (true, false) => "packed",
        }
    }

    /// A `net_virtio_user` port of `testpmd` at a socket; `number` makes its name and its MAC.
    #[must_use]
    pub fn port(self, number: u16, socket: &std::path::Path) -> String {
        format!(
            "net_virtio_user{number},path={},queues=1,queue_size={ENTRIES},mac={},packed_vq={},mrg_rxbuf={}",
            socket.display(),
            mac(number),
            u8::from(self.packed),
            u8::from(self.mergeable),
        )
    }
}

/// The MAC of a guest's card.
#[must_use]
pub fn mac(number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!("02:bb:00:00:{high:02x}:{low:02x}")
}

/// Where frames go, as the guest has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The guest sends.
    Tx,
    /// The guest receives.
    Rx,
}

impl Way {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tx, Self::Rx];

    /// As cases call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tx => "tx",
            Self::Rx => "rx",
        }
    }
}

/// Bytes of small frames, without the check sequence.
pub const SMALL: u32 = 64;
/// And of those that fill an Ethernet frame but for its header.
pub const LARGE: u32 = 1500;

/// Both; one of them in the short form.
#[must_use]
pub fn sizes(quick: bool) -> &'static [u32] {
    if quick { &[SMALL] } else { &[SMALL, LARGE] }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_short_form_is_part_of_the_long_one() {
        let all = Rings::all(false);
        let names: BTreeSet<_> = all.iter().map(|rings| rings.name()).collect();
        assert_eq!(names.len(), 4);
        for few in Rings::all(true) {
            assert!(all.contains(&few), "{few:?}");
        }
    }

    #[test]
    fn a_port_says_what_it_negotiates() {
        let rings = Rings {
            packed: true,
            mergeable: false,
        };
        assert_eq!(
            rings.port(1, Path::new("/s")),
            "net_virtio_user1,path=/s,queues=1,queue_size=256,mac=02:bb:00:00:00:01,packed_vq=1,mrg_rxbuf=0"
        );
    }
}
