//! Null, ram, a file and tmpfs, plain and encrypted: each shape of request beside its floors and peers, in the same
//! rounds.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use bulkhead_integration::random::Random;

use super::BlockError;
use super::alone::{Other, Work};
use super::backend::{self, Backend};
use super::bench::{Bench, in_file};
use super::rounds::{self, Rounds};
use super::shape::{LARGE, SMALL, Shape};
use super::side::{self, Side};
use crate::figures::row::{Placement, Point, Row, Unit};

mod targets;

use targets::Peer;
pub use targets::{DECIPHERED, FIO, FLOOR, QEMU, REFERENCE};

/// Bytes of the disk in memory.
const RAM_BYTES: usize = 256 << 20;
/// Bytes of a file.
const FILE_BYTES: u64 = 512 << 20;
/// The same in the short form.
const QUICK_FILE_BYTES: u64 = 8 << 20;

/// Where a disk's blocks live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Nowhere.
    Null,
    /// In memory of the back-end.
    Ram,
    /// In a file on a disk, which is written and read directly.
    File,
    /// In a file of a tmpfs, written and read directly.
    Tmpfs,
}

/// A storage, plain or encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// Where blocks live.
    pub storage: Storage,
    /// AES-256-XTS in units of 4096 bytes.
    pub xts: bool,
}

impl Group {
    fn all() -> impl Iterator<Item = Self> {
        use Storage::{File, Null, Ram, Tmpfs};
        let storages = [Null, Ram, File, Tmpfs].into_iter();
        storages.flat_map(|storage| [false, true].map(|xts| Self { storage, xts }))
    }

    /// As cases begin.
    #[must_use]
    pub fn name(self) -> &'static str {
        match (self.storage, self.xts) {
            (Storage::Null, false) => "null",
            (Storage::Null, true) => "null XTS",
            (Storage::Ram, false) => "ram",
            (Storage::Ram, true) => "ram XTS",
            (Storage::File, false) => "file",
            (Storage::File, true) => "file XTS",
            (Storage::Tmpfs, false) => "tmpfs",
            (Storage::Tmpfs, true) => "tmpfs XTS",
        }
    }

    fn plain(self) -> Self {
        Self { xts: false, ..self }
    }

    fn is_file(self) -> bool {
        matches!(self.storage, Storage::File | Storage::Tmpfs)
    }

    fn options(self) -> &'static [&'static str] {
        if self.xts { &["--xts"] } else { &[] }
    }

    /// Its file, if it is one; made if it is not there.
    fn file(self, bench: &Bench, name: &str) -> Result<Option<PathBuf>, BlockError> {
        let path = match self.storage {
            Storage::Null | Storage::Ram => return Ok(None),
            Storage::File => bench.on_disk(name),
            Storage::Tmpfs => bench.on_tmpfs(name),
        };
        let bytes = if bench.quick {
            QUICK_FILE_BYTES
        } else {
            FILE_BYTES
        };
        if !path.exists() {
            fill(&path, bytes).map_err(in_file(&path))?;
        }
        Ok(Some(path))
    }

    /// As `--blk` has it.
    fn spec(self, file: Option<&Path>) -> String {
        match (self.storage, file) {
            (Storage::Ram, _) => format!("ram:{RAM_BYTES}"),
            (_, Some(path)) => format!("file:{}", path.display()),
            (_, None) => "null:1GiB".to_owned(),
        }
    }

    /// As `--blockdev` of `qemu-storage-daemon` has it; none where it has nothing alike.
    fn blockdev(self, file: Option<&Path>) -> Option<String> {
        match (self.storage, file) {
            (Storage::Null, _) => Some("driver=null-co,size=1073741824".to_owned()),
            (_, Some(path)) => Some(format!(
                "driver=file,filename={},cache.direct=on,aio=io_uring,locking=off",
                path.display()
            )),
            (_, None) => None,
        }
    }
}

/// Whether a group of that name is there.
#[must_use]
pub fn has(name: &str) -> bool {
    Group::all().any(|group| group.name() == name)
}

