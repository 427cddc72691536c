//! Shapes of call, and what is wanted of each.
#![forbid(unsafe_code)]

use bulkhead_crypto::DataUnit;

use bulkhead_benches::figures::row::Point;

/// Bytes that a side does in one go, at least: then the call through a pointer that starts it costs nothing.
const TURN_BYTES: usize = 64 << 10;

/// Share of the ceiling that is wanted in data units of 4096 bytes.
const OF_CEILING_4096: f64 = 0.90;
/// The same in data units of 512 bytes, for calls of 16 and more.
const OF_CEILING_512: f64 = 0.85;
/// Such a call.
const BATCH_UNITS: usize = 16;

/// A shape of call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub buffer_bytes: usize,
    pub unit: DataUnit,
    /// Data units a call.
    pub units: usize,
    pub encrypt: bool,
    pub in_place: bool,
}

impl Shape {
    /// Buffers, data units and units a call, as issue and figures have them: one, 16, and all of the
    /// buffer's where these are more than one and not 16.
    pub(super) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for unit in [DataUnit::B512, DataUnit::B4096] {
            for buffer_bytes in [512, 4 << 10, 64 << 10, 1 << 20] {
                let whole = buffer_bytes / unit.bytes() as usize;
                let mut calls = vec![1, BATCH_UNITS, whole];
                calls.retain(|units| (1..=whole).contains(units));
                calls.dedup();
                calls.sort_unstable();
                calls.dedup();
                for units in calls {
                    for (encrypt, in_place) in
                        [(true, true), (true, false), (false, true), (false, false)]
                    {
                        all.push(Self {
                            buffer_bytes,
                            unit,
                            units,
                            encrypt,
                            in_place,
                        });
                    }
                }
            }
        }
        all
    }

    pub(super) fn unit_bytes(self) -> usize {
        self.unit.bytes() as usize
    }

    pub(super) fn call_bytes(self) -> usize {
        self.units * self.unit_bytes()
    }

    /// Buffers that a turn does.
    pub(super) fn repeats(self) -> usize {
        TURN_BYTES.div_ceil(self.buffer_bytes)
    }

    pub(super) fn turn_bytes(self) -> usize {
        self.repeats() * self.buffer_bytes
    }

    pub(super) fn of_ceiling(self) -> Option<f64> {
        match self.unit {
            DataUnit::B4096 => Some(OF_CEILING_4096),
            _ => (self.units >= BATCH_UNITS).then_some(OF_CEILING_512),
        }
    }

    pub(super) fn case(self) -> String {
        format!(
            "xts {} {}, {}-byte units, {} a call, {}",
            direction(self.encrypt),
            size(self.buffer_bytes),
            self.unit.bytes(),
            self.units,
            place(self.in_place),
        )
    }

    pub(super) fn point(self) -> Point {
        let unit = self.unit.bytes();
        Point {
            panel: format!(
                "AES-256-XTS {}, {unit}-byte units, {}",
                direction(self.encrypt),
                place(self.in_place)
            ),
            line: match self.units {
                1 => "Bulkhead, 1 unit a call".to_owned(),
                BATCH_UNITS => "Bulkhead, 16 units a call".to_owned(),
                _ => "Bulkhead, the buffer in a call".to_owned(),
            },
            axis: "bytes of a buffer",
            at: self.buffer_bytes,
        }
    }
}

fn direction(encrypt: bool) -> &'static str {
    if encrypt { "encrypt" } else { "decrypt" }
}

fn place(in_place: bool) -> &'static str {
    if in_place {
        "in place"
    } else {
        "between buffers"
    }
}

/// `512 B`, `64 KiB`, `1 MiB`.
pub(crate) fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_its_shapes() {
        let all = Shape::all();
        let units = |bytes, unit| -> Vec<usize> {
            let of_this = all.iter().filter(|shape| {
                shape.buffer_bytes == bytes && shape.unit == unit && shape.encrypt && shape.in_place
            });
            of_this.map(|shape| shape.units).collect()
        };
        assert_eq!(units(512, DataUnit::B512), [1]);
        assert_eq!(units(4 << 10, DataUnit::B512), [1, 8]);
        assert_eq!(units(1 << 20, DataUnit::B512), [1, 16, 2048]);
        assert_eq!(units(512, DataUnit::B4096), [0; 0]);
        assert_eq!(units(4 << 10, DataUnit::B4096), [1]);
        assert_eq!(units(64 << 10, DataUnit::B4096), [1, 16]);
        assert_eq!(units(1 << 20, DataUnit::B4096), [1, 16, 256]);
        // Each in both directions, in place and not.
        assert_eq!(all.len(), 4 * 15);
    }

    #[test]
    fn small_units_have_a_target_in_batches_only() {
        let of_ceiling = |unit, units| {
            let mut all = Shape::all().into_iter();
            let shape = all.find(|shape| shape.unit == unit && shape.units == units);
            shape.and_then(Shape::of_ceiling)
        };
        assert_eq!(of_ceiling(DataUnit::B512, 1), None);
        assert_eq!(of_ceiling(DataUnit::B512, 16), Some(0.85));
        assert_eq!(of_ceiling(DataUnit::B4096, 1), Some(0.90));
    }
}
