//! The agent as it runs: the real binary, started as rot starts it, with these tests on the other
//! end of each of its channels, real signed bundles and real files.

mod applied;
mod bundles;
mod documents;
mod hostile;
mod nics;
mod peers;
mod refused;
mod rekeys;
mod restarts;
mod upgrades;
mod world;
