//! The control socket: one JSON request per line, one JSON answer per line, over a unix socket of mode 0600.
//!
//! Requests name a verb ([`Request`]); answers are `{"ok":true, ...}` or `{"ok":false,"error":"..."}`. A connection
//! may send any number of requests. A peer that sends nonsense gets an error and loses its connection; lines are
//! bounded, and so is the number of connections. Requests are handed to the process's main loop, which owns the VM.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Longest request line in bytes.
const LINE_MAX: u64 = 64 << 10;
/// Connections served at a time.
const CONNECTIONS_MAX: usize = 16;

/// What can be asked of a VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// State, pauses, counters.
    Status,
    /// Stop all vCPUs and devices.
    Pause,
    /// Go on.
    Resume,
    /// Write the VM to a file.
    Save {
        /// The file; it appears only when all is on disk.
        path: PathBuf,
        /// What happens afterwards.
        #[serde(default)]
        then: Then,
    },
    /// Ask the guest to give memory away, or to take it back.
    Balloon {
        /// What the guest shall do without, in all.
        bytes: u64,
    },
    /// Press the power button.
    PowerButton,
    /// End the VM at once.
    Stop,
    /// Bytes for the serial port.
    Type {
        /// The text.
        text: String,
    },
}

/// What a VM does after a save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// Its process ends: the file is the VM now.
    #[default]
    Stop,
    /// It stands still, with its disks and socket paths released, until `resume` (the restore failed) or `stop` (it went well).
    Pause,
    /// It goes on: the file is a copy of its past.
    Resume,
}

/// A request on its way to the main loop, with where the answer goes.
pub struct Call {
    /// What is asked.
    pub request: Request,
    /// Takes exactly one answer.
    pub answer: mpsc::SyncSender<Value>,
}

/// An answer that something failed.
#[must_use]
pub fn failure(error: &dyn std::fmt::Display) -> Value {
    json!({"ok": false, "error": error.to_string()})
}

/// Serves the socket at `path` on a thread of its own until the process ends.
///
/// # Errors
/// The socket cannot be bound; one that a dead process left is replaced.
pub fn serve(path: &Path, calls: mpsc::SyncSender<Call>) -> io::Result<()> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!(
                "{} is served by a running VM of this name; stop it, or use another --name",
                path.display()
            ),
        ));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            let open = Arc::new(AtomicUsize::new(0));
            for stream in listener.incoming().flatten() {
                if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                    open.fetch_sub(1, Ordering::AcqRel);
                    continue;
                }
                let (calls, open_here) = (calls.clone(), Arc::clone(&open));
                let spawned = std::thread::Builder::new()
                    .name("control-peer".into())
                    .spawn(move || {
                        if let Err(error) = talk(&stream, &calls) {
                            tracing::debug!(%error, "control connection ended");
                        }
                        open_here.fetch_sub(1, Ordering::AcqRel);
                    });
                if spawned.is_err() {
                    open.fetch_sub(1, Ordering::AcqRel);
                }
            }
        })?;
    Ok(())
}

fn talk(stream: &UnixStream, calls: &mpsc::SyncSender<Call>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let parsed = serde_json::from_str::<Request>(&line);
        let bad = parsed.is_err();
        let answer = match parsed {
            Ok(request) => {
                let (answer, wait) = mpsc::sync_channel(1);
                match calls.send(Call { request, answer }) {
                    Ok(()) => wait.recv().unwrap_or_else(|_| failure(&"the VM is ending")),
                    Err(_) => failure(&"the VM is ending"),
                }
            }
            Err(e) => failure(&format!("not a request: {e}")),
        };
        let mut stream = stream;
        stream.write_all(format!("{answer}\n").as_bytes())?;
        if bad {
            return Ok(());
        }
    }
}

/// Asks the VM whose control socket is at `path`, waiting at most `bound` for the answer.
///
/// # Errors
/// The connection fails or the answer is no JSON. An answer with `"ok":false` is an error with its text.
pub fn ask(path: &Path, request: &Request, bound: Duration) -> io::Result<Value> {
    let mut stream = UnixStream::connect(path).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("{}: {e}; is the VM running here?", path.display()),
        )
    })?;
    stream.set_read_timeout(Some(bound))?;
    let line = serde_json::to_string(request)?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut text = String::new();
    BufReader::new(stream).read_line(&mut text)?;
    let answer: Value = serde_json::from_str(&text)?;
    if answer["ok"] == true {
        Ok(answer)
    } else {
        Err(io::Error::other(
            answer["error"]
                .as_str()
                .unwrap_or("the VM gave no reason")
                .to_owned(),
        ))
    }
}
