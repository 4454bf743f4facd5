//! The I/O thread: epoll, connecting, greeting, timers, delivery of events.

use super::config::{LinkConfig, Role};
use super::conn::Conn;
use super::core::{Core, Verdict};
use super::event::{Down, Event};
use super::socket;
use super::stream::Stream;
use super::tls::TlsContext;
use crate::frame::hello::{Hello, Status};
use crate::frame::{Frame, Header, Kind, PAYLOAD_BYTES_MAX_UNKNOWN_PEER, VERSION_MAX};
use crate::nonce::nonce;
use rustix::event::{Timespec, epoll};
use std::collections::HashMap;
use std::mem::{Discriminant, discriminant};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Token of the wake-up counter; listeners have 0, 1, ...
const TOKEN_WAKE: u64 = 1 << 32;
const TOKEN_FIRST_CONN: u64 = 1 << 33;
/// Connections that may be greeting at the same time.
const GREETING_MAX: usize = 16;
/// Frames and bytes taken from one path before others get their turn.
const BATCH_FRAMES: usize = 64;
const BATCH_BYTES: usize = 2 << 20;
/// Failures of strangers are reported at most so often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

enum Stage {
    Connecting,
    Handshake,
    Greeting,
}

struct Greeting {
    conn: Conn,
    stage: Stage,
    path: Option<usize>,
    session: u64,
    deadline: Instant,
}

struct Dial {
    at: Instant,
    backoff: Duration,
    busy: bool,
    reported: Option<Discriminant<Down>>,
}

/// The thread's own state.
pub struct Io<H> {
    pub core: Arc<Mutex<Core>>,
    pub config: Arc<LinkConfig>,
    pub epoll: Arc<OwnedFd>,
    pub wake: Arc<OwnedFd>,
    pub listeners: Vec<OwnedFd>,
    pub tls: Option<TlsContext>,
    pub handler: H,
    state: State,
}

struct State {
    greeting: HashMap<u64, Greeting>,
    path_of: HashMap<u64, usize>,
    dials: Vec<Dial>,
    next_token: u64,
    events: Vec<Event>,
    heartbeat_at: Instant,
    silent_reported_ms: u64,
    stranger: Option<(Discriminant<Down>, Instant)>,
    last_loop: Instant,
}

pub fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    // A panic while it was held can only have come from an overflow check; the state is still well-formed enough to be
    // taken down in order, which is all that will happen.
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

impl<H: FnMut(Event)> Io<H> {
    pub fn new(
        core: Arc<Mutex<Core>>,
        config: Arc<LinkConfig>,
        epoll: Arc<OwnedFd>,
        wake: Arc<OwnedFd>,
        listeners: Vec<OwnedFd>,
        tls: Option<TlsContext>,
        handler: H,
    ) -> Self {
        let now = Instant::now();
        let dial = || Dial {
            at: now,
            backoff: ms(config.backoff_ms.0),
            busy: false,
            reported: None,
        };
        let dials = if config.role == Role::Connect {
            config.paths.iter().map(|_| dial()).collect()
        } else {
            vec![]
        };
        let state = State {
            greeting: HashMap::new(),
            path_of: HashMap::new(),
            dials,
            next_token: TOKEN_FIRST_CONN,
            events: Vec::new(),
            heartbeat_at: now,
            silent_reported_ms: 0,
            stranger: None,
            last_loop: now,
        };
        Self {
            core,
            config,
            epoll,
            wake,
            listeners,
            tls,
            handler,
            state,
        }
    }

    /// Registers listeners and wake-up.
    pub fn register(&self) -> std::io::Result<()> {
        epoll::add(
            &*self.epoll,
            &*self.wake,
            epoll::EventData::new_u64(TOKEN_WAKE),
            epoll::EventFlags::IN,
        )?;
        for (i, l) in self.listeners.iter().enumerate() {
            epoll::add(
                &*self.epoll,
                l,
                epoll::EventData::new_u64(i as u64),
                epoll::EventFlags::IN,
            )?;
        }
        Ok(())
    }

