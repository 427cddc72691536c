//! Nothing is lost: a verified write load, and what kills the processes under it.
//!
//! - [`content`]: what each sector of a disk holds.
//! - [`journal`]: what was acknowledged, and so must be there.
//! - [`lane`]: a queue, its requests under way, and what is checked of each completion.
//! - [`disk`]: a disk on its frontend, which goes on when its back-end comes again.
//! - [`load`]: the thread that keeps all disks of a guest busy.
//! - [`finding`]: what it finds wrong.
//! - [`kills`]: who is killed, and how often.
//! - [`times`]: how long the disks were away.

pub mod content;
pub mod disk;
pub mod finding;
pub mod journal;
pub mod kills;
pub mod lane;
pub mod load;
#[cfg(test)]
mod tests;
pub mod times;
