//! Which peers a case has rows beside, and what ratio is wanted of each.
#![forbid(unsafe_code)]

use super::{Case, Storage};
use crate::block::shape::SMALL;
use crate::figures::row::{Placement, Row};

/// The ring echo's name in rows.
pub const FLOOR: &str = "ring-echo floor";
/// Names of peers in rows and in the header.
pub const QEMU: &str = "qemu-storage-daemon";
/// The baseline.
pub const REFERENCE: &str = "serve --reference";
/// The generator of load on bare files.
pub const FIO: &str = "fio";

/// A bare file, read or written with each request's bytes deciphered or enciphered.
pub const DECIPHERED: &str = "io_uring and the cipher on the bare file";

/// Who takes turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    Ours,
    Floor,
    /// The same storage of ours without encryption.
    Plain,
    /// Ours without storage.
    Null,
    Copy,
    Cipher,
    Fio,
    Deciphered,
    Qemu,
    Reference,
    /// Another build of ours.
    Before,
}

/// How far above fio a single request may be, in nanoseconds.
const ABOVE_FIO_NS: f64 = 3000.0;

/// All rows of a case.
pub(super) fn of(case: &Case) -> Vec<Row> {
    let mut rows = Vec::new();
    let placement = case.rounds.placement;
    if case.has(Peer::Floor) {
        let target = of_floor(&case.name(), placement);
        rows.push(case.beside(Peer::Floor, FLOOR, target));
    }
    if case.has(Peer::Copy) {
        // At most 1.15 times as long.
        let target = small(case).then_some(1.0 / 1.15);
        let sum = |ns: &dyn Fn(Peer) -> f64| ns(Peer::Null) + ns(Peer::Copy);
        rows.push(case.beside_sum("null + a copy over the same memory", target, sum));
    }
    if case.has(Peer::Cipher) {
        rows.extend(encrypted(case));
    }
    if case.has(Peer::Fio) {
        rows.extend(beside_fio(case));
    }
    for (peer, name) in [(Peer::Qemu, QEMU), (Peer::Reference, REFERENCE)] {
        if case.has(peer) {
            rows.push(case.beside(peer, name, None));
        }
    }
    rows
}

/// The least share of the floor: at depth 1 everywhere, else where the CPUs are near or far.
pub(super) fn of_floor(case: &str, placement: Placement) -> Option<f64> {
    if !case.contains("4 KiB random") {
        return None;
    }
    match placement {
        Placement::Near | Placement::Far if case.ends_with("depth 1") => Some(0.8),
        Placement::Near => Some(0.5),
        Placement::Far => Some(0.7),
        _ => None,
    }
}

fn small(case: &Case) -> bool {
    case.shape.bytes == SMALL
}

/// An encrypted disk in memory beside the cipher, alone or with the plain one's rest.
fn encrypted(case: &Case) -> Vec<Row> {
    let mut rows = Vec::new();
    if case.has(Peer::Plain) && case.group.storage == Storage::Null {
        let target = (small(case) && case.shape.depth == 32).then_some(1.0);
        let sum = |ns: &dyn Fn(Peer) -> f64| ns(Peer::Plain) + ns(Peer::Cipher);
        rows.push(case.beside_sum("null + the cipher alone", target, sum));
        let target = (!small(case)).then_some(0.95);
        rows.push(Row {
            point: None,
            ..case.beside(Peer::Cipher, "the cipher alone", target)
        });
    }
    if case.has(Peer::Null) {
        let target = small(case).then_some(1.0 / 1.1);
        let sum = |ns: &dyn Fn(Peer) -> f64| ns(Peer::Null) + ns(Peer::Cipher);
        rows.push(case.beside_sum("null + the cipher over the same memory", target, sum));
    }
    if case.has(Peer::Plain) && small(case) {
        rows.push(case.beside(Peer::Plain, "Bulkhead", None));
    }
    rows
}

fn beside_fio(case: &Case) -> Vec<Row> {
    let depth = case.shape.depth;
    let encrypted = case.has(Peer::Cipher);
    let least = match case.group.storage {
        Storage::File => 0.97,
        _ => 0.85,
    };
    let target = (!encrypted && small(case) && depth == 32).then_some(least);
    let mut rows = vec![case.beside(Peer::Fio, FIO, target)];
    if encrypted {
        let target = (small(case) && depth == 32).then_some(1.0);
        let sum = |ns: &dyn Fn(Peer) -> f64| ns(Peer::Fio) + ns(Peer::Cipher);
        rows.push(case.beside_sum("fio + the cipher alone", target, sum));
    }
    if case.has(Peer::Deciphered) {
        rows.push(case.beside(Peer::Deciphered, DECIPHERED, None));
    }
    if depth == 1 {
        let sum = |ns: &dyn Fn(Peer) -> f64| {
            let cipher = if encrypted { ns(Peer::Cipher) } else { 0.0 };
            ns(Peer::Fio) + cipher + ABOVE_FIO_NS
        };
        let name = if encrypted {
            "fio + the cipher alone + 3 us"
        } else {
            "fio + 3 us"
        };
        let target = (!encrypted).then_some(1.0);
        rows.push(case.beside_sum(name, target, sum));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::super::Group;
    use super::*;
    use crate::block::rounds::Rounds;
    use crate::block::shape::Shape;

    fn case(storage: Storage, xts: bool, depth: u16, sides: &[(Peer, f64)]) -> Vec<Row> {
        let shape = Shape {
            writes: false,
            bytes: SMALL,
            depth,
            sequential: false,
        };
        let round = sides.iter().map(|(_, ns)| *ns).collect();
        let case = Case {
            group: Group { storage, xts },
            shape,
            kinds: sides.iter().map(|(peer, _)| *peer).collect(),
            rounds: Rounds::of(vec![round], Placement::Near),
        };
        of(&case)
    }

    #[test]
    fn sums_are_of_the_same_round() {
        use Peer::{Cipher, Ours, Plain};
        let sides = [(Ours, 400.0), (Plain, 50.0), (Cipher, 300.0)];
        let rows = case(Storage::Null, true, 32, &sides);
        let sum = &rows[0];
        assert_eq!(
            (sum.ours, sum.theirs, sum.target),
            (400.0, 350.0, Some(1.0))
        );
        assert_eq!((sum.ratio, sum.met()), (0.875, Some(false)));
        let plain = rows.last().expect("a row");
        assert_eq!((plain.peer.as_ref(), plain.theirs), ("Bulkhead", 2e7));
    }

    #[test]
    fn one_request_may_take_a_little_longer_than_fio() {
        let sides = [(Peer::Ours, 15_000.0), (Peer::Fio, 13_000.0)];
        let rows = case(Storage::File, false, 1, &sides);
        assert_eq!(rows[0].met(), None, "no target beside fio itself");
        assert_eq!((rows[1].theirs, rows[1].met()), (16_000.0, Some(true)));
    }

    #[test]
    fn the_floor_s_share_depends_on_the_place() {
        let of = |depth, place| of_floor(&format!("null, 4 KiB random read, depth {depth}"), place);
        assert_eq!(of(1, Placement::Near), Some(0.8));
        assert_eq!(of(32, Placement::Near), Some(0.5));
        assert_eq!(of(128, Placement::Far), Some(0.7));
        assert_eq!(of(32, Placement::Flipped), None);
        assert_eq!(
            of_floor("null, 128 KiB sequential read, depth 32", Placement::Near),
            None
        );
    }
}
