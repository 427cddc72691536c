//! AES-256-XTS: every kernel against AWS-LC, RustCrypto and published vectors, and what must be refused.

mod agreement;
mod guarded;
mod oracle;
mod random;
mod refusals;
#[cfg(target_arch = "x86_64")]
mod residue;
mod vectors;

use bulkhead_crypto::xts::Kernel;
use bulkhead_crypto::{SecretArena, XtsKey};

/// Runs a test for every kernel that this CPU can run, and names those that it can't.
fn each_kernel(test: &str, mut run: impl FnMut(Kernel)) {
    let available = Kernel::available();
    for kernel in Kernel::ALL {
        if available.contains(&kernel) {
            run(kernel);
        } else {
            println!("skipped: {test}: {kernel}: this CPU (or build) has no such kernel");
        }
    }
}

fn expand(key: &[u8; 64], kernel: Kernel) -> XtsKey {
    let arena = SecretArena::new(1).expect("arena");
    XtsKey::with_kernel(&arena, key, kernel).expect("key")
}
