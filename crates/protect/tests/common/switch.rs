//! A switch that learns at which NIC the guest is: a standby's NIC must not collect frames that the guest had long since.

use pulse::client::{Client, Wire};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::Duration;

/// What QEMU's and our socket NICs put in front of each frame.
const HEADER: usize = 12;

/// See the module.
pub struct Switch {
    socket: UnixDatagram,
    nics: Vec<PathBuf>,
    at: usize,
}

/// A client at the socket `own`, behind a switch that joins these NICs.
pub fn client(own: PathBuf, nics: Vec<PathBuf>) -> Client<Switch> {
    let socket = UnixDatagram::bind(own).unwrap();
    let switch = Switch { socket, nics, at: 0 };
    let mut client = Client::new(switch, Ipv4Addr::new(10, 0, 0, 9), Ipv4Addr::new(10, 0, 0, 2));
    client.nonces_from(steadfast_protect::store::random_u64().unwrap() >> 8);
    client
}

impl Wire for Switch {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let whole = [&[0; HEADER], frame].concat();
        for _ in 0..self.nics.len() {
            let address = rustix::net::SocketAddrUnix::new(self.nics[self.at].as_path())?;
            // The socket does not wait: its other side may be a stopped process. A host that is down has no NIC.
            let sent = rustix::net::sendto(&self.socket, &whole, rustix::net::SendFlags::DONTWAIT, &address);
            if sent.is_ok() {
                return Ok(());
            }
            self.at = (self.at + 1) % self.nics.len();
        }
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        self.socket.set_nonblocking(timeout.is_zero())?;
        if !timeout.is_zero() {
            self.socket.set_read_timeout(Some(timeout))?;
        }
        let mut bytes = vec![0; 66_000];
        match self.socket.recv_from(&mut bytes) {
            Ok((n, from)) => {
                let nic = self.nics.iter().position(|p| from.as_pathname() == Some(p));
                self.at = nic.unwrap_or(self.at);
                Ok(bytes.get(HEADER..n).map(<[u8]>::to_vec))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
