//! What a link reports, and why things fail.

use crate::frame::hello::Status;
use crate::frame::{Frame, FrameError};
use std::io;
use std::sync::Arc;

/// What happened on a link; reported in order, on its I/O thread.
#[derive(Clone, Debug)]
pub enum Event {
    /// A session stands: the first time, and after a [`Event::PeerReset`].
    SessionUp {
        /// Its number.
        session: u64,
    },
    /// A path carries frames.
    PathUp {
        /// Which.
        path: usize,
    },
    /// A path does not carry frames any more; it is opened again by itself.
    PathDown {
        /// Which.
        path: usize,
        /// Why.
        why: Down,
        /// Paths that are left.
        left: usize,
    },
    /// A try to open a path failed; the next follows by itself. Repeated failures of one kind are reported once.
    ConnectFailed {
        /// Which; `None` on the listening side, before the caller has said it.
        path: Option<usize>,
        /// Why.
        why: Down,
    },
    /// The peer has lost the session (it was restarted): frames that it had not acknowledged are gone.
    PeerReset,
    /// Nothing came from the peer on any path for so long. Again after each further interval.
    PeerSilent {
        /// Milliseconds since the last sign of life.
        silent_ms: u64,
    },
    /// This host did not let the I/O thread run for so long: silence of the peer in that time proves nothing (I7).
    Starved {
        /// In milliseconds.
        ms: u64,
    },
    /// A frame, exactly once and in order.
    Received(Frame),
    /// After `try_send` said full: there is room again.
    Writable,
}

/// Why a path went down or did not come up.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Down {
    /// The peer's process ended or closed the connection.
    #[error("the peer closed the connection: its process ended")]
    PeerClosed,
    /// The peer's kernel reset the connection.
    #[error("the peer's host reset the connection: no process holds it any more")]
    Reset,
    /// Nobody listens at the address: the host lives, the process does not.
    #[error("connection refused: the host answers, no process listens")]
    Refused,
    /// The peer ended the session in order.
    #[error("the peer ended the session")]
    Bye,
    /// Nothing came for too long.
    #[error("no sign of life for {silent_ms} ms")]
    Silent {
        /// In milliseconds.
        silent_ms: u64,
    },
    /// Bytes were waiting and none could be written for too long.
    #[error("no byte could be written for {stalled_ms} ms")]
    Stalled {
        /// In milliseconds.
        stalled_ms: u64,
    },
    /// The kernel gave up: the peer's did not acknowledge bytes for the path's timeout.
    #[error("the peer's kernel acknowledges nothing: cable, switch or host is gone")]
    Unacknowledged,
    /// Connecting or greeting took too long.
    #[error("connecting took longer than {0} ms")]
    ConnectTimeout(u64),
    /// Bytes were damaged on the way.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer breaks the protocol.
    #[error("the peer breaks the protocol: {0}")]
    Protocol(&'static str),
    /// TLS failed: wrong, expired or revoked certificate, wrong CA or wrong name.
    #[error("TLS: {0}; check the certificates of both hosts and their clocks")]
    Tls(String),
    /// The peer's certificate is good but is not for the expected host.
    #[error("the peer's certificate is not for host {expected}")]
    WrongName {
        /// The host that was expected.
        expected: String,
    },
    /// The peer does not want this connection.
    #[error("the peer refused the connection: {0:?}")]
    RefusedBy(Status),
    /// This side did not want the connection.
    #[error("connection refused by this host: {0:?}")]
    Refusing(Status),
    /// A new connection took the path's place.
    #[error("replaced by a newer connection of the peer")]
    Replaced,
    /// The session ended.
    #[error("the session was reset")]
    SessionReset,
    /// The operating system says so.
    #[error("{0}")]
    Io(Arc<io::Error>),
}

impl Down {
    /// From an I/O error, with the kinds that tell the state of the peer named.
    #[must_use]
    pub fn from_io(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                Self::Reset
            }
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Self::Refused,
            io::ErrorKind::TimedOut => Self::Unacknowledged,
            io::ErrorKind::UnexpectedEof => Self::PeerClosed,
            _ => Self::Io(Arc::new(e)),
        }
    }

    /// Whether this proves that the peer's process (not merely a network) is gone or has closed.
    #[must_use]
    pub const fn is_process_gone(&self) -> bool {
        matches!(self, Self::PeerClosed | Self::Reset | Self::Refused | Self::Bye)
    }
}

/// Why a link cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Settings that cannot work.
    #[error("link settings: {0}")]
    Config(&'static str),
    /// A socket, epoll or thread could not be made.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The reason.
        source: io::Error,
    },
    /// Certificates or key cannot be used.
    #[error(transparent)]
    Tls(#[from] super::tls::TlsError),
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// As much as allowed is waiting; [`Event::Writable`] follows.
    #[error("the link's queue is full")]
    Full,
    /// The payload is larger than the peer takes.
    #[error("a payload of {0} bytes is larger than the peer takes")]
    TooLong(usize),
    /// The link was closed.
    #[error("the link is closed")]
    Closed,
}
