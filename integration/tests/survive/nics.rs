//! The data plane is killed and upgraded under network cards: a few frames are lost, and no frontend connects again.

use std::time::{Duration, Instant};

use bulkhead_integration::card::{Card, HEADER_BYTES, Options};
use bulkhead_integration::disk::feature;
use bulkhead_integration::frontend::message::request;
use bulkhead_integration::host::{BundleSpec, Host, own_binaries, own_uid};
use bulkhead_integration::random::Random;
use bulkhead_integration::survive::kills::{Child, Victim as _};

use crate::resume::{Outcome, Test};

/// The table.
pub const TESTS: &[Test] = &[Test {
    name: "survive_cards_through_kills_and_upgrades",
    run: kills_and_upgrades,
}];

/// How often the data plane is killed, and upgraded.
const KILLS: u32 = 10;
const UPGRADES: u64 = 3;
/// How long frames may stay away.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Frames that are sent just before, each way.
const BURST: u32 = 12;
/// An ethertype for experiments (IEEE 802, 88-B5).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

/// Two cards on a switch, as the bundle's source says it.
fn network() -> String {
    let (uid, gid) = (own_uid(), nix::unistd::getgid());
    let nic = |number: u8| {
        format!(
            "[[nic]]\nid = \"00000000-0000-4000-8000-00000000000{number}\"\nname = \"nic{number}\"\nmac = \"{}\"\n\
             port = {{ switch = \"lan\" }}\nallowed_uid = {uid}\n\
             socket = {{ name = \"nic{number}\", uid = {uid}, gid = {gid}, mode = \"0660\" }}\n",
            mac(number).map(|byte| format!("{byte:02x}")).join(":"),
        )
    };
    format!("[[switch]]\nname = \"lan\"\n{}{}", nic(1), nic(2))
}

/// A frame of one card for the other, with a number in it.
fn frame(from: u8, to: u8, number: u32) -> Vec<u8> {
    let mut frame = [&mac(to)[..], &mac(from), &ETHERTYPE, &number.to_le_bytes()].concat();
    frame.resize(60, 0);
    frame
}

/// Of one of these frames; none: it is another, such as what a host says by itself.
fn number_in(frame: &[u8]) -> Option<u32> {
    let is_one = frame.get(12..14)? == ETHERTYPE;
    let number = frame.get(14..18).filter(|_| is_one)?;
    Some(u32::from_le_bytes(number.try_into().ok()?))
}

/// A card that sends numbered frames to the other.
pub struct Side {
    card: Card,
    own: u8,
    other: u8,
    sent: u32,
}

impl Side {
    pub fn attach(
        host: &Host,
        own: u8,
        other: u8,
        features: u64,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let mut options = Options::default();
        options.features |= features;
        let card = Card::attach(&host.socket(&format!("nic{own}")), &options)?;
        Ok(Self {
            card,
            own,
            other,
            sent: 0,
        })
    }

    pub fn send(&mut self) -> Outcome {
        self.sent += 1;
        let frame = frame(self.own, self.other, self.sent);
        self.card.offer(0, &[0; HEADER_BYTES], &frame)?;
        Ok(self.card.publish(0)?)
    }

    /// The highest number that has come by now; 0: none.
    fn heard(&mut self) -> Result<u32, Box<dyn std::error::Error>> {
        let mut highest = 0;
        while let Some(received) = self.card.poll(0)? {
            highest = highest.max(number_in(&received.frame).unwrap_or(0));
        }
        Ok(highest)
    }

    /// Its connection is the one it had: messages are answered.
    pub fn is_answered(&mut self) -> Outcome {
        self.card.frontend.ask_u64(request::GET_FEATURES)?;
        Ok(())
    }
}

/// Sends until a frame that was sent from now on has arrived, each way: after how long it had.
pub fn talk(sides: &mut [Side; 2]) -> Result<Duration, Box<dyn std::error::Error>> {
    let began = Instant::now();
    let [one, two] = sides;
    let before = [one.sent, two.sent];
    let mut heard = [false; 2];
    while heard != [true; 2] {
        if began.elapsed() > PATIENCE {
            return Err("no frame arrives any more".into());
        }
        one.send()?;
        two.send()?;
        std::thread::sleep(Duration::from_millis(2));
        heard[0] |= two.heard()? > before[0];
        heard[1] |= one.heard()? > before[1];
    }
    Ok(began.elapsed())
}

fn kills_and_upgrades() -> Outcome {
    let dir = crate::folder()?;
    let bin_dir = own_binaries(dir.path())?;
    let mut host = Host::create_with(dir.path(), &bin_dir)?;
    let more = network();
    let envelope = host.sign(&BundleSpec {
        more: &more,
        ..BundleSpec::new(1, &[])
    })?;
    host.start()?;
    host.apply(&envelope)?;
    let mut sides = [
        Side::attach(&host, 1, 2, 0)?,
        Side::attach(&host, 2, 1, feature::RING_PACKED)?,
    ];
    let outcome = go_through(&host, &mut sides);
    outcome.map_err(|e| format!("{e}\n--- log:\n{}", host.log()).into())
}

fn go_through(host: &Host, sides: &mut [Side; 2]) -> Outcome {
    talk(sides)?;
    // The last reply of each attach is long over.
    std::thread::sleep(Duration::from_millis(200));
    let mut random = Random::named("cards");
    let mut away = Vec::new();
    let mut victim = Child::data_plane(host);
    for round in 0..KILLS {
        for _ in 0..BURST {
            sides.iter_mut().try_for_each(Side::send)?;
        }
        std::thread::sleep(Duration::from_micros(random.below(500)));
        victim.kill()?;
        away.push(talk(sides).map_err(|e| format!("kill {round}: {e}"))?);
    }
    for version in 1..=UPGRADES {
        host.upgrade("dataplane", version)?;
        away.push(talk(sides).map_err(|e| format!("upgrade {version}: {e}"))?);
    }
    // Not before: a kill right after a reply is the one that a connection may not survive.
    sides.iter_mut().try_for_each(Side::is_answered)?;
    let connected = host.log().matches("frontend connected to NIC").count();
    assert_eq!(connected, 2, "each connected once");
    println!("away: {away:?}");
    Ok(())
}
