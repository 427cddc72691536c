//! What a guest does with its network card in the tests of whole systems: transfers whose bytes are compared
//! (`bulkhead_integration::transfer`). Linked static, so that it runs where there are no libraries.
//!
//! `serve ADDRESS:PORT` is the far side, for ever; `send ADDRESS:PORT BYTES` and `receive ADDRESS:PORT BYTES` are
//! verified TCP streams; `streams ADDRESS:PORT` are two that go on for ever, one each way, and say how many bytes
//! there were so far (`sent=`, `received=`); `echo ADDRESS:PORT COUNT LONGEST` sends datagrams of up to LONGEST
//! bytes, compares what comes back and says how many did (`echoed=`). Exit code 0: all was as it has to be.
#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use bulkhead_integration::transfer::{Server, Wish, echo, now_and_then, stream};

/// Any number does, as long as both directions have their own.
const SEED: u64 = 0x6e65_7477;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest-net-failed={error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> io::Result<()> {
    match *words {
        ["serve", at] => {
            let _server = Server::start(address(at)?)?;
            println!("guest-net-serves={at}");
            loop {
                std::thread::sleep(Duration::from_secs(3600));
            }
        }
        ["send", to, bytes] => stream(address(to)?, wish(true, number(bytes)?), |_| ()),
        ["receive", from, bytes] => stream(address(from)?, wish(false, number(bytes)?), |_| ()),
        ["streams", with] => streams(address(with)?),
        ["echo", with, count, longest] => {
            let (count, longest) = (size(count)?, size(longest)?);
            let echoed = echo(address(with)?, count, longest, SEED)?;
            println!("echoed={}", echoed.back);
            Ok(())
        }
        _ => Err(io::Error::other("see the first lines of guest-net.rs")),
    }
}

/// Both directions at once; the first that ends ends it.
fn streams(with: SocketAddr) -> io::Result<()> {
    let (ended, first) = std::sync::mpsc::channel();
    for (name, to_server) in [("sent", true), ("received", false)] {
        let ended = ended.clone();
        std::thread::spawn(move || {
            let progress = now_and_then(|bytes| println!("{name}={bytes}"));
            let result = stream(with, wish(to_server, u64::MAX), progress);
            let _ = ended.send((name, result));
        });
    }
    let (name, result) = first.recv().map_err(io::Error::other)?;
    result.map_err(|error| io::Error::other(format!("{name}: {error}")))
}

fn wish(to_server: bool, bytes: u64) -> Wish {
    Wish {
        to_server,
        seed: SEED ^ u64::from(to_server),
        bytes,
    }
}

fn address(word: &str) -> io::Result<SocketAddr> {
    word.parse()
        .map_err(|e| io::Error::other(format!("{word}: {e}")))
}

fn number(word: &str) -> io::Result<u64> {
    word.parse()
        .map_err(|e| io::Error::other(format!("{word}: {e}")))
}

fn size(word: &str) -> io::Result<usize> {
    word.parse()
        .map_err(|e| io::Error::other(format!("{word}: {e}")))
}
