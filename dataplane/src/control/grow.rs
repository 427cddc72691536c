//! A grant with a greater size alone: the served volume gets the capacity, and its frontend stays (ADR 0014).
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::grant::capacity_sectors;
use super::volumes::{Held, Serving, Volume};
use crate::server::Server;

impl Volume {
    /// Gives the served volume the greater capacity of a grant that is otherwise the one held: the
    /// frontend stays, and hears of it. The key that came with the grant has to be the one in use.
    /// On an error all is as before.
    pub(super) fn grow(&mut self, server: &mut Server, new: &Held) -> Result<(), String> {
        let Serving::Yes(id, device) = &self.serving else {
            return Err("it is not served".to_owned());
        };
        let same_key = match (device.ciphers(), &new.keys.key) {
            (None, None) => true,
            (Some(ciphers), Some(key)) => ciphers.cipher.key.is_same(key),
            _ => false,
        };
        if !same_key {
            return Err(
                "its size and its key changed at once: with another key what is stored could not \
                 be read; seal the key that it has (`bulkhead volume reseal`)"
                    .to_owned(),
            );
        }
        server.resize(*id, capacity_sectors(&new.grant))?;
        tracing::info!(volume = %new.grant.volume, bytes = new.grant.size_bytes, "volume grew");
        self.held.grant = new.grant.clone();
        self.remember_grant(server);
        Ok(())
    }
}
