//! Virtio socket device (virtio 1.2, section 5.10): streams between ports of the guest and unix sockets of the host.
//!
//! All bounds are fixed: connections, greeters, bytes per connection, owed resets, packets per call. Host sockets
//! do not survive a move to another process; after a restore the guest is told so by a transport reset event, and
//! every connection is gone. Bytes for the host are not held back by epochs: vsock is for agents on the same host.

mod connection;
mod host;
mod packet;

use super::common::{
    self, Kick, Registration, count, disable, driver_error, enable, host_error, next_chain, signal, used,
};
use super::{Context, DeviceError, VirtioDevice, VirtioKind};
use crate::devices::io_thread::IoRegistrar;
use crate::state::{StateError, StateKind, StateRecord};
use connection::{Connection, Key, PAYLOAD_MAX, reset};
use host::{GREETERS_MAX, Greeter, Greeting, Host, greeting};
use packet::{HEADER, HOST_CID, Header, OP_REQUEST, OP_RST, TYPE_STREAM};
use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use steadfast_net::SocketName;
use virtio_queue::QueueT;

/// Connections at a time.
pub const CONNECTIONS_MAX: usize = 256;
/// Resets owed to the guest at a time; more are dropped, and its connects time out instead.
const RESETS_MAX: usize = 256;
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const TOKEN_LISTENER: u32 = 1;
const TOKEN_KICK: u32 = 2;
const TOKEN_CONNECTION: u32 = 0x100;
const TOKEN_GREETER: u32 = 0x1000;
/// Packets in each direction in one call.
const BUDGET: usize = 64;
/// First port that is given to connects from the host.
const HOST_PORTS: u32 = 1 << 30;

/// Counters.
#[derive(Debug, Default, Serialize)]
pub struct Stats {
    /// Connections made, by either side.
    pub connections: AtomicU64,
    /// Connects refused: nobody listens, table full, not valid.
    pub refused: AtomicU64,
    /// Payload bytes from the guest.
    pub bytes_out: AtomicU64,
    /// Payload bytes to the guest.
    pub bytes_in: AtomicU64,
    /// Packets of the guest that were not for us.
    pub ignored: AtomicU64,
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    guest_cid: u64,
}

/// The device.
pub struct Vsock {
    name: Arc<str>,
    guest_cid: u64,
    // Connections and greeters hold registrations of their streams, `host` one of its listener.
    connections: BTreeMap<Key, Connection>,
    slots: Vec<Option<Key>>,
    greeters: Vec<Option<Greeter>>,
    host: Host,
    kick: Kick,
    io: Option<IoRegistrar>,
    /// Connections that may have a packet for the guest, each once.
    ready: VecDeque<Key>,
    resets: VecDeque<Key>,
    more_to_accept: bool,
    next_port: u32,
    order: u64,
    /// The guest must be told that all connections are gone.
    transport_reset: bool,
    scratch: Vec<u8>,
    stats: Arc<Stats>,
}

impl Vsock {
    /// A device whose guest has context id `guest_cid`, with the host's sockets at `path`.
    ///
    /// # Errors
    /// [`DeviceError::Config`] for a reserved id, [`DeviceError::Host`] if the socket could not be made.
    pub fn new(name: impl Into<String>, guest_cid: u64, path: &Path) -> Result<Self, DeviceError> {
        let name: Arc<str> = name.into().into();
        let host = Host::bind(path)
            .map_err(|e| host_error(&name, &format!("listening on {}", path.display()), e))?;
        Self::on_host(name, guest_cid, host)
    }

    /// Listens on `path`, for [`Vsock::on_listener`]; the name is the caller's to hand over and to remove. A path left
    /// behind by a dead process is taken over.
    ///
    /// # Errors
    /// What the system said.
    pub fn listen(path: &Path) -> std::io::Result<(SocketName, UnixListener)> {
        host::listen(path)
    }

    /// As [`Vsock::listen`], while another process has `path`, which it will leave to this one.
    ///
    /// # Errors
    /// The socket could not be bound beside it.
    pub fn listen_aside(path: &Path) -> std::io::Result<(SocketName, UnixListener)> {
        host::listen_aside(path)
    }

    /// As [`Vsock::new`], with a socket that listens on `path` already and stays the caller's: a machine built after
    /// a reset listens on the same.
    ///
    /// # Errors
    /// As [`Vsock::new`].
    pub fn on_listener(
        name: impl Into<String>,
        guest_cid: u64,
        listener: UnixListener,
        path: &Path,
    ) -> Result<Self, DeviceError> {
        let name: Arc<str> = name.into().into();
        let host = Host::on(listener, path)
            .map_err(|e| host_error(&name, &format!("listening on {}", path.display()), e))?;
        Self::on_host(name, guest_cid, host)
    }

