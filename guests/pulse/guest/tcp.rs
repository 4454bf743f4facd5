//! A small TCP server (RFC 9293): ports 7 (echo) and 9 (counter), passive opens only, in-order segments only.
//!
//! ```text
//! Closed ──SYN──> SynRcvd ──ACK──> Open ──FIN in, all sent──> FIN out ──ACK──> Closed
//! ```
//! What is to be sent stays in the connection's ring until it is acknowledged; after a timeout (200 ms doubling to 1 s,
//! for about two minutes) or three duplicate ACKs everything unacknowledged is sent again. The peer's window is the
//! limit, and after a loss a congestion window (down to one segment or to half, up by what is acknowledged). The window we offer is the room for answers, so whatever is accepted can be answered.

use crate::count;
use crate::counter;
use crate::cpu::rdtsc;
use crate::disk::Disk;
use crate::link::{Link, Peer, TCP, be16, be32, put16, put32};
use crate::shared::{COUNTER_PORT, ECHO_PORT, REQUEST_BYTES, Reply, Request};
use crate::state::ticks;

const CONNS: usize = 16;
const RING: usize = 32768;
const MSS: u16 = 1460;
const RTO_MS: u64 = 200;
const RTO_MAX_MS: u64 = 1000;
const TRIES: u32 = 120;
/// A silent connection may be dropped for a new one after this long.
const IDLE_MS: u64 = 300_000;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

static mut RINGS: [[u8; RING]; CONNS] = [[0; RING]; CONNS];

#[derive(Clone, Copy, PartialEq)]
enum State {
    Closed,
    SynRcvd,
    Open,
}

#[derive(Clone, Copy)]
struct Conn {
    state: State,
    peer: Peer,
    port: u16,
    local: u16,
    mss: usize,
    /// Oldest unacknowledged, next to send, highest ever sent.
    una: u32,
    nxt: u32,
    max: u32,
    /// The peer's window.
    wnd: usize,
    /// Congestion window: down to one segment on a timeout, up by what is acknowledged.
    cwnd: usize,
    /// Next expected; right edge last offered.
    rcv: u32,
    edge: u32,
    peer_fin: bool,
    need_ack: bool,
    dups: u32,
    tries: u32,
    rto_ms: u64,
    /// 0: off.
    rto_at: u64,
    active: u64,
    /// Bytes in the ring, from `start`; the first has sequence number `una`.
    len: usize,
    start: usize,
    req: [u8; REQUEST_BYTES],
    req_len: usize,
}

const NOBODY: Conn = Conn {
    state: State::Closed,
    peer: Peer { mac: [0; 6], ip: 0 },
    port: 0,
    local: 0,
    mss: 536,
    una: 0,
    nxt: 0,
    max: 0,
    wnd: 0,
    cwnd: RING,
    rcv: 0,
    edge: 0,
    peer_fin: false,
    need_ack: false,
    dups: 0,
    tries: 0,
    rto_ms: RTO_MS,
    rto_at: 0,
    active: 0,
    len: 0,
    start: 0,
    req: [0; REQUEST_BYTES],
    req_len: 0,
};

fn ring(i: usize) -> &'static mut [u8; RING] {
    // SAFETY: vCPU 0 only; each borrow ends before the next is made.
    unsafe { &mut *core::ptr::addr_of_mut!(RINGS[i % CONNS]) }
}

pub struct Tcp {
    conns: [Conn; CONNS],
}

struct Segment<'a> {
    sport: u16,
    dport: u16,
    seq: u32,
    ack: u32,
    flags: u8,
    wnd: usize,
    options: &'a [u8],
    data: &'a [u8],
}

impl Tcp {
    pub fn new() -> Self {
        Self {
            conns: [NOBODY; CONNS],
        }
    }

