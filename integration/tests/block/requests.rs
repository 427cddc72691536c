//! Requests one by one: data, flush, serial, configuration.

use std::collections::BTreeSet;
use std::fs;

use bulkhead_integration::arena::{Arena, Backend, FILE_BYTES, FILE_SECTORS};
use bulkhead_integration::disk::{DATA, Disk, HIGH, Options, Request, feature};
use bulkhead_integration::driver::{SECTOR_BYTES, kind};
use bulkhead_integration::random::Random;

use crate::support::{Outcome, against_shadow, ensure, gather, run_of_blocks, scatter};

pub fn random_io(arena: &mut Arena, random: &mut Random, features: u64, indirect: bool) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut options = Options::default();
    options.features |= features;
    options.indirect = indirect;
    let mut disk = arena.attach(&options)?;
    ensure(disk.features & features == features, || {
        format!("features {features:#x} are not offered")
    })?;
    let mut shadow = arena.contents.clone();
    against_shadow(&mut disk, random, block, &mut shadow, 200)?;
    disk.flush(0)?;
    arena.contents = shadow;
    arena.touch(0..FILE_BYTES);
    // `touch` frees the file from comparison; the contents are compared here instead.
    let all = disk.read_all(FILE_SECTORS)?;
    ensure(all == arena.contents, || {
        "the whole disk reads back differently".to_owned()
    })
}

pub fn random_io_memory(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = Disk::attach(&arena.other_socket, &Options::default())?;
    let sectors = disk.capacity_sectors()?;
    ensure(sectors == 131_072, || format!("{sectors} sectors"))?;
    let mut shadow = disk.read_all(8192)?;
    against_shadow(&mut disk, random, block, &mut shadow, 200)
}

/// Segments at odd addresses and of odd lengths, whole sectors only in their sum.
pub fn unaligned_segments(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    arena.touch(0..FILE_BYTES);
    unaligned(&mut disk, random, block, 100)
}

/// So many requests of such segments, read back through them and through one.
pub fn unaligned(disk: &mut Disk, random: &mut Random, block: u64, rounds: usize) -> Outcome {
    for round in 0..rounds {
        let (sector, len) = run_of_blocks(random, block, 40, FILE_SECTORS);
        let mut list = Vec::new();
        let (mut left, mut at) = (len, DATA);
        while left > 0 {
            let piece = if list.len() == 7 {
                left
            } else {
                1 + random.index(left)
            };
            at += random.below(9);
            list.push((at, u32::try_from(piece)?));
            at += piece as u64;
            left -= piece;
        }
        let bytes = random.bytes(len);
        scatter(disk, &list, &bytes)?;
        let mut request = Request {
            kind: kind::OUT,
            sector,
            segments: list,
        };
        disk.run(0, &request)?;
        for &(addr, len) in &request.segments {
            disk.memory.fill(addr, len as usize, 0xdd)?;
        }
        request.kind = kind::IN;
        disk.run(0, &request)?;
        ensure(gather(disk, &request.segments)? == bytes, || {
            format!("round {round}: {request:?} read back differently")
        })?;
        let aligned = disk.read(0, sector, u32::try_from(len)?)?;
        ensure(aligned == bytes, || {
            format!("round {round}: an aligned read of sector {sector} differs")
        })?;
    }
    Ok(())
}

/// As many segments as the device says it takes, in both memory files.
pub fn many_segments(arena: &mut Arena, random: &mut Random) -> Outcome {
    let block = arena.backend.block_sectors();
    let mut disk = arena.attach(&Options::default())?;
    let seg_max = disk.frontend.get_config(12, 4)?;
    let seg_max = u32::from_le_bytes(seg_max.try_into().unwrap_or_default());
    ensure(
        disk.features & feature::BLK_SEG_MAX != 0 && seg_max > 0,
        || "SEG_MAX is not offered".to_owned(),
    )?;
    let count = u64::from(seg_max.min(126));
    let bytes_each = u32::try_from(block * SECTOR_BYTES)?;
    let list: Vec<_> = (0..count)
        .map(|i| {
            if i % 2 == 0 {
                (DATA + i * 4096, bytes_each)
            } else {
                (HIGH + i * 4096, bytes_each)
            }
        })
        .collect();
    let bytes = random.bytes(usize::try_from(count * u64::from(bytes_each))?);
    scatter(&disk, &list, &bytes)?;
    arena.touch(0..bytes.len());
    let mut request = Request {
        kind: kind::OUT,
        sector: 0,
        segments: list,
    };
    disk.run(0, &request)?;
    request.kind = kind::IN;
    for &(addr, len) in &request.segments {
        disk.memory.fill(addr, len as usize, 0xdd)?;
    }
    disk.run(0, &request)?;
    ensure(gather(&disk, &request.segments)? == bytes, || {
        format!("{count} segments read back differently")
    })
}

