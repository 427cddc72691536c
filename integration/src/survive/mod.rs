//! Nothing is lost: a verified write load, and what kills the processes under it.
//!
//! - [`content`]: what each sector of a disk holds.
//! - [`guest`]: a Linux guest that goes through kills.
//! - [`journal`]: what was acknowledged, and so must be there.
//! - [`lane`]: a queue, its requests under way, and what is checked of each completion.
//! - [`disk`]: a disk on its frontend, which goes on when its back-end comes again.
//! - [`load`]: the thread that keeps all disks of a guest busy.
//! - [`fences`]: when a dead process's last request has ended.
//! - [`fleet`]: a whole host with volumes, and a load on all of them.
//! - [`finding`]: what it finds wrong.
//! - [`kills`]: who is killed, and how often.
//! - [`mixed`]: everything at once, for minutes.
//! - [`points`]: named points at which the data plane dies.
//! - [`scenarios`]: what is done to the processes, and a row of a table for each.
//! - [`times`]: how long the disks were away.

pub mod aside;
pub mod content;
pub mod disk;
pub mod fences;
pub mod finding;
pub mod fleet;
pub mod guest;
pub mod journal;
pub mod kills;
pub mod lane;
pub mod load;
pub mod mixed;
pub mod points;
pub mod scenarios;
#[cfg(test)]
mod tests;
pub mod times;
