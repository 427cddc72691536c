//! The null port.

use bulkhead_dataplane::port::NullPort;

use crate::frames::Packet;
use crate::rig::Rig;
use crate::suite::{self, Outside};

struct Nowhere;

impl Outside for Nowhere {
    type Port = NullPort;
    const LEADS_OUT: bool = false;

    fn set_up() -> (Rig<NullPort>, Self) {
        (Rig::new(|_| NullPort), Self)
    }

    fn arrived(&mut self, rig: &mut Rig<NullPort>) -> Vec<Packet> {
        rig.nics
            .delivered
            .drain(..)
            .map(|(_, packet)| packet)
            .collect()
    }

    fn send(&mut self, _rig: &mut Rig<NullPort>, _packet: &Packet) {
        unreachable!("it does not lead anywhere");
    }
}

#[test]
fn it_does_what_a_port_must() {
    suite::run::<Nowhere>();
}
