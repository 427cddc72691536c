//! `serve` with a re-key under way, life after life: each ends by SIGKILL, after each the file is read offline.

use std::error::Error;
use std::fmt::{self, Display, Formatter};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_crypto::DataUnit;
use bulkhead_crypto::xts::KEY_BYTES;
use bulkhead_integration::arena::MOVING;
use bulkhead_integration::disk::PATIENCE;
use bulkhead_integration::driver::ring::Format;
use bulkhead_integration::processes::{Process, binary};
use bulkhead_integration::random::Random;
use bulkhead_protocol::RekeyId;
use tempfile::TempDir;

use crate::content::Content;
use crate::guest::Guest;
use crate::offline::{Image, Rekey, Volume, ZoneLook};

/// Zones of the volume, which are of 1 MiB.
const ZONES: u64 = 12;
const VOLUME_BYTES: u64 = ZONES << 20;
/// How long a re-key that is not killed any more may take.
const WHOLE_PATIENCE: Duration = Duration::from_secs(60);

/// What stands before the file: slower transfers make zones last, and end in any order.
const STORAGES: [&str; 4] = ["", "delay=1000:", "delay=5000:", "delay=20000:"];

/// What was done.
#[derive(Debug, Default, Clone, Copy)]
pub struct Figures {
    /// Processes killed.
    pub kills: u64,
    /// Of those, before they could serve.
    pub early: u64,
    /// With a zone in the record.
    pub in_zone: u64,
    /// With one whose journal was not finished.
    pub untouched: u64,
    /// With one that was partly in its place.
    pub torn: u64,
    /// Re-keys finished.
    pub finished: u64,
    /// Zones re-encrypted.
    pub zones: u64,
    /// Data units compared offline.
    pub units: u64,
    /// Requests completed and checked.
    pub requests: u64,
    /// Requests that change something, in flight at a kill.
    pub open: u64,
}

impl Display for Figures {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            kills,
            early,
            in_zone,
            untouched,
            torn,
            finished,
            zones,
            units,
            requests,
            open,
        } = self;
        write!(
            f,
            "{kills} kills ({early} before it served; {in_zone} in a zone, of which {untouched} were \
             not touched and {torn} torn; {open} changes in flight), {finished} re-keys finished, \
             {zones} zones, {units} data units compared offline, {requests} requests checked"
        )
    }
}

/// A volume and what is known of it.
#[derive(Debug)]
pub struct Lives {
    dir: TempDir,
    format: Format,
    unit: DataUnit,
    rekey: Rekey,
    content: Content,
    random: Random,
    /// Sequence number of the record, and the frontier, as they were found last.
    reached: (u64, u64),
    /// In this life queues move from worker to worker.
    moving: bool,
    figures: Figures,
}

impl Lives {
    /// A volume under a first key, to be re-keyed to a second.
    pub fn new(name: &str, format: Format, unit: DataUnit) -> Result<Self, Box<dyn Error>> {
        let mut random = Random::named(name);
        let (previous, key) = (new_key(&mut random)?, new_key(&mut random)?);
        let lives = Self {
            dir: tempfile::tempdir()?,
            format,
            unit,
            rekey: Rekey {
                id: new_id(&mut random)?,
                before: None,
                key,
                previous,
            },
            content: Content::new(VOLUME_BYTES, usize::try_from(unit.bytes())?)?,
            random,
            reached: (0, 0),
            moving: false,
            figures: Figures::default(),
        };
        let file = File::create(lives.file())?;
        lives
            .volume(&file)
            .write(&previous, &lives.content.bytes())?;
        lives.write_keys()?;
        Ok(lives)
    }

