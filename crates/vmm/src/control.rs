//! The control socket: one JSON request per line, one JSON answer per line, over a unix socket of mode 0600.
//!
//! Requests name a verb ([`Request`]); answers are `{"ok":true, ...}` or `{"ok":false,"error":"..."}`. A connection
//! may send any number of requests. A peer that sends nonsense gets an error and loses its connection; lines are
//! bounded, and so is the number of connections. Requests are handed to the process's main loop, which owns the VM.

use crate::isolation::janitor::{Leftover, NAME_BOUND, lock_folder, lock_folder_within};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::Duration;
use steadfast_machine::devices::virtio::common::limiter::Rate;
use steadfast_machine::devices::virtio::net::NetHandle;
use steadfast_machine::state::PendingFile;

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
        /// The file; it appears only when all is on disk. If an open file comes with the request (SCM_RIGHTS, with
        /// the line's first byte), that is written, and `path` only names it: see [`save`].
        path: PathBuf,
        /// What happens afterwards.
        #[serde(default)]
        then: Then,
        /// With its memory. Without, only with `pause`: the process that goes on with the VM maps the memory of this one, whose
        /// descriptor the answer names.
        #[serde(default = "yes")]
        memory: bool,
    },
    /// Ask the guest to give memory away, or to take it back.
    Balloon {
        /// What the guest shall do without, in all.
        bytes: u64,
    },
    /// Press the power button.
    PowerButton,
    /// Press the reset button: the guest starts anew at once, as if it had asked for a reset.
    Reset,
    /// Hand a protected VM over to this host (planned promote, live migration).
    HandOver {
        /// The host, a standby in sync.
        to: steadfast_types::HostId,
    },
    /// Open a link to another host's instance of a protected VM; if this one runs the VM, mirror to it. A host that is a
    /// peer already is left as it is.
    AddPeer {
        /// The host.
        host: steadfast_types::HostId,
        /// Addresses, one for each replication path: where this host listens (its name is the smaller), or connects.
        paths: Vec<SocketAddr>,
        /// Mirror to it whenever this instance runs the VM.
        #[serde(default = "yes")]
        standby: bool,
    },
    /// Mirror to this host no more, and close the link. Without any peer the VM runs unprotected.
    RemovePeer {
        /// The host.
        host: steadfast_types::HostId,
    },
    /// Where the members of the pool's store are from now on, the nearest first: hosts join and leave while a protected VM runs.
    StoreEndpoints {
        /// Their addresses for clients.
        endpoints: Vec<String>,
    },
    /// What each of its network cards carries at most.
    NetRate(NetRate),
    /// What a protected VM promises from now on.
    Class {
        /// Its outputs wait until a standby could repeat them.
        hold_outputs: bool,
        /// Longest interval between epochs in microseconds; none: as the policy has it.
        max_interval_us: Option<u64>,
        /// All of it is mirrored, not only its disks.
        #[serde(default = "yes")]
        memory: bool,
    },
    /// Copies to standbys of a protected VM (memory and disks) go at this rate from now on.
    CopyRate {
        /// Bytes a second; 0: as fast as the link.
        bytes_per_s: u64,
    },
    /// Write what a standby of a protected VM holds into this folder, which is there and empty: a saved VM, `state`, and its
    /// disks. For a drill. The VM runs on, and protected.
    CopyState {
        /// The folder.
        folder: PathBuf,
    },
    /// End the VM at once.
    Stop,
    /// Bytes for the serial port.
    Type {
        /// The text.
        text: String,
    },
}

fn yes() -> bool {
    true
}

/// Most that a network card carries, in bytes a second; 0: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetRate {
    /// To the guest.
    #[serde(default)]
    pub in_bytes_per_s: u64,
    /// From the guest.
    #[serde(default)]
    pub out_bytes_per_s: u64,
}

impl NetRate {
    /// Sets it, on a machine that may run.
    pub fn set(self, nics: &[NetHandle]) {
        let rate = |bytes_per_s| Rate {
            bytes_per_s,
            ops_per_s: 0,
        };
        for nic in nics {
            nic.rx_rate().set(rate(self.in_bytes_per_s));
            nic.tx_rate().set(rate(self.out_bytes_per_s));
        }
    }
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
    /// An open file that came with the request.
    pub file: Option<File>,
    /// Takes exactly one answer.
    pub answer: mpsc::SyncSender<Value>,
}

