//! The examples of `docs/formats/bundle.md` are what the tools read.

use bulkhead_bundle::source;

#[test]
fn the_documented_bundle_loads() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/formats/bundle.md");
    let text = std::fs::read_to_string(path).expect("the page");
    let blocks: Vec<&str> = text
        .split("```toml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().expect("the block ends"))
        .collect();
    let dir = tempfile::tempdir().expect("dir");
    for (name, block) in ["bundle.toml", "disk.toml"].iter().zip(&blocks) {
        assert!(block.starts_with(&format!("# {name}")), "{block}");
        std::fs::write(dir.path().join(name), block).expect("write");
    }
    let bundle = source::load(&dir.path().join("bundle.toml")).expect("loads");
    assert_eq!((bundle.epoch, bundle.volumes.len()), (7, 2));
    assert!(
        bundle
            .volumes
            .iter()
            .any(|v| v.sealed_for("host-a").is_some())
    );
    // Every field that a NIC or a volume can have stands in the tables.
    for field in source::nic_to_toml(&bundle.nics[0]).lines() {
        let Some((name, _)) = field.split_once(" = ") else {
            continue;
        };
        let documented =
            text.contains(&format!("`nic.{name}")) || text.contains(&format!("`.{name}`"));
        assert!(documented, "{name} is not documented");
    }
    for field in source::volume_to_toml(&bundle.volumes[0]).lines() {
        let Some((name, _)) = field.split_once(" = ") else {
            continue;
        };
        let documented = text.contains(&format!("`volume.{name}`"))
            || text.contains(&format!("`volume.{name}.name`"));
        assert!(documented, "{name} is not documented");
    }
}
