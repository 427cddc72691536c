//! The plan's tests: every field of a volume by itself, every kind of change, and invariants over
//! random pairs of bundles.

use std::collections::BTreeSet;

use bulkhead_bundle::{Group, Rekey, SealedKeyEntry};
use bulkhead_protocol::DiscardPolicy;
use bulkhead_protocol::limits::{Limits, Rate};
use bulkhead_protocol::workers::Workers;
use proptest::prelude::*;

use super::*;
use crate::examples::{bundle, volume};

fn plan(old: &[Volume], new: &[Volume]) -> Plan {
    Plan::between(Some(&bundle(old.to_vec())), &bundle(new.to_vec()))
}

#[test]
fn the_first_bundle_adds_everything() {
    let new = bundle(vec![volume(1), volume(2)]);
    let plan = Plan::between(None, &new);
    assert_eq!(plan.added, [VolumeId([1; 16]), VolumeId([2; 16])]);
    assert_eq!(plan.bind.len(), 2);
    assert!(plan.leaving.is_empty() && plan.kept.is_empty() && plan.unbind.is_empty());
}

#[test]
fn the_same_bundle_changes_nothing() {
    let plan = plan(&[volume(1), volume(2)], &[volume(2), volume(1)]);
    assert!(plan.is_empty(), "{plan:?}");
    assert_eq!(plan.kept.len(), 2);
}

#[test]
fn each_field_of_a_grant_detaches_the_volume() {
    type Edit = fn(&mut Volume);
    let edits: [(&str, Edit); 9] = [
        ("smaller", |v| v.size_bytes /= 2),
        ("data unit", |v| v.data_unit_bytes = None),
        ("logical block", |v| v.logical_block_bytes = 4096),
        ("read only", |v| v.read_only = true),
        ("serial", |v| v.serial.push('x')),
        ("discard", |v| v.discard = DiscardPolicy::Pass),
        ("queues", |v| v.queues = 2),
        ("socket", |v| v.socket.name = "other".parse().expect("name")),
        ("uid", |v| v.allowed_uid = 2),
    ];
    for (what, edit) in edits {
        let mut after = volume(1);
        edit(&mut after);
        let plan = plan(&[volume(1)], &[after.clone()]);
        assert_eq!(plan.leaving.len(), 1, "{what}");
        assert_eq!(plan.leaving[0].change, Some(Change::Grant), "{what}");
        assert!(plan.kept.is_empty() && plan.added.is_empty(), "{what}");
        // With another file besides, it is still the grant that detaches it.
        after.path.push('2');
        let plan = super::tests::plan(&[volume(1)], &[after]);
        assert_eq!(plan.leaving[0].change, Some(Change::Grant), "{what}");
    }
}

#[test]
fn another_file_detaches_the_volume_by_the_agent() {
    let mut after = volume(1);
    after.path = "other.img".to_owned();
    let plan = plan(&[volume(1)], &[after]);
    assert_eq!(plan.leaving[0].change, Some(Change::File));
    assert!(plan.bind.is_empty() && plan.unbind.is_empty());
}

#[test]
fn a_greater_size_detaches_nobody() {
    let mut grown = volume(1);
    grown.size_bytes *= 2;
    let growing = Growing {
        id: grown.id,
        from_bytes: 1 << 20,
    };
    let only = plan(&[volume(1)], &[grown.clone()]);
    assert_eq!(only.growing, [growing]);
    assert_eq!(only.kept, [grown.id]);
    assert!(only.leaving.is_empty() && !only.is_empty(), "{only:?}");
    // With anything else that is granted, it is a replacement; with another file, a move.
    for (edit, change) in [
        ((|v| v.queues = 2) as fn(&mut Volume), Change::Grant),
        (|v| v.path.push('2'), Change::File),
    ] {
        let mut after = grown.clone();
        edit(&mut after);
        let plan = plan(&[volume(1)], &[after]);
        assert_eq!(plan.leaving[0].change, Some(change));
        assert!(plan.growing.is_empty() && plan.kept.is_empty(), "{plan:?}");
    }
}

#[test]
fn other_limits_and_another_group_detach_nobody() {
    let group = |per_second| Group {
        name: "tenant-a".parse().expect("name"),
        limits: requests(per_second),
    };
    let of = |volumes: Vec<Volume>, groups: Vec<Group>| HostBundle {
        groups,
        ..bundle(volumes)
    };
    let mut limited = volume(1);
    limited.limits = requests(500);
    let mut member = volume(2);
    member.group = Some(group(1).name);
    let before = bundle(vec![volume(1), volume(2), volume(3)]);
    let after = of(vec![limited, member, volume(3)], vec![group(10_000)]);
    let plan = Plan::between(Some(&before), &after);
    assert_eq!(plan.limits.volumes, [1, 2].map(|n| VolumeId([n; 16])));
    assert!(plan.leaving.is_empty() && plan.kept.len() == 3 && !plan.is_empty());
    let lines = [
        "volume disk1: limits 500 requests/s (burst 50); its frontend stays",
        "volume disk2: limits none, group tenant-a; its frontend stays",
        "group tenant-a: limits 10000 requests/s (burst 1000)",
        "1 volume goes on undisturbed",
    ];
    assert_eq!(plan.describe(&after), lines);
    // Only the group: no volume of it is touched.
    let slower = of(after.volumes.clone(), vec![group(10)]);
    let plan = Plan::between(Some(&after), &slower);
    assert!(
        plan.limits.volumes.is_empty() && !plan.is_empty(),
        "{plan:?}"
    );
    assert_eq!(
        plan.describe(&slower),
        [
            "group tenant-a: limits 10 requests/s (burst 1)",
            "3 volumes go on undisturbed"
        ]
    );
}