/// The answers that connections still owe. A process that ends must let them go out first: whoever asked a VM to stop
/// would otherwise be told, now and then, that it died.
#[derive(Clone, Default)]
pub struct Answers(Arc<Owed>);

#[derive(Default)]
struct Owed {
    count: Mutex<usize>,
    fewer: Condvar,
}

/// One request without its answer.
struct Debt<'a>(&'a Owed);

impl Answers {
    fn owe(&self) -> Debt<'_> {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Debt(&self.0)
    }

    /// Waits until every request that was read has its answer written, at most `bound`; how many are still owed.
    /// Requests that the main loop has not taken must have lost their way to it before, or this waits for them in vain.
    pub fn settle(&self, bound: Duration) -> usize {
        let count = self.0.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.fewer.wait_timeout_while(count, bound, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Debt<'_> {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.fewer.notify_all();
    }
}

/// An answer that something failed.
#[must_use]
pub fn failure(error: &dyn std::fmt::Display) -> Value {
    json!({"ok": false, "error": error.to_string()})
}

/// Binds the control socket at `path`; one that a dead process left is replaced. Who connects waits for [`serve`].
///
/// # Errors
/// The socket cannot be bound, or a running VM has it.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    // A dead process's janitor may be about to remove the name.
    let _lock = lock_folder(path);
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
    Ok(listener)
}

/// A bound control socket, and its name as long as it is this one's: another process may have taken it.
pub struct Bound {
    listener: UnixListener,
    name: Mutex<Leftover>,
}

impl Bound {
    /// As [`bind`].
    ///
    /// # Errors
    /// As [`bind`].
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self {
            listener: bind(path)?,
            name: Mutex::new(Leftover::of(path)?),
        })
    }

    /// Gives the socket another name, that of a process which left its VM to this one.
    ///
    /// # Errors
    /// What the system said.
    pub fn rename(&self, to: &Path) -> io::Result<()> {
        let mut name = self.name.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest stands still meanwhile.
        let _lock = lock_folder_within(to, NAME_BOUND);
        let renamed = std::fs::rename(name.path(), to);
        let there = Leftover::of(to)?;
        // Somebody may have done it in our place.
        if !there.same(&name) {
            return renamed.and(Err(io::ErrorKind::AlreadyExists.into()));
        }
        *name = there;
        Ok(())
    }

    /// One more handle on the socket, for [`serve`].
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn try_clone(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// Takes it out of service.
    pub fn leave(&self) {
        let name = self.name.lock().unwrap_or_else(PoisonError::into_inner);
        name.remove();
        // Where the name is not ours to remove any more, nobody may take it for a running VM.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// Serves a bound socket on a thread of its own until the process ends or the socket is shut down. A process that ends
/// settles the [`Answers`] first.
///
/// # Errors
/// No thread to be had.
pub fn serve(listener: UnixListener, calls: mpsc::SyncSender<Call>) -> io::Result<Answers> {
    let answers = Answers::default();
    let owed = answers.clone();
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || {
            let open = Arc::new(AtomicUsize::new(0));
            loop {
                let stream = match listener.accept() {
                    Ok((stream, _)) => stream,
                    // Shut down: the VM's process is ending.
                    Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
                    Err(_) => {
                        // Out of descriptors, say; not a reason to spin.
                        std::thread::sleep(Duration::from_millis(10));
                        continue;
                    }
                };
                if open.fetch_add(1, Ordering::AcqRel) >= CONNECTIONS_MAX {
                    open.fetch_sub(1, Ordering::AcqRel);
                    refuse(
                        &stream,
                        &format!("the VM serves {CONNECTIONS_MAX} connections at a time; try again"),
                    );
                    continue;
                }
                let (calls, open_here, owed) = (calls.clone(), Arc::clone(&open), owed.clone());
                let stream = Arc::new(stream);
                let served = Arc::clone(&stream);
                let spawned = std::thread::Builder::new()
                    .name("control-peer".into())
                    .spawn(move || {
                        if let Err(error) = talk(&served, &calls, &owed) {
                            tracing::debug!(%error, "control connection ended");
                        }
                        open_here.fetch_sub(1, Ordering::AcqRel);
                    });
                if let Err(error) = spawned {
                    open.fetch_sub(1, Ordering::AcqRel);
                    refuse(
                        &stream,
                        &format!("the VM has no thread for this connection: {error}"),
                    );
                }
            }
        })?;
    Ok(answers)
}

/// Tells a peer why it is not served. Its socket is new and empty, so this does not wait; what it asks is not read.
fn refuse(stream: &UnixStream, why: &str) {
    let mut stream = stream;
    let _ = stream.write_all(format!("{}\n", failure(&why)).as_bytes());
}

/// The bytes of a connection, and the last open file that came among them.
struct Incoming<'a> {
    stream: &'a UnixStream,
    file: Option<File>,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [io::IoSliceMut::new(buf)];
        let got = recvmsg(self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                // Of more than one the last is kept; the kernel has dropped what had no room.
                self.file = files.last().map(File::from).or(self.file.take());
            }
        }
        Ok(got.bytes)
    }
}

