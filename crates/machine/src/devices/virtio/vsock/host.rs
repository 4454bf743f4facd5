//! The host's side: a listening socket with a one-line protocol, and connects to sockets named after ports.
//!
//! A host program connects to `PATH` and sends `CONNECT <port>\n`; the answer is `OK <port>\n` once the guest has
//! accepted. A guest that connects to port P of the host (CID 2) reaches whoever listens on `PATH_P`.

use crate::devices::virtio::common::Registration;
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, recv};
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use steadfast_net::{SocketKind, SocketName};

/// Connections that have not said yet what they want.
pub(super) const GREETERS_MAX: usize = 32;
const LINE_MAX: usize = 32;

/// The listening socket; its path is removed on drop if we made it.
pub(super) struct Host {
    // Dropped before the listener that it names.
    pub(super) registration: Option<Registration>,
    /// The path if it is ours to remove, which is done before the listener is closed.
    _own: Option<SocketName>,
    pub(super) listener: UnixListener,
    path: PathBuf,
}

/// Listens on `path`. A path left behind by a dead process is taken over.
pub(super) fn listen(path: &Path) -> io::Result<(SocketName, UnixListener)> {
    SocketName::bind(path, SocketKind::Stream, |p| UnixListener::bind(p))
}

/// As [`listen`], while another process has `path`, which it will leave to this one.
pub(super) fn listen_aside(path: &Path) -> io::Result<(SocketName, UnixListener)> {
    SocketName::bind_aside(path, SocketKind::Stream, |p| UnixListener::bind(p))
}

impl Host {
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let (name, listener) = listen(path)?;
        let mut host = Self::on(listener, path)?;
        host._own = Some(name);
        Ok(host)
    }

    /// Uses a socket that already listens on `path`, which is someone else's to remove.
    pub(super) fn on(listener: UnixListener, path: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            registration: None,
            listener,
            path: path.to_owned(),
            _own: None,
        })
    }

    /// Takes one waiting connection, if there is one.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Connects to whoever listens for `port`; never waits.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(PathBuf::from(path))?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

/// A host program that has connected.
pub(super) struct Greeter {
    // Dropped before the stream that it names.
    pub(super) registration: Option<Registration>,
    pub(super) stream: UnixStream,
    pub(super) order: u64,
}

/// What a greeter has said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// Nothing whole yet.
    Wait,
    /// `CONNECT port`.
    Connect(u32),
    /// Anything else.
    Bad,
}

/// Reads the first line, and not a byte more: what follows is for the guest.
pub(super) fn greeting(stream: &mut UnixStream) -> Greeting {
    let mut line = [0u8; LINE_MAX];
    let n = match recv(&*stream, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((n, _)) if n > 0 => n,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Greeting::Wait,
        _ => return Greeting::Bad,
    };
    let Some(end) = line[..n].iter().position(|b| *b == b'\n') else {
        return if n < LINE_MAX {
            Greeting::Wait
        } else {
            Greeting::Bad
        };
    };
    let mut taken = [0u8; LINE_MAX];
    if stream.read_exact(&mut taken[..=end]).is_err() {
        return Greeting::Bad;
    }
    std::str::from_utf8(&taken[..end])
        .ok()
        .and_then(|l| l.strip_prefix("CONNECT "))
        .and_then(|p| p.trim_end_matches('\r').parse().ok())
        .map_or(Greeting::Bad, Greeting::Connect)
}
