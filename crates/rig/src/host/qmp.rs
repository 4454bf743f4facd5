//! QEMU's machine protocol (QMP): commands and events, one JSON object per line.
//! Specification: `docs/interop/qmp-spec.rst` of QEMU.

use crate::error::{Result, RigError};
use crate::link::mux::lock;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A line of QMP is small; a longer one is not QMP.
const LINE_BYTES_MAX: u64 = 4 << 20;

#[derive(Default)]
struct State {
    answers: HashMap<u64, Value>,
    next: u64,
    closed: bool,
    shutdown_reason: Option<String>,
}

/// A connection to one QEMU.
#[derive(Clone)]
pub struct Qmp {
    server: String,
    writer: Arc<Mutex<UnixStream>>,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Qmp {
    /// Takes up the protocol on a connected socket.
    pub fn start(server: &str, socket: UnixStream) -> std::io::Result<Qmp> {
        let reader = socket.try_clone()?;
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        let state = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let qmp = Qmp {
            server: server.to_string(),
            writer: Arc::new(Mutex::new(socket)),
            state,
        };
        let for_thread = qmp.clone();
        std::thread::Builder::new()
            .name(format!("qmp-{server}"))
            .spawn(move || for_thread.read(reader))?;
        // Sent ahead of the greeting; QEMU reads it when it is ready for it.
        lock(&qmp.writer).write_all(b"{\"execute\":\"qmp_capabilities\",\"id\":0}\n")?;
        Ok(qmp)
    }

    fn read(&self, reader: UnixStream) {
        let mut reader = BufReader::new(reader);
        let mut line = String::new();
        loop {
            line.clear();
            match std::io::Read::take(&mut reader, LINE_BYTES_MAX).read_line(&mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let Ok(value) = serde_json::from_str::<Value>(&line) else {
                continue;
            };
            let mut state = lock(&self.state.0);
            if value["event"] == "SHUTDOWN" {
                state.shutdown_reason = value["data"]["reason"].as_str().map(str::to_string);
            }
            if let Some(id) = value["id"].as_u64().filter(|id| *id > 0) {
                // Answers to those who gave up waiting are not kept.
                if state.answers.len() < 64 {
                    state.answers.insert(id, value);
                }
                self.state.1.notify_all();
            }
        }
        lock(&self.state.0).closed = true;
        self.state.1.notify_all();
    }

    /// Why the machine ended, in QEMU's words (`guest-reset`, `guest-shutdown`, ...), as far as it said.
    pub fn shutdown_reason(&self) -> Option<String> {
        lock(&self.state.0).shutdown_reason.clone()
    }

    /// Waits until QEMU closed the connection, so that no event of it is missed.
    pub fn wait_closed(&self, bound: Duration) {
        let state = lock(&self.state.0);
        let _ = self
            .state
            .1
            .wait_timeout_while(state, bound, |state| !state.closed);
    }

    /// Asks QEMU to do something, and waits for its answer.
    ///
    /// # Errors
    /// [`RigError::Agent`] with QEMU's words when it refuses, [`RigError::Timeout`] when it says nothing (frozen?).
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        let bound = Duration::from_secs(10);
        let broken = |detail: String| RigError::Agent {
            server: self.server.clone(),
            detail,
        };
        let id = {
            let mut state = lock(&self.state.0);
            state.next += 1;
            state.next
        };
        let line = format!(
            "{}\n",
            json!({"execute": command, "arguments": arguments, "id": id})
        );
        lock(&self.writer)
            .write_all(line.as_bytes())
            .map_err(|e| broken(format!("qmp {command}: {e}")))?;
        let deadline = Instant::now() + bound;
        let mut state = lock(&self.state.0);
        loop {
            if let Some(answer) = state.answers.remove(&id) {
                return match answer.get("error") {
                    Some(error) => Err(broken(format!("qmp {command}: {error}"))),
                    None => Ok(answer["return"].clone()),
                };
            }
            if state.closed {
                return Err(broken(format!("qmp {command}: QEMU is gone")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RigError::Timeout {
                    what: format!("QEMU's answer to {command} for server {}", self.server),
                    after_ms: bound.as_millis() as u64,
                    detail: " (is the server frozen?)".to_string(),
                });
            }
            state = self
                .state
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
