//! The steps by which the host becomes what the bundle says. A step is derived from what is known,
//! never from a list made earlier, so that a crash or a peer's restart at any point just leaves
//! other steps to do.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use bulkhead_bundle::{HostBundle, SocketSpec, Volume};
use bulkhead_protocol::{NicId, ServedId, SocketName, SwitchName, VolumeId};

use crate::agent::Known;
use crate::message::Peer;
use crate::networks;
use crate::plan::kind;
use crate::store::Unfinished;

/// One step, in the order in which steps are taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// Ask keyd whether it accepted the candidate; that decides about it.
    Decide,
    /// Have keyd grant the volumes of the bundle in force.
    Accept,
    /// Have rot bind a listener, or give a bound one another owner or mode.
    Bind(SocketName),
    /// Ask the data plane which volumes it serves.
    Survey,
    /// Ask it which NICs and switches it has.
    SurveyNetworks,
    /// Take a volume off the file it has.
    Detach(VolumeId),
    /// Give a volume its file.
    Attach(VolumeId),
    /// Give it a switch, with its uplink.
    AttachSwitch(SwitchName),
    /// Give a NIC its port.
    AttachNic(NicId),
    /// Have a NIC's frames copied into a file.
    Mirror(NicId),
    /// Undo the preparation of a removal that did not happen.
    Cancel(ServedId),
    /// Remove a listener that nothing has any more.
    Unbind(SocketName),
}

impl Step {
    /// Who takes it.
    pub(crate) fn peer(&self) -> Peer {
        match self {
            Self::Decide | Self::Accept => Peer::Keyd,
            Self::Bind(_) | Self::Unbind(_) => Peer::Rot,
            Self::Survey
            | Self::SurveyNetworks
            | Self::Detach(_)
            | Self::Attach(_)
            | Self::AttachSwitch(_)
            | Self::AttachNic(_)
            | Self::Mirror(_)
            | Self::Cancel(_) => Peer::Dataplane,
        }
    }

    /// What it does, for the operator, done or not.
    pub(crate) fn describe(&self, bundle: Option<&HostBundle>) -> String {
        let name = |id: ServedId| match bundle.and_then(|bundle| bundle.name_of(id)) {
            Some(name) => format!("{} {name}", kind(id)),
            None => id.to_string(),
        };
        match self {
            Self::Decide => "keyd: accept the newest bundle".to_owned(),
            Self::Accept => "keyd: accept the bundle and grant what is in it".to_owned(),
            Self::Bind(socket) => format!("listener {socket}: bind"),
            Self::Survey | Self::SurveyNetworks => "data plane: ask what it serves".to_owned(),
            Self::Detach(id) => format!("{}: detach from its earlier file", name((*id).into())),
            Self::Attach(id) => format!("{}: attach", name((*id).into())),
            Self::AttachSwitch(switch) => format!("switch {switch}: attach"),
            Self::AttachNic(id) => format!("{}: attach", name((*id).into())),
            Self::Mirror(id) => format!("{}: mirror", name((*id).into())),
            Self::Cancel(id) => format!("{}: accept frontends again", name(*id)),
            Self::Unbind(socket) => format!("listener {socket}: remove"),
        }
    }
}

/// The first step that is due and did not fail in this pass.
pub(crate) fn next(
    known: &Known,
    unfinished: &Unfinished,
    failed: &BTreeMap<Step, String>,
) -> Option<Step> {
    if known.candidate.is_some() {
        // What the bundle in force is isn't known; nothing is touched before it is.
        return Some(Step::Decide).filter(|step| !failed.contains_key(step));
    }
    let bundle = known.accepted.as_ref().map(|stored| &*stored.bundle);
    let volumes = bundle.map_or(&[][..], |bundle| &bundle.volumes);
    let sockets = || bundle.into_iter().flat_map(HostBundle::sockets);
    let accept = known.accepted.is_some() && (!known.granted || !known.undelivered.is_empty());
    let steps = accept
        .then_some(Step::Accept)
        .into_iter()
        .chain(sockets().filter_map(|(_, socket)| listener(known, socket)))
        .chain((known.accepted.is_some() && known.attached.is_none()).then_some(Step::Survey))
        .chain(detach(known, unfinished))
        .chain(
            volumes
                .iter()
                .filter_map(|volume| attach(known, unfinished, volume)),
        )
        .chain(
            bundle
                .into_iter()
                .flat_map(|bundle| networks::steps(known, bundle)),
        )
        .chain(known.cancel.iter().map(|id| Step::Cancel(*id)))
        .chain(unbind(bundle, unfinished));
    steps.into_iter().find(|step| !failed.contains_key(step))
}

fn listener(known: &Known, wanted: &SocketSpec) -> Option<Step> {
    let as_wanted = known.bound.get(&wanted.name) == Some(wanted);
    (!as_wanted).then(|| Step::Bind(wanted.name.clone()))
}

fn detach<'a>(known: &'a Known, unfinished: &'a Unfinished) -> impl Iterator<Item = Step> + 'a {
    let known_attached = known.attached.is_some();
    let due = unfinished.detach.iter().filter(move |_| known_attached);
    due.map(|id| Step::Detach(*id))
}

fn attach(known: &Known, unfinished: &Unfinished, volume: &Volume) -> Option<Step> {
    let attached = known.attached.as_ref()?.contains(&volume.id);
    let granted = known.granted && !known.undelivered.contains_key(&volume.id.into());
    let bound = known.bound.get(&volume.socket.name) == Some(&volume.socket);
    let wrong_file = unfinished.detach.contains(&volume.id);
    (!attached && granted && bound && !wrong_file).then_some(Step::Attach(volume.id))
}

fn unbind<'a>(
    bundle: Option<&'a HostBundle>,
    unfinished: &'a Unfinished,
) -> impl Iterator<Item = Step> + 'a {
    let stays = move |name: &SocketName| {
        let mut sockets = bundle.into_iter().flat_map(HostBundle::sockets);
        sockets.any(|(_, socket)| socket.name == *name)
    };
    let goes = unfinished.listeners.iter().filter(move |name| !stays(name));
    goes.map(|name| Step::Unbind(name.clone()))
}
