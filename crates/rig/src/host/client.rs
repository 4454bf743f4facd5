//! The client: plain sockets on the client switch, from the process that runs the rig.
//!
//! ```text
//! test code --setns--> network namespace { lo, client0 (TAP) } --frames--> client switch --> servers and guests
//! ```
//! The namespace has no name and no route to anywhere but the client switch. It, the TAP device and every socket in it are
//! held by descriptors only, so the kernel removes all of it when this process ends, however it ends.

use crate::error::{IoContext, Result, RigError};
use crate::netif;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The client's device in its namespace.
pub const DEVICE: &str = "client0";

/// The client on the client switch.
#[derive(Clone, Debug)]
pub struct Client {
    namespace: Arc<File>,
    address: Ipv4Addr,
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn enter_namespace(namespace: &File) -> io::Result<()> {
    // SAFETY: an open descriptor of a network namespace; it changes this thread only.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
    Ok(())
}

impl Client {
    /// Makes the namespace and its TAP device; the descriptor of the TAP goes to the switch.
    ///
    /// # Errors
    /// [`RigError::NotHere`] without root (or CAP_SYS_ADMIN and CAP_NET_ADMIN), or without `/dev/net/tun`.
    pub fn start(address: Ipv4Addr, prefix: u8, mac: [u8; 6], mtu: u32) -> Result<(Client, OwnedFd)> {
        let thread = std::thread::Builder::new().name("client-namespace".to_string());
        let made = thread.spawn(move || -> io::Result<(File, OwnedFd)> {
            // SAFETY: it changes the network namespace of this thread only, which ends right after.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
            let namespace = File::open("/proc/thread-self/ns/net")?;
            let tap = netif::open_tap(DEVICE)?;
            netif::up("lo")?;
            netif::set_mac(DEVICE, mac)?;
            netif::set_mtu(DEVICE, mtu)?;
            netif::set_address(DEVICE, address, prefix)?;
            netif::up(DEVICE)?;
            Ok((namespace, tap))
        });
        let made = made
            .what(|| "thread for the client's namespace".to_string())?
            .join();
        let made = made.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
        let (namespace, tap) = made.map_err(|e| RigError::NotHere {
            what: "a client on the client switch".to_string(),
            why: format!("{e}; it takes root and /dev/net/tun (Rig::builder().client(false) does without)"),
        })?;
        Ok((
            Client {
                namespace: Arc::new(namespace),
                address,
            },
            tap,
        ))
    }

    /// The client of another process: `namespace` is an open descriptor of its network namespace
    /// (`/proc/PID/task/TID/ns/net`, or one that was passed).
    pub fn of_namespace(namespace: File, address: Ipv4Addr) -> Client {
        Client {
            namespace: Arc::new(namespace),
            address,
        }
    }

    /// The descriptor of its namespace.
    pub fn namespace(&self) -> &File {
        &self.namespace
    }

    /// Its address on the client switch.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Runs `act` on a thread in the client's namespace. Sockets that it makes stay in the namespace wherever they go.
    ///
    /// # Errors
    /// Those of `act`, and when no thread can be had.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("client".to_string())
                .spawn_scoped(scope, || {
                    enter_namespace(&self.namespace)?;
                    act()
                })?;
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the client's thread panicked")))
        })
    }

    /// Connects to a server or guest.
    pub fn tcp(&self, to: SocketAddr, bound: Duration) -> io::Result<TcpStream> {
        self.within(|| {
            let stream = TcpStream::connect_timeout(&to, bound)?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
    }

    /// Connects to a server or guest, trying until it takes the connection.
    pub fn tcp_retry(&self, to: SocketAddr, bound: Duration) -> io::Result<TcpStream> {
        let deadline = Instant::now() + bound;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.tcp(to, left.clamp(Duration::from_millis(100), Duration::from_secs(3))) {
                Err(e) if left.is_zero() => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
                done => return done,
            }
        }
    }

    /// A UDP socket of the client.
    pub fn udp(&self) -> io::Result<UdpSocket> {
        let address = self.address;
        self.within(move || UdpSocket::bind((address, 0)))
    }

    /// A listening TCP socket of the client.
    pub fn listen(&self, port: u16) -> io::Result<TcpListener> {
        let address = self.address;
        self.within(move || TcpListener::bind((address, port)))
    }

    /// A command that will run in the client's namespace (a `ping`, a `redis-cli`, ...).
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let namespace = Arc::clone(&self.namespace);
        // SAFETY: setns is async-signal-safe; the descriptor is kept open by the closure.
        unsafe { command.pre_exec(move || enter_namespace(&namespace)) };
        command
    }

    /// One ICMP echo; gives the round trip.
    ///
    /// # Errors
    /// `TimedOut` when no answer comes.
    pub fn ping(&self, to: Ipv4Addr, bound: Duration) -> io::Result<Duration> {
        let own = Arc::new(self.clone());
        own.within(|| Pinger::new(to)?.ping(bound))
    }

    /// A socket for a stream of ICMP echoes.
    pub fn pinger(&self, to: Ipv4Addr) -> io::Result<Pinger> {
        self.within(|| Pinger::new(to))
    }
}

/// Sends ICMP echo requests and takes the answers.
#[derive(Debug)]
pub struct Pinger {
    socket: File,
    to: Ipv4Addr,
    id: u16,
    sequence: u16,
}

fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl Pinger {
    fn new(to: Ipv4Addr) -> io::Result<Pinger> {
        // SAFETY: plain numbers; the descriptor is checked and owned by the File alone.
        let socket = unsafe {
            let fd = check(libc::socket(
                libc::AF_INET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::IPPROTO_ICMP,
            ))?;
            File::from_raw_fd(fd)
        };
        Ok(Pinger {
            id: socket.as_raw_fd() as u16 ^ std::process::id() as u16,
            socket,
            to,
            sequence: 0,
        })
    }

    /// One echo; gives the round trip.
    pub fn ping(&mut self, bound: Duration) -> io::Result<Duration> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut echo = vec![8, 0, 0, 0];
        echo.extend_from_slice(&self.id.to_be_bytes());
        echo.extend_from_slice(&self.sequence.to_be_bytes());
        echo.extend_from_slice(&[0x5a; 48]);
        let sum = internet_checksum(&echo);
        echo[2..4].copy_from_slice(&sum.to_be_bytes());
        let address = libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: 0,
            sin_addr: libc::in_addr {
                s_addr: u32::from(self.to).to_be(),
            },
            sin_zero: [0; 8],
        };
        let start = Instant::now();
        // SAFETY: pointers and lengths describe `echo` and `address`, which outlive the call.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                echo.as_ptr().cast(),
                echo.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_in>() as u32,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        loop {
            let left = bound.saturating_sub(start.elapsed());
            let mut poll = libc::pollfd {
                fd: self.socket.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid pollfd and its count.
            let ready = unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32) };
            if left.is_zero() || ready == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut answer = [0u8; 1500];
            let n = io::Read::read(&mut self.socket, &mut answer)?;
            // A raw socket gives the IP header too; its length is in the low half of the first byte, in words.
            let at = usize::from(answer[0] & 15) * 4;
            let icmp = answer.get(at..n).unwrap_or(&[]);
            let ours = icmp.len() >= 8
                && icmp[0] == 0
                && icmp[4..6] == self.id.to_be_bytes()
                && icmp[6..8] == self.sequence.to_be_bytes();
            if ours {
                return Ok(start.elapsed());
            }
        }
    }
}
