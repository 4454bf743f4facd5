//! One connection's bytes: plain, or through TLS. Never blocks.

use super::event::Down;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustls::Connection;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::OwnedFd;

/// A connected socket.
pub struct Stream {
    fd: OwnedFd,
    tls: Option<Box<Connection>>,
}

struct Raw<'a>(&'a OwnedFd);

impl Read for Raw<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (n, _) = recv(self.0, buf, RecvFlags::empty())?;
        Ok(n)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buf)])
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        // Not writev: a peer that has gone must give an error, not a signal.
        Ok(sendmsg(
            self.0,
            bufs,
            &mut SendAncillaryBuffer::default(),
            SendFlags::NOSIGNAL,
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `Ok(None)`: not now.
fn not_now<T>(r: io::Result<T>) -> Result<Option<T>, Down> {
    match r {
        Ok(v) => Ok(Some(v)),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(e) => Err(Down::from_io(e)),
    }
}

impl Stream {
    /// Takes a connected socket.
    pub fn new(fd: OwnedFd, tls: Option<Connection>) -> Self {
        Self {
            fd,
            tls: tls.map(Box::new),
        }
    }

    /// The socket.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The TLS state, if any.
    pub fn tls(&self) -> Option<&Connection> {
        self.tls.as_deref()
    }

    /// Goes on with the TLS handshake; true when it is complete (at once if there is no TLS).
    pub fn handshake(&mut self) -> Result<bool, Down> {
        let Some(tls) = &mut self.tls else { return Ok(true) };
        let mut progress = true;
        while tls.is_handshaking() && progress {
            progress = false;
            while tls.wants_write() {
                if not_now(tls.write_tls(&mut Raw(&self.fd)))?.is_none() {
                    break;
                }
                progress = true;
            }
            if !tls.is_handshaking() || !tls.wants_read() {
                continue;
            }
            match not_now(tls.read_tls(&mut Raw(&self.fd)))? {
                Some(0) => return Err(Down::PeerClosed),
                Some(_) => {
                    progress = true;
                    if let Err(e) = tls.process_new_packets() {
                        // The alert tells the peer why.
                        let _ = tls.write_tls(&mut Raw(&self.fd));
                        return Err(Down::Tls(e.to_string()));
                    }
                }
                None => {}
            }
        }
        if tls.is_handshaking() {
            return Ok(false);
        }
        self.flush_tls()?;
        Ok(true)
    }

    /// Reads what is there; `None`: nothing now.
    pub fn read(&mut self, buf: &mut [u8]) -> Result<Option<usize>, Down> {
        let Some(tls) = &mut self.tls else {
            return match not_now(Raw(&self.fd).read(buf))? {
                Some(0) => Err(Down::PeerClosed),
                n => Ok(n),
            };
        };
        loop {
            match tls.reader().read(buf) {
                Ok(0) => return Err(Down::PeerClosed),
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(Down::from_io(e)),
            }
            match not_now(tls.read_tls(&mut Raw(&self.fd)))? {
                None => return Ok(None),
                Some(0) => return Err(Down::PeerClosed),
                Some(_) => {}
            }
            if let Err(e) = tls.process_new_packets() {
                let _ = tls.write_tls(&mut Raw(&self.fd));
                return Err(Down::Tls(e.to_string()));
            }
        }
    }

    /// Writes encrypted bytes that wait; true when none are left.
    pub fn flush_tls(&mut self) -> Result<bool, Down> {
        let Some(tls) = &mut self.tls else { return Ok(true) };
        while tls.wants_write() {
            if not_now(tls.write_tls(&mut Raw(&self.fd)))?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes from these pieces, in order; the number of bytes taken, `None`: nothing now.
    pub fn write(&mut self, pieces: &[IoSlice<'_>]) -> Result<Option<usize>, Down> {
        let Some(tls) = &mut self.tls else {
            return not_now(Raw(&self.fd).write_vectored(pieces));
        };
        let mut taken = 0;
        for piece in pieces {
            let mut rest: &[u8] = piece;
            while !rest.is_empty() {
                // The TLS buffer is bounded (64 KiB): it takes a part, which goes out, and so on.
                let n = tls.writer().write(rest).map_err(Down::from_io)?;
                taken += n;
                rest = &rest[n..];
                if rest.is_empty() {
                    break;
                }
                while tls.wants_write() {
                    if not_now(tls.write_tls(&mut Raw(&self.fd)))?.is_none() {
                        return Ok((taken > 0).then_some(taken));
                    }
                }
            }
        }
        self.flush_tls()?;
        Ok(Some(taken))
    }
}
