//! A network peer in user space that questions the guest over any carrier of raw Ethernet frames.
//!
//! Everything is sent again until it is answered or its time is up, so lost, doubled and late frames, and guests that
//! stand still for a while, are endured; what a client observed (replies, connection resets) is never smoothed over.

use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::frames::{self, Ends, Mac, Packet, Segment, flag};
use crate::shared::{COUNTER_PORT, ECHO_PORT, Reply, Request};

/// Carries raw Ethernet frames (no virtio header, no checksum at the end).
pub trait Wire {
    /// Sends one frame. A frame that cannot be sent now may be dropped.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
    /// Receives one frame, or `None` after `timeout`; with a timeout of zero it must not wait at all.
    fn receive(&mut self, timeout: Duration) -> io::Result<Option<Vec<u8>>>;
}

/// How long to wait before a request is sent again.
const RESEND: Duration = Duration::from_millis(200);
const RTO_MAX: Duration = Duration::from_secs(2);
const WINDOW: u16 = 65535;
const MSS: usize = 1460;
/// Most bytes that wait to be sent on a connection.
const OUT_MAX: usize = 256 << 10;

/// A TCP connection of a [`Client`], by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conn(usize);

struct Tcp {
    sport: u16,
    dport: u16,
    una: u32,
    nxt: u32,
    max: u32,
    rcv: u32,
    window: u32,
    /// From `una` on.
    out: VecDeque<u8>,
    input: VecDeque<u8>,
    open: bool,
    fin_wanted: bool,
    fin_acked: bool,
    peer_fin: bool,
    reset: bool,
    sent_at: Instant,
    dups: u32,
    /// Grows with each timeout without progress.
    rto: Duration,
    /// Congestion window: a slow guest must not drown in copies of what it has yet to read.
    cwnd: usize,
}

/// A peer with a MAC and an IPv4 address.
pub struct Client<W: Wire> {
    wire: W,
    me: (Mac, Ipv4Addr),
    guest: (Mac, Ipv4Addr),
    known: bool,
    nonce: u64,
    port: u16,
    udp: VecDeque<(u16, u16, Vec<u8>)>,
    pongs: VecDeque<Vec<u8>>,
    conns: Vec<Tcp>,
}

fn timed_out(what: &str, after: Duration) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("the guest gave no answer to {what} within {after:?}"),
    )
}

impl<W: Wire> Client<W> {
    /// A client at `me` that talks to the guest at `guest`.
    pub fn new(wire: W, me: Ipv4Addr, guest: Ipv4Addr) -> Self {
        let o = me.octets();
        let mac = [2, 0x43, o[0], o[1], o[2], o[3]];
        Self {
            wire,
            me: (mac, me),
            guest: ([0xff; 6], guest),
            known: false,
            nonce: 1,
            port: 20_000,
            udp: VecDeque::new(),
            pongs: VecDeque::new(),
            conns: Vec::new(),
        }
    }

    /// The carrier.
    pub fn wire(&mut self) -> &mut W {
        &mut self.wire
    }

    fn ends(&self) -> Ends {
        Ends {
            src: self.me,
            dst: self.guest,
        }
    }

    /// Takes frames until `done` or the deadline; calls `again` now and each [`RESEND`].
    fn drive<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut again: impl FnMut(&mut Self) -> io::Result<()>,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> io::Result<T> {
        let start = Instant::now();
        let mut next = start;
        loop {
            if let Some(v) = done(self) {
                return Ok(v);
            }
            let now = Instant::now();
            if now - start >= within {
                return Err(timed_out(what, within));
            }
            if now >= next {
                again(self)?;
                next = now + RESEND;
            }
            self.pump()?;
        }
    }

    /// Takes what has come in (waits at most 20 ms for the first frame), answers ARP, runs the timers of TCP.
    pub fn pump(&mut self) -> io::Result<()> {
        let mut wait = Duration::from_millis(20);
        for _ in 0..256 {
            let Some(f) = self.wire.receive(wait)? else { break };
            wait = Duration::ZERO;
            self.frame(&f)?;
        }
        for i in 0..self.conns.len() {
            let t = &mut self.conns[i];
            if t.sent_at.elapsed() > t.rto && t.waiting() {
                t.nxt = t.una;
                t.cwnd = MSS;
                t.rto = (t.rto * 2).min(RTO_MAX);
                t.sent_at = Instant::now();
                self.push(i, true)?;
            }
        }
        Ok(())
    }

