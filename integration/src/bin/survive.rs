//! The full numbers of kills and upgrades under a verified load; prints one table, and ends with 1 if anything
//! was lost. `cargo xtask soak survive` builds what it needs and runs it.

use std::process::ExitCode;

use bulkhead_integration::survive::aside::a_volume_that_kills;
use bulkhead_integration::survive::disk::Base;
use bulkhead_integration::survive::fleet::Scene;
use bulkhead_integration::survive::guest::{guest_on_host, guest_on_serve};
use bulkhead_integration::survive::mixed::mixed;
use bulkhead_integration::survive::scenarios::{
    HEADING, Reconnect, Row, deaths_of_rot, kills, kills_in_recovery, message_points, other_deaths,
    reconnects, request_points, slow_writes, successor_points, upgrades,
};
use clap::Parser;
use std::time::Duration;

/// Kills and upgrades the processes of a host under a verified load.
#[derive(Debug, Parser)]
struct Arguments {
    /// Kills of the data plane under split rings; half as many under packed ones, and shares of it elsewhere
    #[arg(long, value_name = "N", default_value_t = 1000)]
    kills: u32,
    /// Live upgrades of the data plane
    #[arg(long, value_name = "N", default_value_t = 200)]
    upgrades: u32,
    /// Kills, upgrades, configurations and nonsense at once, for so long
    #[arg(long, value_name = "N", default_value_t = 6)]
    minutes: u64,
    /// Memory of the guest meanwhile, in GiB
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    memory_gib: u64,
    /// Only what has this in its name
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// A scenario: its name, and what runs it.
type Scenario = (&'static str, Box<dyn Fn(&str) -> Row>);

fn scenarios(arguments: &Arguments) -> Vec<Scenario> {
    let all = arguments.kills;
    let part = |share: u32| (all / share).max(2);
    let split = Scene::default();
    let plain = Scene {
        data_unit: None,
        ..split.clone()
    };
    let packed = |scene: &Scene| Scene {
        packed: true,
        ..scene.clone()
    };
    let many = Scene {
        disks: 64,
        size: "1MiB",
        depth: 2,
        ..split.clone()
    };
    // Where a reply may have been sent or not, its connection ends, and a frontend without a region loses what it asked for.
    let private = Scene {
        inflight: false,
        message_every: 0,
        ..split.clone()
    };
    let mut out: Vec<Scenario> = Vec::new();
    let mut on_host = |name: &'static str, scene: Scene, count: u32| {
        out.push((name, Box::new(move |name| kills(name, &scene, count))));
    };
    on_host("kills, split, encrypted", split.clone(), part(2));
    on_host("kills, split, plain", plain.clone(), part(2));
    on_host("kills, packed, encrypted", packed(&split), part(4));
    on_host("kills, packed, plain", packed(&plain), part(4));
    on_host("kills, no in-flight region", private, part(20));
    on_host("kills, 64 disks", many, part(20));
    for (name, scene) in [
        ("points, split", split.clone()),
        ("points, packed", packed(&plain)),
    ] {
        let each = (all / 50).clamp(1, 20);
        out.push((
            name,
            Box::new(move |name| request_points(name, &scene, each)),
        ));
    }
    for (name, scene) in [
        ("messages, split", plain.clone()),
        ("messages, packed", packed(&split)),
    ] {
        let each = (all / 50).clamp(1, 20);
        out.push((
            name,
            Box::new(move |name| message_points(name, &scene, each)),
        ));
    }
    for (name, scene) in [
        ("successors, split", split.clone()),
        ("successors, packed", packed(&plain)),
    ] {
        let each = (all / 50).clamp(1, 20);
        out.push((
            name,
            Box::new(move |name| successor_points(name, &scene, each)),
        ));
    }
    for (name, scene) in [
        ("kills in recovery, split", plain),
        ("kills in recovery, packed", packed(&split)),
    ] {
        let count = part(10);
        out.push((
            name,
            Box::new(move |name| kills_in_recovery(name, &scene, count)),
        ));
    }
    let (some, few) = (part(10), part(50));
    out.push((
        "keyd, agent and pairs",
        Box::new(move |name| other_deaths(name, &Scene::default(), some)),
    ));
    out.push((
        "rot",
        Box::new(move |name| deaths_of_rot(name, &Scene::default(), few)),
    ));
    out.push(("a volume that kills", Box::new(a_volume_that_kills)));
    let count = arguments.upgrades;
    for (name, scene) in [
        ("upgrades, split", Scene::default()),
        (
            "upgrades, packed",
            Scene {
                packed: true,
                ..Scene::default()
            },
        ),
    ] {
        out.push((
            name,
            Box::new(move |name| upgrades(name, &scene, count / 2)),
        ));
    }
    let how_long = Duration::from_secs(60 * arguments.minutes) / 2;
    let memory = arguments.memory_gib;
    for (name, packed) in [("mixed, split", false), ("mixed, packed", true)] {
        out.push((
            name,
            Box::new(move |name| mixed(name, packed, how_long, memory)),
        ));
    }
    let count = (all / 50).clamp(1, 20);
    for (name, packed) in [("guest, split", false), ("guest, packed", true)] {
        out.push((
            name,
            Box::new(move |name| guest_on_host(name, packed, count, count)),
        ));
    }
    let name = "guest that connects again";
    out.push((
        name,
        Box::new(move |name| guest_on_serve(name, false, count)),
    ));
    let count = (all * 3 / 10).max(2);
    out.push((
        "slow writes",
        Box::new(move |name| slow_writes(name, count)),
    ));
    for (name, packed, in_order, base) in [
        ("reconnect, QEMU's base", false, false, Base::Used),
        ("reconnect, QEMU's base, packed", true, false, Base::Used),
        (
            "reconnect, cloud-hypervisor's base",
            false,
            false,
            Base::Avail,
        ),
        (
            "reconnect, cloud-hypervisor's base, in order",
            false,
            true,
            Base::InOrder,
        ),
    ] {
        let how = Reconnect {
            packed,
            in_order,
            base,
            is_encrypted: true,
        };
        out.push((name, Box::new(move |name| reconnects(name, how, count))));
    }
    out
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    println!("{HEADING}");
    let mut bad = Vec::new();
    for (name, run) in scenarios(&arguments) {
        if !name.contains(&arguments.only) {
            continue;
        }
        let row = run(name);
        println!("{row}");
        if !row.is_good() {
            bad.push(row);
        }
    }
    for row in &bad {
        eprintln!("\n{}: {}", row.what, row.problems());
    }
    ExitCode::from(u8::from(!bad.is_empty()))
}
