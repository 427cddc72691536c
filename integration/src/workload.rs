//! What guests do with a disk in the demo and in tests, and what is looked for in its file afterwards.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// A text that the guest writes many times; nothing of it may stand in the volume's file.
pub const PLAINTEXT: &str =
    "Bulkhead plaintext: whoever reads this in the file of a volume has found a leak.";

/// Writes 64 MiB of [`PLAINTEXT`] into a file of the mounted file system, reads it back past the page
/// cache, and prints both sums as `written=` and `read=`. `phase=write` stands before the first byte.
const WRITE_AND_READ: &str = "\
     i=0\n\
     while [ $i -lt 4096 ]; do echo \"$TEXT\"; i=$((i+1)); done > /tmp/piece\n\
     size=$(wc -c < /tmp/piece)\n\
     pieces=$((67108864 / size + 1))\n\
     repeat() { n=0; while [ $n -lt $pieces ]; do cat /tmp/piece; n=$((n+1)); done; }\n\
     echo phase=write\n\
     repeat > $FILE\n\
     sync\n\
     echo written=$(repeat | sha256sum | cut -c1-64)\n\
     echo 3 > /proc/sys/vm/drop_caches\n\
     echo read=$(sha256sum < $FILE | cut -c1-64)\n\
     umount /mnt\n\
     if dmesg | grep -i 'i/o error'; then false; fi\n";

/// Makes a file system on the first disk, writes 64 MiB of [`PLAINTEXT`], reads it back past the
/// page cache, and prints both sums as `written=` and `read=`.
#[must_use]
pub fn write_and_read_back() -> String {
    format!(
        "mkfs.ext4 -q -F /dev/vda\nmount -t ext4 /dev/vda /mnt\n\
         TEXT=\"{PLAINTEXT}\"\nFILE=/mnt/data\n{WRITE_AND_READ}"
    )
}

/// Mounts the first disk and prints the sum of what [`write_and_read_back`] left, as `found=`.
#[must_use]
pub fn find_again() -> String {
    "mount -t ext4 /dev/vda /mnt\n\
     echo found=$(sha256sum < /mnt/data | cut -c1-64)\n\
     umount /mnt\n"
        .to_owned()
}

/// As [`find_again`], then replaces it as [`write_and_read_back`] made it.
#[must_use]
pub fn find_and_replace() -> String {
    format!(
        "{}mount -t ext4 /dev/vda /mnt\nTEXT=\"{PLAINTEXT}\"\nFILE=/mnt/data\n{WRITE_AND_READ}",
        find_again()
    )
}

/// What a volume's file looks like from outside.
#[derive(Debug, Clone, Copy)]
pub struct FileLook {
    /// Blocks of 4096 bytes that are not all zeroes.
    pub written_blocks: u64,
    /// Entropy of the written blocks, in bits a byte.
    pub entropy_bits: f64,
    /// Places where [`PLAINTEXT`], or a third of it, stands.
    pub plaintext_hits: u64,
}

/// Looks at a file.
///
/// # Errors
/// What reading it fails with.
pub fn look_at(path: &Path) -> io::Result<FileLook> {
    const STEP: usize = 1 << 20;
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let marks: Vec<&[u8]> = PLAINTEXT
        .as_bytes()
        .chunks(PLAINTEXT.len() / 3)
        .take(3)
        .collect();
    let mut counts = [0u64; 256];
    let (mut written_blocks, mut plaintext_hits, mut at) = (0, 0, 0);
    let mut buffer = vec![0u8; STEP];
    while at < length {
        let part = usize::try_from(length - at).map_or(STEP, |left| left.min(STEP));
        let bytes = buffer.get_mut(..part).unwrap_or_default();
        file.read_exact_at(bytes, at)?;
        for block in bytes.chunks(4096).filter(|b| b.iter().any(|x| *x != 0)) {
            written_blocks += 1;
            for byte in block {
                counts[usize::from(*byte)] += 1;
            }
        }
        plaintext_hits += marks.iter().map(|mark| hits(bytes, mark)).sum::<u64>();
        at += part as u64;
    }
    Ok(FileLook {
        written_blocks,
        entropy_bits: entropy(&counts),
        plaintext_hits,
    })
}

fn hits(bytes: &[u8], mark: &[u8]) -> u64 {
    let first = mark.first().copied().unwrap_or(0);
    let candidates = bytes.iter().enumerate().filter(|(_, b)| **b == first);
    candidates
        .filter(|(at, _)| bytes.get(*at..).is_some_and(|rest| rest.starts_with(mark)))
        .count() as u64
}

fn entropy(counts: &[u64; 256]) -> f64 {
    let total: u64 = counts.iter().sum();
    if total == 0 {
        return 0.0;
    }
    #[expect(clippy::cast_precision_loss, reason = "a share of some gigabytes")]
    let share = |n: u64| n as f64 / total as f64;
    counts
        .iter()
        .filter(|n| **n > 0)
        .map(|n| -share(*n) * share(*n).log2())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_noise_are_told_apart() {
        let dir = tempfile::tempdir().expect("folder");
        let text = dir.path().join("text");
        std::fs::write(&text, PLAINTEXT.repeat(1000)).expect("write");
        let look = look_at(&text).expect("read");
        assert!(
            look.entropy_bits < 6.0 && look.plaintext_hits >= 2900,
            "{look:?}"
        );
        let noise = dir.path().join("noise");
        let bytes = crate::random::Random::named("noise").bytes(1 << 20);
        std::fs::write(&noise, bytes).expect("write");
        let look = look_at(&noise).expect("read");
        assert!(
            look.entropy_bits > 7.99 && look.plaintext_hits == 0,
            "{look:?}"
        );
        assert_eq!(look.written_blocks, 256);
    }
}