/// Writes bytes that are not all alike, so that a file system has them all.
fn fill(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let piece = Random::new(5).bytes(1 << 20);
    for _ in 0..bytes >> 20 {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

/// Measures every group in every shape.
///
/// # Errors
/// See [`BlockError`].
pub fn measure(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let mut rows = Vec::new();
    for group in Group::all().filter(|group| bench.wants_group(group.name())) {
        eprintln!("{} ..", group.name());
        rows.extend(one_group(bench, group)?);
    }
    Ok(rows)
}

/// The floor's rows depend on where the CPUs are: if they have moved since, these are measured there, too. What this
/// run had no occasion for is said so.
///
/// # Errors
/// See [`BlockError`].
pub fn once_more(bench: &Bench, rows: &[Row]) -> Result<Vec<Row>, BlockError> {
    let null = Group {
        storage: Storage::Null,
        xts: false,
    };
    let floors = |rows: &[Row]| -> Vec<Row> {
        let of_floor = rows.iter().filter(|row| row.peer == FLOOR);
        of_floor
            .filter(|row| row.case.starts_with("null, "))
            .cloned()
            .collect()
    };
    let known = floors(rows);
    let Some(first) = known.first() else {
        return Ok(Vec::new());
    };
    let mut more = Vec::new();
    if !bench.quick && rounds::placement(bench)? != first.placement {
        eprintln!("null once more: the CPUs have moved ..");
        more = floors(&one_group(bench, null)?);
        more.retain(|row| {
            !known
                .iter()
                .any(|k| k.case == row.case && k.placement == row.placement)
        });
    }
    let mut missing = Vec::new();
    for row in &known {
        for placement in [Placement::Near, Placement::Far] {
            let there = |r: &&Row| r.case == row.case && r.placement == placement;
            let target = targets::of_floor(&row.case, placement);
            if target.is_some() && known.iter().chain(&more).find(there).is_none() {
                missing.push(not_measured(row, placement, target));
            }
        }
    }
    more.extend(missing);
    Ok(more)
}

fn not_measured(row: &Row, placement: Placement, target: Option<f64>) -> Row {
    Row {
        ours: f64::NAN,
        theirs: f64::NAN,
        ratio: f64::NAN,
        target,
        placement,
        point: None,
        ..row.clone()
    }
}

/// All back-ends of a group, idle ones asleep.
struct Served {
    ours: Backend,
    plain: Option<Backend>,
    qemu: Option<Backend>,
    reference: Option<Backend>,
    file: Option<PathBuf>,
}

impl Served {
    fn start(bench: &Bench, group: Group) -> Result<Self, BlockError> {
        let file = group.file(bench, "disk")?;
        let spec = group.spec(file.as_deref());
        let ours = backend::ours(bench, "ours", &[&spec], group.options())?;
        // A file has one user at a time: there, the floor is fio.
        let plain = (group.xts && !group.is_file())
            .then(|| backend::ours(bench, "plain", &[&spec], &[]))
            .transpose()?;
        let blockdev = group.blockdev(file.as_deref());
        let blockdev = blockdev.filter(|_| bench.has_qemu && !group.xts);
        let qemu = blockdev.map(|blockdev| backend::qemu(bench, "qemu", &blockdev));
        let other = group.file(bench, "reference")?;
        let mut options = vec!["--reference"];
        options.extend(group.options());
        let reference = group.spec(other.as_deref());
        let served = Self {
            ours,
            plain,
            qemu: qemu.transpose()?,
            reference: Some(backend::ours(bench, "reference", &[&reference], &options)?),
            file,
        };
        if group.storage == Storage::Ram {
            served.touch(bench)?;
        }
        Ok(served)
    }

    /// Writes all of the memory once: it is there then.
    fn touch(&self, bench: &Bench) -> Result<(), BlockError> {
        let shape = Shape {
            writes: true,
            bytes: LARGE,
            depth: 8,
            sequential: true,
        };
        for backend in [
            Some(&self.ours),
            self.plain.as_ref(),
            self.reference.as_ref(),
        ] {
            let Some(backend) = backend else { continue };
            let mut options = shape.options();
            options.extend([
                "--socket".to_owned(),
                backend.socket().display().to_string(),
            ]);
            options.extend(["--seconds", "0.5"].map(str::to_owned));
            side::load(bench, &options, 1)?;
        }
        Ok(())
    }
}

fn one_group(bench: &Bench, group: Group) -> Result<Vec<Row>, BlockError> {
    let served = Served::start(bench, group)?;
    let mut rows = Vec::new();
    for shape in Shape::all(bench.quick) {
        let sides = peers(bench, group, shape, &served)?;
        let (kinds, mut sides): (Vec<Peer>, Vec<Side<'_>>) = sides.into_iter().unzip();
        let rounds = rounds::take(bench, &mut sides)?;
        let case = Case {
            group,
            shape,
            kinds,
            rounds,
        };
        rows.extend(case.rows());
    }
    Ok(rows)
}

/// What is measured of a shape, ours first.
fn peers<'a>(
    bench: &'a Bench,
    group: Group,
    shape: Shape,
    served: &Served,
) -> Result<Vec<(Peer, Side<'a>)>, BlockError> {
    let backend = |backend: &Backend| Side::backend(bench, backend.socket(), shape);
    let mut sides = vec![(Peer::Ours, backend(&served.ours))];
    if group.storage == Storage::Null && !group.xts {
        sides.push((Peer::Floor, Side::echo(bench, shape, 1)));
    }
    if let Some(plain) = &served.plain {
        sides.push((Peer::Plain, backend(plain)));
    }
    if group.storage == Storage::Ram {
        let null = backend::ours(bench, "null", &["null:1GiB"], &[])?;
        let side = held(Side::backend(bench, null.socket(), shape), null);
        sides.push((Peer::Null, side));
        if !group.xts {
            let copy = Side::alone(bench, shape, Work::Copy, Other::Disk(RAM_BYTES))?;
            sides.push((Peer::Copy, copy));
        }
    }
    if group.xts {
        let other = match group.storage {
            Storage::Ram => Other::Disk(RAM_BYTES),
            _ => Other::Buffer,
        };
        sides.push((
            Peer::Cipher,
            Side::alone(bench, shape, Work::Cipher, other)?,
        ));
    }
    if let Some(file) = served.file.as_deref().filter(|_| bench.has_fio) {
        sides.push((Peer::Fio, Side::fio(bench, file, shape)));
        if group.xts {
            let side = Side::deciphered(bench, file, shape);
            sides.push((Peer::Deciphered, side));
        }
    }
    if let Some(qemu) = &served.qemu {
        sides.push((Peer::Qemu, backend(qemu)));
    }
    // On files it has one request in flight, by construction.
    let comparable = !group.is_file() || shape.depth == 1;
    if let Some(reference) = served.reference.as_ref().filter(|_| comparable) {
        sides.push((Peer::Reference, backend(reference)));
    }
    Ok(sides)
}

/// A side whose back-end lives as long as it does.
fn held<'a>(mut side: Side<'a>, backend: Backend) -> Side<'a> {
    Side::new(move || {
        let _served = &backend;
        side.turn()
    })
}

