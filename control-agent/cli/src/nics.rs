//! The network cards and switches of a host's status, as a table for people and as JSON for programs.

use std::fmt::Write as _;
use std::path::Path;

use bulkhead_protocol::admin::{AdminReply, AdminRequest, NicEntry, SwitchEntry};
use bulkhead_protocol::control::{
    DropCount, MirrorStatus, NicStatus, PairCounts, SwitchStatus, Traffic,
};
use bulkhead_protocol::limits::Rate;
use bulkhead_protocol::net::{NicLimits, PortSpec, TrafficLimits, Uplink};

use crate::admin::{ask, unexpected};
use crate::failure::Failure;
use crate::json::Json;
use crate::output::{printable, rounded, row, table};

/// The networks of a host.
#[derive(Debug, Default)]
pub(crate) struct NetStatus {
    pub(crate) nics: Vec<NicEntry>,
    pub(crate) switches: Vec<SwitchEntry>,
}

impl NetStatus {
    /// Asks the agent, page by page.
    pub(crate) fn ask(socket: &Path) -> Result<Self, Failure> {
        let mut all = Self::default();
        loop {
            let after = all.nics.last().map(|entry| entry.nic);
            match ask(socket, &AdminRequest::Nics { after }, &[])? {
                AdminReply::Nics {
                    nics,
                    more,
                    switches,
                } => {
                    let more = more && !nics.is_empty();
                    all.nics.extend(nics);
                    all.switches = switches;
                    if !more {
                        return Ok(all);
                    }
                }
                AdminReply::Refused { reason } => {
                    return Err(Failure::new(format!("refused: {}", printable(&reason))));
                }
                _ => return Err(unexpected()),
            }
        }
    }

    /// The tables; nothing without NICs and switches.
    pub(crate) fn to_text(&self) -> String {
        let mut out = String::new();
        if !self.switches.is_empty() {
            let mut rows = vec![row(&[
                "NAME",
                "NICS",
                "UPLINK",
                "STATIONS",
                "CACHED",
                "LOOKED UP",
                "FLOODED",
            ])];
            rows.extend(self.switches.iter().map(|switch| self.switch_row(switch)));
            out.push_str("\nswitches\n");
            out.push_str(&table(&rows));
            for switch in &self.switches {
                out.push_str(&switch_lines(switch));
            }
        }
        if !self.nics.is_empty() {
            out.push_str("\nNICs\n");
            out.push_str(&nics(&self.nics));
        }
        out
    }

    fn switch_row(&self, switch: &SwitchEntry) -> Vec<String> {
        let is_on = |nic: &&NicEntry| matches!(&nic.port, PortSpec::Switch { switch: on } if *on == switch.name);
        let uplink = switch.uplink.as_ref();
        let mut cells = vec![
            switch.name.to_string(),
            self.nics.iter().filter(is_on).count().to_string(),
            uplink.map_or("-".to_owned(), Uplink::to_string),
        ];
        match &switch.state {
            Some(state) => cells.extend(
                [
                    state.stations,
                    state.flow_hits,
                    state.flow_misses,
                    state.floods,
                ]
                .map(|number| number.to_string()),
            ),
            None => cells.extend(row(&["?"; 4])),
        }
        cells
    }

