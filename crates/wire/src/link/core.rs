//! The state of a link that its users and its I/O thread share, under one lock: session, paths, what waits where.
//!
//! Users send under the lock straight into the socket while it takes bytes; the I/O thread does the rest. Events are
//! reported by the I/O thread alone and without the lock.

use super::config::LinkConfig;
use super::conn::Conn;
use super::event::{Down, SendError};
use super::session::{Accepted, RecvState, SendState};
use super::stats::{LinkStats, PathStats};
use crate::buf::{Buf, BufPool};
use crate::frame::hello::{Hello, Status, common_version, features};
use crate::frame::{Frame, Header, Kind, VERSION_MAX, VERSION_MIN};
use crate::nonce::nonce;
use rustix::event::epoll;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Control messages may go this far beyond the bound of the queue: they end what filled it.
const CONTROL_RESERVE_BYTES: u64 = 1 << 20;
/// A path may have this many bytes more under way than another before frames change over to that.
const STICKY_BYTES: usize = 256 << 10;
/// Received bytes after which an acknowledgement goes out without waiting for the next heartbeat.
const ACK_EVERY_BYTES: usize = 256 << 10;
/// Payload of a heartbeat: time stamp, echoed stamp, how long that was held, bytes consumed.
const HEARTBEAT_BYTES: usize = 32;

/// A path's place.
#[derive(Default)]
pub struct Slot {
    /// Its connection while it is up.
    pub conn: Option<Conn>,
    /// Set where an error was met by a sender; the I/O thread takes the path down.
    pub failed: Option<Down>,
    /// Counters of connections that are gone, and of frames.
    pub stats: PathStats,
}

/// See the module.
pub struct Core {
    pub config: Arc<LinkConfig>,
    pub vm: u64,
    pub pool: BufPool,
    pub epoll: Arc<OwnedFd>,
    pub wake: Arc<OwnedFd>,
    pub instance: u64,
    pub peer_instance: u64,
    /// Session number; 0: none yet (listening side).
    pub session: u64,
    /// A connection was accepted in this session.
    pub established: bool,
    pub slots: Vec<Slot>,
    pub closing: bool,
    pub full: bool,
    pub last_rx: Instant,
    pub start: Instant,
    peer_generation: u64,
    peer_window: u64,
    peer_payload_max: usize,
    version: u16,
    features: u32,
    sticky: usize,
    send: SendState,
    recv: RecvState,
    duplicates: u64,
    resets: u64,
}

/// What to do with a Hello.
pub enum Verdict {
    /// Refuse.
    Refuse(Status),
    /// Join it to the session; `reset` if a former session ends, `fresh` if it is the first connection of a session.
    Join { reset: bool, fresh: bool },
}

impl Core {
    pub fn new(
        config: Arc<LinkConfig>,
        vm: u64,
        pool: BufPool,
        epoll: Arc<OwnedFd>,
        wake: Arc<OwnedFd>,
    ) -> Self {
        let now = Instant::now();
        let connects = config.role == super::config::Role::Connect;
        Self {
            vm,
            pool,
            epoll,
            wake,
            instance: nonce(),
            peer_instance: 0,
            session: if connects { nonce() } else { 0 },
            established: false,
            slots: config.paths.iter().map(|_| Slot::default()).collect(),
            closing: false,
            full: false,
            last_rx: now,
            start: now,
            peer_generation: 0,
            peer_window: config.window_bytes as u64,
            peer_payload_max: config.payload_bytes_max,
            version: VERSION_MAX,
            features: features::ALL,
            sticky: 0,
            send: SendState::default(),
            recv: RecvState::default(),
            duplicates: 0,
            resets: 0,
            config,
        }
    }

    // ---- sending ----

    fn room_for(&self, kind: Kind, bytes: usize) -> bool {
        let bound = self.peer_window.min(self.config.queue_bytes_max as u64);
        let bound = if kind == Kind::Control {
            bound.saturating_add(CONTROL_RESERVE_BYTES)
        } else {
            bound
        };
        let waiting = self.send.outstanding_bytes();
        waiting == 0 || waiting.saturating_add(bytes as u64) <= bound
    }

