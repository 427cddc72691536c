//! The command line of `load`.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use super::LoadError;
use super::requests::{MAX_RING, Shape, ring_size};
use super::source::{Mix, Pattern};

const EXAMPLES: &str = "\
Examples:
  load --socket /tmp/a.sock --depth 32
      random reads of 4 KiB for 5 seconds
  load --socket /tmp/a.sock --depth 32 --cpu 1 --peer-cpu 0 --floor
      the same from CPU 1, beside what a back-end on CPU 0 that does nothing would reach, and whether
      the two CPUs are near each other
  load --socket /tmp/a.sock --mix 50 --verify --span 256MiB
      overwrites 256 MiB of the disk and checks every byte that is read back
  load --ring-echo --depth 32 --cpu 1 --peer-cpu 0
      the floor alone

What is on the disk is overwritten by any --mix but `read`, and by --verify.";

/// Requests that a neighbour has in flight, and their bytes.
const NEIGHBOUR_DEPTH: u16 = 128;
const NEIGHBOUR_BYTES: u32 = 128 << 10;

/// Loads vhost-user-blk disks as their only frontend, without a guest, and says how fast they are.
#[derive(Debug, Clone, Parser)]
#[command(name = "load", version, after_help = EXAMPLES)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub struct Arguments {
    /// Where a back-end listens; repeat it to load several disks at once, each with all of the options
    #[arg(long, value_name = "PATH", required_unless_present = "ring_echo")]
    pub socket: Vec<PathBuf>,

    /// A disk beside those, that the same threads load with random writes of 128 KiB, 128 in flight: a neighbour
    /// that takes what it gets. Figures of all disks together have it in, too; repeat it for more
    #[arg(long, value_name = "PATH", requires = "socket", conflicts_with_all = ["verify", "rate", "packed"])]
    pub neighbour: Vec<PathBuf>,

    /// No back-end: a thread that checks requests and answers them at once, the floor
    #[arg(long, conflicts_with_all = ["socket", "verify", "floor"])]
    pub ring_echo: bool,

    /// Requests in flight, of each queue
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_RING)))]
    pub depth: u16,

    /// Bytes of a request, a multiple of 512; also with KiB or MiB
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = block_size)]
    pub block_size: u32,

    /// What requests do: read, write, or the percentage of reads
    #[arg(long, value_name = "MIX", default_value = "read")]
    pub mix: Mix,

    /// Where they go
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,

    /// Queues of each disk; each has a part of the disk for itself
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,

    /// A thread on this CPU; repeat it for more threads, which share out the queues [default: one
    /// thread on any CPU]
    #[arg(long, value_name = "N")]
    pub cpu: Vec<usize>,

    /// The CPU of the back-end's worker (or of the echo): a ping-pong with the first --cpu before and
    /// after says whether they are near
    #[arg(long, value_name = "N", requires = "cpu")]
    pub peer_cpu: Option<usize>,

    /// Measure the floor too, before and after, and give the ratio to it. Both CPUs must be free then
    /// but for the back-end, and that asleep
    #[arg(long, requires = "peer_cpu")]
    pub floor: bool,

    /// Packed rings
    #[arg(long)]
    pub packed: bool,

    /// Kicks and calls by flags, though the back-end has EVENT_IDX
    #[arg(long)]
    pub no_event_idx: bool,

    /// Sleep for so many microseconds after each look that finds nothing, instead of looking again at once:
    /// leaves the CPU to others, and adds to latencies
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub pause: Option<u64>,

    /// Ask for calls, as a guest without polling does (nobody waits for them)
    #[arg(long)]
    pub calls: bool,

    /// Each request in an indirect table
    #[arg(long)]
    pub indirect: bool,

    /// Pieces that the data of a request is in
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=126))]
    pub segments: u16,

    /// How long to measure, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub seconds: Duration,

    /// How long to load before that, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub warm_up: Duration,

    /// Give up after so many seconds without an answer
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,

    /// Use the first bytes of the disk only; with KiB, MiB, GiB or TiB [default: the whole disk, of
    /// which --verify takes 256 MiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub span: Option<u64>,

    /// Fill the span, check every read against the write that was acknowledged last, and read all of it
    /// at the end
    #[arg(long)]
    pub verify: bool,

    /// Requests a second, all queues together, at even distances; latency counts from when a request
    /// was due [default: as many as are answered]
    #[arg(long, value_name = "IOPS", value_parser = rate)]
    pub rate: Option<f64>,

    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}

