//! What a frontend says of a network card alone.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use super::{Handled, Outbox, Outcome, Session};
use crate::net::NetDevice;
use crate::worker::message::ToWorker;

impl Session {
    fn card(&self) -> Result<&Arc<NetDevice>, String> {
        let card = self.facts.device.net();
        card.ok_or_else(|| "it is for a network card, and this is a disk".to_owned())
    }

    /// NET_SET_MTU.
    pub(super) fn check_mtu(&self, mtu: u64) -> Outcome {
        self.card()?.check_mtu(mtu)?;
        Ok(Handled::Done)
    }

    /// SEND_RARP: the guest has come from another host, and its driver does not announce itself. Whoever serves its
    /// first queue tells the network where it is now, unless it has just been told.
    pub(super) fn announce(&self, mac: [u8; 6], out: &mut Outbox) -> Outcome {
        let card = self.card()?;
        let own = card.shape.mac;
        if mac != own {
            return Err(format!(
                "the frontend announces {mac:02x?}, and the card's address is {own:02x?}"
            ));
        }
        if let Some(queue) = self.started().first().copied()
            && card.may_announce()
        {
            out.to_workers.push((queue, ToWorker::Announce { queue }));
        }
        Ok(Handled::Done)
    }
}
