//! Bytes that a network carries, each held against what was sent: TCP streams in both directions, and datagrams
//! that come back.
//!
//! Checksums of the network say little here, for they may be computed, or left out, by what is being tested: so the
//! bytes themselves are compared. The far side is a [`Server`]; each connection says what it wants in [`Wish`].

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::random::Random;

/// Bytes that are made and compared at once.
const CHUNK: usize = 64 * 1024;
/// How long a peer may say nothing: longer than TCP's retransmissions take to get over a network that is gone for
/// seconds.
pub const SILENCE: Duration = Duration::from_secs(60);
/// How long a datagram's answer is waited for before the next one is sent.
const ECHO: Duration = Duration::from_millis(500);
/// Longest payload of a datagram, over IPv4.
const LONGEST_DATAGRAM: usize = 65_507;
/// Bytes of a [`Wish`].
const WISH_BYTES: usize = 17;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// The one who connects sends; else the server does.
    pub to_server: bool,
    /// Which bytes.
    pub seed: u64,
    /// How many; `u64::MAX`: until the connection ends.
    pub bytes: u64,
}

impl Wish {
    fn encode(self) -> [u8; WISH_BYTES] {
        let mut out = [0; WISH_BYTES];
        out[0] = u8::from(self.to_server);
        out[1..9].copy_from_slice(&self.seed.to_le_bytes());
        out[9..].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }

    fn decode(bytes: [u8; WISH_BYTES]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            to_server: bytes[0] != 0,
            seed: word(1),
            bytes: word(9),
        }
    }
}

/// The bytes of a stream from an offset that is a multiple of 8 on.
fn pattern(out: &mut [u8], seed: u64, offset: u64) {
    for (index, word) in out.chunks_mut(8).enumerate() {
        let at = offset / 8 + index as u64;
        let bytes = Random::new(seed ^ at).next_u64().to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// Where a stream of some bytes has its next chunk, and how long that is.
fn chunks(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    let starts = (0..bytes).step_by(CHUNK);
    starts.map(move |at| {
        let left = usize::try_from(bytes - at).unwrap_or(CHUNK);
        (at, left.min(CHUNK))
    })
}

fn send(mut stream: impl Write, wish: Wish, mut sent: impl FnMut(u64)) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    for (at, len) in chunks(wish.bytes) {
        pattern(&mut buffer[..len], wish.seed, at);
        stream.write_all(&buffer[..len])?;
        sent(at + len as u64);
    }
    stream.flush()
}

fn receive(mut stream: impl Read, wish: Wish, mut received: impl FnMut(u64)) -> io::Result<()> {
    let (mut buffer, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    for (at, len) in chunks(wish.bytes) {
        stream.read_exact(&mut buffer[..len])?;
        pattern(&mut wanted[..len], wish.seed, at);
        if let Some(wrong) = (0..len).find(|i| buffer[*i] != wanted[*i]) {
            return Err(io::Error::other(format!(
                "byte {} of the stream is {:#04x}, not {:#04x}",
                at + wrong as u64,
                buffer[wrong],
                wanted[wrong]
            )));
        }
        received(at + len as u64);
    }
    Ok(())
}

fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))
}

/// A TCP stream in one direction, verified where it arrives; `progress` is told how many bytes have gone through.
///
/// # Errors
/// The first byte that is wrong, a connection that was reset, or silence for [`SILENCE`].
pub fn stream(to: SocketAddr, wish: Wish, progress: impl FnMut(u64)) -> io::Result<()> {
    carry(&connect(to)?, wish, progress)
}

/// A connection to a [`Server`], for [`carry`].
///
/// # Errors
/// When nobody answers for [`SILENCE`].
pub fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, SILENCE)?;
    patient(&stream)?;
    Ok(stream)
}

/// As [`stream`], over a connection on which nothing was said yet.
///
/// # Errors
/// See [`stream`].
pub fn carry(mut stream: &TcpStream, wish: Wish, progress: impl FnMut(u64)) -> io::Result<()> {
    stream.write_all(&wish.encode())?;
    if !wish.to_server {
        return receive(stream, wish, progress);
    }
    send(stream, wish, progress)?;
    // The server says that it has found every byte as it should be.
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer != [1] {
        return Err(io::Error::other("the server received other bytes"));
    }
    Ok(())
}

/// What became of datagrams.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Echoed {
    /// How many came back as they were sent.
    pub back: usize,
    /// How many did not come back in time.
    pub lost: usize,
}

