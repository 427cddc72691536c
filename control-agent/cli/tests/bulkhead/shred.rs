//! `volume shred`: what is printed to be signed, what is destroyed and when, and what is left alone.
//! That a host then really has no key is what keyd's and the whole system's tests show.

use std::fs;

use crate::{Folder, SEALED};

/// Two volumes, a bundle with both, and its envelope.
fn with_volumes() -> Folder {
    let folder = Folder::with_keys();
    for (name, socket) in [("disk", "vm1"), ("other", "vm2")] {
        let sealed = SEALED.replace("vm1", socket);
        folder.ok(&format!(
            "volume create --name {name} --path {name}.img --file {name}.img --size 1MiB {sealed} \
             --out {name}.toml"
        ));
    }
    folder.write_bundle(&["disk.toml", "other.toml"]);
    folder.ok("sign --bundle bundle.toml --key alice.key --out bundle.cose");
    folder
}

/// The line that is to be signed.
fn order(printed: &str) -> String {
    let line = printed.lines().find(|line| line.starts_with("shred = "));
    line.expect("an order").to_owned()
}

#[test]
fn without_yes_it_prints_the_order_and_destroys_nothing() {
    let folder = with_volumes();
    let before = folder.files();
    let printed = folder.ok("volume shred --volume disk.toml --copy bundle.cose --file disk.img");
    assert!(printed.contains("\n# host-a\nshred = [\""), "{printed}");
    for part in [
        "sealed to    recovery  ",
        "would end    disk.toml\n",
        "would end    bundle.cose\n",
        "would end    disk.img\n",
        "nothing is destroyed yet",
        "together\n  with the recovery key",
        "flash",
        "name every volume that the host is still to serve",
    ] {
        assert!(printed.contains(part), "{part:?}: {printed}");
    }
    assert_eq!(folder.files(), before);
}

#[test]
fn the_printed_line_makes_a_bundle_that_shreds() {
    let folder = with_volumes();
    let line = order(&folder.ok("volume shred --volume disk.toml"));
    folder.write_bundle(&["disk.toml", "other.toml"]);
    let source = folder.read("bundle.toml");
    folder.write("bundle.toml", &format!("{line}\n{source}"));
    folder.refused(
        "sign --bundle bundle.toml --key alice.key --out bundle-8.cose",
        &["bundle.toml:1: shred", "can't be both kept and destroyed"],
    );
    folder.write_bundle(&["other.toml"]);
    let source = folder.read("bundle.toml");
    folder.write("bundle.toml", &format!("{line}\n{source}"));
    folder.ok("sign --bundle bundle.toml --key alice.key --out bundle-8.cose");
    let shown = folder.ok("show bundle-8.cose --trust trust.toml");
    let id = line.split('"').nth(1).expect("an id");
    let expected = format!("shred        {id}: its key is destroyed for ever\n");
    assert!(shown.contains(&expected), "{shown}");
}

#[test]
fn with_yes_the_copies_are_overwritten_and_gone() {
    let folder = with_volumes();
    for name in ["disk.toml", "bundle.cose"] {
        // A second name shows what became of the bytes themselves.
        let link = folder.path(&format!("{name}.link"));
        fs::hard_link(folder.path(name), link).expect("link");
    }
    let printed =
        folder.ok("volume shred --volume disk.toml --copy bundle.cose --file disk.img --yes");
    order(&printed);
    for name in ["disk.toml", "bundle.cose", "disk.img"] {
        assert!(!folder.exists(name), "{name}");
    }
    for name in ["disk.toml.link", "bundle.cose.link"] {
        let bytes = fs::read(folder.path(name)).expect("read");
        assert!(!bytes.is_empty() && bytes.iter().all(|byte| *byte == 0));
    }
    assert!(folder.exists("other.toml") && folder.exists("other.img"));
}

#[test]
fn what_fails_leaves_the_stanza_to_go_on_with() {
    let folder = with_volumes();
    // It is shown as what it points to, and not overwritten through a link.
    std::os::unix::fs::symlink("bundle.cose", folder.path("link.cose")).expect("link");
    let line = "volume shred --volume disk.toml --copy link.cose --file disk.img --yes";
    folder.refused(line, &["link.cose: may still be there"]);
    assert!(folder.exists("bundle.cose") && folder.exists("disk.toml"));
    folder.ok("volume shred --volume disk.toml --copy bundle.cose --yes");
    assert!(!folder.exists("bundle.cose") && !folder.exists("disk.toml"));
}

#[test]
fn during_a_rekey_the_recipients_of_both_keys_are_told_once() {
    let folder = with_volumes();
    let before = folder.ok("volume shred --volume disk.toml");
    folder.ok("recovery new --out later.key");
    folder.ok(
        "volume rekey --volume disk.toml --host state/host.pub --recovery later.key.pub \
         --out disk-2.toml",
    );
    let printed = folder.ok("volume shred --volume disk-2.toml");
    let recipients = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.starts_with("sealed to "));
        lines.map(str::to_owned).collect()
    };
    let (one, both) = (recipients(&before), recipients(&printed));
    assert_eq!((one.len(), both.len()), (2, 3), "{printed}");
    assert!(one.iter().all(|line| both.contains(line)), "{printed}");
    assert_eq!(printed.matches("\nshred = ").count(), 1, "{printed}");
}

#[test]
fn what_else_is_needed_is_left_alone() {
    let folder = with_volumes();
    folder.ok(
        "volume create --name plain --path p.img --size 1MiB --data-unit none --socket vm3 \
         --allowed-uid 1000 --out plain.toml",
    );
    let both = folder.read("disk.toml") + &folder.read("other.toml");
    folder.write("both.toml", &both);
    let in_use = fs::File::open(folder.path("disk.img")).expect("open");
    in_use.lock_shared().expect("lock");
    let before = folder.files();
    for (line, says) in [
        ("--volume plain.toml", "is plain: it has no key"),
        ("--volume both.toml", "has 2 volumes"),
        ("--volume bundle.cose", "is a bundle"),
        (
            "--volume disk.toml --copy other.toml",
            "does not name volume \"disk\"",
        ),
        (
            "--volume disk.toml --copy both.toml",
            "has 1 more volume(s)",
        ),
        (
            "--volume disk.toml --copy bundle.toml",
            "is a bundle's source",
        ),
        ("--volume disk.toml --copy alice.key.pub", "alice.key.pub"),
        ("--volume disk.toml --file disk.img", "is in use"),
        ("--volume disk.toml --file .", "."),
        ("--volume missing.toml", "missing.toml"),
    ] {
        folder.refused(&format!("volume shred {line} --yes"), &[says]);
        assert_eq!(folder.files(), before, "{line}");
    }
}

#[test]
fn the_hosts_present_public_key_is_printed_and_put_in_its_place() {
    let folder = Folder::with_keys();
    let made = folder.read("state/host.pub");
    // Before keyd ran for the first time.
    assert_eq!(folder.ok("host public --state-dir state"), made);
    folder.ok("host init --name host-a --state-dir next");
    let now = folder.read("next/host.pub");
    folder.write("state/keyd/host.pub", &now);
    let ended = folder.run("host public --state-dir state", &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, now.as_str()));
    assert!(
        ended.stderr.contains("state/host.pub was out of date"),
        "{ended:?}"
    );
    assert_eq!(folder.read("state/host.pub"), now);
    assert_eq!(folder.run("host public --state-dir state", &[]).stderr, "");
    folder.refused("host public --state-dir nowhere", &["nowhere/host.pub"]);
}
