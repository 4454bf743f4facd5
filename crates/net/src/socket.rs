//! Frames over unix datagram sockets: for tests, for simulated switches, for hosts without privileges.
//!
//! One datagram is one frame with its 12-byte header, which is all zeroes: no offloads.

use crate::{NetBackend, Offloads, Sent, SocketKind, SocketName, VNET_HEADER};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// Frames over a unix datagram socket.
pub struct SocketBackend {
    /// Our own path if it is ours to remove. Dropped before the socket: a name that nobody serves may be taken by
    /// another process, whose name it is then.
    own: Option<SocketName>,
    socket: UnixDatagram,
    /// Where frames go; the connected peer if not given.
    peer: Option<PathBuf>,
}

impl SocketBackend {
    /// Uses a connected socket, for example one end of a pair.
    ///
    /// # Errors
    /// The socket could not be made non-blocking.
    pub fn new(socket: UnixDatagram) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            peer: None,
            own: None,
        })
    }

    /// Uses a bound, unconnected socket whose path is someone else's to remove, and sends to `peer`.
    ///
    /// # Errors
    /// The socket could not be made non-blocking.
    pub fn bound(socket: UnixDatagram, peer: &Path) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            peer: Some(peer.to_owned()),
            own: None,
        })
    }

    /// Binds `own` and sends to `peer`, which may come and go: meanwhile frames are lost, as on a cut wire.
    /// A path left behind by a dead process is taken over.
    ///
    /// # Errors
    /// `own` could not be bound.
    pub fn bind(own: &Path, peer: &Path) -> io::Result<Self> {
        let (name, socket) = Self::bind_kept(own)?;
        let mut this = Self::bound(socket, peer)?;
        this.own = Some(name);
        Ok(this)
    }

    /// Binds `own`, whose name is the caller's to hand over and to remove, for [`SocketBackend::bound`].
    /// A path left behind by a dead process is taken over.
    ///
    /// # Errors
    /// `own` could not be bound.
    pub fn bind_kept(own: &Path) -> io::Result<(SocketName, UnixDatagram)> {
        SocketName::bind(own, SocketKind::Datagram, |p| UnixDatagram::bind(p))
    }

    /// As [`SocketBackend::bind_kept`], while another process has the name `own`, which it will leave to this one.
    ///
    /// # Errors
    /// The socket could not be bound beside it.
    pub fn bind_aside(own: &Path) -> io::Result<(SocketName, UnixDatagram)> {
        SocketName::bind_aside(own, SocketKind::Datagram, |p| UnixDatagram::bind(p))
    }
}

impl NetBackend for SocketBackend {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn can_offload(&self) -> bool {
        false
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        if offloads == Offloads::default() {
            Ok(())
        } else {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn send(&mut self, frame: &[u8]) -> Sent {
        loop {
            let sent = match &self.peer {
                Some(peer) => self.socket.send_to(frame, peer),
                None => self.socket.send(frame),
            };
            match sent {
                Ok(_) => return Sent::Done,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Sent::WouldBlock,
                Err(_) => return Sent::Dropped,
            }
        }
    }

    fn receive(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.socket.recv(buf) {
                // Not a frame; a peer may send anything.
                Ok(n) if n < VNET_HEADER => return Err(io::ErrorKind::InvalidData.into()),
                Ok(n) => {
                    // The guest did not agree to offloads, whatever the peer wrote there.
                    if let Some(header) = buf.get_mut(..VNET_HEADER) {
                        header.fill(0);
                    }
                    return Ok(Some(n));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The peer went away; frames may come when it is back.
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_pass_and_a_full_or_missing_peer_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut one = SocketBackend::bind(&a, &b).unwrap();
        let mut frame = vec![9; 80];
        assert_eq!(one.send(&frame), Sent::Dropped);
        let mut two = SocketBackend::bind(&b, &a).unwrap();
        assert_eq!(one.send(&frame), Sent::Done);
        let mut buf = vec![0; crate::FRAME_MAX];
        assert_eq!(two.receive(&mut buf).unwrap(), Some(80));
        frame[..VNET_HEADER].fill(0);
        assert_eq!(buf[..80], frame);
        assert_eq!(two.receive(&mut buf).unwrap(), None);
        let mut n = 0;
        while one.send(&frame) == Sent::Done {
            n += 1;
            assert!(n < 1_000_000);
        }
        assert_eq!(one.send(&frame), Sent::WouldBlock);
        // Too short to be a frame.
        while two.receive(&mut buf).unwrap().is_some() {}
        one.socket.send_to(&[1, 2], &b).unwrap();
        assert!(two.receive(&mut buf).is_err());
        assert_eq!(two.receive(&mut buf).unwrap(), None);
        drop(two);
        assert!(!b.exists());
        // A path left behind by a dead process is taken over, a living one is not.
        drop(UnixDatagram::bind(&b).unwrap());
        let _two = SocketBackend::bind(&b, &a).unwrap();
        assert!(SocketBackend::bind(&b, &a).is_err());
    }
}
