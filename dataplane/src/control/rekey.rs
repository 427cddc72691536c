//! Grants that begin or end a re-key of a volume that is served: its device gets other keys for the same bytes, and
//! its frontend notices nothing.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::sync::Arc;

use bulkhead_crypto::XtsKey;
use bulkhead_protocol::RekeyId;
use bulkhead_protocol::control::RekeyState;
use bulkhead_protocol::keys::VolumeGrant;

use super::volumes::{Held, Serving, Volume};
use crate::blk::{Cipher, Ciphers, Rekey};
use crate::server::Server;

impl Volume {
    /// Gives the served volume the keys of a grant that differs by a re-key alone: it begins, or is over. The
    /// frontend stays. On an error all is as before.
    pub(super) fn rekey(&mut self, server: &mut Server, new: Held) -> Result<(), String> {
        let Serving::Yes(id, device) = &self.serving else {
            return Err("it is not served".to_owned());
        };
        let now = device.ciphers().ok_or("it is not encrypted")?;
        let ciphers = match (new.grant.rekey, new.keys.key, new.keys.previous) {
            (Some(rekey), Some(key), Some(previous)) => begun(&now, rekey, key, &previous)?,
            (None, Some(key), None) => over(&now, &key)?,
            _ => return Err("its keys are not those of a re-key".to_owned()),
        };
        // First, so that no successor finds a re-key under way of which it does not know.
        let (key, previous_key) = new.keys.pages.stored();
        let grant = new.grant.clone();
        server.remember(*id, |volume| {
            (volume.grant, volume.key, volume.previous_key) = (grant, key, previous_key);
        })?;
        server.set_ciphers(*id, &ciphers)?;
        tracing::info!(volume = %new.grant.volume, rekey = ?new.grant.rekey, "other keys for the volume");
        self.held.grant = new.grant;
        self.held.keys.pages = new.keys.pages;
        Ok(())
    }

    /// Whether everything is under the key, where a grant no longer has the re-key and the previous key of the
    /// one in force. Of a volume that is not served nobody knows here: its record is looked at when it is
    /// taken. Of one that another host may hold only what was is known: where a re-key was under way, the host
    /// that has it may be done, and a record that says otherwise keeps the volume from being served.
    pub(super) fn may_drop_previous(
        &self,
        server: &Server,
        new: &VolumeGrant,
    ) -> Result<(), String> {
        let old = self.held.grant.rekey;
        let ends = old.is_some() && new.rekey != old;
        let Some((id, device)) = self.served().filter(|_| ends) else {
            return Ok(());
        };
        let progress = device.rekey_progress();
        // Also while it is being let go of: a queue that starts meanwhile has it kept, and nobody looks.
        let has = server.has_volume(id);
        match progress {
            Some(progress) if progress.state == RekeyState::Done => Ok(()),
            Some(progress) if !has && progress.done_bytes > 0 => Ok(()),
            progress => {
                if !has {
                    // The grant comes again; by then it is known what the file says now.
                    server.look_at_rekey(id);
                }
                Err(format!(
                    "its re-key is at {} %: keep the previous key in the bundle until `bulkhead \
                     status` says that it is done",
                    progress.map_or(0, |progress| progress.percent())
                ))
            }
        }
    }
}

/// The keys of a volume whose re-key begins: everything is under what was its key until now.
fn begun(now: &Ciphers, id: RekeyId, key: XtsKey, previous: &XtsKey) -> Result<Ciphers, String> {
    if !now.cipher.key.is_same(previous) {
        return Err(
            "the previous key of its re-key is not the one in use: with another key what is stored \
             could not be read; make the re-key from the volume's newest stanza"
                .to_owned(),
        );
    }
    let unit = now.cipher.unit;
    Ok(Ciphers {
        cipher: Arc::new(Cipher { key, unit }),
        volume: now.volume,
        rekey: Some(Rekey {
            id,
            previous: Arc::clone(&now.cipher),
        }),
    })
}

/// The keys of a volume whose re-key is over.
fn over(now: &Ciphers, key: &XtsKey) -> Result<Ciphers, String> {
    if !now.cipher.key.is_same(key) {
        return Err("its re-key is over, and its key is another than the new one".to_owned());
    }
    Ok(Ciphers {
        rekey: None,
        ..now.clone()
    })
}
