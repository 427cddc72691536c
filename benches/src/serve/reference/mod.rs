//! `--reference`: the same disks from the stock crates, `vhost-user-backend` and `virtio-queue`: the
//! baseline that Bulkhead is measured and compared against.
//!
//! It is what one writes with these crates in a day: a thread for each queue that sleeps in epoll,
//! takes what the ring has, and does one request after the other through a bounce buffer, with `pread` and `pwrite`
//! where there is a file. It keeps to well-formed requests and frontends; the crates end threads
//! or panic on some others.
//!
//! | module | owns |
//! | --- | --- |
//! | `backend` | what the crates ask of a device |
//! | [`request`] | one descriptor chain, from header to status |
//! | [`store`] | where blocks live, and their encryption |

mod backend;
pub mod request;
pub mod store;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::cpus::{self, CpuError};
use super::devices::Device;
use backend::Backend;
use store::{Disk, StoreError};

/// Why the reference can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// A disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The CPUs.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A device's thread panicked.
    #[error("the thread of a device panicked")]
    Panicked,
}

/// Serves the devices on the CPUs `on` (on any, if there is none) until a signal ends the process. `ready` is
/// called once everything runs.
///
/// # Errors
/// See [`ReferenceError`].
pub fn run(devices: Vec<Device>, on: &[usize], ready: impl FnOnce()) -> Result<(), ReferenceError> {
    cpus::pin(on)?;
    let threads: Result<Vec<_>, _> = devices.into_iter().map(spawn).collect();
    let threads = threads?;
    ready();
    for thread in threads {
        thread.join().map_err(|_| ReferenceError::Panicked)?;
    }
    Ok(())
}

/// Serves a device on a thread of its own: one frontend after the other, without end.
fn spawn(device: Device) -> Result<JoinHandle<()>, StoreError> {
    let name = device.socket.display().to_string();
    let disk = Arc::new(Disk::new(device.disk)?);
    let mut listener = Listener::from(device.listener);
    let thread = std::thread::Builder::new().name("device".to_owned());
    let run = move || {
        loop {
            if let Err(e) = serve_one(&disk, &mut listener) {
                tracing::warn!("{name}: {e}");
                // Out of descriptors, most likely: a loop that fails at once helps nobody.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    };
    thread.spawn(run).map_err(StoreError::Start)
}

/// Waits for a frontend and serves it until it leaves.
fn serve_one(disk: &Arc<Disk>, listener: &mut Listener) -> Result<(), String> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Backend::new(Arc::clone(disk), memory.clone()));
    let daemon = VhostUserDaemon::new("frontend".to_owned(), Arc::clone(&backend), memory);
    let mut daemon = daemon.map_err(message)?;
    daemon.start(listener).map_err(message)?;
    let end = daemon.wait();
    // Joins the queues' threads.
    drop(daemon);
    backend.close_exit_events();
    match end {
        Ok(())
        | Err(DaemonError::HandleRequest(VhostError::Disconnected | VhostError::PartialMessage)) => {
            Ok(())
        }
        Err(e) => Err(message(e)),
    }
}

fn message(error: impl ToString) -> String {
    error.to_string()
}