/// What was measured of a shape.
struct Case {
    group: Group,
    shape: Shape,
    kinds: Vec<Peer>,
    rounds: Rounds,
}

impl Case {
    fn rows(&self) -> Vec<Row> {
        targets::of(self)
    }

    fn has(&self, peer: Peer) -> bool {
        self.kinds.contains(&peer)
    }

    /// A side's nanoseconds for a request in a round.
    fn ns(&self, round: &[f64], peer: Peer) -> f64 {
        let at = self.kinds.iter().position(|kind| *kind == peer);
        at.and_then(|at| round.get(at)).copied().unwrap_or(f64::NAN)
    }

    fn name(&self) -> String {
        format!("{}, {}", self.group.name(), self.shape.name())
    }

    /// Requests a second of small ones, and where no bytes move; bytes of large ones.
    fn rate(&self, ns: f64) -> (Unit, f64) {
        let still = self.group.storage == Storage::Null && !self.group.xts;
        if self.shape.bytes == SMALL || still {
            (Unit::RequestsPerSecond, 1e9 / ns)
        } else {
            (Unit::GigabytesPerSecond, f64::from(self.shape.bytes) / ns)
        }
    }

    /// A row of rates beside a peer.
    fn beside(&self, peer: Peer, name: &'static str, target: Option<f64>) -> Row {
        let ours = self.rounds.median(|round| self.ns(round, Peer::Ours));
        let theirs = self.rounds.median(|round| self.ns(round, peer));
        let (unit, ours) = self.rate(ours);
        Row {
            case: self.name(),
            unit,
            ours,
            peer: name.into(),
            theirs: self.rate(theirs).1,
            ratio: self
                .rounds
                .median(|round| self.ns(round, peer) / self.ns(round, Peer::Ours)),
            target: self.judged(target),
            placement: self.rounds.placement,
            point: self.point(),
        }
    }

