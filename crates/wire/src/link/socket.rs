//! Sockets: made, bound and set up. All through `rustix`; non-blocking and closed on exec.

use super::config::{Addr, LinkConfig};
use rustix::net::sockopt;
use rustix::net::{self, AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, ipproto};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

const BACKLOG: i32 = 16;

fn new_socket(addr: &Addr, mptcp: bool) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let family = match addr {
        Addr::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
        Addr::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
        Addr::Unix(_) => {
            return Ok(net::socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                flags,
                None,
            )?);
        }
    };
    if mptcp {
        // A kernel without MPTCP, or with it switched off, refuses here; TCP then does.
        if let Ok(fd) = net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::MPTCP)) {
            return Ok(fd);
        }
    }
    Ok(net::socket_with(family, SocketType::STREAM, flags, None)?)
}

/// Whether this kernel makes MPTCP sockets.
#[must_use]
pub fn mptcp_available() -> bool {
    let flags = SocketFlags::CLOEXEC;
    net::socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        flags,
        Some(ipproto::MPTCP),
    )
    .is_ok()
}

/// Options of a connection. None of them is vital: an MPTCP socket of an older kernel lacks some.
pub fn tune(fd: &OwnedFd, addr: &Addr, config: &LinkConfig) {
    if matches!(addr, Addr::Tcp(_)) {
        let _ = sockopt::set_tcp_nodelay(fd, true);
        let timeout_ms = u32::try_from(config.path_timeout_ms).unwrap_or(u32::MAX);
        let _ = sockopt::set_tcp_user_timeout(fd, timeout_ms);
    }
}

/// Buffer sizes; must be set before connecting or listening to have their full effect.
fn size_buffers(fd: &OwnedFd, config: &LinkConfig) {
    if let Some(bytes) = config.socket_buffer_bytes {
        let _ = sockopt::set_socket_send_buffer_size(fd, bytes);
        let _ = sockopt::set_socket_recv_buffer_size(fd, bytes);
    }
}

/// Starts to listen. A stale socket file is removed first.
pub fn listen(addr: &Addr, config: &LinkConfig) -> io::Result<OwnedFd> {
    let fd = new_socket(addr, config.mptcp)?;
    size_buffers(&fd, config);
    match addr {
        Addr::Tcp(a) => {
            sockopt::set_socket_reuseaddr(&fd, true)?;
            net::bind(&fd, a)?;
        }
        Addr::Unix(path) => {
            let unix = SocketAddrUnix::new(path)?;
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            net::bind(&fd, &unix)?;
        }
    }
    net::listen(&fd, BACKLOG)?;
    Ok(fd)
}

/// The address that a listening socket got (port 0 asks the kernel for one).
pub fn local_addr(fd: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(net::getsockname(fd).ok()?).ok()
}

/// Takes one waiting connection; `None` if there is none.
pub fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
        Ok(fd) => Ok(Some(fd)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Starts to connect; completion shows as writability, the result in [`connect_result`].
pub fn connect(addr: &Addr, local: Option<SocketAddr>, config: &LinkConfig) -> io::Result<OwnedFd> {
    let fd = new_socket(addr, config.mptcp)?;
    size_buffers(&fd, config);
    tune(&fd, addr, config);
    if let (Some(local), Addr::Tcp(_)) = (local, addr) {
        net::bind(&fd, &local)?;
    }
    let any: SocketAddrAny = match addr {
        Addr::Tcp(a) => (*a).into(),
        Addr::Unix(p) => SocketAddrUnix::new(p)?.into(),
    };
    match net::connect(&fd, &any) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::INTR) => Ok(fd),
        Err(e) => Err(e.into()),
    }
}

/// The result of a connect that has completed.
pub fn connect_result(fd: &OwnedFd) -> io::Result<()> {
    sockopt::socket_error(fd)?.map_err(io::Error::from)
}