    fn frame(&mut self, f: &[u8]) -> io::Result<()> {
        let Some((mac, ip, packet)) = frames::parse(f) else {
            return Ok(());
        };
        if ip != self.guest.1 {
            return Ok(());
        }
        if mac != self.guest.0 {
            self.guest.0 = mac;
        }
        self.known = true;
        match packet {
            Packet::Arp { op: 1, target, .. } if target == self.me.1 => {
                let f = frames::arp(2, self.ends());
                self.wire.send(&f)?;
            }
            Packet::Arp { .. } => {}
            Packet::Pong(data) => keep(&mut self.pongs, data),
            Packet::Udp { sport, dport, data } => keep(&mut self.udp, (sport, dport, data)),
            Packet::Tcp(s) => return self.segment(&s),
        }
        Ok(())
    }

    /// Learns the guest's MAC address.
    pub fn resolve(&mut self, within: Duration) -> io::Result<Mac> {
        self.known = false;
        let ask = |c: &mut Self| {
            let f = frames::arp(
                1,
                Ends {
                    src: c.me,
                    dst: ([0; 6], c.guest.1),
                },
            );
            c.wire.send(&f)
        };
        self.drive("ARP", within, ask, |c| c.known.then_some(c.guest.0))
    }

    /// Asks the counter port; the same request (same nonce) is sent until it is answered.
    pub fn ask(&mut self, kind: u32, within: Duration) -> io::Result<Reply> {
        let nonce = self.nonce;
        self.nonce += 1;
        let port = 19_000;
        let bytes = Request { kind, nonce }.to_bytes();
        self.drive(
            "a request to the counter",
            within,
            |c| {
                let f = frames::udp(c.ends(), port, COUNTER_PORT, &bytes);
                c.wire.send(&f)
            },
            |c| {
                while let Some((_, to, data)) = c.udp.pop_front() {
                    let reply = Reply::from_bytes(&data).filter(Reply::is_valid);
                    if let Some(r) = reply.filter(|r| to == port && r.nonce == nonce && r.kind() == kind) {
                        return Some(r);
                    }
                }
                None
            },
        )
    }

    /// Starts nonces at `first`, so that two clients at one address and port differ.
    pub fn nonces_from(&mut self, first: u64) {
        self.nonce = first.max(1);
    }

    /// Sends a request once and waits for nothing (for the kinds that have no answer).
    pub fn tell(&mut self, kind: u32) -> io::Result<()> {
        let f = frames::udp(
            self.ends(),
            19_001,
            COUNTER_PORT,
            &Request { kind, nonce: 0 }.to_bytes(),
        );
        self.wire.send(&f)
    }

    /// UDP echo; true if what came back is what went out.
    pub fn echo(&mut self, data: &[u8], within: Duration) -> io::Result<bool> {
        let port = 19_002;
        let send = |c: &mut Self| {
            let f = frames::udp(c.ends(), port, ECHO_PORT, data);
            c.wire.send(&f)
        };
        let came = self.drive("a UDP echo", within, send, |c| {
            std::iter::from_fn(|| c.udp.pop_front()).find(|(from, to, _)| *from == ECHO_PORT && *to == port)
        })?;
        Ok(came.2 == data)
    }

    /// ICMP echo; true if what came back is what went out.
    pub fn ping(&mut self, data: &[u8], within: Duration) -> io::Result<bool> {
        let send = |c: &mut Self| {
            let f = frames::ping(c.ends(), data);
            c.wire.send(&f)
        };
        Ok(self.drive("a ping", within, send, |c| c.pongs.pop_front())? == data)
    }

    /// Waits for a datagram to `port` (the collector's reports).
    pub fn datagram(&mut self, port: u16, within: Duration) -> io::Result<Vec<u8>> {
        let mine = |c: &mut Self| {
            std::iter::from_fn(|| c.udp.pop_front())
                .find(|d| d.1 == port)
                .map(|d| d.2)
        };
        self.drive("nothing (its own datagram)", within, |_| Ok(()), mine)
    }

