//! VIRTIO_F_IN_ORDER as a model: what is given back, and when (virtio 1.2, 2.7.9 and 2.8.6).

use std::collections::{BTreeMap, VecDeque};

/// Chains in flight, in the order in which they were taken, if that is negotiated.
#[derive(Debug)]
pub struct Order {
    in_order: bool,
    taken: VecDeque<u16>,
    ended: BTreeMap<u16, u32>,
}

impl Order {
    pub fn new(in_order: bool) -> Self {
        Self {
            in_order,
            taken: VecDeque::new(),
            ended: BTreeMap::new(),
        }
    }

    pub fn taken(&mut self, head: u16) {
        self.taken.push_back(head);
    }

    /// The chain that was taken last was put back.
    pub fn put_back(&mut self) {
        self.taken.pop_back();
    }

    /// Those of the heads in flight that have not ended.
    pub fn waiting(&self, in_flight: impl Iterator<Item = u16>) -> Vec<u16> {
        in_flight
            .filter(|head| !self.ended.contains_key(head))
            .collect()
    }

    /// A chain has ended: the chains that are given back now, with their lengths.
    pub fn ended(&mut self, head: u16, len: u32) -> Vec<(u16, u32)> {
        if !self.in_order {
            return vec![(head, len)];
        }
        self.ended.insert(head, len);
        let mut given_back = Vec::new();
        while let Some(head) = self.taken.front().copied() {
            let Some(len) = self.ended.remove(&head) else {
                break;
            };
            self.taken.pop_front();
            given_back.push((head, len));
        }
        given_back
    }
}
