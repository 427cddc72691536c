//! What is in flight, from the bytes of a region and of its ring.

/// What a queue finds.
#[derive(Debug)]
pub enum Model {
    /// Nobody has used the region.
    Fresh,
    /// It is of a version that nobody knows here.
    Unknown,
    /// It is not of this ring.
    Stale,
    /// These are in flight, in order; none: they can't be taken, since the driver has changed one of them.
    Kept(Option<Vec<u16>>),
}

/// What can't be taken is not compared.
impl PartialEq for Model {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Kept(Some(one)), Self::Kept(Some(two))) => one == two,
            (Self::Fresh, Self::Fresh)
            | (Self::Unknown, Self::Unknown)
            | (Self::Stale, Self::Stale)
            | (Self::Kept(_), Self::Kept(_)) => true,
            _ => false,
        }
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// What the head of a region says before anything else is looked at.
fn head(region: &[u8], size: u16) -> Result<(), Model> {
    match (half(region, 8), long(region, 0)) {
        (0, _) => Err(Model::Fresh),
        (1, 0) if half(region, 10) == size => Ok(()),
        (1, 0) => Err(Model::Stale),
        _ => Err(Model::Unknown),
    }
}

/// Of a split queue.
pub fn split(region: &[u8], avail: &[u8], used: &[u8], size: u16) -> Model {
    if let Err(model) = head(region, size) {
        return model;
    }
    let entry = |head: u16| 16 + 16 * usize::from(head);
    if (0..size).any(|head| region[entry(head)] > 1) {
        return Model::Stale;
    }
    let mut open: Vec<u16> = (0..size).filter(|head| region[entry(*head)] == 1).collect();
    if open.is_empty() {
        return Model::Kept(Some(open));
    }
    let used_idx = half(used, 2);
    let mut batch = Vec::new();
    let mut next = half(region, 12);
    for _ in 0..used_idx.wrapping_sub(half(region, 14)) {
        if next >= size || batch.contains(&next) {
            return Model::Stale;
        }
        batch.push(next);
        next = half(region, entry(next) + 6);
    }
    open.retain(|head| !batch.contains(head));
    let ahead = half(avail, 2).wrapping_sub(used_idx);
    if !open.is_empty() && (ahead > size || usize::from(ahead) < open.len()) {
        return Model::Stale;
    }
    let first = u16::try_from(open.len()).expect("few");
    let untaken = (first..ahead).filter(|_| !open.is_empty());
    for index in untaken {
        let slot = usize::from(used_idx.wrapping_add(index) % size);
        if open.contains(&half(avail, 4 + 2 * slot)) {
            return Model::Stale;
        }
    }
    open.sort_by_key(|head| (long(region, entry(*head) + 8), *head));
    Model::Kept(Some(open))
}

/// A place in a packed ring, and the turn.
type At = (u16, u8);

fn advanced((index, wrap): At, size: u16) -> At {
    if index + 1 == size {
        (0, 1 - wrap)
    } else {
        (index + 1, wrap)
    }
}

/// Of a packed queue.
pub fn packed(region: &[u8], ring: &[u8], size: u16) -> Model {
    if let Err(model) = head(region, size) {
        return model;
    }
    found(region, ring, size).map_or(Model::Stale, |open| Model::Kept(Some(open)))
}

/// Buffer IDs in flight, in order; none if they can't be of this ring.
fn found(region: &[u8], ring: &[u8], size: u16) -> Option<Vec<u16>> {
    let entry = |index: u16| &region[32 + 32 * usize::from(index)..][..32];
    let (used, old) = (
        (half(region, 16), region[20]),
        (half(region, 18), region[21]),
    );
    let good = |(index, wrap): At| index < size && wrap <= 1;
    if !good(used) || !good(old) || (0..size).any(|index| entry(index)[0] > 1) {
        return None;
    }
    let bits = |at: At| {
        let flags = half(ring, 16 * usize::from(at.0) + 14);
        (
            u8::from(flags & 1 << 7 != 0),
            u8::from(flags & 1 << 15 != 0),
        )
    };
    let available = |at: At| bits(at) == (at.1, 1 - at.1);
    let (mut at, mut free) = (old, half(region, 14));
    if used != old && !available(old) {
        (at, free) = (used, half(region, 12));
    }
    let mut seen = Vec::new();
    while free < size {
        if seen.contains(&free) {
            return None;
        }
        seen.push(free);
        free = half(entry(free), 2);
    }
    let firsts = (0..size).filter(|index| entry(*index)[0] == 1 && !seen.contains(index));
    let mut open = Vec::new();
    for first in firsts.collect::<Vec<_>>() {
        let id = chain(region, first, size, &mut seen)?;
        if id >= size || open.iter().any(|(_, _, other)| *other == id) {
            return None;
        }
        open.push((long(entry(first), 8), first, id));
    }
    if seen.len() != usize::from(size) {
        return None;
    }
    let descriptors: u16 = open
        .iter()
        .map(|(_, first, _)| half(entry(*first), 6))
        .sum();
    if descriptors > 0 && !available(at) {
        return None;
    }
    for _ in 0..descriptors {
        if bits(at).0 != at.1 {
            return None;
        }
        at = advanced(at, size);
    }
    open.sort_unstable();
    Some(open.into_iter().map(|(_, _, id)| id).collect())
}

/// Follows a chain of entries: its buffer ID, which is the last one's.
fn chain(region: &[u8], first: u16, size: u16, seen: &mut Vec<u16>) -> Option<u16> {
    let entry = |index: u16| &region[32 + 32 * usize::from(index)..][..32];
    let count = half(entry(first), 6);
    let mut at = first;
    for step in 1..=count {
        if at >= size || seen.contains(&at) {
            return None;
        }
        seen.push(at);
        let flags = half(entry(at), 18);
        let is_last = step == count;
        let (next, indirect) = (flags & 1 != 0, flags & 4 != 0);
        if next == is_last || (indirect && !is_last) {
            return None;
        }
        if is_last {
            return (half(entry(first), 4) == at).then(|| half(entry(at), 16));
        }
        at = half(entry(at), 2);
    }
    None
}