    /// So many kills; then what is under way is finished.
    pub fn run(mut self, kills: u64) -> Result<Figures, Box<dyn Error>> {
        while self.figures.kills < kills {
            self.life().map_err(|e| self.explain(e))?;
        }
        let end = Instant::now() + WHOLE_PATIENCE;
        let before = self.figures.finished;
        while self.figures.finished == before {
            let attached = self.serving_life(Duration::from_millis(500));
            attached.map_err(|e| self.explain(e))?;
            if Instant::now() > end {
                let (_, frontier) = self.reached;
                return Err(format!("the last re-key is still at {frontier} bytes").into());
            }
        }
        Ok(self.figures)
    }

    fn explain(&self, error: impl Display) -> Box<dyn Error> {
        let (_, frontier) = self.reached;
        let re_keys = self.figures.finished;
        format!(
            "after {} kills and {re_keys} re-keys, frontier at {frontier}: {error}",
            self.figures.kills
        )
        .into()
    }

    /// One life that ends at a random moment: rarely before it serves, often just after.
    fn life(&mut self) -> Result<(), Box<dyn Error>> {
        let how_long = match self.random.below(8) {
            0 => return self.early_life(),
            1..3 => self.random.below(20_000),
            3..7 => self.random.below(200_000),
            _ => self.random.below(800_000),
        };
        self.serving_life(Duration::from_micros(how_long))
    }

    fn early_life(&mut self) -> Result<(), Box<dyn Error>> {
        let mut process = self.start(2, true, "")?;
        std::thread::sleep(Duration::from_micros(self.random.below(60_000)));
        process.kill();
        self.figures.kills += 1;
        self.figures.early += 1;
        self.look()
    }

    fn serving_life(&mut self, how_long: Duration) -> Result<(), Box<dyn Error>> {
        let queues = 1 + u16::try_from(self.random.below(2))?;
        let storage = STORAGES[self.random.index(STORAGES.len())];
        self.moving = self.random.below(2) == 0;
        let mut process = self.serving(queues, true, storage)?;
        let socket = self.socket();
        let (_, frontier) = self.reached;
        let (content, random) = (&mut self.content, &mut self.random);
        let guest = Guest::attach(&socket, self.format, queues, content, random);
        let mut guest = guest.map_err(|e| told(&mut process, e))?;
        // Where zones will be until it is killed.
        guest.focus(frontier..frontier + (3 << 20))?;
        guest.run(how_long).map_err(|e| told(&mut process, e))?;
        if let Some(status) = process.ended() {
            return Err(told(&mut process, format!("it ended by itself: {status}")));
        }
        process.kill();
        self.figures.kills += 1;
        self.figures.requests += guest.done;
        let open = guest.lose().map_err(|e| told(&mut process, e))?;
        self.figures.open += open as u64;
        self.look().map_err(|e| told(&mut process, e))
    }

    /// Reads the file, as the last life left it.
    fn look(&mut self) -> Result<(), Box<dyn Error>> {
        let file = let_go(&self.file())?;
        let image = self.volume(&file).read(&self.rekey)?;
        drop(file);
        self.judge(&image)?;
        self.figures.units += self.content.units() as u64;
        let wrong = self.content.settle(&image.plain);
        if let Some(first) = wrong.first() {
            let (count, record) = (wrong.len(), image.record);
            return Err(format!(
                "{count} data units can't be read, the first is {first}: {record:?}, {:?}",
                image.zone
            )
            .into());
        }
        if image.is_done() {
            self.finish()?;
        }
        Ok(())
    }

    /// Nothing goes back; what was seen is counted.
    fn judge(&mut self, image: &Image) -> Result<(), Box<dyn Error>> {
        let (sequence, frontier) = self.reached;
        let now = image.record.map_or(0, |record| record.sequence);
        if now < sequence || image.frontier_bytes() < frontier {
            let what = format!(
                "the record went back from {:?}: {:?}",
                self.reached, image.record
            );
            return Err(what.into());
        }
        self.figures.zones += (image.frontier_bytes() - frontier) >> 20;
        self.reached = (now, image.frontier_bytes());
        self.figures.in_zone += u64::from(image.zone != ZoneLook::None);
        match image.zone {
            ZoneLook::None => {}
            ZoneLook::Untouched => self.figures.untouched += 1,
            ZoneLook::Journalled { written, units } => {
                self.figures.torn += u64::from(written > 0 && written < units);
            }
        }
        Ok(())
    }

