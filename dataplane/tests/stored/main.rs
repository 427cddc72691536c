//! What survives a process: the state of a volume and the descriptors that it names, over a store whose
//! other end keeps them as rot does.
#![expect(unsafe_code, reason = "an ioctl")]

mod deaths;
mod faults;
mod format;
mod golden;
mod keeper;
#[path = "../vhost_user/messages.rs"]
#[allow(dead_code, reason = "shared with the tests of the protocol")]
mod messages;
mod rot;
mod sample;