pub fn flush(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    ensure(disk.features & feature::BLK_FLUSH != 0, || {
        "FLUSH is not offered".to_owned()
    })?;
    arena.touch(0..4096);
    for _ in 0..10 {
        disk.write(0, 0, &random.bytes(4096))?;
        disk.flush(0)?;
    }
    Ok(())
}

pub fn get_id(arena: &mut Arena, _: &mut Random) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    let id = disk.id(0)?;
    let text = id.iter().position(|b| *b == 0).unwrap_or(id.len());
    ensure(
        id[..text].iter().all(u8::is_ascii_graphic) && id[text..].iter().all(|b| *b == 0),
        || format!("the id is not text and zeroes: {id:?}"),
    )
}

/// Reads of up to 256 bytes at any offset: the same bytes, zeroes behind them.
pub fn config_space(arena: &mut Arena, _: &mut Random) -> Outcome {
    let disk = arena.attach(&Options::default())?;
    ensure(disk.capacity_sectors()? == FILE_SECTORS, || {
        "capacity".to_owned()
    })?;
    if arena.backend == Backend::Qemu {
        return Ok(());
    }
    let all = disk.frontend.get_config(0, 256)?;
    for (offset, size) in [
        (0, 60),
        (8, 8),
        (20, 4),
        (34, 2),
        (0, 1),
        (200, 56),
        (255, 1),
    ] {
        let part = disk.frontend.get_config(offset, size)?;
        let (from, to) = (offset as usize, (offset + size) as usize);
        ensure(part == all[from..to], || {
            format!("{size} bytes at {offset} differ from those of the whole")
        })?;
    }
    ensure(all[100..].iter().all(|b| *b == 0), || {
        "what follows the configuration is not zero".to_owned()
    })
}

pub fn reconnect_keeps_data(arena: &mut Arena, random: &mut Random) -> Outcome {
    let bytes = random.bytes(64 << 10);
    arena.touch(0..bytes.len());
    for _ in 0..5 {
        let mut disk = arena.attach(&Options::default())?;
        disk.write(0, 0, &bytes)?;
        drop(disk);
        let mut disk = arena.attach(&Options::default())?;
        let back = disk.read(0, 0, u32::try_from(bytes.len())?)?;
        ensure(back == bytes, || "the data is gone".to_owned())?;
    }
    arena.contents[..bytes.len()].copy_from_slice(&bytes);
    Ok(())
}

/// Plain: the file holds the bytes. Encrypted: none of them, and equal sectors differ.
pub fn file_bytes(arena: &mut Arena, random: &mut Random) -> Outcome {
    let mut disk = arena.attach(&Options::default())?;
    let bytes = random.bytes(4096).repeat(16);
    arena.touch(0..bytes.len());
    disk.write(0, 0, &bytes)?;
    disk.flush(0)?;
    let file = fs::read(&arena.file)?;
    let file = &file[..bytes.len()];
    if !matches!(arena.backend, Backend::Xts(_)) {
        return ensure(file == bytes, || "the file differs".to_owned());
    }
    let plain: BTreeSet<&[u8]> = bytes.chunks_exact(16).collect();
    let cipher: BTreeSet<&[u8]> = file.chunks_exact(16).collect();
    ensure(plain.is_disjoint(&cipher), || {
        "plaintext in the file".to_owned()
    })?;
    ensure(cipher.len() == file.len() / 16, || {
        "equal plaintext blocks make equal ciphertext blocks".to_owned()
    })
}