    /// Takes frames until one does not fit; returns how many.
    pub fn send(&mut self, frames: &[Frame]) -> Result<usize, SendError> {
        if self.closing {
            return Err(SendError::Closed);
        }
        let ack = self.recv.next();
        let mut touched = 0u8;
        let mut taken = 0;
        for frame in frames {
            if frame.payload().len() > self.peer_payload_max.min(self.config.payload_bytes_max) {
                self.flush_paths(touched);
                return Err(SendError::TooLong(frame.payload().len()));
            }
            if !self.room_for(frame.kind, frame.wire_bytes()) {
                self.full = true;
                break;
            }
            let path = self.choose();
            let seq = self.send.push(frame.clone(), path.map_or(0, |p| 1 << p));
            if let Some(p) = path {
                self.hand_over(p, frame, seq, ack);
                touched |= 1 << p;
            }
            taken += 1;
        }
        self.flush_paths(touched);
        if taken == 0 && !frames.is_empty() {
            Err(SendError::Full)
        } else {
            Ok(taken)
        }
    }

    fn hand_over(&mut self, path: usize, frame: &Frame, seq: u64, ack: u64) {
        let slot = &mut self.slots[path];
        if let Some(conn) = &mut slot.conn {
            conn.push(frame, self.version, seq, ack);
            conn.unacked_bytes += frame.wire_bytes();
            slot.stats.frames_out += 1;
        }
    }

    /// The path for the next frame: the one used last, unless another has clearly less to do.
    fn choose(&mut self) -> Option<usize> {
        let mut best: Option<(usize, (bool, usize, Duration))> = None;
        for (i, slot) in self.slots.iter().enumerate() {
            let Some(conn) = slot.conn.as_ref().filter(|_| slot.failed.is_none()) else {
                continue;
            };
            let load = conn.out_bytes() + conn.unacked_bytes;
            let load = if i == self.sticky {
                load.saturating_sub(STICKY_BYTES)
            } else {
                load
            };
            let key = (conn.suspect, load, conn.rtt.unwrap_or(Duration::MAX));
            let better = match &best {
                None => true,
                Some((at, known)) => {
                    key < *known && !(*at == self.sticky && key.1 == known.1 && key.0 == known.0)
                }
            };
            if better {
                best = Some((i, key));
            }
        }
        let chosen = best.map(|(i, _)| i);
        self.sticky = chosen.unwrap_or(self.sticky);
        chosen
    }

    fn flush_paths(&mut self, paths: u8) {
        for p in 0..self.slots.len() {
            if paths & (1 << p) != 0 {
                self.flush(p);
            }
        }
    }

    /// Writes what waits on a path as far as it goes, and asks epoll for the rest.
    pub fn flush(&mut self, path: usize) {
        let slot = &mut self.slots[path];
        let Some(conn) = slot.conn.as_mut().filter(|_| slot.failed.is_none()) else {
            return;
        };
        let result = conn.flush(Instant::now()).and_then(|done| {
            if done == conn.wants_out {
                conn.wants_out = !done;
                let mut flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
                flags.set(epoll::EventFlags::OUT, !done);
                let data = epoll::EventData::new_u64(conn.token);
                epoll::modify(&*self.epoll, conn.stream.fd(), data, flags)
                    .map_err(|e| Down::from_io(e.into()))?;
            }
            Ok(())
        });
        if let Err(why) = result {
            slot.failed = Some(why);
            self.wake();
        }
    }

