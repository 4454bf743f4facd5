//! A client that adds one to the guest's counter, again and again, and believes nothing.
//!
//! A request is repeated with its nonce until it is answered; the guest does it once. So each reply must carry exactly the
//! counter of the one before plus one, over every failover: less would be something acknowledged and lost, more something
//! done twice. The guest's clock and the work of its vCPU never go back either, and its own checks find nothing.

use pulse::frames::{self, Ends, Packet};
use pulse::shared::COUNTER_PORT;
use pulse::{Reply, Request, kind};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HEADER: usize = 12;
/// A request is sent again after so long.
const AGAIN: Duration = Duration::from_millis(4);
const GUEST: ([u8; 6], Ipv4Addr) = ([0x52, 0x54, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 2));
const ME: ([u8; 6], Ipv4Addr) = ([2, 0x43, 10, 0, 0, 9], Ipv4Addr::new(10, 0, 0, 9));
const PORT: u16 = 19_000;

/// What the client has seen.
#[derive(Clone, Default)]
pub struct Seen {
    /// Replies taken, and the last one's counter.
    pub replies: u64,
    /// The counter of the last reply.
    pub counter: u64,
    /// When the last reply came, and from whose NIC.
    pub last: Option<(Instant, char)>,
    /// The guest's clock in the last reply, in TSC ticks.
    uptime: u64,
    loops: u64,
    /// What was wrong.
    pub wrong: Vec<String>,
}

/// The client at work on a thread of its own.
pub struct Load {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Begins at the socket `own`, and sends to both NICs.
    pub fn start(own: PathBuf, nics: [PathBuf; 2]) -> Self {
        let socket = UnixDatagram::bind(own).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let (to, end) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || run(&socket, &nics, &to, &end));
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was seen until now; fails if anything was wrong.
    pub fn seen(&self) -> Seen {
        let seen = self.lock();
        assert!(seen.wrong.is_empty(), "the client saw: {:#?}", seen.wrong);
        seen.clone()
    }

    /// Waits for a reply from a host's NIC that came after `since`; says how long after.
    pub fn reply_from(&self, host: &str, since: Instant, within: Duration) -> Result<Duration, String> {
        loop {
            let seen = self.seen();
            if let Some((at, from)) = seen.last
                && at > since
                && host.starts_with(from)
            {
                return Ok(at - since);
            }
            if since.elapsed() > within {
                return Err(format!(
                    "no reply from {host} within {within:?}; last {:?} ago from {:?}, counter {}",
                    seen.last.map(|l| l.0.elapsed()),
                    seen.last.map(|l| l.1),
                    seen.counter
                ));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(socket: &UnixDatagram, nics: &[PathBuf; 2], seen: &Mutex<Seen>, stop: &AtomicBool) {
    let mut buf = vec![0; 65_536];
    let mut nonce = 1;
    let mut sent: Option<Instant> = None;
    while !stop.load(Ordering::Relaxed) {
        if sent.is_none_or(|at| at.elapsed() >= AGAIN) {
            let ends = Ends { src: ME, dst: GUEST };
            let request = Request {
                kind: kind::INC,
                nonce,
            };
            send(
                socket,
                nics,
                &frames::udp(ends, PORT, COUNTER_PORT, &request.to_bytes()),
            );
            sent = Some(Instant::now());
        }
        let Ok((len, from)) = socket.recv_from(&mut buf) else {
            continue;
        };
        let at = Instant::now();
        let name = from.as_pathname().and_then(|p| p.to_str()).unwrap_or("?");
        let from = name.chars().last().unwrap_or('?');
        let mut reply = None;
        match buf.get(HEADER..len).and_then(frames::parse).map(|p| p.2) {
            Some(Packet::Arp { op: 1, target, .. }) if target == ME.1 => {
                send(socket, nics, &frames::arp(2, Ends { src: ME, dst: GUEST }));
            }
            Some(Packet::Udp {
                dport: PORT, data, ..
            }) => reply = Reply::from_bytes(&data),
            _ => {}
        }
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reply) = reply
            && seen.take(&reply, nonce, (at, from))
        {
            nonce += 1;
            sent = None;
        }
    }
}

fn send(socket: &UnixDatagram, nics: &[PathBuf; 2], frame: &[u8]) {
    let whole = [&[0; HEADER], frame].concat();
    for nic in nics {
        // A NIC that is not there, or is full because its process stands still, loses it: as on any wire. The socket
        // does not wait: its other side may be a stopped process.
        let Ok(address) = rustix::net::SocketAddrUnix::new(nic.as_path()) else {
            continue;
        };
        let _ = rustix::net::sendto(socket, &whole, rustix::net::SendFlags::DONTWAIT, &address);
    }
}

impl Seen {
    /// Takes a reply; whether it answers `nonce`.
    fn take(&mut self, r: &Reply, nonce: u64, last: (Instant, char)) -> bool {
        let mut wrong = Vec::new();
        if !r.is_valid() {
            wrong.push("a reply with a wrong checksum".to_string());
        } else if r.errors != 0 {
            wrong.push(format!("the guest's own checks failed: {:#x}", r.errors));
        }
        if r.nonce > nonce {
            wrong.push(format!("a reply to {} while {nonce} is asked", r.nonce));
        }
        let answers = r.nonce == nonce;
        if answers {
            if r.counter != self.counter + 1 {
                wrong.push(format!(
                    "counter {} after {} (nonce {nonce}, from {})",
                    r.counter, self.counter, last.1
                ));
            }
            if r.uptime_ticks < self.uptime {
                wrong.push(format!(
                    "clock {} after {}, counter {} {last:?} after {:?}",
                    r.uptime_ticks, self.uptime, r.counter, self.last
                ));
            }
            if r.loops_all < self.loops {
                wrong.push(format!(
                    "loops {} after {}, counter {}",
                    r.loops_all, self.loops, r.counter
                ));
            }
            (self.counter, self.uptime, self.loops) = (r.counter, r.uptime_ticks, r.loops_all);
            self.replies += 1;
            self.last = Some(last);
        }
        self.wrong.truncate(20);
        self.wrong.extend(wrong);
        answers
    }
}