    /// Every field under its own name.
    pub(crate) fn to_json(&self) -> [(&'static str, Json); 2] {
        let switch = |switch: &SwitchEntry| {
            Json::Object(vec![
                ("name", Json::text(&switch.name)),
                ("uplink", Json::or_null(switch.uplink.as_ref(), Json::text)),
                (
                    "state",
                    Json::or_null(switch.state.as_ref(), switch_state_json),
                ),
            ])
        };
        [
            (
                "nics",
                Json::Array(self.nics.iter().map(nic_json).collect()),
            ),
            (
                "switches",
                Json::Array(self.switches.iter().map(switch).collect()),
            ),
        ]
    }
}

/// What there is to be seen of a switch that is not usual.
fn switch_lines(switch: &SwitchEntry) -> String {
    let mut out = String::new();
    let Some(state) = &switch.state else {
        return out;
    };
    // Writing to a String does not fail.
    if state.moved > 0 {
        let _ = writeln!(
            out,
            "  {}: {} stations went from one port to another",
            switch.name, state.moved
        );
    }
    if state.uplink_drops > 0 {
        let _ = writeln!(
            out,
            "  {}: dropped of what came by the uplink: {}",
            switch.name, state.uplink_drops
        );
    }
    if state.uplink_refused > 0 {
        let _ = writeln!(
            out,
            "  {}: refused by the uplink: {}",
            switch.name, state.uplink_refused
        );
    }
    if state.uplink_removed {
        let _ = writeln!(
            out,
            "  {}: the uplink's interface was removed: make it again, and apply the bundle without the uplink and then with it",
            switch.name
        );
    }
    out
}

fn switch_state_json(state: &SwitchStatus) -> Json {
    Json::Object(vec![
        ("stations", Json::Number(state.stations)),
        ("learned", Json::Number(state.learned)),
        ("moved", Json::Number(state.moved)),
        ("flow_hits", Json::Number(state.flow_hits)),
        ("flow_misses", Json::Number(state.flow_misses)),
        ("floods", Json::Number(state.floods)),
        ("uplink_drops", Json::Number(state.uplink_drops)),
        ("uplink_refused", Json::Number(state.uplink_refused)),
        ("uplink_removed", Json::Bool(state.uplink_removed)),
    ])
}

fn nics(nics: &[NicEntry]) -> String {
    let mut rows = vec![row(&[
        "NAME", "STATE", "MAC", "PORT", "QUEUES", "RX", "RX BYTES", "TX", "TX BYTES", "DROPPED",
        "SOCKET",
    ])];
    rows.extend(nics.iter().map(nic_row));
    let mut out = table(&rows);
    for entry in nics {
        let name = printable(&entry.name);
        // Writing to a String does not fail.
        if !entry.limits.is_none() {
            let _ = writeln!(out, "  {name}: limits {}", entry.limits);
        }
        let Some(state) = &entry.state else { continue };
        for (what, drops) in [("sent", &state.tx_drops), ("for it", &state.rx_drops)] {
            if !drops.is_empty() {
                let _ = writeln!(
                    out,
                    "  {name}: dropped of what was {what}: {}",
                    words(drops)
                );
            }
        }
        if state.throttled_ms > 0 {
            let ms = state.throttled_ms;
            let _ = writeln!(out, "  {name}: held back by its limits for {ms} ms");
        }
        if let Some(mirror) = &state.mirror {
            let _ = writeln!(out, "  {name}: mirror {}", mirror_words(mirror));
        }
        if let Some(fault) = &state.fault {
            let _ = writeln!(out, "  {name}: {}", printable(fault));
        }
    }
    out
}

fn nic_row(entry: &NicEntry) -> Vec<String> {
    let mut cells = vec![
        printable(&entry.name),
        state_word(entry.state.as_ref()).to_owned(),
        entry.mac.to_string(),
        entry.port.to_string(),
    ];
    match &entry.state {
        Some(state) => {
            let queues = match state.retired_queues {
                0 => state.running_queues.to_string(),
                retired => format!("{} ({retired} retired)", state.running_queues),
            };
            let PairCounts { rx, tx } = state.total();
            cells.extend([
                queues,
                rx.packets.to_string(),
                rounded(rx.bytes),
                tx.packets.to_string(),
                rounded(tx.bytes),
                rx.dropped.saturating_add(tx.dropped).to_string(),
            ]);
        }
        None => cells.extend(row(&["?"; 6])),
    }
    cells.push(printable(&entry.socket_path));
    cells
}

/// What a NIC is doing, in one word.
fn state_word(state: Option<&NicStatus>) -> &'static str {
    match state {
        None => "unknown",
        Some(state) if state.fault.is_some() => "failed",
        Some(state) if !state.attached => "detached",
        Some(state) if state.connected => "connected",
        Some(_) => "waiting",
    }
}

/// As in `3 spoofed_mac, 1 malformed`.
fn words(drops: &[DropCount]) -> String {
    let words = |drops: &DropCount| format!("{} {}", drops.frames, printable(&drops.reason));
    let words: Vec<_> = drops.iter().map(words).collect();
    words.join(", ")
}