    /// Opens a TCP connection.
    pub fn connect(&mut self, dport: u16, within: Duration) -> io::Result<Conn> {
        self.port += 1;
        let i = self.conns.len();
        let iss = u32::from(self.port).wrapping_mul(0x9E37_79B9);
        self.conns.push(Tcp {
            sport: self.port,
            dport,
            una: iss,
            nxt: iss,
            max: iss,
            rcv: 0,
            window: 0,
            out: VecDeque::new(),
            input: VecDeque::new(),
            open: false,
            fin_wanted: false,
            fin_acked: false,
            peer_fin: false,
            reset: false,
            sent_at: Instant::now(),
            dups: 0,
            rto: RESEND,
            cwnd: 10 * MSS,
        });
        let syn = |c: &mut Self| c.transmit(i, iss, flag::SYN, Vec::new());
        self.drive("a TCP SYN", within, syn, |c| {
            (c.conns[i].open || c.conns[i].reset).then_some(())
        })?;
        if self.conns[i].reset {
            Err(io::ErrorKind::ConnectionRefused.into())
        } else {
            Ok(Conn(i))
        }
    }

    fn alive(&self, c: Conn) -> io::Result<()> {
        if self.conns[c.0].reset {
            Err(io::ErrorKind::ConnectionReset.into())
        } else {
            Ok(())
        }
    }

    /// Takes as much of `data` as fits into the sending buffer, and sends what the window allows.
    pub fn write(&mut self, c: Conn, data: &[u8]) -> io::Result<usize> {
        self.alive(c)?;
        let t = &mut self.conns[c.0];
        let n = data.len().min(OUT_MAX.saturating_sub(t.out.len()));
        t.out.extend(&data[..n]);
        self.push(c.0, false)?;
        Ok(n)
    }

    /// Takes what has arrived, without waiting.
    pub fn read(&mut self, c: Conn) -> io::Result<Vec<u8>> {
        if self.conns[c.0].input.is_empty() {
            self.alive(c)?;
        }
        Ok(self.conns[c.0].input.drain(..).collect())
    }

