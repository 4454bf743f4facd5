//! A client of a pulse guest that adds one to its counter, again and again, and says from which host each answer came.
//!
//! A request is repeated with its nonce until it is answered; the guest does it once. So the counter grows by exactly one with
//! each answer, over every failover; after a boot it begins anew, which is counted. A guest that keeps its counter on a disk goes on from
//! there after a boot: what was done and not answered may be there, what was answered must be.

use pulse::frames::{self, Ends, Packet};
use pulse::shared::COUNTER_PORT;
use pulse::{Reply, Request, kind};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HEADER: usize = 12;
const AGAIN: Duration = Duration::from_millis(10);
const GUEST: ([u8; 6], Ipv4Addr) = ([0x52, 0x54, 0, 0, 0, 1], Ipv4Addr::new(10, 0, 0, 2));
const ME: ([u8; 6], Ipv4Addr) = ([2, 0x43, 10, 0, 0, 9], Ipv4Addr::new(10, 0, 0, 9));
const PORT: u16 = 19_000;

/// What was seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub replies: u64,
    pub counter: u64,
    /// Times that the counter began anew, or was taken from the disk.
    pub boots: u64,
    /// Where it was taken up at the last boot, of a guest that keeps it on a disk.
    taken_up: Option<u64>,
    pub last: Option<(Instant, String)>,
    /// Longest time between two replies.
    pub longest: Duration,
    pub wrong: Vec<String>,
}

pub struct Client {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    pub fn start(own: &Path, nics: Vec<(String, PathBuf)>) -> Self {
        Self::asking(own, nics, kind::INC)
    }

    /// Of a guest that keeps its counter on a disk.
    pub fn of_disk(own: &Path, nics: Vec<(String, PathBuf)>) -> Self {
        Self::asking(own, nics, kind::FLUSH_INC)
    }

    fn asking(own: &Path, nics: Vec<(String, PathBuf)>, kind: u32) -> Self {
        let socket = UnixDatagram::bind(own).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let (to, end) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || work(&socket, &nics, kind, &to, &end));
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// What was seen; fails if anything was wrong.
    pub fn seen(&self) -> Seen {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(seen.wrong.is_empty(), "the client saw: {:#?}", seen.wrong);
        seen
    }

    /// Waits for an answer that came after `since` from any host but `not`; says from which, and how long after.
    pub fn answer(&self, not: &str, since: Instant) -> (String, Duration) {
        super::wait_for("an answer of the guest", || {
            let (at, host) = self.seen().last?;
            (at > since && host != not).then(|| (host, at - since))
        })
    }

    /// The longest gap is counted from now on.
    pub fn forget_gap(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).longest = Duration::ZERO;
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(socket: &UnixDatagram, nics: &[(String, PathBuf)], kind: u32, seen: &Mutex<Seen>, stop: &AtomicBool) {
    let (mut buf, mut nonce, mut sent) = (vec![0; 65_536], 1, None::<Instant>);
    let ends = Ends { src: ME, dst: GUEST };
    while !stop.load(Ordering::Relaxed) {
        if sent.is_none_or(|at| at.elapsed() >= AGAIN) {
            let request = Request { kind, nonce };
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
        let name = nics.iter().find(|(_, path)| from.as_pathname() == Some(path));
        let name = name.map_or_else(|| "?".to_owned(), |(host, _)| host.clone());
        match buf.get(HEADER..len).and_then(frames::parse).map(|p| p.2) {
            Some(Packet::Arp { op: 1, target, .. }) if target == ME.1 => {
                send(socket, nics, &frames::arp(2, ends));
            }
            Some(Packet::Udp {
                dport: PORT, data, ..
            }) => {
                let Some(reply) = Reply::from_bytes(&data) else {
                    continue;
                };
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                if seen.take(&reply, kind, nonce, name) {
                    (nonce, sent) = (nonce + 1, None);
                }
            }
            _ => {}
        }
        // Enough load to see every gap; the machine has other work.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send(socket: &UnixDatagram, nics: &[(String, PathBuf)], frame: &[u8]) {
    let whole = [&[0; HEADER], frame].concat();
    for (_, nic) in nics {
        let Ok(address) = rustix::net::SocketAddrUnix::new(nic.as_path()) else {
            continue;
        };
        let _ = rustix::net::sendto(socket, &whole, rustix::net::SendFlags::DONTWAIT, &address);
    }
}

impl Seen {
    fn take(&mut self, r: &Reply, kind: u32, nonce: u64, from: String) -> bool {
        if !r.is_valid() || r.errors != 0 {
            self.wrong.push(format!("a bad reply from {from}: {r:?}"));
        }
        if r.nonce != nonce {
            return false;
        }
        let on_disk = kind == kind::FLUSH_INC;
        let booted = on_disk
            && self
                .taken_up
                .replace(r.boot_counter)
                .is_some_and(|b| b != r.boot_counter);
        let goes_on = booted && (1..=2).contains(&r.counter.wrapping_sub(self.counter));
        let begins_anew = !on_disk && r.counter == 1 && self.counter > 0;
        if goes_on || begins_anew {
            self.boots += 1;
        } else if r.counter != self.counter + 1 {
            self.wrong.push(format!(
                "counter {} after {} (nonce {nonce}, from {from})",
                r.counter, self.counter
            ));
        }
        let now = Instant::now();
        if let Some((at, _)) = self.last {
            self.longest = self.longest.max(now - at);
        }
        self.counter = r.counter;
        self.replies += 1;
        self.last = Some((now, from));
        true
    }
}
