//! Fuzz targets: functions that take any bytes, and panic where something that must hold does not.
//!
//! They are plain functions: libFuzzer drives them (`engine`, by `cargo xtask fuzz`), and every toolchain
//! runs them over the corpora (`tests/corpus.rs`). A target reads its bytes as a list of what a hostile
//! driver or frontend does, and compares what comes of it with a slow model, written from the
//! specification, wherever there is one.
//!
//! | module | target |
//! | --- | --- |
//! | `split_walk` | a split ring: what is taken, used and signalled |
//! | `packed_walk` | the same of a packed ring |
//! | `inflight_region` | a queue that goes on over another's in-flight region, whatever was done to it |
//! | `blk_request` | a virtio-blk request's header, ranges and buffers |
//! | `net_frame` | a network frame: its header, layers and offloads |
//! | `net_offload` | what comes of a frame in receive buffers: whole, completed or cut |
//! | `vhost_user_stream` | a frontend's bytes and descriptors, in any pieces and order |
//! | `stored_state` | what a predecessor left of a volume |
//! | `config_write` | writes to the configuration space |
//! | `xts` | the volume cipher between any segments, against AWS-LC's |
//! | `gcm` | batches of the packet cipher, against AWS-LC's AEAD |
//! | `guest`, `input`, `order`, `wire` | guest memory, the reading of bytes, in-order use and protocols, for several of them |
mod blk_request;
mod config_write;
mod gcm;
mod guest;
mod inflight_region;
mod input;
mod net_frame;
mod net_offload;
mod order;
mod packed_walk;
mod split_walk;
mod stored_state;
mod vhost_user_stream;
mod wire;
mod xts;

/// A target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, and its corpus' folder.
    pub name: &'static str,
    /// What it is about, in a line.
    pub about: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "split_walk",
        about: "split rings against a slow model: chains taken, used entries, notifications",
        run: split_walk::run,
    },
    Target {
        name: "packed_walk",
        about: "packed rings against a slow model, as split ones",
        run: packed_walk::run,
    },
    Target {
        name: "inflight_region",
        about: "what a queue finds in an in-flight region that anybody has changed, against a slow model",
        run: inflight_region::run,
    },
    Target {
        name: "blk_request",
        about: "virtio-blk requests against a slow model: header, ranges, buffers, permissions",
        run: blk_request::run,
    },
    Target {
        name: "net_frame",
        about: "network frames against a slow model: headers cut anywhere, layers, offloads",
        run: net_frame::run,
    },
    Target {
        name: "net_offload",
        about: "frames into receive buffers: segments are the original, checksums are good",
        run: net_offload::run,
    },
    Target {
        name: "vhost_user_stream",
        about: "a frontend's bytes and descriptors in any pieces and order; workers answer or fail",
        run: vhost_user_stream::run,
    },
    Target {
        name: "stored_state",
        about: "stored states, damaged and of any version: refused, or a session goes on from them",
        run: stored_state::run,
    },
    Target {
        name: "config_write",
        about: "writes to the configuration space: only the cache mode changes",
        run: config_write::run,
    },
    Target {
        name: "xts",
        about: "AES-256-XTS under every kernel, between any segments, against AWS-LC's",
        run: xts::run,
    },
    Target {
        name: "gcm",
        about: "AES-256-GCM of batches of packets under every kernel, against AWS-LC's; forgeries",
        run: gcm::run,
    },
];
