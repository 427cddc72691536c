//! Network cards of a host, as its bundle's source has them, and what its status says of them.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Host, HostError, own_uid};
use crate::random::Random;

/// A network card to be in a bundle.
#[derive(Debug, Clone)]
pub struct NicSpec {
    /// Its name, and its socket's.
    pub name: String,
    /// Its address.
    pub mac: String,
    /// Queue pairs.
    pub pairs: u16,
    /// What it is connected to, as TOML has it: `{ switch = "lan" }`.
    pub port: String,
    /// More lines of its stanza.
    pub more: String,
}

impl NicSpec {
    /// With one queue pair, on a switch.
    #[must_use]
    pub fn on_switch(name: &str, mac: &str, switch: &str) -> Self {
        Self {
            name: name.to_owned(),
            mac: mac.to_owned(),
            pairs: 1,
            port: format!("{{ switch = \"{switch}\" }}"),
            more: String::new(),
        }
    }

    /// With one queue pair, on a TAP of its own.
    #[must_use]
    pub fn on_tap(name: &str, mac: &str, interface: &str) -> Self {
        Self {
            port: format!("{{ tap = \"{interface}\" }}"),
            ..Self::on_switch(name, mac, "")
        }
    }

    /// Its stanza, for a frontend of our own uid. Its id comes from its name.
    #[must_use]
    pub fn stanza(&self) -> String {
        let Self {
            name,
            mac,
            pairs,
            port,
            more,
        } = self;
        let (uid, gid) = (own_uid(), nix::unistd::getgid().as_raw());
        let id = uuid(name);
        format!(
            "[[nic]]\nid = \"{id}\"\nname = \"{name}\"\nmac = \"{mac}\"\nqueue_pairs = {pairs}\nport = {port}\n\
             socket = {{ name = \"{name}\", uid = {uid}, gid = {gid}, mode = \"0660\" }}\n\
             allowed_uid = {uid}\nforce_removal = true\n{more}\n"
        )
    }
}

/// A switch's stanza, with a TAP as its uplink or without one.
#[must_use]
pub fn switch(name: &str, uplink: Option<&str>) -> String {
    let mut stanza = format!("[[switch]]\nname = \"{name}\"\n");
    if let Some(interface) = uplink {
        let _ = writeln!(stanza, "uplink = {{ tap = \"{interface}\" }}");
    }
    stanza
}

/// A random UUID (version 4) that is the same for the same name.
fn uuid(name: &str) -> String {
    let mut bytes = Random::named(name).bytes(16);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::new();
    for (index, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Host {
    /// What the host's status says of a network card.
    ///
    /// # Errors
    /// See [`HostError`]; also when it doesn't know the card.
    pub fn nic(&self, name: &str) -> Result<Value, HostError> {
        let status = self.status()?;
        let nics = status["nics"].as_array();
        let nic = nics.and_then(|nics| nics.iter().find(|nic| nic["name"] == name));
        nic.cloned()
            .ok_or_else(|| self.late(&format!("the status has no network card {name}: {status}")))
    }

    /// How many frames that a card's guest sent were dropped for a reason.
    ///
    /// # Errors
    /// See [`Host::nic`].
    pub fn tx_drops(&self, name: &str, reason: &str) -> Result<u64, HostError> {
        let nic = self.nic(name)?;
        let drops = nic["state"]["tx_drops"].as_array();
        let drops = drops.into_iter().flatten();
        let of_reason = drops.filter(|drop| drop["reason"] == reason);
        Ok(of_reason.filter_map(|drop| drop["frames"].as_u64()).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_uuids_and_each_name_has_its_own() {
        assert_eq!(uuid("a"), uuid("a"));
        assert_ne!(uuid("a"), uuid("b"));
        let id = uuid("a");
        assert_eq!((id.len(), id.as_bytes()[14]), (36, b'4'));
    }
}
