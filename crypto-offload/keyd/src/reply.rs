//! The answer about an accepted bundle, cut so that it fits into a message.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use bulkhead_protocol::channel::MAX_MESSAGE_BYTES;
use bulkhead_protocol::keys::{HostKeys, KeydToAgent, MAX_SHREDS, Undelivered};

/// Most volumes and NICs that one answer names.
const MAX_ENTRIES: usize = 1024;
/// CBOR around a reason: list, id with its kind, lengths.
const ENTRY_BYTES: usize = 26;
/// CBOR of everything else: the host's key, and each of the shreds that are told of.
const FIXED_BYTES: usize = 2048 + MAX_SHREDS * SHRED_BYTES;
/// CBOR of a shred: an id, two fingerprints, three numbers.
const SHRED_BYTES: usize = 160;

/// The answer. With so much undelivered that their reasons exceed a message, the reasons
/// are cut, then the list: the agent learns that not all was delivered, and asks again.
pub(crate) fn accepted(
    request_id: u64,
    epoch: u64,
    mut undelivered: Vec<Undelivered>,
    keys: HostKeys,
) -> KeydToAgent {
    undelivered.truncate(MAX_ENTRIES);
    let room = MAX_MESSAGE_BYTES - FIXED_BYTES;
    let each = room.checked_div(undelivered.len()).unwrap_or(room) - ENTRY_BYTES;
    for entry in &mut undelivered {
        let end = entry.reason.floor_char_boundary(each);
        entry.reason.truncate(end);
    }
    KeydToAgent::Accepted {
        request_id,
        epoch,
        undelivered,
        keys,
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::{Channel, NicId, VolumeId};

    use bulkhead_protocol::keys::{Shred, ShredState};

    use super::*;

    /// As long as it gets.
    fn keys() -> HostKeys {
        let shred = Shred {
            volume: VolumeId([0xee; 16]),
            epoch: u64::MAX,
            time_s: u64::MAX,
            destroyed_key: [0xee; 48].into(),
            new_key: [0xee; 48].into(),
            state: ShredState::KeyOnDisk,
        };
        HostKeys {
            fingerprint: [0xee; 48].into(),
            shreds: vec![shred; MAX_SHREDS],
            shreds_total: u64::MAX,
            unfinished: Some("\u{10ffff}".repeat(300)),
        }
    }

    #[test]
    fn it_always_fits_into_a_message() {
        for count in [0, 1, 1023, 1024, 1025, 5000] {
            let entry = Undelivered {
                id: NicId([0xee; 16]).into(),
                reason: "é".repeat(300),
            };
            let reply = accepted(u64::MAX, u64::MAX, vec![entry; count], keys());
            let (a, b) = Channel::pair().expect("pair");
            a.send(&reply, &[]).expect("fits");
            let KeydToAgent::Accepted { undelivered, .. } =
                b.receive::<KeydToAgent>().expect("receive").message
            else {
                panic!("another answer");
            };
            assert_eq!(undelivered.len(), count.min(MAX_ENTRIES));
        }
    }
}
