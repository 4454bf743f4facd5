//! Links: a session with one peer over all replication paths at once.
//!
//! ```text
//!  sealing thread --try_send--> lock: number, choose path, write at once while the socket takes it
//!  I/O thread     epoll: read, check, put in order --> handler(Event)      (one thread per link)
//!                 timers: heartbeat, silence, stalls, connecting again
//! ```
//!
//! Every frame of the user has a session sequence number and is kept until the peer's acknowledgement. Frames go to
//! the path with the least to do. A path that dies costs only that what it had not delivered is sent on the others; a
//! path that is silent for a moment gets no new frames, and what it carries is sent on the others as well. The
//! receiver drops duplicates and puts in order (W4). Paths are opened again by themselves.
//!
//! A session outlives all of its connections, and ends when one of the processes does ([`Event::PeerReset`]): what was
//! not acknowledged is then gone, and the epoch protocol goes on from what the peer says it has.
//!
//! Credit: at most the peer's window of bytes is under way that its user has not used; [`Link::try_send`] says
//! [`SendError::Full`] beyond.
//!
//! Death of the peer's process shows at once: its kernel closes the connections ([`Down::is_process_gone`]). Death of
//! its host shows as silence ([`Event::PeerSilent`]). Both only raise suspicion.

mod config;
mod conn;
mod core;
mod event;
mod io;
mod session;
mod socket;
mod stats;
mod stream;
mod tls;

pub use config::{Addr, LinkConfig, PATHS_MAX, PathConfig, Role, Security};
pub use event::{Down, Event, OpenError, SendError};
pub use socket::mptcp_available;
pub use stats::{LinkStats, PathStats};
pub use tls::{TlsError, TlsFiles};

use self::core::Core;
use self::io::{Io, lock};
use self::tls::TlsContext;
use crate::buf::BufPool;
use crate::frame::{Frame, HEADER_BYTES, Kind, PAYLOAD_BYTES_MAX, vm_hash};
use rustix::event::{EventfdFlags, epoll, eventfd};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// Bytes of unused buffers that a link keeps for reuse.
const POOL_BYTES: usize = 16 << 20;

/// A link; dropping it ends the session in order.
pub struct Link {
    core: Arc<Mutex<Core>>,
    pool: BufPool,
    thread: Option<JoinHandle<()>>,
    addresses: Vec<Option<SocketAddr>>,
}

impl Link {
    /// Opens a link. `handler` gets all events on the link's I/O thread; it may send, and must not wait for long: no
    /// heartbeat goes out meanwhile. (Give long work to another thread, with [`LinkConfig::manual_credit`].)
    ///
    /// # Errors
    /// [`OpenError`]: bad settings, addresses that cannot be listened on, certificates that cannot be read.
    pub fn open(config: LinkConfig, handler: impl FnMut(Event) + Send + 'static) -> Result<Self, OpenError> {
        check(&config)?;
        let config = Arc::new(config);
        let io = |what: &str| {
            let what = what.to_owned();
            move |e: rustix::io::Errno| OpenError::Io {
                what,
                source: e.into(),
            }
        };
        let tls = match &config.security {
            Security::Tls(files) => Some(TlsContext::load(files, &config.peer)?),
            Security::Plain => None,
        };
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io("epoll"))?);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(io("eventfd"))?);
        let mut listeners = Vec::new();
        if config.role == Role::Listen {
            for p in &config.paths {
                let fd = socket::listen(&p.addr, &config).map_err(|source| OpenError::Io {
                    what: format!("listen on {}", p.addr),
                    source,
                })?;
                listeners.push(fd);
            }
        }
        let addresses = listeners.iter().map(socket::local_addr).collect();
        let pool = BufPool::new(POOL_BYTES);
        let vm = vm_hash(&config.vm);
        let core = Core::new(
            Arc::clone(&config),
            vm,
            pool.clone(),
            Arc::clone(&epoll),
            Arc::clone(&wake),
        );
        let core = Arc::new(Mutex::new(core));
        let name = format!("link-{}", config.peer);
        let thread_io = Io::new(Arc::clone(&core), config, epoll, wake, listeners, tls, handler);
        thread_io.register().map_err(|source| OpenError::Io {
            what: "epoll".into(),
            source,
        })?;
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || thread_io.run())
            .map_err(|source| OpenError::Io {
                what: "start the link's thread".into(),
                source,
            })?;
        Ok(Self {
            core,
            pool,
            thread: Some(thread),
            addresses,
        })
    }

    /// A handle for sending from other threads, or from the handler.
    #[must_use]
    pub fn sender(&self) -> LinkSender {
        LinkSender {
            core: Arc::clone(&self.core),
        }
    }

    /// Buffers to encode into; they come back when the peer has acknowledged them.
    #[must_use]
    pub fn pool(&self) -> &BufPool {
        &self.pool
    }

    /// Listening side: the TCP addresses in use (a port of 0 asks for any).
    #[must_use]
    pub fn addresses(&self) -> &[Option<SocketAddr>] {
        &self.addresses
    }

    /// See [`LinkSender::try_send`].
    ///
    /// # Errors
    /// [`SendError`].
    pub fn try_send(&self, frame: &Frame) -> Result<(), SendError> {
        lock(&self.core).send(std::slice::from_ref(frame)).map(|_| ())
    }

    /// See [`LinkSender::try_send_all`].
    ///
    /// # Errors
    /// [`SendError`].
    pub fn try_send_all(&self, frames: &[Frame]) -> Result<usize, SendError> {
        lock(&self.core).send(frames)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        lock(&self.core).stats()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        {
            let mut core = lock(&self.core);
            let (vm, now) = (core.vm, Instant::now());
            for p in 0..core.slots.len() {
                if let Some(conn) = &mut core.slots[p].conn {
                    conn.push_own(Kind::Bye, vm, crate::frame::VERSION_MAX, 0, Vec::new());
                    // As far as the sockets take it now; a Bye that is lost is a closed connection to the peer.
                    let _ = conn.flush(now);
                }
            }
            core.closing = true;
            core.wake();
        }
        if let Some(t) = self.thread.take() {
            // A handler that drops its own link runs on that thread, which ends when the handler returns.
            if t.thread().id() != std::thread::current().id() {
                let _ = t.join();
            }
        }
        let mut core = lock(&self.core);
        for slot in &mut core.slots {
            slot.conn = None;
        }
    }
}