fn mirror_words(mirror: &MirrorStatus) -> String {
    let (frames, bytes) = (mirror.frames, rounded(mirror.bytes));
    let ended = if mirror.ended { ", ended" } else { "" };
    let missed = match mirror.missed {
        0 => String::new(),
        missed => format!(", {missed} missed"),
    };
    format!("has {frames} frames, {bytes}{missed}{ended}")
}

fn nic_json(entry: &NicEntry) -> Json {
    Json::Object(vec![
        ("id", Json::text(entry.nic)),
        ("name", Json::text(&entry.name)),
        ("socket", Json::text(&entry.socket)),
        ("socket_path", Json::text(&entry.socket_path)),
        ("mac", Json::text(entry.mac)),
        ("mtu", Json::Number(entry.mtu.into())),
        ("queue_pairs", Json::Number(entry.queue_pairs.into())),
        ("port", port_json(&entry.port)),
        ("limits", limits_json(&entry.limits)),
        ("state", Json::or_null(entry.state.as_ref(), state_json)),
    ])
}

fn port_json(port: &PortSpec) -> Json {
    let (kind, name, queue) = match port {
        PortSpec::Switch { switch } => ("switch", Some(switch.to_string()), None),
        PortSpec::Tap { interface } => ("tap", Some(interface.to_string()), None),
        PortSpec::AfXdp { interface, queue } => {
            ("af_xdp", Some(interface.to_string()), Some(*queue))
        }
        PortSpec::Null => ("null", None, None),
    };
    Json::Object(vec![
        ("kind", Json::text(kind)),
        ("name", Json::or_null(name, Json::Text)),
        ("queue", Json::or_null(queue, |q| Json::Number(q.into()))),
    ])
}

fn limits_json(limits: &NicLimits) -> Json {
    let rate = |rate: Option<Rate>| {
        Json::or_null(rate, |rate| {
            Json::Object(vec![
                ("per_second", Json::Number(rate.per_second)),
                ("burst", Json::Number(rate.burst)),
            ])
        })
    };
    let traffic = |traffic: &TrafficLimits| {
        Json::Object(vec![
            ("packets", rate(traffic.packets)),
            ("bytes", rate(traffic.bytes)),
        ])
    };
    Json::Object(vec![
        ("rx", traffic(&limits.rx)),
        ("tx", traffic(&limits.tx)),
    ])
}

