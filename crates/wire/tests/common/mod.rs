//! A pair of links over loopback, and a TCP proxy that misbehaves on command.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use steadfast_types::{HostId, Term, VmId};
use steadfast_wire::link::{Addr, PathConfig, Role, Security};
use steadfast_wire::{Event, Frame, Link, LinkConfig, LinkSender};

pub const WAIT: Duration = Duration::from_secs(20);

pub fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A link and its events.
pub struct End {
    pub link: Link,
    pub events: Receiver<Event>,
}

impl End {
    pub fn open(config: LinkConfig) -> Self {
        let (tx, events) = channel();
        let link = Link::open(config, move |e| {
            let _ = tx.send(e);
        })
        .expect("link opens");
        Self { link, events }
    }

    /// Waits for an event that matches, dropping others; fails after a bound.
    pub fn wait<T>(&self, what: &str, mut pick: impl FnMut(Event) -> Option<T>) -> T {
        let end = Instant::now() + WAIT;
        let mut seen = Vec::new();
        loop {
            match self
                .events
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(e) => {
                    let text = format!("{e:?}");
                    if let Some(t) = pick(e) {
                        return t;
                    }
                    seen.push(text.chars().take(120).collect::<String>());
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let from = seen.len().saturating_sub(20);
                    panic!("waited in vain for {what}; last seen: {:#?}", &seen[from..]);
                }
            }
        }
    }

    pub fn wait_up(&self, paths: usize) {
        let end = Instant::now() + WAIT;
        while self.link.stats().paths.iter().filter(|p| p.up).count() < paths {
            assert!(
                Instant::now() < end,
                "paths do not come up: {:?}",
                self.link.stats()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The next received frame.
    pub fn frame(&self) -> Frame {
        self.wait("a frame", |e| match e {
            Event::Received(f) => Some(f),
            _ => None,
        })
    }

    /// Sends, waiting while full.
    pub fn send(&self, frame: &Frame) {
        send_on(&self.link.sender(), frame);
    }

    /// Receives numbered test frames `from..to` and checks each.
    pub fn expect_numbers(&self, from: u64, to: u64) {
        for n in from..to {
            let f = self.frame();
            assert_eq!(number_of(&f), n, "lost, doubled or out of order");
            assert_eq!(f.payload(), numbered(n).payload(), "content of frame {n}");
        }
    }
}

/// Sends, waiting while full.
pub fn send_on(to: &LinkSender, frame: &Frame) {
    let end = Instant::now() + WAIT;
    while to.try_send(frame).is_err() {
        assert!(Instant::now() < end, "stays full: {:?}", to.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Test frame number `n`: mostly small, every eighth large.
pub fn numbered(n: u64) -> Frame {
    let len = if n.is_multiple_of(8) {
        100_000 + (n as usize * 37) % 100_000
    } else {
        20 + (n as usize * 7) % 500
    };
    let mut payload = vec![n as u8; len];
    payload[..8].copy_from_slice(&n.to_le_bytes());
    Frame::control(
        steadfast_wire::vm_hash(&VmId::new("vm").unwrap()),
        Term(4),
        payload,
    )
}

pub fn number_of(f: &Frame) -> u64 {
    u64::from_le_bytes(*f.payload().first_chunk().unwrap())
}

pub fn config(role: Role, paths: Vec<PathConfig>) -> LinkConfig {
    let (a, b) = (HostId::new("alpha").unwrap(), HostId::new("beta").unwrap());
    let (host, peer) = if role == Role::Connect { (a, b) } else { (b, a) };
    LinkConfig::new(VmId::new("vm").unwrap(), host, peer, role, paths, Security::Plain)
}

pub fn listener(paths: usize, change: impl Fn(&mut LinkConfig)) -> End {
    let mut c = config(Role::Listen, vec![PathConfig::new(Addr::Tcp(any_port())); paths]);
    change(&mut c);
    End::open(c)
}

pub fn addresses(end: &End) -> Vec<SocketAddr> {
    end.link.addresses().iter().map(|a| a.unwrap()).collect()
}

pub fn connector(to: &[SocketAddr], change: impl Fn(&mut LinkConfig)) -> End {
    let mut c = config(Role::Connect, to.iter().map(|a| PathConfig::new(*a)).collect());
    change(&mut c);
    End::open(c)
}

/// What a proxy does to bytes.
#[derive(Default)]
pub struct Faults {
    /// Swallow nothing, forward nothing: the cable is cut.
    pub cut: AtomicBool,
    /// Refuse and end connections.
    pub down: AtomicBool,
    /// Forward, each time, this much later.
    pub delay_ms: AtomicU32,
    /// Flip a bit in this many coming reads.
    pub corrupt: AtomicU32,
    /// Bytes forwarded.
    pub bytes: AtomicU64,
    stop: AtomicBool,
}

/// A TCP proxy in front of one address.
pub struct Proxy {
    pub addr: SocketAddr,
    pub faults: Arc<Faults>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
    main: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn new(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let faults = Arc::new(Faults::default());
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let threads: Arc<Mutex<Vec<JoinHandle<()>>>> = Arc::default();
        let (f, s, t) = (Arc::clone(&faults), Arc::clone(&streams), Arc::clone(&threads));
        let main = std::thread::spawn(move || {
            while !f.stop.load(Ordering::Relaxed) {
                let Ok((client, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                if f.down.load(Ordering::Relaxed) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(target) else {
                    continue;
                };
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to, f) = (from.try_clone().unwrap(), to.try_clone().unwrap(), Arc::clone(&f));
                    t.lock()
                        .unwrap()
                        .push(std::thread::spawn(move || forward(from, to, &f)));
                }
                s.lock().unwrap().extend([client, server]);
            }
        });
        Self {
            addr,
            faults,
            streams,
            threads,
            main: Some(main),
        }
    }

    /// Ends all connections; new ones are accepted unless `down` is set.
    pub fn kill(&self) {
        for s in self.streams.lock().unwrap().drain(..) {
            let _ = s.shutdown(Shutdown::Both);
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, faults: &Faults) {
    from.set_nonblocking(false).unwrap();
    from.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    to.set_nodelay(true).unwrap();
    let mut buf = vec![0; 64 << 10];
    while !faults.stop.load(Ordering::Relaxed) {
        if faults.cut.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        match from.read(&mut buf) {
            Ok(0) => break,
            Ok(n) => {
                let delay = faults.delay_ms.load(Ordering::Relaxed);
                if delay > 0 {
                    std::thread::sleep(Duration::from_millis(delay.into()));
                }
                while faults.cut.load(Ordering::Relaxed) && !faults.stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let less = |v: u32| v.checked_sub(1);
                if faults
                    .corrupt
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                    .is_ok()
                {
                    buf[n / 2] ^= 0x10;
                }
                faults.bytes.fetch_add(n as u64, Ordering::Relaxed);
                if to.write_all(&buf[..n]).is_err() {
                    break;
                }
            }
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.faults.stop.store(true, Ordering::Relaxed);
        self.kill();
        if let Some(m) = self.main.take() {
            let _ = m.join();
        }
        let threads: Vec<_> = self.threads.lock().unwrap().drain(..).collect();
        for t in threads {
            let _ = t.join();
        }
    }
}
