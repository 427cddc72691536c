//! Limits, groups and workers in a bundle: what was signed before there were any stays what it was, and what
//! makes no sense is refused with its place.

use std::fs;

use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::workers::Workers;

use super::*;
use crate::{Group, encoding, source, validate, verify};

/// A bundle that says something of everything here.
fn limited() -> HostBundle {
    let mut bundle = bundle();
    bundle.groups = vec![Group {
        name: "tenant-a".parse().expect("name"),
        limits: Limits {
            requests: Some(Rate::with_default_burst(20_000)),
            bytes: None,
        },
    }];
    bundle.workers = Workers::new(None, vec![2, 3]).ok();
    bundle.volumes[0].group = Some("tenant-a".parse().expect("name"));
    bundle.volumes[1].limits = Limits {
        requests: Some(Rate {
            per_second: 10_000,
            burst: 50,
        }),
        bytes: Some(Rate {
            per_second: 100 << 20,
            burst: 10 << 20,
        }),
    };
    bundle
}

#[test]
fn without_limits_groups_and_workers_a_bundle_is_encoded_as_ever() {
    let plain = encoding::encode(&bundle());
    assert_eq!(plain[0], 0xa7, "seven entries");
    // An example by hand: what the field numbers are is what was signed.
    let mut with = bundle();
    with.groups = limited().groups;
    with.workers = limited().workers;
    let mut expected = vec![0xa9];
    expected.extend(&plain[1..]);
    // 8: [{0: "tenant-a", 1: {0: {0: 20000, 1: 2000}}}]
    expected.extend([0x08, 0x81, 0xa2, 0x00, 0x68]);
    expected.extend(b"tenant-a");
    expected.extend([
        0x01, 0xa1, 0x00, 0xa2, 0x00, 0x19, 0x4e, 0x20, 0x01, 0x19, 0x07, 0xd0,
    ]);
    // 9: {0: 2, 1: [2, 3]}
    expected.extend([0x09, 0xa2, 0x00, 0x02, 0x01, 0x82, 0x02, 0x03]);
    assert_eq!(encoding::encode(&with), expected);
    assert_eq!(encoding::decode(&expected).as_ref(), Ok(&with));
}

#[test]
fn a_volume_without_limits_and_group_has_the_encoding_that_it_had() {
    let one = |change: fn(&mut Volume)| {
        let mut volume = encrypted(1);
        change(&mut volume);
        encoding::encode(&HostBundle {
            volumes: vec![volume],
            ..bundle()
        })
    };
    let plain = one(|_| {});
    for (with, header) in [
        (one(|v| v.limits = limited().volumes[1].limits), 0xaf),
        (one(|v| v.group = "g".parse().ok()), 0xaf),
    ] {
        let at = plain.iter().zip(&with).position(|(a, b)| a != b);
        let at = at.expect("they differ");
        assert_eq!((plain[at], with[at]), (0xae, header));
    }
}

#[test]
fn limits_are_signed_and_verified() {
    let trust = trust(1);
    let verified = verify(&signed(&limited()), &policy(&trust)).expect("holds");
    assert_eq!(*verified, limited());
    let group = verified.group_of(&verified.volumes[0]);
    assert_eq!(group, Some(&limited().groups[0]));
    assert_eq!(verified.group_of(&verified.volumes[1]), None);
}

#[test]
fn refused_limits_that_say_nothing_in_another_way() {
    let mut bytes = encoding::encode(&bundle());
    bytes[0] = 0xa8;
    bytes.extend([0x08, 0x80]);
    let refused = encoding::decode(&bytes);
    assert_eq!(refused, Err(encoding::DecodeError::NotCanonical));
}

#[test]
fn refused_fields_that_this_version_does_not_know() {
    let mut bytes = encoding::encode(&limited());
    // The group's second key, of {0: name, 1: limits}, becomes a third.
    let name = b"\x68tenant-a\x01\xa1";
    let at = bytes.windows(name.len()).rposition(|w| w == name);
    bytes[at.expect("there") + 9] = 0x02;
    let refused = encoding::decode(&bytes);
    let field = "groups[0].2".to_owned();
    assert_eq!(refused, Err(encoding::DecodeError::UnknownField(field)));
}

