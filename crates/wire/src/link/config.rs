//! Settings of a link.

use super::tls::TlsFiles;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use steadfast_types::{HostId, VmId};

/// Most paths that a link uses.
pub const PATHS_MAX: usize = 4;

/// An address to connect to or to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addr {
    /// TCP over IPv4 or IPv6.
    Tcp(SocketAddr),
    /// A socket in the file system, for two processes on one host.
    Unix(PathBuf),
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(a) => write!(f, "{a}"),
            Self::Unix(p) => write!(f, "unix:{}", p.display()),
        }
    }
}

impl From<SocketAddr> for Addr {
    fn from(a: SocketAddr) -> Self {
        Self::Tcp(a)
    }
}

/// One way between the two hosts. Both sides list the same paths in the same order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathConfig {
    /// Listening side: where to listen. Connecting side: where to connect to.
    pub addr: Addr,
    /// Connecting side: the local address to connect from, which chooses the network; `None`: the kernel's choice.
    pub local: Option<SocketAddr>,
}

impl PathConfig {
    /// A path to (or at) this address.
    #[must_use]
    pub fn new(addr: impl Into<Addr>) -> Self {
        Self {
            addr: addr.into(),
            local: None,
        }
    }
}

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// This side connects, and connects again (the primary).
    Connect,
    /// This side listens (the standby).
    Listen,
}

/// How a link is secured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Security {
    /// TLS 1.3, both sides with certificates of the pool's CA that carry their host's name.
    Tls(TlsFiles),
    /// No encryption and no proof of who the peer is. An explicit choice, for tests and closed networks.
    Plain,
}

/// Settings of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// The VM whose stream it carries.
    pub vm: VmId,
    /// This host.
    pub host: HostId,
    /// The other host; anybody else is refused.
    pub peer: HostId,
    /// Who connects.
    pub role: Role,
    /// One to [`PATHS_MAX`] paths.
    pub paths: Vec<PathConfig>,
    /// TLS, or explicitly not.
    pub security: Security,
    /// Order of sessions, e.g. the term at which this process started: a peer with a lower one is refused once a higher
    /// one was seen.
    pub generation: u64,
    /// Use MPTCP where the kernel has it (with fallback to TCP), beside our own paths.
    pub mptcp: bool,
    /// Bytes that may be sent and not yet be used by the peer; beyond, `try_send` says full.
    pub queue_bytes_max: usize,
    /// Bytes that this side is ready to hold for the peer.
    pub window_bytes: usize,
    /// Largest payload of a frame in bytes.
    pub payload_bytes_max: usize,
    /// Interval of heartbeats on each path.
    pub heartbeat_ms: u64,
    /// A path silent for so long gets no new frames, and what waits on it goes over the others as well.
    pub suspect_ms: u64,
    /// A path silent, or not taking bytes, for so long is closed and opened again.
    pub path_timeout_ms: u64,
    /// No path brought anything for so long: [`super::Event::PeerSilent`], and again after each such interval.
    pub silent_ms: u64,
    /// Time for connecting and greeting.
    pub handshake_timeout_ms: u64,
    /// First and longest wait before connecting again.
    pub backoff_ms: (u64, u64),
    /// Kernel buffer sizes for sending and receiving in bytes; `None`: the kernel adapts them.
    pub socket_buffer_bytes: Option<usize>,
    /// The user of the link says with [`super::Link::consumed`] when received frames have been used; otherwise they
    /// count as used when the handler returns.
    pub manual_credit: bool,
}

impl LinkConfig {
    /// Settings with the defaults for a data centre.
    #[must_use]
    pub fn new(
        vm: VmId,
        host: HostId,
        peer: HostId,
        role: Role,
        paths: Vec<PathConfig>,
        security: Security,
    ) -> Self {
        Self {
            vm,
            host,
            peer,
            role,
            paths,
            security,
            generation: 0,
            mptcp: false,
            queue_bytes_max: 64 << 20,
            window_bytes: 64 << 20,
            payload_bytes_max: 4 << 20,
            heartbeat_ms: 10,
            suspect_ms: 50,
            path_timeout_ms: 1000,
            silent_ms: 100,
            handshake_timeout_ms: 2000,
            backoff_ms: (5, 500),
            socket_buffer_bytes: None,
            manual_credit: false,
        }
    }
}