    /// Runs until the link is closed.
    pub fn run(mut self) {
        let mut ready: Vec<epoll::Event> = Vec::with_capacity(32);
        loop {
            let now = Instant::now();
            self.timers(now);
            self.deliver();
            if lock(&self.core).closing {
                return;
            }
            let wait = self.next_timer().saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: wait.as_secs() as i64,
                tv_nsec: i64::from(wait.subsec_nanos()),
            };
            ready.clear();
            let before = Instant::now();
            let buffer = rustix::buffer::spare_capacity(&mut ready);
            if epoll::wait(&*self.epoll, buffer, Some(&timeout)).is_err() {
                // Interrupted: look again.
                continue;
            }
            let now = Instant::now();
            self.notice_starvation(now, before + wait);
            for event in &ready {
                self.dispatch(event.data.u64(), event.flags);
                self.deliver();
            }
            self.state.last_loop = Instant::now();
        }
    }

    /// If this thread was not let run, silence proves nothing: all clocks of silence begin again (I7).
    fn notice_starvation(&mut self, now: Instant, due: Instant) {
        let late = now.saturating_duration_since(due);
        if late < ms(self.config.suspect_ms.max(20)) {
            return;
        }
        self.state.events.push(Event::Starved {
            ms: u64::try_from(late.as_millis()).unwrap_or(u64::MAX),
        });
        let mut core = lock(&self.core);
        core.last_rx = now;
        for slot in &mut core.slots {
            if let Some(c) = &mut slot.conn {
                c.last_rx = now;
                if c.stalled_since.is_some() {
                    c.stalled_since = Some(now);
                }
            }
        }
    }

    fn deliver(&mut self) {
        // The handler may send, which needs the lock: it is not held here.
        for event in std::mem::take(&mut self.state.events) {
            (self.handler)(event);
        }
    }

    fn next_timer(&self) -> Instant {
        let dials = self.state.dials.iter().filter(|d| !d.busy).map(|d| d.at);
        let greetings = self.state.greeting.values().map(|g| g.deadline);
        dials.chain(greetings).fold(self.state.heartbeat_at, Instant::min)
    }

    fn timers(&mut self, now: Instant) {
        for path in 0..self.state.dials.len() {
            let d = &self.state.dials[path];
            if !d.busy && d.at <= now {
                self.dial(path, now);
            }
        }
        let late: Vec<u64> = self
            .state
            .greeting
            .iter()
            .filter(|(_, g)| g.deadline <= now)
            .map(|(token, _)| *token)
            .collect();
        for token in late {
            self.greeting_failed(token, Down::ConnectTimeout(self.config.handshake_timeout_ms));
        }
        if self.state.heartbeat_at <= now {
            self.state.heartbeat_at = now + ms(self.config.heartbeat_ms);
            self.beat(now);
        }
    }

    /// Once per heartbeat interval: send one, and look at who is silent.
    fn beat(&mut self, now: Instant) {
        let mut down = Vec::new();
        let silent_ms;
        {
            let mut core = lock(&self.core);
            let mut new_suspect = false;
            for p in 0..core.slots.len() {
                let slot = &mut core.slots[p];
                if let Some(why) = slot.failed.take() {
                    down.push((p, why));
                    continue;
                }
                let Some(conn) = &mut slot.conn else { continue };
                let silent = now.saturating_duration_since(conn.last_rx);
                let stalled = conn
                    .stalled_since
                    .map_or(Duration::ZERO, |t| now.saturating_duration_since(t));
                let limit = ms(self.config.path_timeout_ms);
                if silent > limit {
                    down.push((
                        p,
                        Down::Silent {
                            silent_ms: silent.as_millis() as u64,
                        },
                    ));
                } else if stalled > limit {
                    down.push((
                        p,
                        Down::Stalled {
                            stalled_ms: stalled.as_millis() as u64,
                        },
                    ));
                } else {
                    let suspect = silent.max(stalled) > ms(self.config.suspect_ms);
                    new_suspect |= suspect && !conn.suspect;
                    conn.suspect = suspect;
                    core.heartbeat(p, now);
                }
            }
            if new_suspect {
                core.redistribute(true);
            }
            if core.became_writable() {
                self.state.events.push(Event::Writable);
            }
            let silent = now.saturating_duration_since(core.last_rx);
            silent_ms = if core.established {
                silent.as_millis() as u64
            } else {
                0
            };
        }
        for (p, why) in down {
            self.path_down(p, why, now);
        }
        let every = self.config.silent_ms.max(1);
        if silent_ms < every {
            self.state.silent_reported_ms = 0;
        } else if silent_ms >= self.state.silent_reported_ms + every {
            self.state.silent_reported_ms = silent_ms;
            self.state.events.push(Event::PeerSilent { silent_ms });
        }
    }

    fn dispatch(&mut self, token: u64, flags: epoll::EventFlags) {
        if token == TOKEN_WAKE {
            let mut n = [0u8; 8];
            let _ = rustix::io::read(&*self.wake, &mut n);
            let failed: Vec<(usize, Down)> = {
                let mut core = lock(&self.core);
                core.slots
                    .iter_mut()
                    .enumerate()
                    .filter_map(|(i, s)| s.failed.take().map(|w| (i, w)))
                    .collect()
            };
            for (p, why) in failed {
                self.path_down(p, why, Instant::now());
            }
        } else if (token as usize) < self.listeners.len() {
            self.accept(token as usize);
        } else if self.state.greeting.contains_key(&token) {
            self.greet(token);
        } else if let Some(&path) = self.state.path_of.get(&token) {
            if flags.contains(epoll::EventFlags::OUT) {
                lock(&self.core).flush(path);
            }
            let others = epoll::EventFlags::IN
                | epoll::EventFlags::RDHUP
                | epoll::EventFlags::HUP
                | epoll::EventFlags::ERR;
            if flags.intersects(others) {
                self.receive(path);
            }
        }
    }

    // ---- frames ----

    /// Reads a path until its socket is empty, delivering as it goes.
    fn receive(&mut self, path: usize) {
        let mut ready: Vec<Frame> = Vec::new();
        let mut dry = false;
        loop {
            let now = Instant::now();
            let result = self.read_batch(path, now, &mut dry, &mut ready);
            let bytes: u64 = ready.iter().map(|f| f.wire_bytes() as u64).sum();
            self.state.events.extend(ready.drain(..).map(Event::Received));
            self.deliver();
            {
                let mut core = lock(&self.core);
                if !self.config.manual_credit {
                    core.add_consumed(bytes);
                }
                core.acknowledge_if_due(now);
                if core.became_writable() {
                    self.state.events.push(Event::Writable);
                }
            }
            match result {
                Ok(true) => {}
                Ok(false) => return,
                Err(why) => return self.path_down(path, why, now),
            }
        }
    }

    /// One batch of frames; `Ok(true)` if there is more.
    fn read_batch(
        &self,
        path: usize,
        now: Instant,
        dry: &mut bool,
        ready: &mut Vec<Frame>,
    ) -> Result<bool, Down> {
        let mut core = lock(&self.core);
        let core = &mut *core;
        let mut bytes = 0;
        for _ in 0..BATCH_FRAMES {
            let pool = core.pool.clone();
            let Some(conn) = &mut core.slots[path].conn else {
                return Ok(false);
            };
            let Some((header, payload)) = conn.next_frame(self.config.payload_bytes_max, &pool, now, dry)?
            else {
                return Ok(false);
            };
            conn.suspect = false;
            bytes += payload.len();
            core.on_frame(path, &header, payload, now, ready)?;
            if bytes > BATCH_BYTES {
                break;
            }
        }
        Ok(true)
    }

    fn path_down(&mut self, path: usize, why: Down, now: Instant) {
        let (was_up, left) = {
            let mut core = lock(&self.core);
            let conn = core.take_down(path, &why);
            (conn.map(|c| c.token), core.up())
        };
        let Some(token) = was_up else { return };
        self.state.path_of.remove(&token);
        if let Some(d) = self.state.dials.get_mut(path) {
            d.busy = false;
            d.at = now + ms(self.config.backoff_ms.0);
            d.backoff = ms(self.config.backoff_ms.0);
            d.reported = None;
        }
        self.state.events.push(Event::PathDown { path, why, left });
    }

    // ---- connecting and greeting ----

    fn begin(&mut self, fd: OwnedFd, stage: Stage, path: Option<usize>, now: Instant) -> Result<u64, Down> {
        let tls = match (&self.tls, self.config.role) {
            (None, _) => None,
            (Some(t), Role::Connect) => Some(t.client()?),
            (Some(t), Role::Listen) => Some(t.server()?),
        };
        let token = self.state.next_token;
        self.state.next_token += 1;
        let flags = match stage {
            Stage::Connecting => epoll::EventFlags::OUT,
            _ => epoll::EventFlags::IN | epoll::EventFlags::RDHUP,
        };
        epoll::add(&*self.epoll, &fd, epoll::EventData::new_u64(token), flags)
            .map_err(|e| Down::from_io(e.into()))?;
        let conn = Conn::new(Stream::new(fd, tls), token, now);
        let deadline = now + ms(self.config.handshake_timeout_ms);
        self.state.greeting.insert(
            token,
            Greeting {
                conn,
                stage,
                path,
                session: 0,
                deadline,
            },
        );
        Ok(token)
    }

    fn dial(&mut self, path: usize, now: Instant) {
        let p = &self.config.paths[path];
        self.state.dials[path].busy = true;
        let started = socket::connect(&p.addr, p.local, &self.config)
            .map_err(Down::from_io)
            .and_then(|fd| self.begin(fd, Stage::Connecting, Some(path), now));
        if let Err(why) = started {
            self.dial_failed(path, why, now);
        }
    }

    fn dial_failed(&mut self, path: usize, why: Down, now: Instant) {
        let Some(d) = self.state.dials.get_mut(path) else {
            return;
        };
        d.busy = false;
        d.at = now + d.backoff;
        d.backoff = (d.backoff * 2).min(ms(self.config.backoff_ms.1));
        let kind = discriminant(&why);
        if d.reported != Some(kind) {
            d.reported = Some(kind);
            self.state.events.push(Event::ConnectFailed {
                path: Some(path),
                why,
            });
        }
    }

    fn accept(&mut self, listener: usize) {
        let now = Instant::now();
        while let Ok(Some(fd)) = socket::accept(&self.listeners[listener]) {
            // Too many at once: the newest is turned away (closed), those under way go on.
            if self.state.greeting.len() >= GREETING_MAX {
                continue;
            }
            socket::tune(&fd, &self.config.paths[listener].addr, &self.config);
            if let Err(why) = self.begin(fd, Stage::Handshake, None, now) {
                self.stranger_failed(why, now);
            }
        }
    }

    fn stranger_failed(&mut self, why: Down, now: Instant) {
        let kind = discriminant(&why);
        let again = self
            .state
            .stranger
            .is_some_and(|(k, at)| k == kind && now < at + REPORT_EVERY);
        if !again {
            self.state.stranger = Some((kind, now));
            self.state.events.push(Event::ConnectFailed { path: None, why });
        }
    }

    fn greeting_failed(&mut self, token: u64, why: Down) {
        let Some(g) = self.state.greeting.remove(&token) else {
            return;
        };
        let now = Instant::now();
        match g.path {
            Some(path) => self.dial_failed(path, why, now),
            None => self.stranger_failed(why, now),
        }
    }

    fn greet(&mut self, token: u64) {
        if let Err(why) = self.greet_further(token) {
            self.greeting_failed(token, why);
        }
    }

    fn greet_further(&mut self, token: u64) -> Result<(), Down> {
        let now = Instant::now();
        let Some(g) = self.state.greeting.get_mut(&token) else {
            return Ok(());
        };
        if matches!(g.stage, Stage::Connecting) {
            socket::connect_result(g.conn.stream.fd()).map_err(Down::from_io)?;
            let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
            let data = epoll::EventData::new_u64(token);
            epoll::modify(&*self.epoll, g.conn.stream.fd(), data, flags)
                .map_err(|e| Down::from_io(e.into()))?;
            g.stage = Stage::Handshake;
        }
        if matches!(g.stage, Stage::Handshake) {
            if !g.conn.stream.handshake()? {
                return Ok(());
            }
            if let (Some(ctx), Some(conn)) = (&self.tls, g.conn.stream.tls()) {
                ctx.check_peer(conn)?;
            }
            g.stage = Stage::Greeting;
            if let Some(path) = g.path {
                let core = lock(&self.core);
                let hello = core.hello(path, Status::Accepted);
                g.session = hello.session;
                g.conn.push_own(Kind::Hello, core.vm, 1, 0, hello.encode());
                drop(core);
                // Some hundred bytes into an empty socket buffer: they fit, or the deadline ends it.
                g.conn.flush(now)?;
            }
        }
        let pool = lock(&self.core).pool.clone();
        let mut dry = false;
        let next = g
            .conn
            .next_frame(PAYLOAD_BYTES_MAX_UNKNOWN_PEER, &pool, now, &mut dry)?;
        let Some((header, payload)) = next else {
            return Ok(());
        };
        let expected = if g.path.is_some() {
            Kind::Welcome
        } else {
            Kind::Hello
        };
        if header.kind != expected {
            return Err(Down::Protocol("does not greet first"));
        }
        let hello = Hello::decode(&payload).map_err(|_| Down::Protocol("a malformed greeting"))?;
        match g.path {
            Some(path) => self.welcomed(token, path, &hello, now),
            None => self.greeted(token, &header, &hello, now),
        }
    }

    /// Connecting side: the answer to our Hello.
    fn welcomed(&mut self, token: u64, path: usize, hello: &Hello, now: Instant) -> Result<(), Down> {
        let Some(g) = self.state.greeting.get(&token) else {
            return Ok(());
        };
        let session = g.session;
        let mut core = lock(&self.core);
        if core.session != session {
            // The session was reset while this connection was greeting.
            return Err(Down::SessionReset);
        }
        if hello.status == Status::Reset {
            let had = core.established;
            core.reset_session(nonce());
            drop(core);
            self.drop_paths(None, now);
            if had {
                self.state.events.push(Event::PeerReset);
            }
            if let Some(g) = self.state.greeting.remove(&token) {
                drop(g);
            }
            let d = &mut self.state.dials[path];
            (d.busy, d.at) = (false, now);
            return Ok(());
        }
        if hello.status != Status::Accepted {
            return Err(Down::RefusedBy(hello.status));
        }
        if hello.host != self.config.peer.as_str() {
            return Err(Down::Refusing(Status::WrongHost));
        }
        if core.established && core.peer_instance != hello.instance {
            return Err(Down::Protocol("two peers answer on different paths"));
        }
        let fresh = !core.established;
        core.learn(hello)?;
        drop(core);
        self.up(token, path, fresh, now);
        Ok(())
    }

    /// Listening side: a Hello.
    fn greeted(&mut self, token: u64, header: &Header, hello: &Hello, now: Instant) -> Result<(), Down> {
        let path = usize::from(hello.path);
        let mut core = lock(&self.core);
        let verdict = core.judge(hello, header.vm);
        let (reset, fresh) = match verdict {
            Verdict::Refuse(status) => {
                let answer = core.hello(path.min(core.slots.len() - 1), status);
                let vm = core.vm;
                drop(core);
                if let Some(g) = self.state.greeting.get_mut(&token) {
                    g.conn
                        .push_own(Kind::Welcome, vm, VERSION_MAX, 0, answer.encode());
                    let _ = g.conn.flush(now);
                }
                return Err(Down::Refusing(status));
            }
            Verdict::Join { reset, fresh } => (reset, fresh),
        };
        if fresh {
            core.reset_session_if(reset, hello.session);
        }
        drop(core);
        if reset {
            self.drop_paths(None, now);
            self.state.events.push(Event::PeerReset);
        } else {
            self.drop_paths(Some(path), now);
        }
        let mut core = lock(&self.core);
        core.learn(hello)?;
        let answer = core.hello(path, Status::Accepted);
        let vm = core.vm;
        drop(core);
        if let Some(g) = self.state.greeting.get_mut(&token) {
            g.conn
                .push_own(Kind::Welcome, vm, VERSION_MAX, 0, answer.encode());
        }
        self.up(token, path, fresh, now);
        Ok(())
    }

    /// Ends one path, or all, in favour of something newer.
    fn drop_paths(&mut self, only: Option<usize>, now: Instant) {
        for p in 0..self.config.paths.len() {
            if only.is_none_or(|o| o == p) {
                let why = if only.is_some() {
                    Down::Replaced
                } else {
                    Down::SessionReset
                };
                self.path_down(p, why, now);
            }
        }
    }

    fn up(&mut self, token: u64, path: usize, fresh: bool, now: Instant) {
        let Some(g) = self.state.greeting.remove(&token) else {
            return;
        };
        self.state.path_of.insert(token, path);
        let session = {
            let mut core = lock(&self.core);
            core.join(path, g.conn, now);
            core.session
        };
        if let Some(d) = self.state.dials.get_mut(path) {
            d.backoff = ms(self.config.backoff_ms.0);
            d.reported = None;
        }
        if fresh {
            self.state.events.push(Event::SessionUp { session });
        }
        self.state.events.push(Event::PathUp { path });
        // What came behind the greeting is in the connection's buffer already.
        self.receive(path);
    }
}
