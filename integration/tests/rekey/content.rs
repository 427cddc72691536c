//! What a disk must hold: for each data unit what was written last, and where a kill left that open, what was
//! being written.

use std::ops::Range;

use bulkhead_integration::random::Random;

/// What one data unit holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// Bytes that follow from this number and the data unit's place.
    Stamp(u32),
    /// Zeroes.
    Zeroes,
    /// Whatever: it was discarded.
    Anything,
}

impl Value {
    /// The bytes of a data unit; none in particular if anything may be there.
    pub fn bytes(self, unit: usize, unit_bytes: usize) -> Vec<u8> {
        match self {
            Self::Stamp(stamp) => numbers(stamp, unit).bytes(unit_bytes),
            Self::Zeroes | Self::Anything => vec![0; unit_bytes],
        }
    }

    /// Whether a data unit's bytes are these.
    pub fn is(self, unit: usize, bytes: &[u8]) -> bool {
        match self {
            Self::Stamp(stamp) => {
                let mut numbers = numbers(stamp, unit);
                let words = bytes.as_chunks::<8>().0;
                words
                    .iter()
                    .all(|word| *word == numbers.next_u64().to_le_bytes())
            }
            Self::Zeroes => bytes.iter().all(|byte| *byte == 0),
            Self::Anything => true,
        }
    }
}

fn numbers(stamp: u32, unit: usize) -> Random {
    Random::new((u64::from(stamp) << 32) ^ unit as u64)
}

/// What a whole disk must hold.
#[derive(Debug)]
pub struct Content {
    /// Bytes of a data unit.
    pub unit_bytes: usize,
    values: Vec<Value>,
    /// What may have replaced a unit's value.
    doubts: Vec<Option<Value>>,
    stamps: u32,
}

impl Content {
    /// Every unit has a stamp.
    pub fn new(bytes: u64, unit_bytes: usize) -> Result<Self, std::num::TryFromIntError> {
        let units = usize::try_from(bytes)? / unit_bytes;
        Ok(Self {
            unit_bytes,
            values: vec![Value::Stamp(0); units],
            doubts: vec![None; units],
            stamps: 0,
        })
    }

    /// How many data units there are.
    pub fn units(&self) -> usize {
        self.values.len()
    }

    /// A stamp that was never used.
    pub fn next_stamp(&mut self) -> Value {
        self.stamps += 1;
        Value::Stamp(self.stamps)
    }

    /// All bytes, as the disk has them at first.
    pub fn bytes(&self) -> Vec<u8> {
        let units = self.values.iter().enumerate();
        units
            .flat_map(|(unit, value)| value.bytes(unit, self.unit_bytes))
            .collect()
    }

    /// Units hold something else now.
    pub fn set(&mut self, units: Range<usize>, value: Value) {
        self.values[units].fill(value);
    }

    /// Units may hold something else: whoever was to say it was killed.
    pub fn doubt(&mut self, units: Range<usize>, value: Value) {
        self.doubts[units].fill(Some(value));
    }

    /// The first unit of those from `first` on whose bytes here are not what it must hold.
    pub fn first_wrong(&self, first: usize, bytes: &[u8]) -> Option<usize> {
        let units = bytes.chunks_exact(self.unit_bytes).enumerate();
        units
            .map(|(i, bytes)| (first + i, bytes))
            .find(|(unit, bytes)| !self.values[*unit].is(*unit, bytes))
            .map(|(unit, _)| unit)
    }

    /// Compares a whole disk, and ends all doubts. The units that hold what they must not.
    pub fn settle(&mut self, bytes: &[u8]) -> Vec<usize> {
        let mut wrong = Vec::new();
        for (unit, bytes) in bytes.chunks_exact(self.unit_bytes).enumerate() {
            let doubt = self.doubts[unit].take();
            if self.values[unit].is(unit, bytes) && doubt != Some(Value::Anything) {
                continue;
            }
            match doubt {
                Some(value) if value.is(unit, bytes) => self.values[unit] = value,
                _ => wrong.push(unit),
            }
        }
        wrong
    }
}
