//! What the guests of these tests run, as busybox's `sh` has it. Each line that fails ends a guest, and the test
//! with it; what is printed as `name=value` is looked at by the test.

use std::fmt::Write as _;

/// Address of the guest that serves, and of the one that does all the rest; both protocols.
pub const SERVER: &str = "10.77.0.1";
/// See [`SERVER`].
pub const CLIENT: &str = "10.77.0.2";
/// The same in IPv6.
pub const SERVER_6: &str = "fd77::1";
const CLIENT_6: &str = "fd77::2";
/// Port of the verified transfers.
pub const PORT: u16 = 7007;

/// Seconds that a `ping` may take: a guest under TCG on a machine that does other things takes its time.
const PING: &str = "ping -c 1 -W 60";

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    /// Bytes of each verified stream.
    pub bytes: u64,
    /// Datagrams.
    pub datagrams: u32,
    /// Seconds of each run of iperf3.
    pub seconds: u32,
    /// How often the interface goes down and up, and how often the driver lets go of the card and takes it again.
    pub turns: u32,
}

/// Brings the card up.
fn up(address: &str, address_6: &str) -> String {
    format!(
        "ip link set lo up\n\
         ip addr add {address}/24 dev eth0\n\
         echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad\n\
         ip -6 addr add {address_6}/64 dev eth0\n\
         ip link set eth0 up\n"
    )
}

/// The guest that answers. It goes on until the test ends it.
pub fn server() -> String {
    format!(
        "{}\
         guest-net serve [::]:{PORT} &\n\
         iperf3 -s -D\n\
         echo server=ready\n\
         while sleep 1; do {ERRORS}; done",
        up(SERVER, SERVER_6)
    )
}

/// Packets whose checksum the kernel found to be wrong, of all protocols.
const ERRORS: &str = "\
echo csum_errors=$(awk '/^Tcp:|^Udp:|^Icmp:/ { \
  if ($1 in names) { split(names[$1], n); for (i = 2; i <= NF; i++) if (n[i] == \"InCsumErrors\") sum += $i } \
  else names[$1] = $0 } END { print sum + 0 }' /proc/net/snmp)";

/// The guest that does everything once.
pub fn client(amount: Amount) -> String {
    let mut script = up(CLIENT, CLIENT_6);
    script.push_str(
        "echo queues=$(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)\n\
         echo packed=$(cut -c35 /sys/class/net/eth0/device/features)\n\
         echo mtu=$(cat /sys/class/net/eth0/mtu)\n",
    );
    let _ = writeln!(script, "{PING} {SERVER}\n{PING} {SERVER_6}\necho pinged=1");
    // Both kinds of segments, and neither: the switch is given whole ones, or packets of the MTU.
    for offloads in ["on", "off"] {
        script.push_str(&transfers(amount, offloads));
    }
    let _ = writeln!(script, "{}", turns(amount.turns));
    let _ = writeln!(script, "{ERRORS}\necho all=done");
    script
}

/// Streams and datagrams with offloads on or off.
fn transfers(amount: Amount, offloads: &str) -> String {
    let Amount {
        bytes,
        datagrams,
        seconds,
        ..
    } = amount;
    let mut script = format!(
        // What a card can't change is not changed.
        "ethtool -K eth0 tx {offloads} sg {offloads} tso {offloads} gso {offloads} gro {offloads} || true\n\
         echo tso_{offloads}=$(ethtool -k eth0 | awk '/^tcp-segmentation-offload:/ {{ print $2 }}')\n\
         guest-net send {SERVER}:{PORT} {bytes}\n\
         guest-net receive {SERVER}:{PORT} {bytes}\n\
         guest-net send [{SERVER_6}]:{PORT} {bytes}\n\
         guest-net receive [{SERVER_6}]:{PORT} {bytes}\n\
         guest-net echo {SERVER}:{PORT} {datagrams} 1400\n\
         guest-net echo {SERVER}:{PORT} {datagrams} 9000\n"
    );
    for (way, option) in [("send", ""), ("receive", "-R")] {
        let _ = writeln!(
            script,
            "iperf3 -c {SERVER} -t {seconds} -f m {option} > /tmp/iperf\n\
             echo iperf_{way}_{offloads}=$(awk '/receiver/ {{ print $7 }}' /tmp/iperf)"
        );
    }
    script
}

