//! The command line's limits of a volume.

use bulkhead_bundle::source::parse_size;
use bulkhead_protocol::GroupName;
use bulkhead_protocol::limits::{Limits, Rate};
use clap::Args;

/// How much a volume may do; what is not given is not limited.
#[derive(Debug, Args)]
pub(crate) struct LimitArguments {
    /// Most requests a second
    #[arg(long, value_name = "N")]
    requests: Option<u64>,
    /// Requests that may pass at once after idleness [default: a tenth of --requests]
    #[arg(long, value_name = "N", requires = "requests")]
    requests_burst: Option<u64>,
    /// Most bytes a second: a number of bytes, or of KiB, MiB, GiB, TiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bandwidth: Option<u64>,
    /// Bytes that may pass at once after idleness [default: a tenth of --bandwidth]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "bandwidth")]
    bandwidth_burst: Option<u64>,
    /// The group of the bundle whose limits it shares
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<GroupName>,
}

impl LimitArguments {
    /// The limits of the volume itself.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            requests: rate(self.requests, self.requests_burst),
            bytes: rate(self.bandwidth, self.bandwidth_burst),
        }
    }
}

fn rate(per_second: Option<u64>, burst: Option<u64>) -> Option<Rate> {
    let rate = Rate::with_default_burst(per_second?);
    Some(Rate {
        burst: burst.unwrap_or(rate.burst),
        ..rate
    })
}