    /// A row of times beside a sum of what others take, in nanoseconds.
    fn beside_sum(
        &self,
        name: &'static str,
        target: Option<f64>,
        sum: impl Fn(&dyn Fn(Peer) -> f64) -> f64,
    ) -> Row {
        let theirs = |round: &[f64]| sum(&|peer| self.ns(round, peer));
        Row {
            case: self.name(),
            unit: Unit::NanosecondsPerRequest,
            ours: self.rounds.median(|round| self.ns(round, Peer::Ours)),
            peer: name.into(),
            theirs: self.rounds.median(theirs),
            ratio: self
                .rounds
                .median(|round| theirs(round) / self.ns(round, Peer::Ours)),
            target: self.judged(target),
            placement: self.rounds.placement,
            point: None,
        }
    }

    /// Figures of CPUs that moved are not held against anybody.
    fn judged(&self, target: Option<f64>) -> Option<f64> {
        target.filter(|_| self.rounds.placement != Placement::Flipped)
    }

    fn point(&self) -> Option<Point> {
        let plain = self.group.plain().name();
        (self.shape.bytes == SMALL).then(|| Point {
            panel: format!("{plain}, {}", self.shape.kind()),
            line: if self.group.xts {
                "Bulkhead, XTS"
            } else {
                "Bulkhead"
            }
            .to_owned(),
            axis: "requests in flight",
            at: usize::from(self.shape.depth),
        })
    }
}

/// Each group in each shape beside another `serve`.
///
/// # Errors
/// See [`BlockError`].
pub fn against(bench: &Bench) -> Result<Vec<Row>, BlockError> {
    let Some(bin) = &bench.against else {
        return Ok(Vec::new());
    };
    let cpu = bench.worker_cpu.to_string();
    let mut rows = Vec::new();
    for group in Group::all().filter(|group| bench.wants_group(group.name())) {
        eprintln!("{} ..", group.name());
        let mut options = vec!["--cpu", cpu.as_str()];
        options.extend(group.options());
        // A file has one user at a time.
        let (one, other) = (group.file(bench, "disk")?, group.file(bench, "reference")?);
        let (one, other) = (group.spec(one.as_deref()), group.spec(other.as_deref()));
        let ours = backend::serve(bench, &bench.bin, "ours", &[&one], &options)?;
        let theirs = backend::serve(bench, bin, "other", &[&other], &options)?;
        for shape in Shape::all(bench.quick) {
            let sides = [&ours, &theirs].map(|b| Side::backend(bench, b.socket(), shape));
            let case = Case {
                group,
                shape,
                kinds: vec![Peer::Ours, Peer::Before],
                rounds: rounds::take(bench, &mut Vec::from(sides))?,
            };
            rows.push(Row {
                point: None,
                ..case.beside(Peer::Before, "the other serve", None)
            });
        }
    }
    Ok(rows)
}