impl Arguments {
    /// The same command line for its neighbours alone.
    #[must_use]
    pub fn of_neighbours(&self) -> Self {
        Self {
            socket: self.neighbour.clone(),
            neighbour: Vec::new(),
            depth: NEIGHBOUR_DEPTH,
            block_size: NEIGHBOUR_BYTES,
            segments: 1,
            mix: Mix::WRITE,
            pattern: Pattern::Random,
            ..self.clone()
        }
    }

    /// What requests look like.
    ///
    /// # Errors
    /// [`LoadError::Options`].
    pub fn shape(&self) -> Result<Shape, LoadError> {
        let pieces = u32::from(self.segments) * 512;
        if !self.block_size.is_multiple_of(pieces) {
            let (bytes, segments) = (self.block_size, self.segments);
            let what = format!(
                "--block-size {bytes} can't be cut into {segments} pieces of whole sectors: use fewer --segments"
            );
            return Err(LoadError::Options(what));
        }
        let shape = Shape {
            depth: self.depth,
            block_bytes: self.block_size,
            segments: self.segments,
            indirect: self.indirect,
            ring_size: 0,
        };
        Ok(Shape {
            ring_size: ring_size(&shape)?,
            ..shape
        })
    }
}

fn size(text: &str) -> Result<u64, String> {
    crate::serve::spec::bytes(text).map_err(|e| e.to_string())
}

fn block_size(text: &str) -> Result<u32, String> {
    let bytes = size(text)?;
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| bytes.is_multiple_of(512) && *bytes <= 16 << 20)
        .ok_or_else(|| format!("{text} is no multiple of 512 up to 16 MiB"))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text
        .parse()
        .ok()
        .filter(|seconds| (0.0..=1e6).contains(seconds));
    let seconds =
        seconds.ok_or_else(|| format!("{text:?} is no number of seconds: write it as in 0.5"))?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (0.1..=1e9).contains(rate));
    rate.ok_or_else(|| format!("{text:?} is no rate: write requests a second, as in 10000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once("load").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_have_units_and_limits() {
        let line = "--socket s --socket t --depth 32 --block-size 128KiB --segments 4 --mix 70 --seconds 0.5 --rate 10000 --span 1GiB";
        let arguments = parse(line).expect("parses");
        assert_eq!(arguments.socket.len(), 2);
        assert_eq!(arguments.block_size, 131_072);
        assert_eq!(arguments.mix.read_percent(), 70);
        assert_eq!(arguments.seconds, Duration::from_millis(500));
        assert_eq!(arguments.span, Some(1 << 30));
        let shape = arguments.shape().expect("fits");
        assert_eq!((shape.ring_size, shape.chain()), (256, 6));
        for (option, said) in [
            ("--depth 0", "1..=1024"),
            ("--depth 1025", "1..=1024"),
            ("--block-size 1000", "multiple of 512"),
            ("--block-size 4kb", "KiB, MiB"),
            ("--block-size 32MiB", "up to 16 MiB"),
            ("--mix 101", "percentage of reads"),
            ("--seconds -1", "unexpected argument"),
            ("--seconds=x", "number of seconds"),
            ("--rate 0", "requests a second"),
            ("--queues 257", "1..=256"),
            ("--pause 0", "1..=1000000"),
            ("--segments 127", "1..=126"),
            ("--ring-echo", "cannot be used with"),
            ("--floor", "--peer-cpu"),
            ("--peer-cpu 0", "--cpu"),
        ] {
            let error = parse(&format!("--socket s {option}"))
                .expect_err(option)
                .to_string();
            assert!(error.contains(said), "{option}: {error}");
        }
        assert!(parse("").is_err(), "neither socket nor echo");
        assert!(parse("--ring-echo").is_ok());
    }

    #[test]
    fn pieces_are_whole_sectors() {
        let arguments = parse("--socket s --block-size 4KiB --segments 3").expect("parses");
        let error = arguments.shape().expect_err("1365 bytes").to_string();
        assert!(error.contains("fewer --segments"), "{error}");
    }
}