    fn on_host(name: Arc<str>, guest_cid: u64, host: Host) -> Result<Self, DeviceError> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(DeviceError::Config {
                device: name.to_string(),
                why: format!("context id {guest_cid}; use 3 to {}", u32::MAX - 1),
            });
        }
        let kick = Kick::new().map_err(|e| host_error(&name, "making its eventfd", e))?;
        Ok(Self {
            guest_cid,
            connections: BTreeMap::new(),
            slots: vec![None; CONNECTIONS_MAX],
            greeters: (0..GREETERS_MAX).map(|_| None).collect(),
            host,
            kick,
            io: None,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            more_to_accept: false,
            next_port: HOST_PORTS,
            order: 0,
            transport_reset: false,
            scratch: vec![0; HEADER + PAYLOAD_MAX],
            stats: Arc::default(),
            name,
        })
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    /// Notes that a connection may have something for the guest.
    fn mark(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && connection.wants()
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.ready.push_back(key);
        }
    }

    fn owe_reset(&mut self, key: Key) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back(key);
        }
    }

    fn close(&mut self, key: Key, tell: bool) {
        if let Some(connection) = self.connections.remove(&key) {
            if let Some(slot) = self.slots.get_mut(connection.slot) {
                *slot = None;
            }
            if connection.queued {
                self.ready.retain(|k| *k != key);
            }
        }
        if tell {
            self.owe_reset(key);
        }
    }

    fn insert(&mut self, key: Key, make: impl FnOnce(usize) -> Connection) -> bool {
        let (Some(slot), Some(io)) = (self.slots.iter().position(Option::is_none), &self.io) else {
            return false;
        };
        let mut connection = make(slot);
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        let token = TOKEN_CONNECTION + slot as u32;
        match Registration::with(io, connection.stream().as_raw_fd(), token, flags) {
            Ok(registration) => connection.registration = Some(registration),
            Err(error) => {
                tracing::warn!(device = %self.name, %error, "connection refused");
                return false;
            }
        }
        self.slots[slot] = Some(key);
        self.connections.insert(key, connection);
        count(&self.stats.connections, 1);
        self.mark(key);
        true
    }

    /// Handles one packet of the guest.
    fn packet(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            count(&self.stats.ignored, 1);
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        count(&self.stats.bytes_out, data.len() as u64);
        if let Some(connection) = self.connections.get_mut(&key) {
            let fine = header.kind == TYPE_STREAM && connection.packet(header, data).is_ok();
            if fine {
                self.mark(key);
            } else {
                self.close(key, header.op != OP_RST);
            }
            return;
        }
        if header.op == OP_RST {
            return;
        }
        let connected = if header.kind == TYPE_STREAM && header.op == OP_REQUEST {
            match self.host.connect(header.dst_port) {
                Ok(stream) => self.insert(key, |slot| Connection::accepted(stream, slot, header)),
                Err(error) => {
                    tracing::debug!(device = %self.name, port = header.dst_port, %error, "nobody listens");
                    false
                }
            }
        } else {
            false
        };
        if !connected {
            count(&self.stats.refused, 1);
            self.owe_reset(key);
        }
    }

    fn transmit(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let Some(queue) = ctx.queues.get_mut(TX).filter(|q| q.ready()) else {
            return Ok(());
        };
        let name = Arc::clone(&self.name);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut done = 0;
        let result = loop {
            if let Err(e) = disable(&name, ctx.memory, queue) {
                break Err(e);
            }
            let mut step = || -> Result<bool, DeviceError> {
                while done < BUDGET {
                    let Some(chain) = next_chain(&name, ctx.memory, queue)? else {
                        return enable(&name, ctx.memory, queue);
                    };
                    let mut raw = [0; HEADER];
                    let n = chain
                        .read_at(ctx.memory, 0, &mut raw)
                        .map_err(|e| driver_error(&name, e))?;
                    let header = Header::decode(&raw);
                    let rest = (chain.readable_len() as usize).saturating_sub(HEADER);
                    let len = header.len as usize;
                    if n < HEADER || len > rest || len > PAYLOAD_MAX {
                        let why = format!(
                            "packet of {} bytes that claims {len} of data",
                            chain.readable_len()
                        );
                        return Err(driver_error(&name, why));
                    }
                    chain
                        .read_at(ctx.memory, HEADER as u32, &mut scratch[..len])
                        .map_err(|e| driver_error(&name, e))?;
                    self.packet(&header, &scratch[..len]);
                    used(&name, ctx.memory, queue, chain.head, 0)?;
                    done += 1;
                }
                self.kick.arm();
                Ok(false)
            };
            match step() {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.scratch = scratch;
        result?;
        if done > 0 {
            signal(&name, ctx.memory, queue, TX, ctx.interrupt)?;
        }
        Ok(())
    }

    /// Puts the next packet for the guest into `scratch`, at most `room` bytes; returns its length.
    fn next_packet(&mut self, room: usize) -> Option<usize> {
        if let Some(key) = self.resets.pop_front() {
            self.scratch[..HEADER].copy_from_slice(&reset(key, self.guest_cid).encode());
            return Some(HEADER);
        }
        while let Some(key) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.queued = false;
            let room = room.min(self.scratch.len());
            let outcome = connection.next(key, self.guest_cid, &mut self.scratch[HEADER..room]);
            let header = match outcome {
                Ok(Some(header)) => header,
                Ok(None) => continue,
                Err(_) => {
                    self.close(key, false);
                    reset(key, self.guest_cid)
                }
            };
            self.mark(key);
            self.scratch[..HEADER].copy_from_slice(&header.encode());
            count(&self.stats.bytes_in, header.len.into());
            return Some(HEADER + header.len as usize);
        }
        None
    }

    fn receive(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let name = Arc::clone(&self.name);
        let Some(queue) = ctx.queues.get_mut(RX).filter(|q| q.ready()) else {
            return Ok(());
        };
        let mut done = 0;
        while !self.resets.is_empty() || !self.ready.is_empty() {
            if done == BUDGET {
                self.kick.arm();
                break;
            }
            let Some(chain) = next_chain(&name, ctx.memory, queue)? else {
                if enable(&name, ctx.memory, queue)? {
                    continue;
                }
                break;
            };
            let room = chain.writable_len() as usize;
            if room <= HEADER {
                return Err(driver_error(&name, "receive buffer without room for data"));
            }
            let Some(len) = self.next_packet(room) else {
                queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                break;
            };
            chain
                .write_at(ctx.memory, 0, &self.scratch[..len])
                .map_err(|e| driver_error(&name, e))?;
            used(&name, ctx.memory, queue, chain.head, len as u32)?;
            done += 1;
        }
        if done > 0 {
            signal(&name, ctx.memory, queue, RX, ctx.interrupt)?;
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone, once it has left a buffer for events.
    fn events(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let name = Arc::clone(&self.name);
        let Some(queue) = ctx.queues.get_mut(EVENT).filter(|q| q.ready()) else {
            return Ok(());
        };
        while self.transport_reset {
            let Some(chain) = next_chain(&name, ctx.memory, queue)? else {
                if enable(&name, ctx.memory, queue)? {
                    continue;
                }
                break;
            };
            // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0.
            let written = chain
                .write_at(ctx.memory, 0, &0u32.to_le_bytes())
                .map_err(|e| driver_error(&name, e))?;
            if written < 4 {
                return Err(driver_error(&name, "event buffer of less than 4 bytes"));
            }
            used(&name, ctx.memory, queue, chain.head, 4)?;
            signal(&name, ctx.memory, queue, EVENT, ctx.interrupt)?;
            self.transport_reset = false;
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..GREETERS_MAX {
            let stream = match self.host.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => {
                    // Out of descriptors, say. Edge-triggered: looked at again when the next one comes.
                    tracing::warn!(device = %self.name, %error, "connection from the host not accepted");
                    return;
                }
            };
            let free = self.greeters.iter().position(Option::is_none);
            // Who waits longest without a word makes room.
            let slot = free.or_else(|| {
                let all = self.greeters.iter().enumerate();
                all.min_by_key(|(_, g)| g.as_ref().map_or(0, |g| g.order))
                    .map(|(slot, _)| slot)
            });
            let (Some(slot), Some(io)) = (slot, &self.io) else {
                return;
            };
            self.order += 1;
            let token = TOKEN_GREETER + slot as u32;
            let flags = EventFlags::IN | EventFlags::ET;
            self.greeters[slot] = None;
            if let Ok(registration) = Registration::with(io, stream.as_raw_fd(), token, flags) {
                self.greeters[slot] = Some(Greeter {
                    registration: Some(registration),
                    stream,
                    order: self.order,
                });
            }
        }
        self.more_to_accept = true;
        self.kick.arm();
    }

    fn greet(&mut self, slot: usize) {
        let Some(place) = self.greeters.get_mut(slot) else {
            return;
        };
        let Some(greeter) = place.as_mut() else { return };
        let said = greeting(&mut greeter.stream);
        if said == Greeting::Wait {
            return;
        }
        let Some(mut greeter) = place.take() else { return };
        greeter.registration = None;
        let Greeting::Connect(guest_port) = said else {
            count(&self.stats.refused, 1);
            return;
        };
        // A port that no connection uses: there are far more ports than connections.
        let mut host_port = self.next_port;
        while self.connections.keys().any(|k| k.host_port == host_port) {
            host_port = host_port.wrapping_add(1).max(HOST_PORTS);
        }
        self.next_port = host_port.wrapping_add(1).max(HOST_PORTS);
        let key = Key {
            host_port,
            guest_port,
        };
        if !self.insert(key, |slot| Connection::requested(greeter.stream, slot)) {
            count(&self.stats.refused, 1);
        }
    }

    fn forget(&mut self) {
        self.connections.clear();
        self.slots.fill(None);
        self.greeters.iter_mut().for_each(|g| *g = None);
        self.ready.clear();
        self.resets.clear();
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Vsock
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        common::copy_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.io = Some(ctx.io.clone());
        let listener = self.host.listener.as_raw_fd();
        let edge = EventFlags::IN | EventFlags::ET;
        let registered = Registration::with(ctx.io, listener, TOKEN_LISTENER, edge).and_then(|r| {
            self.host.registration = Some(r);
            self.kick.register(ctx.io, TOKEN_KICK)
        });
        if let Err(e) = registered {
            self.reset();
            return Err(host_error(&self.name, "registering with its I/O thread", e));
        }
        self.events(ctx)
    }

    fn queue_notified(&mut self, ctx: &mut Context<'_>, queue: usize) -> Result<(), DeviceError> {
        match queue {
            TX => self.transmit(ctx)?,
            EVENT => self.events(ctx)?,
            _ => {}
        }
        self.receive(ctx)
    }

    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKEN_LISTENER => self.accept(),
            TOKEN_KICK => {
                self.kick.clear();
                if std::mem::take(&mut self.more_to_accept) {
                    self.accept();
                }
                self.transmit(ctx)?;
            }
            TOKEN_GREETER.. => self.greet((token - TOKEN_GREETER) as usize),
            TOKEN_CONNECTION.. => {
                let slot = (token - TOKEN_CONNECTION) as usize;
                if let Some(key) = self.slots.get(slot).copied().flatten()
                    && let Some(connection) = self.connections.get_mut(&key)
                {
                    if connection.ready().is_ok() {
                        self.mark(key);
                    } else {
                        self.close(key, true);
                    }
                }
            }
            _ => return Ok(()),
        }
        self.receive(ctx)
    }

    fn reset(&mut self) {
        self.forget();
        self.host.registration = None;
        self.kick.unregister();
        self.io = None;
        self.transport_reset = false;
    }

    fn drain(&mut self, _ctx: Option<&mut Context<'_>>, _within: Duration) -> Result<(), DeviceError> {
        // Packets are handled inside the call that took them; what waits for the host dies with its sockets.
        Ok(())
    }

    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError> {
        let state = State {
            guest_cid: self.guest_cid,
        };
        StateRecord::encode(StateKind::VirtioVsock, instance, 1, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        common::expect_kind(record, StateKind::VirtioVsock)?;
        let state: State = record.decode(1)?;
        if !(3..u64::from(u32::MAX)).contains(&state.guest_cid) {
            return Err(StateError::Refused(format!(
                "{}: impossible context id {}",
                self.name, state.guest_cid
            )));
        }
        self.forget();
        self.guest_cid = state.guest_cid;
        self.transport_reset = true;
        Ok(())
    }
}

/// Fuzz entry: see [`common::testkit::fuzz`]. Two host programs wait, one listens.
#[doc(hidden)]
pub fn fuzz_vsock(data: &[u8]) {
    use std::io::Write;
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let n = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("steadfast-fuzz-{}-{n}", std::process::id()));
    let mut port = path.clone().into_os_string();
    port.push("_0");
    let listener = std::os::unix::net::UnixListener::bind(&port);
    if let Ok(device) = Vsock::new("vsock", 3, &path) {
        let mut clients = Vec::new();
        for hello in [&b"CONNECT 7\nhello"[..], b"nonsense\n"] {
            if let Ok(mut client) = std::os::unix::net::UnixStream::connect(&path) {
                let _ = client.write_all(hello);
                clients.push(client);
            }
        }
        common::testkit::fuzz(device, 0, data);
    }
    drop(listener);
    let _ = std::fs::remove_file(&port);
}

#[cfg(test)]
mod tests;