fn talk(stream: &UnixStream, calls: &mpsc::SyncSender<Call>, answers: &Answers) -> io::Result<()> {
    let mut reader = BufReader::new(Incoming { stream, file: None });
    loop {
        let mut line = String::new();
        if (&mut reader).take(LINE_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let owed = answers.owe();
        let file = reader.get_mut().file.take();
        let parsed = serde_json::from_str::<Request>(&line);
        let bad = parsed.is_err();
        let answer = match parsed {
            Ok(request) => {
                let (answer, wait) = mpsc::sync_channel(1);
                match calls.send(Call {
                    request,
                    file,
                    answer,
                }) {
                    Ok(()) => wait.recv().unwrap_or_else(|_| failure(&"the VM is ending")),
                    Err(_) => failure(&"the VM is ending"),
                }
            }
            Err(e) => failure(&format!("not a request: {e}")),
        };
        let mut stream = stream;
        stream.write_all(format!("{answer}\n").as_bytes())?;
        drop(owed);
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
    ask_with(path, request, None, bound)
}

fn connect(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path).map_err(|e| {
        io::Error::new(
            e.kind(),
            format!("{}: {e}; is the VM running here?", path.display()),
        )
    })
}

/// The process that serves the control socket at `path`, as the kernel knows it.
///
/// # Errors
/// Nobody serves it.
pub fn served_by(path: &Path) -> io::Result<u32> {
    server_of(&connect(path)?)
}

fn server_of(stream: &UnixStream) -> io::Result<u32> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    Ok(peer.pid.as_raw_nonzero().get().cast_unsigned())
}

/// Why there was no answer, as far as it can be told from outside.
fn no_answer(path: &Path, server: Option<u32>) -> io::Error {
    let who = server.map_or_else(
        || "the VM's process".into(),
        |pid| format!("the VM's process {pid}"),
    );
    let text = match served_by(path) {
        Ok(now) if Some(now) == server => {
            format!("{who} ended the connection without an answer; it still runs: try again, or see its log")
        }
        _ => format!("{who} ended without an answer; its log says why"),
    };
    io::Error::new(io::ErrorKind::UnexpectedEof, text)
}