/// Sends on a link; see [`Link::sender`]. After the link is dropped it says [`SendError::Closed`].
#[derive(Clone)]
pub struct LinkSender {
    core: Arc<Mutex<Core>>,
}

impl LinkSender {
    /// Sends a frame, or keeps it until a path is there. Writes it into the socket at once if that takes it.
    ///
    /// # Errors
    /// [`SendError::Full`] if the bound of the queue or of the peer's window is reached; the frame was not taken.
    pub fn try_send(&self, frame: &Frame) -> Result<(), SendError> {
        lock(&self.core).send(std::slice::from_ref(frame)).map(|_| ())
    }

    /// Sends frames in as few writes as possible; returns how many were taken.
    ///
    /// # Errors
    /// [`SendError::Full`] if not even the first was taken.
    pub fn try_send_all(&self, frames: &[Frame]) -> Result<usize, SendError> {
        lock(&self.core).send(frames)
    }

    /// With [`LinkConfig::manual_credit`]: this received frame was used.
    pub fn consumed(&self, frame: &Frame) {
        lock(&self.core).add_consumed(frame.wire_bytes() as u64);
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> LinkStats {
        lock(&self.core).stats()
    }
}

fn check(config: &LinkConfig) -> Result<(), OpenError> {
    let bad = |what| Err(OpenError::Config(what));
    if config.paths.is_empty() || config.paths.len() > PATHS_MAX {
        return bad("a link has 1 to 4 paths");
    }
    if !(1024..=PAYLOAD_BYTES_MAX).contains(&config.payload_bytes_max) {
        return bad("payload_bytes_max must be 1 KiB to 16 MiB");
    }
    let largest = config.payload_bytes_max + HEADER_BYTES;
    if config.window_bytes < largest || config.queue_bytes_max < largest {
        return bad("window_bytes and queue_bytes_max must hold at least one frame of payload_bytes_max");
    }
    if config.heartbeat_ms == 0 || config.suspect_ms < 2 * config.heartbeat_ms {
        return bad("suspect_ms must be at least two heartbeats");
    }
    if config.path_timeout_ms < config.suspect_ms || config.silent_ms < 2 * config.heartbeat_ms {
        return bad("path_timeout_ms must be at least suspect_ms, silent_ms at least two heartbeats");
    }
    if config.host == config.peer {
        return bad("host and peer are the same");
    }
    if config.backoff_ms.0 == 0
        || config.backoff_ms.1 < config.backoff_ms.0
        || config.handshake_timeout_ms == 0
    {
        return bad("backoff_ms and handshake_timeout_ms must be above 0");
    }
    Ok(())
}
