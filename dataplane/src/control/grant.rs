//! A grant as it arrives from keyd: every field checked, its key expanded, the page it came in wiped, or kept
//! for a successor.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_crypto::{DataUnit, SecretArena, XtsKey};
use bulkhead_protocol::keys::{KeydToDataplane, VolumeGrant, XTS_KEY_BYTES};
use bulkhead_protocol::{DiscardPolicy, Received};

use super::page::{Pages, expand};
use crate::blk::Geometry;

const _: () = assert!(KEY_BYTES == XTS_KEY_BYTES);

/// Most request queues of a volume.
const MAX_QUEUES: u16 = 64;
/// Length of a serial in bytes (virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID).
const SERIAL_BYTES: usize = 20;
const SECTOR_BYTES: u64 = crate::blk::SECTOR_BYTES;

/// Checks the fields of a grant.
///
/// # Errors
/// What is wrong, for the operator.
pub(super) fn check(grant: &VolumeGrant) -> Result<(), String> {
    let block = grant.logical_block_bytes;
    if !matches!(block, 512 | 4096) {
        return Err(format!(
            "a logical block of {block} bytes: it has 512 or 4096"
        ));
    }
    match grant.data_unit_bytes {
        None => {}
        Some(unit) if DataUnit::new(unit).is_none() => {
            return Err(format!("a data unit of {unit} bytes: it has 512 or 4096"));
        }
        Some(unit) if unit > block => {
            return Err(format!(
                "a data unit of {unit} bytes is larger than the logical block of {block}"
            ));
        }
        Some(_) => {}
    }
    if grant.rekey.is_some() && (grant.data_unit_bytes.is_none() || grant.read_only) {
        return Err("a re-key of a volume that is plain or only read".to_owned());
    }
    let size = grant.size_bytes;
    if size == 0 || !size.is_multiple_of(u64::from(block)) || i64::try_from(size).is_err() {
        return Err(format!(
            "a size of {size} bytes: it is a multiple of the logical block of {block}, below 2^63"
        ));
    }
    if !(1..=MAX_QUEUES).contains(&grant.queues) {
        return Err(format!("{} queues: it has 1 to {MAX_QUEUES}", grant.queues));
    }
    if grant.rekey.is_some() && (grant.data_unit_bytes.is_none() || grant.read_only) {
        return Err("a re-key of a volume that is plain or only read".to_owned());
    }
    let printable = grant.serial.bytes().all(|c| (b' '..=b'~').contains(&c));
    if grant.serial.len() > SERIAL_BYTES || !printable {
        return Err(format!(
            "its serial is not ASCII of at most {SERIAL_BYTES} characters"
        ));
    }
    check_limits(grant)
}

fn check_limits(grant: &VolumeGrant) -> Result<(), String> {
    let checked = grant.limits.check();
    checked.map_err(|e| format!("its limits: {e}"))?;
    let Some(group) = &grant.group else {
        return Ok(());
    };
    let checked = group.limits.check();
    checked.map_err(|e| format!("the limits of its group {}: {e}", group.name))
}

/// What came with a grant, expanded.
#[derive(Debug, Default)]
pub(super) struct GrantedKeys {
    /// None for a plain volume.
    pub(super) key: Option<XtsKey>,
    /// What a re-key replaces.
    pub(super) previous: Option<XtsKey>,
    /// What they came in; kept where a successor is to have it.
    pub(super) pages: Pages,
}

/// Takes the keys that came with a grant: none for a plain volume. With `keep` their pages stay as they
/// are until they drop.
///
/// # Errors
/// What is wrong with the descriptors or the key. A page that was secret memory is wiped then.
pub(super) fn take_keys(
    (arena, keep): (&Arc<SecretArena>, bool),
    grant: &VolumeGrant,
    received: &mut Received<KeydToDataplane>,
) -> Result<GrantedKeys, String> {
    if grant.data_unit_bytes.is_none() {
        let [] = received.take_fds().map_err(|e| e.to_string())?;
        return Ok(GrantedKeys::default());
    }
    if grant.rekey.is_none() {
        let [page] = received.take_fds().map_err(|e| e.to_string())?;
        let (key, page) = expand(arena, page, keep)?;
        return Ok(GrantedKeys {
            key: Some(key),
            previous: None,
            pages: Pages {
                key: page,
                previous: None,
            },
        });
    }
    let [page, previous] = received.take_fds().map_err(|e| e.to_string())?;
    // Both pages are wiped, whatever is wrong with one of them.
    let (key, previous) = (expand(arena, page, keep), expand(arena, previous, keep));
    let (key, page) = key?;
    let (previous, previous_page) = previous.map_err(|e| format!("its previous key: {e}"))?;
    if key.is_same(&previous) {
        return Err("its key and its previous key are the same".to_owned());
    }
    Ok(GrantedKeys {
        key: Some(key),
        previous: Some(previous),
        pages: Pages {
            key: page,
            previous: previous_page,
        },
    })
}

/// Whether a grant says the same as another of what is served: the epoch and the limits aside, which a
/// served volume takes in as it is.
pub(super) fn is_same(one: &VolumeGrant, other: &VolumeGrant) -> bool {
    let as_other = VolumeGrant {
        epoch: other.epoch,
        limits: other.limits,
        group: other.group.clone(),
        ..one.clone()
    };
    as_other == *other
}

