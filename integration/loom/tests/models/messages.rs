//! Messages and wake-ups: none is lost, however the two threads meet.

use bulkhead_loom::{Channel, Event, explore};
use loom::thread;
use std::sync::Arc;

/// Messages of a run.
const MESSAGES: u32 = 2;

#[derive(Default)]
struct Link {
    channel: Channel<u32>,
    event: Event,
}

impl Link {
    /// `WorkerHandle::send`, and `Worker::reply`: the message first, then the signal.
    fn send(&self, message: u32) {
        self.channel.send(message);
        self.event.write();
    }
}

/// `Worker::run` with `Worker::sleep`: the wait for the wake is armed, then the channel is looked at once
/// more. A read of an eventfd in the ring resets it when it ends, not when it is armed.
fn worker(link: &Link, reset_late: bool) -> Vec<u32> {
    let mut got = Vec::new();
    loop {
        while let Some(message) = link.channel.try_recv() {
            got.push(message);
        }
        if got.len() == MESSAGES as usize {
            return got;
        }
        if reset_late {
            // Broken: what came since the look above is forgotten.
            link.event.clear();
            link.event.read();
        } else if link.channel.is_empty() {
            link.event.read();
        }
    }
}

fn wake(reset_late: bool) {
    explore(move || {
        let link = Arc::new(Link::default());
        let sender = Arc::clone(&link);
        let control = thread::spawn(move || (0..MESSAGES).for_each(|n| sender.send(n)));
        assert_eq!(worker(&link, reset_late), [0, 1]);
        control.join().expect("it sends");
    });
}

#[test]
fn no_message_to_a_worker_is_lost() {
    wake(false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_wake_that_is_reset_after_the_look_loses_a_message() {
    wake(true);
}

/// `Replies::next`.
fn next(link: &Link, look_first: bool) -> Option<u32> {
    if let Some(message) = link.channel.try_recv() {
        return Some(message);
    }
    if look_first {
        // Broken: a message that comes between the two is announced by nothing.
        let message = link.channel.try_recv();
        link.event.clear();
        return message;
    }
    link.event.clear();
    link.channel.try_recv()
}

fn replies(look_first: bool) {
    explore(move || {
        let link = Arc::new(Link::default());
        let sender = Arc::clone(&link);
        let worker = thread::spawn(move || (0..MESSAGES).for_each(|n| sender.send(n)));
        let mut got = Vec::new();
        while got.len() < MESSAGES as usize {
            // The event loop says that the descriptor is readable.
            link.event.wait();
            while let Some(message) = next(&link, look_first) {
                got.push(message);
            }
        }
        assert_eq!(got, [0, 1]);
        worker.join().expect("it sends");
    });
}

#[test]
fn no_answer_of_a_worker_is_lost() {
    replies(false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn an_event_that_is_cleared_after_the_second_look_loses_an_answer() {
    replies(true);
}