    /// A re-key has come to its end: the key alone opens everything, and the next one begins.
    fn finish(&mut self) -> Result<(), Box<dyn Error>> {
        self.figures.finished += 1;
        let mut process = self.serving(1, false, "")?;
        let socket = self.socket();
        let (content, random) = (&mut self.content, &mut self.random);
        let guest = Guest::attach(&socket, self.format, 1, content, random);
        let read = guest.and_then(|mut guest| guest.read_all());
        read.map_err(|e| told(&mut process, format!("with the key alone: {e}")))?;
        process.kill();
        drop(let_go(&self.file())?);
        self.rekey = Rekey {
            id: new_id(&mut self.random)?,
            before: Some(self.rekey.id),
            key: new_key(&mut self.random)?,
            previous: self.rekey.key,
        };
        self.reached = (0, 0);
        self.write_keys()
    }

    fn serving(&self, queues: u16, rekey: bool, storage: &str) -> Result<Process, Box<dyn Error>> {
        let mut process = self.start(queues, rekey, storage)?;
        if process.wait_for_log("listening on", PATIENCE) {
            return Ok(process);
        }
        Err(told(&mut process, "it does not serve"))
    }

    fn start(&self, queues: u16, rekey: bool, storage: &str) -> Result<Process, Box<dyn Error>> {
        let mut command = Command::new(binary("serve", "bulkhead-benches")?);
        command.current_dir(self.dir.path());
        command.env("BULKHEAD_LOG", "info");
        let blk = format!("{storage}file:volume");
        command.args(["--socket", "socket", "--blk", &blk, "--discard"]);
        command.args(["--queues", &queues.to_string()]);
        command.args(["--xts", "--data-unit", &self.unit.bytes().to_string()]);
        command.args(["--key-file", "key"]);
        if self.moving {
            command.args(MOVING);
        }
        if rekey {
            let id = self.rekey.id.to_string();
            command.args(["--rekey-from", "previous", "--rekey-id", &id]);
        }
        Ok(Process::start_command(command)?)
    }

    fn write_keys(&self) -> Result<(), Box<dyn Error>> {
        fs::write(self.dir.path().join("key"), self.rekey.key)?;
        Ok(fs::write(
            self.dir.path().join("previous"),
            self.rekey.previous,
        )?)
    }

    fn volume<'a>(&self, file: &'a File) -> Volume<'a> {
        Volume {
            file,
            bytes: VOLUME_BYTES,
            unit: self.unit,
        }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }
}

/// The file, once nobody else has it: the kernel ends a dead process's transfers, and gives its lock back,
/// some time after the process is gone.
fn let_go(path: &Path) -> Result<File, Box<dyn Error>> {
    let file = File::open(path)?;
    let end = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(format!("the dead process still has the file: {e}").into()),
        }
    }
}

fn told(process: &mut Process, error: impl Display) -> Box<dyn Error> {
    let ended = process.wait(Duration::from_millis(100));
    let ended = ended.map_or(String::new(), |status| format!(" (it ended: {status})"));
    format!("{error}{ended}\n--- log:\n{}", process.log()).into()
}

fn new_key(random: &mut Random) -> Result<[u8; KEY_BYTES], Box<dyn Error>> {
    let bytes = random.bytes(KEY_BYTES);
    bytes.try_into().map_err(|_| "a key has 64 bytes".into())
}

fn new_id(random: &mut Random) -> Result<RekeyId, Box<dyn Error>> {
    let id = random.bytes(16).try_into();
    Ok(RekeyId(id.map_err(|_| "an id has 16 bytes")?))
}