/// As [`ask`], handing over an open file.
///
/// # Errors
/// As [`ask`].
pub fn ask_with(path: &Path, request: &Request, file: Option<&File>, bound: Duration) -> io::Result<Value> {
    let mut stream = connect(path)?;
    let server = server_of(&stream).ok();
    stream.set_read_timeout(Some(bound))?;
    let line = format!("{}\n", serde_json::to_string(request)?);
    let fds: Vec<BorrowedFd<'_>> = file.iter().map(|f| f.as_fd()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a file descriptor"));
    }
    let sent = sendmsg(
        &stream,
        &[io::IoSlice::new(line.as_bytes())],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    match sent
        .map_err(io::Error::from)
        .and_then(|sent| stream.write_all(&line.as_bytes()[sent..]))
    {
        // Refused before it was read: the answer says why.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        done => done?,
    }
    let mut text = String::new();
    match BufReader::new(stream).read_line(&mut text) {
        Ok(0) => return Err(no_answer(path, server)),
        // A process that is killed with our request unread resets the connection.
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(no_answer(path, server)),
        done => done.map(drop)?,
    }
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

/// Saves the VM whose control socket is at `socket` to `file`, which the caller may write and the VM's process need
/// not: it is made here without a name, handed over open, and takes its name when all is on disk.
///
/// To stop the VM afterwards it is first paused: a caller that dies meanwhile leaves a VM that can go on, or a
/// whole file, never neither.
///
/// # Errors
/// The VM goes on as before if the save failed.
pub fn save(socket: &Path, file: &Path, then: Then, bound: Duration) -> io::Result<Value> {
    save_with(socket, file, then, true, bound)
}

/// As [`save`] with [`Then::Pause`], but the memory stays where it is: see [`Request::Save`].
///
/// # Errors
/// As [`save`].
pub fn save_state(socket: &Path, file: &Path, bound: Duration) -> io::Result<Value> {
    save_with(socket, file, Then::Pause, false, bound)
}

fn save_with(socket: &Path, file: &Path, then: Then, memory: bool, bound: Duration) -> io::Result<Value> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", file.display()));
    let pending = PendingFile::create(file).map_err(named)?;
    let request = Request::Save {
        path: file.to_owned(),
        then: if then == Then::Stop { Then::Pause } else { then },
        memory,
    };
    let done = ask_with(socket, &request, Some(pending.file()), bound)
        .and_then(|answer| pending.keep().map_err(named).map(|()| answer));
    match done {
        Ok(answer) => {
            if then == Then::Stop {
                ask(socket, &Request::Stop, bound)?;
            }
            Ok(answer)
        }
        Err(error) => {
            if then == Then::Stop {
                // If it was paused for us, it goes on; if the save itself failed it never stopped.
                let _ = ask(socket, &Request::Resume, bound);
            }
            Err(error)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A socket, its requests, and what they are still owed.
    fn served() -> (tempfile::TempDir, PathBuf, mpsc::Receiver<Call>, Answers) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let (calls, incoming) = mpsc::sync_channel(1);
        let answers = serve(bind(&path).unwrap(), calls).unwrap();
        (dir, path, incoming, answers)
    }

    fn answer_is_there(mut stream: UnixStream) -> String {
        stream.set_nonblocking(true).unwrap();
        let mut bytes = [0; 256];
        let n = stream.read(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    }

    #[test]
    fn who_asks_for_the_end_hears_of_it_before_it_comes() {
        let (_dir, path, incoming, answers) = served();
        for _ in 0..300 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"{\"verb\":\"stop\"}\n").unwrap();
            let call = incoming.recv().unwrap();
            assert_eq!(call.request, Request::Stop);
            call.answer.send(json!({"ok": true})).unwrap();
            // The process would end now. Without this the answer is often not there yet.
            assert_eq!(answers.settle(Duration::from_secs(60)), 0);
            assert_eq!(answer_is_there(stream), "{\"ok\":true}\n");
        }
    }

    #[test]
    fn requests_that_nobody_takes_are_told_that_the_vm_ends() {
        let (_dir, path, incoming, answers) = served();
        let mut streams = Vec::new();
        for _ in 0..5 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(b"{\"verb\":\"status\"}\n").unwrap();
            streams.push(stream);
        }
        let call = incoming.recv().unwrap();
        drop((call, incoming));
        for mut stream in streams {
            let mut line = String::new();
            BufReader::new(&mut stream).read_line(&mut line).unwrap();
            assert!(line.contains("the VM is ending"), "{line:?}");
        }
        assert_eq!(answers.settle(Duration::from_secs(60)), 0);
    }

    #[test]
    fn one_connection_too_many_is_told_so() {
        let (_dir, path, _incoming, _answers) = served();
        let kept: Vec<_> = (0..CONNECTIONS_MAX)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        let refused = ask(&path, &Request::Status, Duration::from_secs(60)).unwrap_err();
        assert!(
            refused.to_string().contains("16 connections at a time"),
            "{refused}"
        );
        drop(kept);
    }

    #[test]
    fn a_process_that_says_nothing_is_told_from_one_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let listener = bind(&path).unwrap();
        let silent = std::thread::spawn(move || {
            drop(listener.accept().unwrap());
            // The one that looks whether we are still here.
            drop(listener.accept().unwrap());
        });
        let said = ask(&path, &Request::Status, Duration::from_secs(60)).unwrap_err();
        assert!(said.to_string().contains("it still runs"), "{said}");
        silent.join().unwrap();
    }
}
