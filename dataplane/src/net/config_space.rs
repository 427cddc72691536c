//! The virtio-net configuration space, and the features that a card offers (virtio 1.2, 5.1.3 and 5.1.4).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::device::NetDevice;
use super::header::feature;
use crate::device::CONFIG_BYTES;

/// `status`: the link is up.
const LINK_UP: u16 = 1;

/// What a network card offers, beside the transport's features. Whatever it is connected to: what a receiver can't
/// take as it is, is completed or cut in software.
#[must_use]
pub fn features(_device: &NetDevice) -> u64 {
    feature::CSUM
        | feature::GUEST_CSUM
        | feature::MTU
        | feature::MAC
        | feature::GUEST_TSO4
        | feature::GUEST_TSO6
        | feature::HOST_TSO4
        | feature::HOST_TSO6
        | feature::MRG_RXBUF
        | feature::STATUS
        | feature::CTRL_VQ
        | feature::GUEST_ANNOUNCE
        | feature::MQ
        | feature::GUEST_USO4
        | feature::GUEST_USO6
        | feature::HOST_USO
}

/// Its configuration space, as it is now: `struct virtio_net_config`.
#[must_use]
pub fn read(device: &NetDevice) -> [u8; CONFIG_BYTES] {
    let shape = &device.shape;
    let status = if device.is_up() { LINK_UP } else { 0 };
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = space.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, &shape.mac);
    put(6, &status.to_le_bytes());
    put(8, &shape.queue_pairs.to_le_bytes());
    put(10, &shape.mtu.to_le_bytes());
    space
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Shape;

    /// The fields lie where Linux' `virtio_net.h` has them.
    #[test]
    fn the_space_says_what_the_device_is() {
        let device = NetDevice::new(Shape {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            mtu: 9000,
            queue_pairs: 4,
        });
        let space = read(&device);
        assert_eq!(
            space[..12],
            [0x52, 0x54, 0, 1, 2, 3, 1, 0, 4, 0, 0x28, 0x23]
        );
        assert!(space[12..].iter().all(|byte| *byte == 0));
        let told = device.told();
        device.set_up(false);
        assert_eq!(read(&device)[6], 0);
        assert_ne!(device.told(), told, "the frontend is to hear of it");
    }
}