/// Whether a grant says the same as another but for a greater size (as [`is_same`] does).
pub(super) fn only_grew(from: &VolumeGrant, to: &VolumeGrant) -> bool {
    let VolumeGrant { size_bytes, .. } = *from;
    let as_before = VolumeGrant {
        size_bytes,
        ..to.clone()
    };
    to.size_bytes > size_bytes && is_same(from, &as_before)
}

/// Whether a grant says the same as another but for a re-key that begins or is over (as [`is_same`] does).
pub(super) fn only_rekeys(from: &VolumeGrant, to: &VolumeGrant) -> bool {
    let as_before = VolumeGrant {
        rekey: from.rekey,
        ..to.clone()
    };
    from.rekey.is_some() != to.rekey.is_some() && is_same(from, &as_before)
}

/// The device that a grant describes.
pub(super) fn geometry(grant: &VolumeGrant) -> Geometry {
    let mut serial = [0; SERIAL_BYTES];
    for (to, from) in serial.iter_mut().zip(grant.serial.bytes()) {
        *to = from;
    }
    Geometry {
        logical_block_bytes: grant.logical_block_bytes,
        read_only: grant.read_only,
        serial,
        queues: grant.queues,
        discard: grant.discard == DiscardPolicy::Pass,
    }
}

/// Its capacity in sectors.
pub(super) fn capacity_sectors(grant: &VolumeGrant) -> u64 {
    grant.size_bytes / SECTOR_BYTES
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::limits::{GroupGrant, Limits, Rate};
    use bulkhead_protocol::{RekeyId, VolumeId};

    use super::*;

    type Change = fn(&mut VolumeGrant);

    fn grant() -> VolumeGrant {
        VolumeGrant {
            volume: VolumeId([7; 16]),
            socket: "disk".parse().expect("a name"),
            allowed_uid: 1000,
            size_bytes: 1 << 20,
            logical_block_bytes: 4096,
            data_unit_bytes: Some(4096),
            read_only: false,
            serial: "serial".to_owned(),
            queues: 1,
            discard: DiscardPolicy::Ignore,
            epoch: 3,
            rekey: None,
            limits: Limits::default(),
            group: Some(GroupGrant {
                name: "tenant-a".parse().expect("a name"),
                limits: Limits::default(),
            }),
        }
    }

    #[test]
    fn a_grant_that_describes_no_device_is_refused() {
        assert_eq!(check(&grant()), Ok(()));
        const NOTHING: Rate = Rate {
            per_second: 0,
            burst: 0,
        };
        let cases: [(&str, Change); 15] = [
            ("block", |g| g.logical_block_bytes = 1024),
            ("no block", |g| g.logical_block_bytes = 0),
            ("unit", |g| g.data_unit_bytes = Some(1024)),
            ("unit over block", |g| g.logical_block_bytes = 512),
            ("no size", |g| g.size_bytes = 0),
            ("part of a block", |g| g.size_bytes += 512),
            ("too large", |g| g.size_bytes = 1 << 63),
            ("no queue", |g| g.queues = 0),
            ("queues", |g| g.queues = 65),
            ("re-key of a plain one", |g| {
                (g.data_unit_bytes, g.rekey) = (None, Some(RekeyId([1; 16])));
            }),
            ("re-key of one that is only read", |g| {
                (g.read_only, g.rekey) = (true, Some(RekeyId([1; 16])));
            }),
            ("long serial", |g| g.serial = "x".repeat(21)),
            ("serial", |g| g.serial = "é".to_owned()),
            ("a rate of nothing", |g| g.limits.requests = Some(NOTHING)),
            ("a group's rate", |g| {
                g.group.as_mut().expect("one").limits.bytes = Some(NOTHING)
            }),
        ];
        for (name, change) in cases {
            let mut bad = grant();
            change(&mut bad);
            assert!(check(&bad).is_err(), "{name}");
        }
    }

    #[test]
    fn only_the_epoch_and_the_limits_may_differ() {
        let mut other = grant();
        other.epoch += 1;
        (other.limits.requests, other.group) = (Some(Rate::with_default_burst(1)), None);
        assert!(is_same(&grant(), &other));
        other.allowed_uid += 1;
        assert!(!is_same(&grant(), &other));
    }

    #[test]
    fn a_rekey_is_one_that_begins_or_is_over_and_nothing_else() {
        let with = |id| VolumeGrant {
            rekey: Some(RekeyId([id; 16])),
            epoch: 4,
            ..grant()
        };
        assert!(only_rekeys(&grant(), &with(1)) && only_rekeys(&with(1), &grant()));
        assert!(!only_rekeys(&grant(), &grant()) && !only_rekeys(&with(1), &with(1)));
        assert!(!only_rekeys(&with(1), &with(2)), "another one");
        let mut more = with(1);
        more.size_bytes *= 2;
        assert!(!only_rekeys(&grant(), &more), "and more");
    }

    #[test]
    fn growth_is_a_greater_size_and_nothing_else() {
        let mut other = grant();
        assert!(!only_grew(&grant(), &other), "the same");
        other.size_bytes *= 2;
        other.epoch += 1;
        assert!(only_grew(&grant(), &other));
        assert!(!only_grew(&other, &grant()), "smaller");
        other.queues += 1;
        assert!(!only_grew(&grant(), &other), "and more");
    }

    #[test]
    fn the_device_is_what_was_granted() {
        let device = geometry(&grant());
        assert_eq!(capacity_sectors(&grant()), 2048);
        assert_eq!(&device.serial[..8], b"serial\0\0");
    }
}
