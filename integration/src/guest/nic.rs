//! A guest's network cards: vhost-user-net of QEMU's, whose control queue stays in QEMU.

use std::path::PathBuf;

use super::{RECONNECT_MS, on};

/// Modules of virtio network cards.
pub(super) const MODULES: &[&str] = &["virtio_net"];

/// A network card of a guest; the first is eth0.
#[derive(Debug, Clone)]
pub struct GuestNic {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// Its address, as six hexadecimal bytes with colons.
    pub mac: String,
    /// Queue pairs. The driver uses as many as there are processors.
    pub pairs: u16,
    /// Packed rings are offered to the guest, if the back-end has them.
    pub packed: bool,
    /// The driver is offered no offloads: it gets checksummed packets of the MTU, and sends such.
    pub bare: bool,
}

/// What a bare card is not offered.
const OFFLOADS: &[&str] = &[
    "csum",
    "gso",
    "guest_csum",
    "guest_tso4",
    "guest_tso6",
    "guest_ecn",
    "guest_ufo",
    "guest_uso4",
    "guest_uso6",
    "host_tso4",
    "host_tso6",
    "host_ecn",
    "host_ufo",
    "host_uso",
];

impl GuestNic {
    /// With one pair of split rings.
    #[must_use]
    pub fn new(socket: PathBuf, mac: &str) -> Self {
        Self {
            socket,
            mac: mac.to_owned(),
            pairs: 1,
            packed: false,
            bare: false,
        }
    }

    /// QEMU's arguments for the card of this number.
    pub(super) fn arguments(&self, index: usize) -> Vec<String> {
        let Self {
            socket,
            mac,
            pairs,
            packed,
            bare,
        } = self;
        // An interrupt for each queue, one for the control queue and one for changes of the configuration.
        let vectors = 2 * pairs + 2;
        let offloads = OFFLOADS.iter().filter(|_| *bare);
        let without: String = offloads.map(|name| format!(",{name}=off")).collect();
        vec![
            "-chardev".to_owned(),
            format!(
                "socket,id=cn{index},path={},reconnect-ms={RECONNECT_MS}",
                socket.display()
            ),
            "-netdev".to_owned(),
            format!("vhost-user,id=n{index},chardev=cn{index},queues={pairs}"),
            "-device".to_owned(),
            format!(
                "virtio-net-pci,netdev=n{index},mac={mac},mq={},vectors={vectors},packed={},romfile={without}",
                on(*pairs > 1),
                on(*packed)
            ),
        ]
    }
}