#[test]
fn other_workers_detach_nobody() {
    let with = |cpus: &[u16]| HostBundle {
        workers: Workers::new(None, cpus.to_vec()).ok(),
        ..bundle(vec![volume(1)])
    };
    let none = bundle(vec![volume(1)]);
    for (from, to, line) in [
        (&none, &with(&[]), "workers: 1"),
        (&none, &with(&[2]), "workers: 1 on CPU 2"),
        (&with(&[2]), &with(&[2, 3]), "workers: 2 on CPUs 2-3"),
        (&with(&[2]), &none, "workers: what the host itself says"),
    ] {
        let plan = Plan::between(Some(from), to);
        assert!(plan.leaving.is_empty() && !plan.is_empty(), "{plan:?}");
        assert_eq!(plan.describe(to), [line, "1 volume goes on undisturbed"]);
    }
    assert!(Plan::between(Some(&with(&[2])), &with(&[2])).is_empty());
}

fn requests(per_second: u64) -> Limits {
    Limits {
        requests: Some(Rate::with_default_burst(per_second)),
        bytes: None,
    }
}

fn with_rekey(number: u8, rekey: u8) -> Volume {
    Volume {
        rekey: Some(Rekey {
            id: RekeyId([rekey; 16]),
            previous_keys: Vec::new(),
        }),
        ..volume(number)
    }
}

#[test]
fn a_rekey_that_begins_or_ends_detaches_nobody() {
    let id = VolumeId([1; 16]);
    let one = Some(RekeyId([7; 16]));
    for (old, new, from, to, says) in [
        (
            volume(1),
            with_rekey(1, 7),
            None,
            one,
            "volume disk1: gets another key (re-key 07070707-0707-0707-0707-070707070707), while it \
             is served; its frontend stays",
        ),
        (
            with_rekey(1, 7),
            volume(1),
            one,
            None,
            "volume disk1: its previous key is dropped; its frontend stays",
        ),
    ] {
        let plan = plan(&[old, volume(2)], &[new.clone(), volume(2)]);
        let force = false;
        assert_eq!(
            plan.rekeying,
            [Rekeying {
                id,
                from,
                to,
                force
            }]
        );
        assert!(plan.leaving.is_empty() && !plan.is_empty(), "{plan:?}");
        let lines = plan.describe(&bundle(vec![new]));
        assert_eq!(lines, [says, "1 volume goes on undisturbed"]);
    }
    let same = plan(&[with_rekey(1, 7)], &[with_rekey(1, 7)]);
    assert!(same.is_empty(), "{same:?}");
}

#[test]
fn a_rekey_beside_another_change_or_another_rekey_detaches() {
    let mut moved = with_rekey(1, 7);
    moved.path.push('2');
    let with_file = plan(&[volume(1)], &[moved.clone()]);
    assert_eq!(with_file.leaving[0].change, Some(Change::File));
    assert_eq!(with_file.rekeying.len(), 1);
    let lines = with_file.describe(&bundle(vec![moved]));
    assert!(lines[1].ends_with("while it is served"), "{lines:?}");
    let exchanged = plan(&[with_rekey(1, 7)], &[with_rekey(1, 8)]);
    assert_eq!(exchanged.leaving[0].change, Some(Change::Grant));
    let mut removed = plan(&[with_rekey(1, 7)], &[]);
    assert_eq!(removed.leaving.remove(0).change, None);
    assert!(removed.rekeying.is_empty(), "nothing is dropped of it");
}

#[test]
fn shrinking_is_refused_and_nothing_else_is() {
    let old = bundle(vec![volume(1), volume(2)]);
    assert_eq!(refuse_shrinking(None, &old), Ok(()));
    assert_eq!(refuse_shrinking(Some(&old), &old), Ok(()));
    assert_eq!(refuse_shrinking(Some(&old), &bundle(vec![])), Ok(()));
    let mut after = volume(2);
    after.size_bytes -= 512;
    let refused = refuse_shrinking(Some(&old), &bundle(vec![after])).expect_err("smaller");
    assert!(refused.contains("volume disk2") && refused.contains("never shrinks"));
}

#[test]
fn names_force_and_sealed_keys_disturb_nobody() {
    let edits: [fn(&mut Volume); 3] = [
        |v| v.name = "renamed".to_owned(),
        |v| v.force_removal = true,
        |v| {
            v.sealed_keys.push(SealedKeyEntry {
                recipient: "host-b".to_owned(),
                fingerprint: vec![1],
                enc: vec![1],
                ciphertext: vec![1],
            });
        },
    ];
    for edit in edits {
        let mut after = volume(1);
        edit(&mut after);
        let plan = plan(&[volume(1)], &[after]);
        assert!(plan.is_empty(), "{plan:?}");
    }
}