fn state_json(state: &NicStatus) -> Json {
    let queue = |traffic: &Traffic| {
        Json::Object(vec![
            ("packets", Json::Number(traffic.packets)),
            ("bytes", Json::Number(traffic.bytes)),
            ("dropped", Json::Number(traffic.dropped)),
        ])
    };
    let pair =
        |pair: &PairCounts| Json::Object(vec![("rx", queue(&pair.rx)), ("tx", queue(&pair.tx))]);
    let drops = |drops: &[DropCount]| {
        let one = |drops: &DropCount| {
            Json::Object(vec![
                ("reason", Json::text(&drops.reason)),
                ("frames", Json::Number(drops.frames)),
            ])
        };
        Json::Array(drops.iter().map(one).collect())
    };
    let mirror = |mirror: &MirrorStatus| {
        Json::Object(vec![
            ("frames", Json::Number(mirror.frames)),
            ("bytes", Json::Number(mirror.bytes)),
            ("missed", Json::Number(mirror.missed)),
            ("ended", Json::Bool(mirror.ended)),
        ])
    };
    Json::Object(vec![
        ("attached", Json::Bool(state.attached)),
        ("connected", Json::Bool(state.connected)),
        ("running_queues", Json::Number(state.running_queues.into())),
        ("retired_queues", Json::Number(state.retired_queues.into())),
        ("pairs", Json::Array(state.pairs.iter().map(pair).collect())),
        ("tx_drops", drops(&state.tx_drops)),
        ("rx_drops", drops(&state.rx_drops)),
        ("throttled_ms", Json::Number(state.throttled_ms)),
        ("mirror", Json::or_null(state.mirror.as_ref(), mirror)),
        ("fault", Json::or_null(state.fault.as_ref(), Json::text)),
    ])
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::NicId;

    use super::*;

    fn status() -> NetStatus {
        let traffic = |packets, dropped| Traffic {
            packets,
            bytes: packets * 64,
            dropped,
        };
        let pair = PairCounts {
            rx: traffic(10, 1),
            tx: traffic(20, 3),
        };
        let mut limits = NicLimits::default();
        limits.tx.packets = Some(Rate::with_default_burst(1000));
        let entry = NicEntry {
            nic: NicId([0x81; 16]),
            name: "net1".to_owned(),
            socket: "vm1-net".parse().expect("a name"),
            socket_path: "/run/vm1-net.sock".to_owned(),
            mac: "52:54:00:00:00:01".parse().expect("a MAC"),
            mtu: 1500,
            queue_pairs: 2,
            port: PortSpec::Switch {
                switch: "lan".parse().expect("a name"),
            },
            limits,
            state: Some(NicStatus {
                attached: true,
                connected: true,
                running_queues: 4,
                pairs: vec![pair; 2],
                tx_drops: vec![DropCount {
                    reason: "spoofed_mac".to_owned(),
                    frames: 6,
                }],
                mirror: Some(MirrorStatus {
                    frames: 5,
                    bytes: 2048,
                    missed: 1,
                    ended: true,
                }),
                ..NicStatus::of_unattached(NicId([0x81; 16]))
            }),
        };
        let silent = NicEntry {
            name: "net2".to_owned(),
            state: None,
            port: PortSpec::Null,
            limits: NicLimits::default(),
            ..entry.clone()
        };
        NetStatus {
            nics: vec![entry, silent],
            switches: vec![SwitchEntry {
                name: "lan".parse().expect("a name"),
                uplink: Some(Uplink::Tap {
                    interface: "bh-lan".parse().expect("a name"),
                }),
                state: Some(SwitchStatus {
                    name: "lan".parse().expect("a name"),
                    stations: 3,
                    learned: 5,
                    moved: 1,
                    flow_hits: 1000,
                    flow_misses: 20,
                    floods: 7,
                    uplink_drops: 2,
                    uplink_refused: 4,
                    uplink_removed: true,
                }),
            }],
        }
    }

    #[test]
    fn the_tables_add_up_the_pairs_and_name_the_reasons() {
        let text = status().to_text();
        for expected in [
            "  NAME  NICS  UPLINK      STATIONS  CACHED  LOOKED UP  FLOODED\n",
            "  lan   1     TAP bh-lan  3         1000    20         7\n",
            "  lan: 1 stations went from one port to another\n",
            "  lan: dropped of what came by the uplink: 2\n",
            "  lan: refused by the uplink: 4\n",
            "  lan: the uplink's interface was removed: make it again, and apply",
            "  net1  connected  52:54:00:00:00:01  switch lan  4       20  1.2 KiB   40  2.5 KiB   8        /run/vm1-net.sock\n",
            "  net2  unknown    52:54:00:00:00:01  null        ?",
            "  net1: limits sends 1000 packets/s (burst 100)\n",
            "  net1: dropped of what was sent: 6 spoofed_mac\n",
            "  net1: mirror has 5 frames, 2.0 KiB, 1 missed, ended\n",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
        assert_eq!(NetStatus::default().to_text(), "");
    }

    #[test]
    fn the_json_has_every_queue() {
        let [(_, nics), (_, switches)] = status().to_json();
        let line = nics.to_line();
        for expected in [
            "\"port\":{\"kind\":\"switch\",\"name\":\"lan\",\"queue\":null}",
            "\"limits\":{\"rx\":{\"packets\":null,\"bytes\":null},\"tx\":{\"packets\":{\"per_second\":1000,\"burst\":100},",
            "\"pairs\":[{\"rx\":{\"packets\":10,\"bytes\":640,\"dropped\":1},\"tx\":{\"packets\":20,",
            "\"tx_drops\":[{\"reason\":\"spoofed_mac\",\"frames\":6}]",
            "\"mirror\":{\"frames\":5,\"bytes\":2048,\"missed\":1,\"ended\":true}",
            "\"state\":null}]",
        ] {
            assert!(line.contains(expected), "{expected}\n{line}");
        }
        assert_eq!(
            switches.to_line(),
            "[{\"name\":\"lan\",\"uplink\":\"TAP bh-lan\",\"state\":{\"stations\":3,\"learned\":5,\"moved\":1,\
             \"flow_hits\":1000,\"flow_misses\":20,\"floods\":7,\"uplink_drops\":2,\"uplink_refused\":4,\"uplink_removed\":true}}]"
        );
    }
}