/// Sends datagrams of many sizes, one after the other, and compares what comes back.
///
/// # Errors
/// One that came back changed.
pub fn echo(to: SocketAddr, count: usize, longest: usize, seed: u64) -> io::Result<Echoed> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(ECHO))?;
    let mut random = Random::new(seed);
    let mut echoed = Echoed::default();
    let (mut sent, mut back) = (vec![0; LONGEST_DATAGRAM], vec![0; LONGEST_DATAGRAM]);
    for index in 0..count {
        let len = 8 + random.index(longest.min(LONGEST_DATAGRAM) - 7);
        pattern(&mut sent[..len], seed ^ index as u64, 0);
        sent[..8].copy_from_slice(&(index as u64).to_le_bytes());
        socket.send(&sent[..len])?;
        match answer(&socket, &mut back, index as u64)? {
            None => echoed.lost += 1,
            Some(got) if back[..got] == sent[..len] => echoed.back += 1,
            Some(got) => {
                return Err(io::Error::other(format!(
                    "datagram {index} of {len} bytes came back changed, as {got} bytes"
                )));
            }
        }
    }
    Ok(echoed)
}

/// The answer to a datagram; late answers to those before it are left out.
fn answer(socket: &UdpSocket, back: &mut [u8], index: u64) -> io::Result<Option<usize>> {
    loop {
        let got = match socket.recv(back) {
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        };
        let number = back.first_chunk().map(|b| u64::from_le_bytes(*b));
        if got < 8 || number.is_none_or(|number| number >= index) {
            return Ok(Some(got));
        }
    }
}

/// The far side: serves streams, and sends datagrams back. It ends with the value.
#[derive(Debug)]
pub struct Server {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on an address, for both protocols, in the network namespace of this thread.
    ///
    /// # Errors
    /// When it can't.
    pub fn start(at: SocketAddr) -> io::Result<Self> {
        let (tcp, udp) = (TcpListener::bind(at)?, UdpSocket::bind(at)?);
        tcp.set_nonblocking(true)?;
        udp.set_read_timeout(Some(Duration::from_millis(50)))?;
        let ends = Arc::new(AtomicBool::new(false));
        let (first, second) = (Arc::clone(&ends), Arc::clone(&ends));
        let threads = vec![
            std::thread::spawn(move || accept(&tcp, &first)),
            std::thread::spawn(move || send_back(&udp, &second)),
        ];
        Ok(Self { ends, threads })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, ends: &AtomicBool) {
    while !ends.load(Ordering::Acquire) {
        match listener.accept() {
            // Its thread ends with the connection; what went wrong, its peer says.
            Ok((stream, _)) => drop(std::thread::spawn(move || serve(stream))),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    patient(&stream)?;
    let mut wish = [0; WISH_BYTES];
    stream.read_exact(&mut wish)?;
    let wish = Wish::decode(wish);
    if !wish.to_server {
        return send(&stream, wish, |_| ());
    }
    let right = receive(&stream, wish, |_| ());
    stream.write_all(&[u8::from(right.is_ok())])
}

fn send_back(socket: &UdpSocket, ends: &AtomicBool) {
    let mut buffer = vec![0; LONGEST_DATAGRAM];
    while !ends.load(Ordering::Acquire) {
        if let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    }
}

/// Calls `say` at most ten times a second with the latest number.
pub fn now_and_then(mut say: impl FnMut(u64)) -> impl FnMut(u64) {
    let mut last: Option<Instant> = None;
    move |number| {
        if last.is_none_or(|at| at.elapsed() >= Duration::from_millis(100)) {
            last = Some(Instant::now());
            say(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> (Server, SocketAddr) {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = free.local_addr().expect("an address");
        drop(free);
        (Server::start(at).expect("it listens"), at)
    }

    #[test]
    fn streams_go_both_ways_and_datagrams_come_back() {
        let (_server, at) = server();
        for to_server in [true, false] {
            let (seed, bytes) = (7, 3 * CHUNK as u64 + 5);
            let wish = Wish {
                to_server,
                seed,
                bytes,
            };
            let mut through = 0;
            stream(at, wish, |bytes| through = bytes).expect("verified");
            assert_eq!(through, bytes);
        }
        let echoed = echo(at, 20, 9000, 3).expect("verified");
        assert_eq!(echoed.back + echoed.lost, 20);
    }

    #[test]
    fn a_byte_that_is_wrong_is_found() {
        let wish = Wish {
            to_server: true,
            seed: 1,
            bytes: 100_000,
        };
        let mut bytes = Vec::new();
        send(&mut bytes, wish, |_| ()).expect("memory");
        receive(bytes.as_slice(), wish, |_| ()).expect("all right");
        bytes[70_001] ^= 4;
        let error = receive(bytes.as_slice(), wish, |_| ()).expect_err("one is wrong");
        assert!(error.to_string().starts_with("byte 70001 "), "{error}");
    }
}