#[test]
fn the_listener_alone_is_bound_anew() {
    let edits: [fn(&mut SocketSpec); 3] = [|s| s.uid = 2, |s| s.gid = 2, |s| s.mode = 0o660];
    for edit in edits {
        let mut after = volume(1);
        edit(&mut after.socket);
        let plan = plan(&[volume(1)], &[after.clone()]);
        assert_eq!(plan.bind, [after.socket.name]);
        assert_eq!(plan.kept, [after.id]);
        assert!(plan.leaving.is_empty() && plan.unbind.is_empty());
    }
}

#[test]
fn exchanged_listeners_stay_bound() {
    let (mut one, mut two) = (volume(1), volume(2));
    std::mem::swap(&mut one.socket, &mut two.socket);
    let plan = plan(&[volume(1), volume(2)], &[one, two]);
    assert_eq!(plan.leaving.len(), 2);
    assert!(plan.bind.is_empty() && plan.unbind.is_empty());
}

#[test]
fn force_comes_from_whoever_may_say_so() {
    let force = |old: &Volume, new: &HostBundle| {
        let plan = Plan::between(Some(&bundle(vec![old.clone()])), new);
        plan.leaving[0].force
    };
    let mut forced = volume(1);
    forced.force_removal = true;
    // A removal: the old bundle's flag, or the new one's list.
    assert!(!force(&volume(1), &bundle(vec![])));
    assert!(force(&forced, &bundle(vec![])));
    let mut listed = bundle(vec![]);
    listed.force_remove = vec![VolumeId([1; 16])];
    assert!(force(&volume(1), &listed));
    listed.force_remove = vec![VolumeId([2; 16])];
    assert!(!force(&volume(1), &listed));
    // A shred is a removal by itself.
    let mut shredding = bundle(vec![]);
    shredding.shred = vec![VolumeId([1; 16])];
    assert!(force(&volume(1), &shredding));
    // A change: the flag of the bundle that changes it, and no other.
    let changed = |force_removal| {
        let mut after = volume(1);
        (after.queues, after.force_removal) = (2, force_removal);
        bundle(vec![after])
    };
    assert!(force(&volume(1), &changed(true)));
    assert!(!force(&forced, &changed(false)));
}

fn any_volume() -> impl Strategy<Value = Volume> {
    (0u8..5, 0u8..3, 1u16..3, 0u8..4, any::<bool>()).prop_map(|(id, path, queues, socket, mode)| {
        let mut volume = volume(id);
        volume.path = format!("{path}.img");
        volume.queues = queues;
        volume.socket.name = format!("vm{socket}").parse().expect("name");
        volume.socket.mode = if mode { 0o600 } else { 0o660 };
        volume
    })
}

/// Volumes with ids and listeners of their own, as in a valid bundle.
fn any_bundle() -> impl Strategy<Value = HostBundle> {
    prop::collection::vec(any_volume(), 0..5).prop_map(|volumes| {
        let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
        let own = |v: &Volume| ids.insert(v.id) && names.insert(v.socket.name.clone());
        bundle(volumes.into_iter().filter(own).collect())
    })
}

proptest! {
    #[test]
    fn every_volume_and_listener_has_its_place(old in any_bundle(), new in any_bundle()) {
        let plan = Plan::between(Some(&old), &new);
        let set = |ids: Vec<VolumeId>| ids.into_iter().collect::<BTreeSet<_>>();
        let ids = |bundle: &HostBundle| set(bundle.volumes.iter().map(|v| v.id).collect());
        let back = |l: &Leaving| l.change.is_some();
        let (kept, added) = (set(plan.kept.clone()), set(plan.added.clone()));
        let leaving = set(plan.leaving.iter().filter_map(|l| l.id.volume()).collect());
        let changed = set(plan.leaving.iter().filter(|l| back(l)).filter_map(|l| l.id.volume()).collect());
        // What was there stays or leaves; what is to be there stays, comes back or comes.
        prop_assert!(kept.is_disjoint(&leaving) && added.is_disjoint(&ids(&old)));
        prop_assert_eq!(kept.union(&leaving).copied().collect::<BTreeSet<_>>(), ids(&old));
        let after: BTreeSet<_> = kept.union(&changed).chain(&added).copied().collect();
        prop_assert_eq!(after, ids(&new));
        // Listeners: those of before, plus the bound, minus the removed, are those of after.
        let names = |b: &HostBundle| -> BTreeSet<SocketName> {
            b.volumes.iter().map(|v| v.socket.name.clone()).collect()
        };
        let mut bound = names(&old);
        bound.extend(plan.bind.iter().cloned());
        for name in &plan.unbind {
            prop_assert!(bound.remove(name));
        }
        prop_assert_eq!(bound, names(&new));
        prop_assert!(Plan::between(Some(&new), &new).is_empty());
    }
}
