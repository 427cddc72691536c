//! Several short runs of data units in one call, each with a number and places of its own, as requests to
//! different places of a volume have them.
//!
//! The first tweak of a unit is a block of AES by itself, for which the data has to wait. Here those of all runs
//! are made before any data, so that they come one behind the other and not each after a wait.
//!
//! UNSAFETY: extents are the caller's word; the bases of each have room, as kernels round them up.
#![expect(unsafe_code, reason = "guest memory by raw pointer")]

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use super::engine::{Direction, Run};
use super::kernel::{BASES_ROUNDED_TO, Base, GROUP_BYTES};
use super::key::XtsKey;
use super::types::{BufferError, DataUnit};
use crate::raw;

/// Groups whose bases are made together: 32 KiB of data.
const TOGETHER: usize = 64;

/// Room for these, for what the last extent rounds up, and for the one that kernels read ahead. Aligned as the
/// engine's.
#[repr(align(64))]
#[expect(dead_code, reason = "its bytes are used by address")]
struct Bases([Base; TOGETHER + BASES_ROUNDED_TO + 1]);

/// A run of data units that lies in one piece on either side.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Number of its first unit.
    pub first_unit: u64,
    /// Where it is read.
    pub source: NonNull<u8>,
    /// Where it is written: the source, or bytes of which none is one of the source's.
    pub destination: NonNull<u8>,
    /// Bytes on either side.
    pub bytes: usize,
}

impl XtsKey {
    /// Encrypts extents, each as [`XtsKey::encrypt_raw`] does, one after the other.
    ///
    /// # Errors
    /// [`BufferError`] if one of them is no multiple of the data unit; nothing was written.
    ///
    /// # Safety
    /// As [`XtsKey::encrypt_raw`] for each of them. A destination may be another's, too: it then has what
    /// the later one made.
    pub unsafe fn encrypt_extents(
        &self,
        unit: DataUnit,
        extents: &[Extent],
    ) -> Result<(), BufferError> {
        // SAFETY: passed on to the caller.
        unsafe { self.extents(unit, extents, Direction::Encrypt) }
    }

    /// Decrypts extents, as [`XtsKey::encrypt_extents`].
    ///
    /// # Errors
    /// As [`XtsKey::encrypt_extents`].
    ///
    /// # Safety
    /// As [`XtsKey::encrypt_extents`].
    pub unsafe fn decrypt_extents(
        &self,
        unit: DataUnit,
        extents: &[Extent],
    ) -> Result<(), BufferError> {
        // SAFETY: passed on to the caller.
        unsafe { self.extents(unit, extents, Direction::Decrypt) }
    }

    /// # Safety
    /// As [`XtsKey::encrypt_extents`].
    unsafe fn extents(
        &self,
        unit: DataUnit,
        extents: &[Extent],
        direction: Direction,
    ) -> Result<(), BufferError> {
        for extent in extents {
            unit.check(extent.bytes, extent.bytes)?;
        }
        let run = self.run(unit, 0, direction);
        let mut bases = MaybeUninit::<Bases>::uninit();
        let bases = bases.as_mut_ptr().cast::<Base>();
        let mut rest = extents;
        while let Some((first, behind)) = rest.split_first() {
            // SAFETY: room as the type says; the rest is passed on to the caller.
            let count = unsafe { batch(&run, rest, bases) };
            if let Some(behind) = rest.get(count..).filter(|_| count > 0) {
                rest = behind;
                continue;
            }
            let units = unit.units_in(first.bytes);
            let run = self.run(unit, u128::from(first.first_unit), direction);
            let source = std::iter::once((first.source, first.bytes));
            let destination = std::iter::once((first.destination, first.bytes));
            // SAFETY: as many bytes on both sides; the rest is passed on to the caller.
            unsafe { run.between(units, source, destination) };
            rest = behind;
        }
        Ok(())
    }
}

/// Does as many of the extents as their bases have room; none if the first is too long, or its numbers go past 2^64.
///
/// # Safety
/// As [`XtsKey::encrypt_extents`]; each is a multiple of the data unit.
unsafe fn batch(run: &Run<'_>, extents: &[Extent], bases: *mut Base) -> usize {
    let (mut groups, mut written, mut count) = (0, 0, 0);
    for extent in extents {
        let here = extent.bytes / GROUP_BYTES;
        let units = run.unit.units_in(extent.bytes);
        let fits = extent.first_unit.checked_add(units as u64).is_some();
        if !fits || groups + here > TOGETHER {
            break;
        }
        // SAFETY: at most TOGETHER bases are before their end, and there is room for rounding up.
        let made = unsafe {
            let first = u128::from(extent.first_unit);
            (run.functions.bases)(run.schedule, run.unit, first, units, bases.add(groups))
        };
        written = written.max(groups + made);
        groups += here;
        count += 1;
    }
    let crypt = match run.direction {
        Direction::Encrypt => run.functions.encrypt,
        Direction::Decrypt => run.functions.decrypt,
    };
    let mut at = 0;
    for extent in extents.iter().take(count) {
        let here = extent.bytes / GROUP_BYTES;
        let (source, destination) = (extent.source.as_ptr(), extent.destination.as_ptr());
        // SAFETY: the extent's bases, which the kernel wipes; its bytes are the caller's word.
        unsafe { crypt(run.schedule, bases.add(at), here, source, destination) };
        at += here;
    }
    // SAFETY: inside the array, as above.
    unsafe {
        raw::wipe(
            bases.add(groups).cast(),
            (written.max(groups) - groups) * size_of::<Base>(),
        )
    };
    count
}