#[test]
fn refused_limits_groups_and_workers_that_make_no_sense() {
    let refused = |change: fn(&mut HostBundle), expected: &str| {
        let mut bundle = limited();
        change(&mut bundle);
        let error = validate(&bundle).expect_err("refused").to_string();
        assert!(error.starts_with(expected), "{error}");
        assert!(crate::sign(&bundle, &[alice()]).is_err());
    };
    refused(
        |b| {
            b.volumes[1].limits.requests = Some(Rate {
                per_second: 0,
                burst: 1,
            })
        },
        "volume \"disk2\": limits: requests: 0 requests a second are not between 1 and",
    );
    refused(
        |b| b.groups[0].limits.bytes = Some(Rate::with_default_burst(1)),
        "group \"tenant-a\": limits: bandwidth: 1 bytes a second are not between 65536 and",
    );
    refused(
        |b| b.groups.push(b.groups[0].clone()),
        "group \"tenant-a\": name: there are two groups",
    );
    refused(
        |b| b.groups.clear(),
        "volume \"disk1\": group: there is no group \"tenant-a\" in the bundle",
    );
    refused(
        |b| {
            b.workers = Some(Workers {
                count: 3,
                cpus: vec![1],
            })
        },
        "workers: count: 3 workers, but 1 CPUs for them",
    );
}

const SOURCE: &str = r#"host = "host-a"
epoch = 7
not_before = 1000
expires = 2000
force_remove = "09090909-0909-0909-0909-090909090909"
include = ["disks.toml"]

[workers]
cpus = "2-3"

[[group]]
name = "tenant-a"
limits = { requests = 20000 }
"#;

/// The source with these changes, or why it is refused.
fn load(from: &str, to: &str) -> Result<HostBundle, String> {
    let folder = tempfile::tempdir().expect("folder");
    let disks: String = limited()
        .volumes
        .iter()
        .map(source::volume_to_toml)
        .collect();
    let path = folder.path().join("bundle.toml");
    assert!(SOURCE.contains(from) || disks.contains(from), "{from}");
    let write = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text.replacen(from, to, 1)).expect("write");
    };
    write("bundle.toml", SOURCE);
    write("disks.toml", &disks);
    let prefix = format!("{}/", folder.path().display());
    source::load(&path).map_err(|error| error.to_string().replace(&prefix, ""))
}

#[test]
fn a_source_says_limits_groups_and_workers() {
    assert_eq!(load("host-a", "host-a"), Ok(limited()));
    let rates = |to: &str| {
        let from = "limits = { requests = 20000 }";
        load(from, to).expect("good").groups[0].limits
    };
    let with_units = rates("limits = { bandwidth = \"100MiB\", bandwidth_burst = \"1GiB\" }");
    let expected = Rate {
        per_second: 100 << 20,
        burst: 1 << 30,
    };
    assert_eq!(with_units.bytes, Some(expected));
    assert!(rates("limits = {}").is_none() && rates("").is_none());
    let alone = load("cpus = \"2-3\"", "count = 4").expect("good");
    assert_eq!(alone.workers, Workers::new(Some(4), Vec::new()).ok());
}

#[test]
fn mistakes_in_limits_are_named_with_file_line_and_field() {
    for (from, to, expected) in [
        (
            "requests = 20000",
            "requests_burst = 20000",
            "bundle.toml:13: group[0].limits.requests_burst: is a burst over no rate",
        ),
        (
            "requests = 20000",
            "iops = 20000",
            "bundle.toml:13: group[0].limits.iops: is an unknown field; there are: requests,",
        ),
        (
            "requests = 20000",
            "bandwidth = \"10MB\"",
            "bundle.toml:13: group[0].limits.bandwidth: \"10MB\" has the unknown unit",
        ),
        (
            "requests = 20000",
            "bandwidth = 0.5",
            "bundle.toml:13: group[0].limits.bandwidth: must be bytes a second like",
        ),
        (
            "requests = 20000",
            "requests = 0",
            "bundle.toml:13: group[0].limits: group \"tenant-a\": requests: 0 requests a second",
        ),
        (
            "name = \"tenant-a\"",
            "name = \"Tenant A\"",
            "bundle.toml:12: group[0].name: group name \"Tenant A\" is not valid",
        ),
        (
            "name = \"tenant-a\"",
            "name = \"tenant-b\"",
            "disks.toml:15: volume[0].group: volume \"disk1\": there is no group \"tenant-a\"",
        ),
        (
            "bandwidth_burst = 10485760",
            "bandwidth_burst = 0",
            "disks.toml:42: volume[1].limits: volume \"disk2\": bandwidth_burst: a burst of 0",
        ),
        (
            "cpus = \"2-3\"",
            "cpus = \"3-2\"",
            "bundle.toml:9: workers.cpus: \"3-2\" is neither a CPU nor a range",
        ),
        (
            "cpus = \"2-3\"",
            "count = 65",
            "bundle.toml:9: workers.count: 65 is not between 0 and 64",
        ),
        (
            "cpus = \"2-3\"",
            "count = 1\ncpus = \"2-3\"",
            "bundle.toml:10: workers.cpus: 1 workers, but 2 CPUs",
        ),
        (
            "cpus = \"2-3\"",
            "",
            "bundle.toml:8: workers.count: says nothing",
        ),
    ] {
        let error = load(from, to).expect_err("refused");
        assert!(error.starts_with(expected), "{from} -> {to}: {error}");
    }
}