    /// One segment with a correct checksum.
    pub fn input(&mut self, link: &mut Link, from: Peer, p: &[u8], disk: &mut Option<Disk>) {
        if p.len() < 20 {
            return;
        }
        let off = usize::from(p[12] >> 4) * 4;
        if off < 20 || off > p.len() {
            return;
        }
        let s = Segment {
            sport: be16(p, 0),
            dport: be16(p, 2),
            seq: be32(p, 4),
            ack: be32(p, 8),
            flags: p[13],
            wnd: usize::from(be16(p, 14)),
            options: &p[20..off],
            data: &p[off..],
        };
        let found = self.conns.iter().position(|c| {
            c.state != State::Closed && c.port == s.sport && c.local == s.dport && c.peer.ip == from.ip
        });
        match found {
            Some(i) => self.conns[i].segment(i, link, from, &s, disk),
            None if s.flags & (SYN | ACK | RST) == SYN && matches!(s.dport, ECHO_PORT | COUNTER_PORT) => {
                self.open(link, from, &s)
            }
            None if s.flags & RST == 0 => refuse(link, from, &s),
            None => {}
        }
    }

    fn open(&mut self, link: &mut Link, from: Peer, s: &Segment) {
        let now = rdtsc();
        let free = self
            .conns
            .iter()
            .position(|c| c.state == State::Closed)
            .or_else(|| {
                self.conns
                    .iter()
                    .position(|c| now.wrapping_sub(c.active) > ticks(IDLE_MS))
            });
        let Some(i) = free else { return };
        let iss = (now >> 6) as u32;
        self.conns[i] = Conn {
            state: State::SynRcvd,
            peer: from,
            port: s.sport,
            local: s.dport,
            mss: usize::from(mss_option(s.options).unwrap_or(536).clamp(64, MSS)),
            una: iss,
            nxt: iss.wrapping_add(1),
            max: iss.wrapping_add(1),
            wnd: s.wnd,
            rcv: s.seq.wrapping_add(1),
            rto_at: now.wrapping_add(ticks(RTO_MS)),
            active: now,
            ..NOBODY
        };
        count!(tcp_accepted, 1);
        self.conns[i].send_syn_ack(link);
    }

    /// Sends again what was not acknowledged in time, and what could not be sent before.
    pub fn timers(&mut self, link: &mut Link) {
        let mut now = 0;
        for i in 0..CONNS {
            let c = &mut self.conns[i];
            if c.state == State::Closed {
                continue;
            }
            if now == 0 {
                now = rdtsc();
            }
            if c.rto_at != 0 && now >= c.rto_at {
                c.timeout(i, link, now);
            } else if c.state == State::Open && (c.need_ack || c.unsent() > 0) {
                c.output(i, link, false);
            }
        }
    }
}

fn mss_option(mut o: &[u8]) -> Option<u16> {
    loop {
        match o {
            [1, rest @ ..] => o = rest,
            [2, 4, a, b, ..] => return Some(u16::from_be_bytes([*a, *b])),
            [0, ..] | [] | [_] => return None,
            [_, n, ..] if *n >= 2 => o = o.get(usize::from(*n)..)?,
            _ => return None,
        }
    }
}

fn refuse(link: &mut Link, to: Peer, s: &Segment) {
    let len = s.data.len() as u32 + u32::from(s.flags & SYN != 0) + u32::from(s.flags & FIN != 0);
    let (seq, ack, flags) = if s.flags & ACK != 0 {
        (s.ack, 0, RST)
    } else {
        (0, s.seq.wrapping_add(len), RST | ACK)
    };
    link.send_ip(to, TCP, 20, 16, |p| {
        header(p, s.dport, s.sport, seq, ack, flags, 0, 20)
    });
}

#[allow(clippy::too_many_arguments)]
fn header(p: &mut [u8], sport: u16, dport: u16, seq: u32, ack: u32, flags: u8, wnd: u16, len: u8) {
    put16(p, 0, sport);
    put16(p, 2, dport);
    put32(p, 4, seq);
    put32(p, 8, ack);
    p[12] = len << 2;
    p[13] = flags;
    put16(p, 14, wnd);
    put16(p, 18, 0);
}

impl Conn {
    /// Bytes (and a FIN) that were never sent, or are to be sent again.
    fn unsent(&self) -> usize {
        (self.len + usize::from(self.peer_fin)).saturating_sub(self.nxt.wrapping_sub(self.una) as usize)
    }

    /// What we can take in now.
    fn room(&self) -> usize {
        let free = RING - self.len;
        if self.local == COUNTER_PORT {
            (free / Reply::BYTES * REQUEST_BYTES).saturating_sub(self.req_len)
        } else {
            free
        }
    }

