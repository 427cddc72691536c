//! `frontend_*`: the message orders of frontends that can't run here, each as a script that then
//! does verified I/O. What differs between them is what others' backends have tripped over: where
//! SET_VRING_ENABLE and the base stand, what asks for a reply, what is never sent.

mod cloud_hypervisor;
mod spdk;

use std::error::Error;

use bulkhead_integration::arena::{Arena, Backend};
use bulkhead_integration::random::Random;
use libtest_mimic::{Arguments, Failed, Trial};

type Outcome = Result<(), Box<dyn Error>>;

/// One script.
struct Script {
    name: &'static str,
    run: fn(&mut Arena, &mut Random) -> Outcome,
}

const SCRIPTS: &[Script] = &[
    Script {
        name: "cloud_hypervisor_start",
        run: cloud_hypervisor::start,
    },
    Script {
        name: "cloud_hypervisor_pause_and_resume",
        run: cloud_hypervisor::pause_and_resume,
    },
    Script {
        name: "cloud_hypervisor_reset",
        run: cloud_hypervisor::reset,
    },
    Script {
        name: "cloud_hypervisor_reconnect",
        run: cloud_hypervisor::reconnect,
    },
    Script {
        name: "cloud_hypervisor_reconnect_under_load",
        run: cloud_hypervisor::reconnect_under_load,
    },
    Script {
        name: "cloud_hypervisor_hotplug",
        run: cloud_hypervisor::hotplug,
    },
    Script {
        name: "spdk_virtio_user",
        run: spdk::run,
    },
    Script {
        name: "spdk_virtio_user_again",
        run: spdk::again,
    },
];

/// Queues of each device.
const QUEUES: u16 = 2;

fn main() {
    let args = Arguments::from_args();
    let backends = [(Backend::Plain, ""), (Backend::Xts(4096), "_xts")];
    let mut trials = Vec::new();
    for script in SCRIPTS {
        for (backend, suffix) in backends {
            let name = format!("frontend_{}{suffix}", script.name);
            trials.push(Trial::test(name.clone(), move || {
                trial(script, backend, &name)
            }));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn trial(script: &Script, backend: Backend, name: &str) -> Result<(), Failed> {
    let mut arena = Arena::start(backend, QUEUES, name)?;
    (script.run)(&mut arena, &mut Random::named(name))
        .map_err(|e| format!("{e}\n--- log:\n{}", arena.process.log()))?;
    Ok(arena.check()?)
}

/// Fails with `what` unless it holds.
fn ensure(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(what.into()) }
}
