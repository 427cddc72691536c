//! Guests without a guest: vhost-user-net frontends that send and take frames, made to cost so little that what they
//! measure is the back-end.
//!
//! All of them are driven by one thread, in turns; every frame is written once before the first is sent, and only its
//! number changes. Whoever receives looks at that number: a frame that comes twice, or after one that was sent later,
//! ends the run with an error. Frames that a back-end drops are not missed.
//!
//! | module | owns |
//! | --- | --- |
//! | [`card`] | connecting to a back-end: features, memory, queues |
//! | [`slots`] | where in shared memory frames and buffers lie |
//! | [`frame`] | what is sent |
//! | [`sender`] | a queue that sends |
//! | [`receiver`] | a queue that receives |
//! | [`run`] | guests together, for a while |
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

pub mod card;
pub mod frame;
pub mod receiver;
pub mod run;
pub mod sender;
pub mod slots;