/// The interface down and up, then the driver off the card and on again.
fn turns(turns: u32) -> String {
    format!(
        "i=0; while [ $i -lt {turns} ]; do\n\
           ip link set eth0 down; ip link set eth0 up; {PING} {SERVER} > /dev/null; i=$((i+1))\n\
         done; echo downs=$i\n\
         card=$(basename $(readlink /sys/class/net/eth0/device))\n\
         driver=/sys/bus/virtio/drivers/virtio_net\n\
         i=0; while [ $i -lt {turns} ]; do\n\
           echo $card > $driver/unbind; echo $card > $driver/bind\n\
           ip addr add {CLIENT}/24 dev eth0; ip link set eth0 up; {PING} {SERVER} > /dev/null; i=$((i+1))\n\
         done; echo rebinds=$i"
    )
}

/// Talks, and reboots so many times; the number of boots so far is kept on the disk.
pub fn rebooting(times: u32) -> String {
    format!(
        "{}\
         boot=$(dd if=/dev/vda bs=512 count=1 2> /dev/null | tr -d '\\0')\n\
         boot=${{boot:-0}}\n\
         {PING} {SERVER}\n\
         guest-net send {SERVER}:{PORT} 65536\n\
         guest-net receive {SERVER}:{PORT} 65536\n\
         echo through_after_boot=$boot\n\
         if [ $boot -lt {times} ]; then\n\
           echo $((boot+1)) | dd of=/dev/vda conv=sync bs=512 2> /dev/null; sync; reboot -f\n\
         fi",
        up(CLIENT, CLIENT_6)
    )
}

/// Streams and datagrams to and from the host, over both protocols.
pub fn with_the_host(bytes: u64) -> String {
    format!(
        "{}\
         {PING} {SERVER}\n\
         guest-net send {SERVER}:{PORT} {bytes}\n\
         guest-net receive {SERVER}:{PORT} {bytes}\n\
         guest-net send [{SERVER_6}]:{PORT} {bytes}\n\
         guest-net receive [{SERVER_6}]:{PORT} {bytes}\n\
         guest-net echo {SERVER}:{PORT} 20 9000\n\
         {ERRORS}",
        up(CLIENT, CLIENT_6)
    )
}
/// Talks to the host, then with an address that is not the card's.
pub fn to_the_host() -> String {
    format!(
        "{}\
         {PING} {SERVER}\n\
         guest-net send {SERVER}:{PORT} 100000\n\
         guest-net receive {SERVER}:{PORT} 100000\n\
         ip link set eth0 down\n\
         ip link set eth0 address 02:00:00:00:77:99\n\
         ip link set eth0 up\n\
         if ping -c 3 -W 2 {SERVER}; then echo spoofed=through; else echo spoofed=lost; fi",
        up(CLIENT, CLIENT_6)
    )
}

/// Two streams that go on for ever, one each way.
pub fn streams() -> String {
    format!(
        "{}{PING} {SERVER}\nguest-net streams {SERVER}:{PORT}",
        up(CLIENT, CLIENT_6)
    )
}

/// Says nothing by itself once it has pinged the server, but answers.
pub fn silent() -> String {
    format!(
        "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6\n\
         ip link set lo up\n\
         ip addr add {CLIENT}/24 dev eth0\n\
         ip link set eth0 up\n\
         {PING} {SERVER}\n\
         guest-net serve 0.0.0.0:{PORT} &\n\
         while sleep 1; do echo silent=1; done"
    )
}
