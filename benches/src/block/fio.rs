//! `fio` on a bare file: io_uring, direct I/O, registered files and buffers; what a file can give without rings of
//! a guest.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::BlockError;
use super::bench::Bench;
use super::shape::Shape;
use super::side::Side;

/// Requests that it submits, or reaps, at once at most.
const BATCH: u16 = 16;

impl<'a> Side<'a> {
    /// `fio` on the file, from the CPU that serves.
    #[must_use]
    pub fn fio(bench: &'a Bench, path: &Path, shape: Shape) -> Self {
        let path = path.to_owned();
        Self::new(move || run(bench, &path, shape))
    }
}

fn run(bench: &Bench, path: &Path, shape: Shape) -> Result<f64, BlockError> {
    let output = Command::new("fio")
        .args(options(bench, path, shape))
        .output()
        .map_err(|source| BlockError::Program {
            what: "fio".to_owned(),
            source,
        })?;
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = || BlockError::Fio {
        path: path.to_owned(),
        said: format!("{said}{}", String::from_utf8_lossy(&output.stderr)),
    };
    // Notes may stand before the JSON.
    let json = said.find('{').and_then(|at| said.get(at..));
    let json = json.and_then(|json| serde_json::from_str(json).ok());
    let iops = json.and_then(|json| iops(&json, shape));
    let iops = iops.filter(|iops| output.status.success() && *iops > 0.0);
    Ok(1e9 / iops.ok_or_else(failed)?)
}

fn options(bench: &Bench, path: &Path, shape: Shape) -> Vec<String> {
    let what = match (shape.sequential, shape.writes) {
        (false, false) => "randread",
        (false, true) => "randwrite",
        (true, false) => "read",
        (true, true) => "write",
    };
    let batch = shape.depth.min(BATCH);
    let mut options: Vec<String> = [
        "--name=bare",
        "--ioengine=io_uring",
        "--direct=1",
        "--fixedbufs=1",
        "--registerfiles=1",
        "--time_based=1",
        "--norandommap=1",
        "--randrepeat=0",
        "--gtod_reduce=1",
        "--thread=1",
        "--output-format=json",
    ]
    .map(str::to_owned)
    .to_vec();
    for (name, value) in [
        ("filename", path.display().to_string()),
        ("rw", what.to_owned()),
        ("bs", shape.bytes.to_string()),
        ("iodepth", shape.depth.to_string()),
        ("iodepth_batch_submit", batch.to_string()),
        ("iodepth_batch_complete_min", "1".to_owned()),
        ("iodepth_batch_complete_max", batch.to_string()),
        ("cpus_allowed", bench.worker_cpu.to_string()),
        ("runtime", format!("{}ms", bench.pace.sample.as_millis())),
        ("ramp_time", format!("{}ms", bench.pace.warm_up.as_millis())),
    ] {
        options.push(format!("--{name}={value}"));
    }
    options
}

fn iops(json: &Value, shape: Shape) -> Option<f64> {
    let direction = if shape.writes { "write" } else { "read" };
    json["jobs"][0][direction]["iops"].as_f64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_direction_s_figure_counts() {
        let json = json!({"jobs": [{"read": {"iops": 5.0}, "write": {"iops": 7.0}}]});
        let shape = |writes| Shape {
            writes,
            ..Shape::all(true)[0]
        };
        assert_eq!(iops(&json, shape(false)), Some(5.0));
        assert_eq!(iops(&json, shape(true)), Some(7.0));
        assert_eq!(iops(&json!({}), shape(true)), None);
    }
}