    fn send_syn_ack(&mut self, link: &mut Link) {
        let wnd = self.room();
        self.edge = self.rcv.wrapping_add(wnd as u32);
        let c = *self;
        link.send_ip(c.peer, TCP, 24, 16, |p| {
            header(p, c.local, c.port, c.una, c.rcv, SYN | ACK, wnd as u16, 24);
            p[20..22].copy_from_slice(&[2, 4]);
            put16(p, 22, MSS);
        });
    }

    /// Sends `n` ring bytes from sequence number `seq` on. False if the device takes nothing now.
    fn send(&mut self, i: usize, link: &mut Link, seq: u32, n: usize, flags: u8) -> bool {
        let wnd = self.room();
        let c = *self;
        let from = (c.start + seq.wrapping_sub(c.una) as usize) % RING;
        let sent = link.send_ip(c.peer, TCP, 20 + n, 16, |p| {
            header(p, c.local, c.port, seq, c.rcv, flags, wnd as u16, 20);
            let ring = ring(i);
            let first = n.min(RING - from);
            p[20..20 + first].copy_from_slice(&ring[from..from + first]);
            p[20 + first..20 + n].copy_from_slice(&ring[..n - first]);
        });
        if sent {
            self.edge = self.rcv.wrapping_add(wnd as u32);
            self.need_ack = false;
        }
        sent
    }

    /// Sends what the windows allow, or at least a due ACK.
    fn output(&mut self, i: usize, link: &mut Link, probe: bool) {
        loop {
            let flight = self.nxt.wrapping_sub(self.una) as usize;
            let window = if probe { self.wnd.max(1) } else { self.wnd }.min(self.cwnd);
            let n = self
                .len
                .saturating_sub(flight)
                .min(window.saturating_sub(flight))
                .min(self.mss);
            if n == 0 || link.room() == 0 {
                break;
            }
            if !self.send(i, link, self.nxt, n, ACK | PSH) {
                return;
            }
            self.advance(n as u32);
        }
        if self.peer_fin && self.nxt == self.una.wrapping_add(self.len as u32) && link.room() > 0 {
            if self.send(i, link, self.nxt, 0, FIN | ACK) {
                self.advance(1);
            }
        }
        if self.need_ack && link.room() > 0 {
            self.send(i, link, self.nxt, 0, ACK);
        }
        // Data waiting for a closed window needs the timer too.
        if self.rto_at == 0 && (self.nxt != self.una || self.unsent() > 0) {
            self.rto_at = rdtsc().wrapping_add(ticks(self.rto_ms));
        }
    }

    fn advance(&mut self, n: u32) {
        if self.nxt != self.max {
            count!(tcp_resent, 1);
        }
        self.nxt = self.nxt.wrapping_add(n);
        if (self.nxt.wrapping_sub(self.max) as i32) > 0 {
            self.max = self.nxt;
        }
    }

    fn timeout(&mut self, i: usize, link: &mut Link, now: u64) {
        self.tries += 1;
        if self.tries > TRIES {
            let c = *self;
            link.send_ip(c.peer, TCP, 20, 16, |p| {
                header(p, c.local, c.port, c.nxt, c.rcv, RST | ACK, 0, 20)
            });
            self.state = State::Closed;
            return;
        }
        self.rto_ms = (self.rto_ms * 2).min(RTO_MAX_MS);
        self.rto_at = now.wrapping_add(ticks(self.rto_ms));
        if self.state == State::SynRcvd {
            count!(tcp_resent, 1);
            self.send_syn_ack(link);
        } else {
            self.nxt = self.una;
            self.cwnd = self.mss;
            self.output(i, link, true);
        }
    }

    fn segment(&mut self, i: usize, link: &mut Link, from: Peer, s: &Segment, disk: &mut Option<Disk>) {
        let offset = s.seq.wrapping_sub(self.rcv) as i32;
        let in_window = offset >= 0 && offset as usize <= self.room().max(1);
        if s.flags & RST != 0 {
            if in_window {
                self.state = State::Closed;
            }
            return;
        }
        self.peer.mac = from.mac;
        self.active = rdtsc();
        if s.flags & SYN != 0 {
            if self.state == State::SynRcvd && s.seq.wrapping_add(1) == self.rcv {
                self.send_syn_ack(link); // our first answer was lost
            } else {
                self.send(i, link, self.nxt, 0, ACK); // RFC 9293, section 3.10.7.4: challenge
            }
            return;
        }
        if s.flags & ACK == 0 {
            return;
        }
        if self.state == State::SynRcvd {
            if s.ack != self.nxt {
                return refuse(link, from, s);
            }
            self.state = State::Open;
            self.una = s.ack;
            self.wnd = s.wnd;
            self.settle();
        } else if !self.acknowledge(i, link, s) {
            return;
        }
        self.data(offset, s, i, disk);
        self.output(i, link, false);
    }

