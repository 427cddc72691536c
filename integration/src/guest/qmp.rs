//! Commands to a running QEMU over its machine protocol (QEMU's `docs/interop/qmp-spec.rst`): one JSON
//! object a line, events in between.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long QEMU may take to listen, and to answer a command.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket of a QEMU that may still be starting.
    ///
    /// # Errors
    /// When it doesn't come, or says what is no greeting.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.line()?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::other(format!("no greeting: {greeting}")));
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; what it returns.
    ///
    /// # Errors
    /// What QEMU says against it, or that it doesn't answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        self.stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Starts to hand the guest over to the QEMU that listens on a socket.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn migrate(&mut self, to: &Path) -> io::Result<()> {
        let uri = format!("unix:{}", to.display());
        self.execute("migrate", &json!({"uri": uri})).map(drop)
    }

    /// Where the hand-over is, in QEMU's word.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn migration(&mut self) -> io::Result<String> {
        let status = self.execute("query-migrate", &json!({}))?;
        let word = status.get("status").and_then(Value::as_str);
        Ok(word.unwrap_or("none").to_owned())
    }

    /// Waits until the hand-over is there.
    ///
    /// # Errors
    /// When it fails, or doesn't come.
    pub fn wait_for_migration(&mut self, word: &str, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let now = self.migration()?;
            if now == word {
                return Ok(());
            }
            if now == "failed" || Instant::now() > deadline {
                let all = self.execute("query-migrate", &json!({}))?;
                return Err(io::Error::other(format!(
                    "the migration is not {word:?}: {all}"
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}
