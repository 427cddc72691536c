//! Disks and network cards that share workers: limits hold, groups are shared, hostile neighbours get their part and no more,
//! idle devices cost nothing, and frames between cards no allocation.
//!
//! Nothing here depends on how fast a machine is: requests, time by the workers' own clock, processor time and
//! wake-ups are counted, and compared with each other.

mod cards;
#[path = "../counting/mod.rs"]
mod counting;
mod floods;
mod idle;
mod limits;
mod neighbours;
mod rig;