    /// The timer after progress.
    fn settle(&mut self) {
        self.tries = 0;
        self.dups = 0;
        self.rto_ms = RTO_MS;
        self.rto_at = if self.max == self.una && self.unsent() == 0 {
            0
        } else {
            rdtsc().wrapping_add(ticks(RTO_MS))
        };
    }

    /// The ACK field. False if the connection is over, or the segment acknowledges what was never sent.
    fn acknowledge(&mut self, i: usize, link: &mut Link, s: &Segment) -> bool {
        let acked = s.ack.wrapping_sub(self.una);
        let outstanding = self.max.wrapping_sub(self.una);
        if acked as i32 > 0 && acked > outstanding {
            self.send(i, link, self.nxt, 0, ACK);
            return false;
        }
        if acked as i32 > 0 {
            let bytes = (acked as usize).min(self.len);
            if acked as usize > self.len {
                self.state = State::Closed; // our FIN, which is the last thing we send
                return false;
            }
            if acked > self.nxt.wrapping_sub(self.una) {
                self.nxt = s.ack;
            }
            self.una = s.ack;
            self.start = (self.start + bytes) % RING;
            self.len -= bytes;
            self.wnd = s.wnd;
            self.cwnd = (self.cwnd + bytes).min(RING);
            self.settle();
            // Say so if the window we offer was small and has opened.
            let offered = self.edge.wrapping_sub(self.rcv) as usize;
            if offered < RING / 4 && self.room() >= offered + RING / 4 {
                self.need_ack = true;
            }
        } else if acked == 0 {
            if s.data.is_empty() && s.wnd == self.wnd && outstanding > 0 && s.flags & FIN == 0 {
                self.dups += 1;
                if self.dups == 3 {
                    self.nxt = self.una;
                    self.cwnd = (self.cwnd / 2).max(self.mss);
                }
            }
            self.wnd = s.wnd;
        }
        true
    }

    /// The data and the FIN, as far as they are next in order and there is room.
    fn data(&mut self, offset: i32, s: &Segment, i: usize, disk: &mut Option<Disk>) {
        let fin = s.flags & FIN != 0;
        if s.data.is_empty() && !fin {
            if offset < 0 {
                self.need_ack = true; // a keep-alive
            }
            return;
        }
        self.need_ack = true;
        let skip = offset.unsigned_abs() as usize;
        if offset > 0 || skip > s.data.len() || self.peer_fin {
            return;
        }
        let data = &s.data[skip..];
        let take = data.len().min(self.room());
        if self.local == COUNTER_PORT {
            self.requests(i, &data[..take], disk);
        } else {
            self.queue(i, &data[..take]);
        }
        self.rcv = self.rcv.wrapping_add(take as u32);
        if fin && take == data.len() {
            self.rcv = self.rcv.wrapping_add(1);
            self.peer_fin = true;
        }
    }

    fn queue(&mut self, i: usize, data: &[u8]) {
        let ring = ring(i);
        let at = (self.start + self.len) % RING;
        let first = data.len().min(RING - at);
        ring[at..at + first].copy_from_slice(&data[..first]);
        ring[..data.len() - first].copy_from_slice(&data[first..]);
        self.len += data.len();
    }

    fn requests(&mut self, i: usize, data: &[u8], disk: &mut Option<Disk>) {
        for b in data {
            self.req[self.req_len] = *b;
            self.req_len += 1;
            if self.req_len == REQUEST_BYTES {
                self.req_len = 0;
                // A stream that does not speak our language is answered, so that its sender notices.
                let req = Request::from_bytes(&self.req).unwrap_or(Request { kind: 0, nonce: 0 });
                let reply = counter::serve(req, disk).to_bytes();
                self.queue(i, &reply);
            }
        }
    }
}
