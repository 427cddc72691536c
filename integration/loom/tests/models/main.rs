//! T04: what worker, control thread and driver share, in every order.
//!
//! | module | protocols |
//! | --- | --- |
//! | `messages` | messages between control thread and worker, and the wake-ups that go with them |
//! | `queues` | the end of a queue, and another memory under its requests |
//! | `notify` | kicks and calls that are suppressed while the other side looks anyway |
//! | `resize` | a device that grows while requests are checked |

mod messages;
mod notify;
mod queues;
mod resize;
