//! Every file of every corpus, once, by whatever compiler runs the tests; and each target with no bytes.

use std::fs;
use std::path::Path;

use bulkhead_fuzz::TARGETS;
use libtest_mimic::{Arguments, Trial};

fn main() {
    let mut args = Arguments::from_args();
    // Some targets count the process's descriptors.
    args.test_threads = Some(1);
    let mut trials = Vec::new();
    for target in TARGETS {
        let run = target.run;
        trials.push(Trial::test(format!("{}_nothing", target.name), move || {
            run(&[]);
            Ok(())
        }));
        trials.push(Trial::test(format!("{}_corpus", target.name), move || {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("corpus")
                .join(target.name);
            let files: Vec<_> = fs::read_dir(&dir)?
                .flatten()
                .map(|entry| entry.path())
                .collect();
            if files.is_empty() {
                return Err(format!("{} has no file", dir.display()).into());
            }
            for file in files {
                let bytes = fs::read(&file)?;
                if std::panic::catch_unwind(|| run(&bytes)).is_err() {
                    return Err(format!("{} fails, see above", file.display()).into());
                }
            }
            Ok(())
        }));
    }
    libtest_mimic::run(&args, trials).exit();
}