    /// Wakes the I/O thread.
    pub fn wake(&self) {
        // Fails only when the counter is full: then it is awake anyway.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// Gives frames that no live path carries to those that are left. With `suspects`, also those that only silent
    /// paths carry, as duplicates.
    pub fn redistribute(&mut self, suspects: bool) {
        let (mut live, mut trusted) = (0u8, 0u8);
        for (i, s) in self.slots.iter().enumerate() {
            if let Some(c) = s.conn.as_ref().filter(|_| s.failed.is_none()) {
                live |= 1 << i;
                trusted |= u8::from(!c.suspect) << i;
            }
        }
        if live == 0 || (suspects && trusted == 0) {
            return;
        }
        let good = if trusted != 0 { trusted } else { live };
        let ack = self.recv.next();
        let mut send = std::mem::take(&mut self.send);
        let mut touched = 0;
        for u in send.unacked() {
            let orphan = u.paths & live == 0;
            let doubtful = suspects && u.paths & trusted == 0;
            if !orphan && !doubtful {
                continue;
            }
            let Some(p) = self.choose().filter(|p| good & (1 << p) != 0) else {
                break;
            };
            u.paths |= 1 << p;
            self.hand_over(p, &u.frame, u.seq, ack);
            self.slots[p].stats.frames_resent += 1;
            touched |= 1 << p;
        }
        self.send = send;
        self.flush_paths(touched);
    }

    // ---- receiving ----

    /// Takes one frame of a path. Numbered frames whose turn it is go to `ready`.
    pub fn on_frame(
        &mut self,
        path: usize,
        h: &Header,
        payload: Buf,
        now: Instant,
        ready: &mut Vec<Frame>,
    ) -> Result<(), Down> {
        if h.vm != self.vm {
            return Err(Down::Protocol("a frame of another VM"));
        }
        self.last_rx = now;
        self.slots[path].stats.frames_in += 1;
        if !self.acknowledged(h.ack) {
            return Err(Down::Protocol("acknowledges what was never sent"));
        }
        match h.kind {
            Kind::Control | Kind::Bulk => {
                let frame = Frame::received(h, payload);
                let bytes = frame.wire_bytes();
                let bound = self
                    .config
                    .window_bytes
                    .saturating_add(CONTROL_RESERVE_BYTES as usize);
                match self.recv.accept(h.seq, frame, bound, ready) {
                    Accepted::New => {}
                    Accepted::Duplicate => self.duplicates += 1,
                    Accepted::TooFarAhead => return Err(Down::Protocol("sends beyond the window")),
                }
                if let Some(conn) = &mut self.slots[path].conn {
                    conn.unanswered_bytes += bytes;
                }
                Ok(())
            }
            Kind::Heartbeat => self.on_heartbeat(path, &payload, now),
            Kind::Bye => Err(Down::Bye),
            Kind::Hello | Kind::Welcome => Err(Down::Protocol("greets twice")),
        }
    }

    /// The peer has all before `ack`; false if that cannot be.
    fn acknowledged(&mut self, ack: u64) -> bool {
        let slots = &mut self.slots;
        self.send.acknowledge(ack, |u| {
            for (p, slot) in slots.iter_mut().enumerate() {
                if let Some(c) = slot.conn.as_mut().filter(|_| u.paths & (1 << p) != 0) {
                    c.unacked_bytes = c.unacked_bytes.saturating_sub(u.frame.wire_bytes());
                }
            }
        })
    }

    fn on_heartbeat(&mut self, path: usize, payload: &[u8], now: Instant) -> Result<(), Down> {
        let (numbers, rest) = payload.as_chunks::<8>();
        let [sent, echo, held, consumed] = *numbers else {
            return Err(Down::Protocol("a heartbeat of the wrong length"));
        };
        if !rest.is_empty() {
            return Err(Down::Protocol("a heartbeat of the wrong length"));
        }
        let number = u64::from_le_bytes;
        if !self.send.consumed(number(consumed)) {
            return Err(Down::Protocol("has used more than was sent"));
        }
        let now_ns = self.now_ns(now);
        if let Some(conn) = &mut self.slots[path].conn {
            conn.heard = Some((number(sent), now));
            let trip = now_ns
                .checked_sub(number(echo))
                .and_then(|t| t.checked_sub(number(held)));
            if let Some(trip) = trip.filter(|_| number(echo) != 0) {
                let sample = Duration::from_nanos(trip);
                conn.rtt = Some(conn.rtt.map_or(sample, |r| (r * 7 + sample) / 8));
            }
        }
        Ok(())
    }

    /// Frames of this many bytes were used by the receiver's owner.
    pub fn add_consumed(&mut self, bytes: u64) {
        self.recv.add_consumed(bytes);
    }

    /// Sends an acknowledgement on the paths that have brought much since the last.
    pub fn acknowledge_if_due(&mut self, now: Instant) {
        for p in 0..self.slots.len() {
            if self.slots[p]
                .conn
                .as_ref()
                .is_some_and(|c| c.unanswered_bytes >= ACK_EVERY_BYTES)
            {
                self.heartbeat(p, now);
            }
        }
    }

    /// After `Full`, whether half of the queue is free again (told once).
    pub fn became_writable(&mut self) -> bool {
        let half = self.peer_window.min(self.config.queue_bytes_max as u64) / 2;
        let now = self.full && self.send.outstanding_bytes() <= half;
        self.full &= !now;
        now
    }

    // ---- paths and sessions ----

    fn now_ns(&self, now: Instant) -> u64 {
        u64::try_from(now.duration_since(self.start).as_nanos())
            .unwrap_or(u64::MAX)
            .saturating_add(1)
    }

    /// Queues a heartbeat on a path and writes it.
    pub fn heartbeat(&mut self, path: usize, now: Instant) {
        let sent = self.now_ns(now);
        let (vm, version, ack, consumed) = (
            self.vm,
            self.version,
            self.recv.next(),
            self.recv.consumed_bytes(),
        );
        let Some(conn) = &mut self.slots[path].conn else {
            return;
        };
        // A heartbeat behind bytes that do not move would say nothing, and would pile up.
        if conn.stalled_since.is_some() {
            return;
        }
        conn.unanswered_bytes = 0;
        let (echo, held) = conn.heard.map_or((0, 0), |(stamp, at)| {
            (
                stamp,
                u64::try_from(now.duration_since(at).as_nanos()).unwrap_or(u64::MAX),
            )
        });
        let mut payload = Vec::with_capacity(HEARTBEAT_BYTES);
        for v in [sent, echo, held, consumed] {
            payload.extend_from_slice(&v.to_le_bytes());
        }
        conn.push_own(Kind::Heartbeat, vm, version, ack, payload);
        self.flush(path);
    }

    /// Our Hello or Welcome for a path.
    pub fn hello(&self, path: usize, status: Status) -> Hello {
        let is_answer = self.config.role == super::config::Role::Listen;
        let (min, max) = if is_answer {
            (self.version, self.version)
        } else {
            (VERSION_MIN, VERSION_MAX)
        };
        Hello {
            version_min: min,
            version_max: max,
            features: if is_answer { self.features } else { features::ALL },
            session: self.session,
            instance: self.instance,
            peer_instance: self.peer_instance,
            generation: self.config.generation,
            received: self.recv.next(),
            consumed: self.recv.consumed_bytes(),
            window: self.config.window_bytes as u64,
            payload_max: u32::try_from(self.config.payload_bytes_max).unwrap_or(u32::MAX),
            path: path as u8,
            status,
            host: self.config.host.to_string(),
            peer: self.config.peer.to_string(),
        }
    }

    /// Listening side: what to do with a Hello. Changes nothing.
    pub fn judge(&self, h: &Hello, vm: u64) -> Verdict {
        if common_version(h.version_min, h.version_max).is_none() {
            return Verdict::Refuse(Status::Version);
        }
        if vm != self.vm {
            return Verdict::Refuse(Status::WrongVm);
        }
        if h.host != self.config.peer.as_str() || h.peer != self.config.host.as_str() {
            return Verdict::Refuse(Status::WrongHost);
        }
        if usize::from(h.path) >= self.slots.len() {
            return Verdict::Refuse(Status::WrongPath);
        }
        if h.generation < self.peer_generation {
            return Verdict::Refuse(Status::Stale);
        }
        let known = h.session == self.session && h.instance == self.peer_instance;
        let expected = h.peer_instance == self.instance;
        match (known, expected, h.peer_instance) {
            // Frames that it says it received were sent, or else it is confused: begin again.
            (true, _, _) if h.received > self.send.next() => Verdict::Refuse(Status::Reset),
            (true, true, _) | (true, _, 0) => Verdict::Join {
                reset: false,
                fresh: false,
            },
            // A session that is new to both.
            (false, _, 0) if h.session != 0 => Verdict::Join {
                reset: self.established,
                fresh: true,
            },
            _ => Verdict::Refuse(Status::Reset),
        }
    }

    /// Takes what a Hello or Welcome says of the peer; the connection then joins with [`Core::join`].
    pub fn learn(&mut self, h: &Hello) -> Result<(), Down> {
        let version = common_version(h.version_min, h.version_max).ok_or(Down::Refusing(Status::Version))?;
        self.version = version;
        self.features = h.features & features::ALL;
        self.session = h.session;
        self.peer_instance = h.instance;
        self.peer_generation = self.peer_generation.max(h.generation);
        self.peer_window = h.window;
        self.peer_payload_max = h.payload_max as usize;
        self.established = true;
        if !self.acknowledged(h.received) || !self.send.consumed(h.consumed) {
            return Err(Down::Protocol("acknowledges what was never sent"));
        }
        Ok(())
    }

    /// A connection becomes the path's; what nobody carries goes out on it.
    pub fn join(&mut self, path: usize, conn: Conn, now: Instant) {
        self.last_rx = now;
        let slot = &mut self.slots[path];
        slot.conn = Some(conn);
        slot.failed = None;
        slot.stats.connects += 1;
        self.redistribute(false);
        self.heartbeat(path, now);
    }

    /// A path's connection ends.
    pub fn take_down(&mut self, path: usize, why: &Down) -> Option<Conn> {
        let slot = &mut self.slots[path];
        slot.failed = None;
        let conn = slot.conn.take()?;
        slot.stats.bytes_in += conn.bytes.0;
        slot.stats.bytes_out += conn.bytes.1;
        if matches!(why, Down::Frame(_)) {
            slot.stats.corrupt += 1;
        }
        for u in self.send.unacked() {
            u.paths &= !(1 << path);
        }
        self.redistribute(false);
        Some(conn)
    }

    /// Number of paths that are up.
    pub fn up(&self) -> usize {
        self.slots.iter().filter(|s| s.conn.is_some()).count()
    }

    /// Forgets the session: all that waits and all that was received.
    pub fn reset_session(&mut self, session: u64) {
        self.session = session;
        self.peer_instance = 0;
        self.established = false;
        self.send = SendState::default();
        self.recv = RecvState::default();
        self.resets += 1;
        for slot in &mut self.slots {
            if let Some(c) = &mut slot.conn {
                c.unacked_bytes = 0;
            }
        }
    }

    /// Listening side: a new session begins; `had` says whether one ends by it. Frames that were queued before there
    /// was any session stay.
    pub fn reset_session_if(&mut self, had: bool, session: u64) {
        if had {
            self.reset_session(session);
        } else {
            self.session = session;
        }
    }

    /// Counters now.
    pub fn stats(&self) -> LinkStats {
        let paths = self.slots.iter().map(|s| {
            let mut p = s.stats;
            if let Some(c) = &s.conn {
                p.up = true;
                p.bytes_in += c.bytes.0;
                p.bytes_out += c.bytes.1;
                p.rtt_us = c.rtt.map(|r| u64::try_from(r.as_micros()).unwrap_or(u64::MAX));
                p.queued_bytes = c.out_bytes();
                p.unacked_bytes = c.unacked_bytes;
                p.suspect = c.suspect;
            }
            p
        });
        LinkStats {
            paths: paths.collect(),
            session: self.session,
            features: self.features,
            unacked_bytes: self.send.unacked_bytes(),
            outstanding_bytes: self.send.outstanding_bytes(),
            duplicates: self.duplicates,
            resets: self.resets,
            silent_ms: u64::try_from(self.last_rx.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}
