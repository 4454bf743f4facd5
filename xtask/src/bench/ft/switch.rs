//! A switch that learns at which card the guest is, as a carrier of frames for [`pulse::client::Client`].

use pulse::client::Wire;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

/// See the module.
pub struct Switch {
    socket: UnixDatagram,
    nics: Vec<PathBuf>,
    at: usize,
    /// Bytes in front of each frame.
    header: usize,
    buf: Vec<u8>,
}

impl Switch {
    /// From a bound socket to these cards.
    pub fn new(socket: UnixDatagram, nics: Vec<PathBuf>, header: usize) -> Self {
        Self {
            socket,
            nics,
            at: 0,
            header,
            buf: vec![0; 66_000],
        }
    }
}

impl Wire for Switch {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let mut bytes = vec![0; self.header];
        bytes.extend_from_slice(frame);
        // A host that is down has no card; the next one is tried with the next frame.
        if self.socket.send_to(&bytes, &self.nics[self.at]).is_err() {
            self.at = (self.at + 1) % self.nics.len();
        }
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        self.socket.set_nonblocking(timeout.is_zero())?;
        if !timeout.is_zero() {
            self.socket.set_read_timeout(Some(timeout))?;
        }
        match self.socket.recv_from(&mut self.buf) {
            Ok((n, from)) => {
                let nic = self.nics.iter().position(|p| from.as_pathname() == Some(p));
                self.at = nic.unwrap_or(self.at);
                Ok(self.buf.get(self.header..n).map(<[u8]>::to_vec))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
