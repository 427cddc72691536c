//! Lines with a tick and their seconds; while a step takes long, a terminal shows that it goes on.

use std::error::Error;
use std::io::{IsTerminal as _, Write as _, stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What a step returns: its evidence.
pub type Step = Result<String, Box<dyn Error>>;

/// After so long a step says that it goes on.
const QUIET: Duration = Duration::from_secs(1);

/// Runs a step and prints how it ended.
///
/// # Errors
/// The step's own, after its line.
pub fn step(name: &str, run: impl FnOnce() -> Step) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    let result = with_progress(name, began, run);
    let seconds = began.elapsed().as_secs_f64();
    match result {
        Ok(evidence) => {
            println!("✓ {name}: {evidence} ({seconds:.1} s)");
            Ok(())
        }
        Err(error) => {
            println!("✗ {name} ({seconds:.1} s)");
            Err(error)
        }
    }
}

fn with_progress(name: &str, began: Instant, run: impl FnOnce() -> Step) -> Step {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ticker = scope.spawn(|| tick(name, began, &done));
        let result = run();
        done.store(true, Ordering::Release);
        ticker.thread().unpark();
        let _ = ticker.join();
        result
    })
}

/// On a terminal the line counts seconds; elsewhere one line says that it began.
fn tick(name: &str, began: Instant, done: &AtomicBool) {
    let terminal = stdout().is_terminal();
    let mut said = false;
    loop {
        std::thread::park_timeout(Duration::from_millis(200));
        if done.load(Ordering::Acquire) {
            break;
        }
        if began.elapsed() < QUIET {
            continue;
        }
        if terminal {
            print!("\r… {name}: {} s\x1b[K", began.elapsed().as_secs());
            let _ = stdout().flush();
        } else if !said {
            println!("… {name}");
        }
        said = true;
    }
    if said && terminal {
        print!("\r\x1b[K");
        let _ = stdout().flush();
    }
}