    /// Sends `data` to the echo port and compares what comes back, byte by byte.
    pub fn echo_stream(&mut self, c: Conn, data: &[u8], within: Duration) -> io::Result<()> {
        let start = Instant::now();
        let (mut sent, mut back) = (0, 0);
        while back < data.len() {
            if start.elapsed() > within {
                return Err(timed_out(
                    &format!("TCP data after {back} of {} bytes", data.len()),
                    within,
                ));
            }
            sent += self.write(c, &data[sent..])?;
            self.pump()?;
            let got = self.read(c)?;
            if data.get(back..back + got.len()) != Some(&got[..]) {
                let text = format!(
                    "the TCP echo differs between byte {back} and {}",
                    back + got.len()
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            back += got.len();
        }
        Ok(())
    }

    /// One request and its reply on a connection to the counter port.
    pub fn ask_stream(&mut self, c: Conn, kind: u32, within: Duration) -> io::Result<Reply> {
        let nonce = self.nonce;
        self.nonce += 1;
        self.write(c, &Request { kind, nonce }.to_bytes())?;
        let mut bytes: Vec<u8> = Vec::new();
        let reply = self.drive(
            "a request on a TCP connection",
            within,
            |_| Ok(()),
            |me| {
                bytes.extend(me.conns[c.0].input.drain(..));
                if me.conns[c.0].reset {
                    Some(None)
                } else {
                    Reply::from_bytes(&bytes).map(Some)
                }
            },
        )?;
        let reply = reply.ok_or(io::ErrorKind::ConnectionReset)?;
        if !reply.is_valid() || reply.nonce != nonce || bytes.len() != Reply::BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("not the reply to {nonce}: {reply:?}"),
            ));
        }
        Ok(reply)
    }

    /// Sends FIN and waits until both sides have closed.
    pub fn close(&mut self, c: Conn, within: Duration) -> io::Result<()> {
        self.conns[c.0].fin_wanted = true;
        self.push(c.0, false)?;
        let closed = |me: &mut Self| {
            let t = &me.conns[c.0];
            (t.reset || t.peer_fin && t.fin_acked).then_some(())
        };
        self.drive("a TCP FIN", within, |_| Ok(()), closed)?;
        self.alive(c)
    }

    fn transmit(&mut self, i: usize, seq: u32, flags: u8, data: Vec<u8>) -> io::Result<()> {
        let t = &self.conns[i];
        let ack = if flags & flag::ACK != 0 { t.rcv } else { 0 };
        let s = Segment {
            sport: t.sport,
            dport: t.dport,
            seq,
            ack,
            flags,
            window: WINDOW,
            data,
        };
        let f = frames::tcp(self.ends(), &s);
        self.wire.send(&f)
    }

    /// Sends what the window allows.
    fn push(&mut self, i: usize, probe: bool) -> io::Result<()> {
        loop {
            let t = &mut self.conns[i];
            if !t.open || t.reset {
                return Ok(());
            }
            let flight = t.nxt.wrapping_sub(t.una) as usize;
            let window = if probe { t.window.max(1) } else { t.window } as usize;
            let window = window.min(t.cwnd);
            let n = t
                .out
                .len()
                .saturating_sub(flight)
                .min(window.saturating_sub(flight))
                .min(MSS);
            let fin = n == 0 && t.fin_wanted && !t.fin_acked && flight == t.out.len();
            if n == 0 && !fin {
                return Ok(());
            }
            let seq = t.nxt;
            let data: Vec<u8> = t.out.range(flight.min(t.out.len())..).take(n).copied().collect();
            t.nxt = t.nxt.wrapping_add(n as u32 + u32::from(fin));
            if t.nxt.wrapping_sub(t.max) as i32 > 0 {
                t.max = t.nxt;
            }
            t.sent_at = Instant::now();
            let flags = flag::ACK | if fin { flag::FIN } else { flag::PSH };
            self.transmit(i, seq, flags, data)?;
        }
    }

    fn segment(&mut self, s: &Segment) -> io::Result<()> {
        let mine = |t: &Tcp| t.sport == s.dport && t.dport == s.sport;
        let Some(i) = self.conns.iter().position(mine) else {
            return Ok(());
        };
        let t = &mut self.conns[i];
        if s.flags & flag::RST != 0 {
            t.reset |= !(t.fin_acked && t.peer_fin);
            return Ok(());
        }
        if s.flags & flag::SYN != 0 {
            if !t.open && s.ack == t.una.wrapping_add(1) {
                t.open = true;
                t.una = s.ack;
                t.nxt = s.ack;
                t.max = s.ack;
                t.rcv = s.seq.wrapping_add(1);
                t.window = u32::from(s.window);
            }
            let seq = t.nxt;
            return self.transmit(i, seq, flag::ACK, Vec::new());
        }
        if !t.open || s.flags & flag::ACK == 0 {
            return Ok(());
        }
        let acked = s.ack.wrapping_sub(t.una);
        if acked <= t.max.wrapping_sub(t.una) {
            if acked > 0 {
                let bytes = (acked as usize).min(t.out.len());
                t.fin_acked |= acked as usize > t.out.len();
                t.out.drain(..bytes);
                if acked > t.nxt.wrapping_sub(t.una) {
                    t.nxt = s.ack;
                }
                t.una = s.ack;
                t.dups = 0;
                t.rto = RESEND;
                t.cwnd = (t.cwnd + acked as usize).min(1 << 20);
                t.sent_at = Instant::now();
            } else if s.data.is_empty() && u32::from(s.window) == t.window && t.max != t.una {
                t.dups += 1;
                if t.dups == 3 {
                    t.nxt = t.una;
                    t.cwnd = (t.cwnd / 2).max(MSS);
                }
            }
            t.window = u32::from(s.window);
        }
        let fin = s.flags & flag::FIN != 0;
        let ack_due = !s.data.is_empty() || fin;
        let behind = t.rcv.wrapping_sub(s.seq) as usize;
        if behind <= s.data.len() && !t.peer_fin {
            t.input.extend(&s.data[behind..]);
            t.rcv = s.seq.wrapping_add(s.data.len() as u32);
            if fin {
                t.rcv = t.rcv.wrapping_add(1);
                t.peer_fin = true;
            }
        }
        let seq = t.nxt;
        self.push(i, false)?;
        if ack_due {
            self.transmit(i, seq, flag::ACK, Vec::new())?;
        }
        Ok(())
    }
}

/// Keeps the newest 4096.
fn keep<T>(queue: &mut VecDeque<T>, item: T) {
    if queue.len() >= 4096 {
        queue.pop_front();
    }
    queue.push_back(item);
}

impl Tcp {
    fn waiting(&self) -> bool {
        self.open && !self.reset && (!self.out.is_empty() || self.fin_wanted && !self.fin_acked)
    }
}
