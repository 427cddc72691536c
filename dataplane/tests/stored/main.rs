//! What survives a process: the state of a volume and the descriptors that it names, over a store whose
//! other end keeps them as rot does.

mod format;
mod keeper;
mod rot;
mod sample;
