//! Virtio network device (virtio 1.2, section 5.1) with one queue pair and a control queue.
//!
//! Frames go through a [`NetBackend`]; what holds frames back until their epoch commits is a backend, too. A frame
//! is sent inside the call that took its chain, so no transmitted frame is ever in flight here. A frame that came
//! from the backend and found no receive buffers is kept, and is part of the state.
//!
//! The receive side is edge-triggered: the device remembers that the backend may have frames (`rx_ready`) and looks
//! again when buffers come. A frame over several buffers is given to the driver in one step.

mod control;

pub use steadfast_net::{NetBackend, Offloads, Sent, SocketBackend, Tap, TapBackend, TapError, TapOptions};

use super::common::{
    self, Chain, Kick, RateHandle, RateLimiter, Registration, Timer, count, disable, driver_error, enable,
    host_error, next_chain, put, signal, signal_since, used, used_together,
};
use super::{Context, DeviceError, VirtioDevice, VirtioKind};
use crate::state::{StateError, StateKind, StateRecord};
use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use steadfast_net::{FRAME_MAX, VNET_HEADER};
use virtio_queue::{Queue, QueueT};

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;
const OFFLOADS: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN;
const S_LINK_UP: u16 = 1;
const S_ANNOUNCE: u16 = 2;

const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;
const TOKEN_BACKEND: u32 = 1;
const TOKEN_KICK: u32 = 2;
const TOKEN_TIMER: u32 = 3;
const TOKEN_CHANGE: u32 = 4;
/// Frames in each direction in one call.
const BUDGET: usize = 128;
/// Bytes in each direction in one call.
const BUDGET_BYTES: u64 = 2 << 20;
/// How soon a backend that had no room is asked again, and how often before its frame is lost.
const RETRY: Duration = Duration::from_millis(1);
const RETRIES_MAX: u32 = 100;

/// Counters.
#[derive(Debug, Default, Serialize)]
pub struct Stats {
    /// Frames that the guest sent.
    pub tx_frames: AtomicU64,
    /// Bytes of these, without headers.
    pub tx_bytes: AtomicU64,
    /// Frames that the backend lost, or that were not frames.
    pub tx_dropped: AtomicU64,
    /// Frames that the guest received.
    pub rx_frames: AtomicU64,
    /// Bytes of these, without headers.
    pub rx_bytes: AtomicU64,
    /// Frames that did not fit the guest's buffers, or that the backend could not receive.
    pub rx_dropped: AtomicU64,
    /// Times that a rate limit held a direction back.
    pub throttled: AtomicU64,
}

/// Settings of a NIC.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// Name for messages.
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// MTU that the guest is told, if any.
    pub mtu: Option<u16>,
    /// Limits of what the guest sends.
    pub tx_rate: RateHandle,
    /// Limits of what the guest receives.
    pub rx_rate: RateHandle,
}

#[derive(Default)]
struct Wishes {
    announce: AtomicBool,
    link_down: AtomicBool,
}

/// Reaches a running NIC from outside its lock.
#[derive(Clone)]
pub struct NetHandle {
    kick: Arc<vmm_sys_util::eventfd::EventFd>,
    wishes: Arc<Wishes>,
    stats: Arc<Stats>,
    tx_rate: RateHandle,
    rx_rate: RateHandle,
}

impl NetHandle {
    /// Has the guest announce itself (gratuitous ARP), as after a failover to another switch port.
    pub fn announce(&self) {
        self.wishes.announce.store(true, Ordering::SeqCst);
        let _ = self.kick.write(1);
    }

    /// Plugs the cable in or out.
    pub fn set_link(&self, up: bool) {
        self.wishes.link_down.store(!up, Ordering::SeqCst);
        let _ = self.kick.write(1);
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Limits of what the guest sends.
    #[must_use]
    pub fn tx_rate(&self) -> &RateHandle {
        &self.tx_rate
    }

    /// Limits of what the guest receives.
    #[must_use]
    pub fn rx_rate(&self) -> &RateHandle {
        &self.rx_rate
    }
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    mac: [u8; 6],
    status: u16,
    filter: control::Filter,
    /// A received frame, with its header, that waits for buffers.
    waiting: Vec<u8>,
}

/// The device.
pub struct Net {
    name: Arc<str>,
    registration: Option<Registration>,
    backend: Box<dyn NetBackend>,
    kick: Kick,
    timer: Timer,
    change: Kick,
    handle: NetHandle,
    tx_limiter: RateLimiter,
    rx_limiter: RateLimiter,
    mac: [u8; 6],
    mtu: Option<u16>,
    status: u16,
    filter: control::Filter,
    features: u64,
    rx_ready: bool,
    rx_frame: Vec<u8>,
    /// Length of the frame in `rx_frame`; 0 when there is none.
    rx_len: usize,
    tx_frame: Vec<u8>,
    tx_retries: u32,
    used_heads: Vec<(u16, u32)>,
    chains: Vec<Chain>,
}

impl Net {
    /// A NIC on `backend`.
    ///
    /// # Errors
    /// [`DeviceError::Config`] for an impossible address or MTU, [`DeviceError::Host`] if eventfds could not be made.
    pub fn new(config: NetConfig, backend: Box<dyn NetBackend>) -> Result<Self, DeviceError> {
        let refuse = |why: String| {
            Err(DeviceError::Config {
                device: config.name.clone(),
                why,
            })
        };
        if config.mac[0] & 1 != 0 || config.mac == [0; 6] {
            return refuse(
                "the MAC address is a group address or zero; use one like 52:54:00:12:34:56".to_owned(),
            );
        }
        if config.mtu.is_some_and(|m| m < 68) {
            return refuse("the MTU is below 68".to_owned());
        }
        let made = Kick::new().and_then(|c| Ok((c.handle()?, c, Kick::new()?, Timer::new()?)));
        let (change_handle, change, kick, timer) =
            made.map_err(|e| host_error(&config.name, "making its eventfds", e))?;
        Ok(Self {
            registration: None,
            backend,
            kick,
            timer,
            change,
            handle: NetHandle {
                kick: Arc::new(change_handle),
                wishes: Arc::default(),
                stats: Arc::default(),
                tx_rate: config.tx_rate.clone(),
                rx_rate: config.rx_rate.clone(),
            },
            tx_limiter: RateLimiter::new(config.tx_rate),
            rx_limiter: RateLimiter::new(config.rx_rate),
            mac: config.mac,
            mtu: config.mtu,
            status: S_LINK_UP,
            filter: control::Filter::default(),
            features: 0,
            rx_ready: true,
            rx_frame: vec![0; FRAME_MAX],
            rx_len: 0,
            tx_frame: vec![0; FRAME_MAX],
            tx_retries: 0,
            used_heads: Vec::new(),
            chains: Vec::new(),
            name: config.name.into(),
        })
    }

    /// Reaches the NIC from outside.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        self.handle.clone()
    }

    /// The backend, for whoever holds the device's lock.
    pub fn backend_mut(&mut self) -> &mut dyn NetBackend {
        &mut *self.backend
    }

    fn arm(&self, delay: Duration) -> Result<(), DeviceError> {
        self.timer
            .arm(delay)
            .map_err(|e| host_error(&self.name, "arming its timer", e))
    }

    fn transmit(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let Some(queue) = ctx.queues.get_mut(TX).filter(|q| q.ready()) else {
            return Ok(());
        };
        let stats = Arc::clone(&self.handle.stats);
        let (mut done, mut bytes) = (0, 0);
        let mut pause = None;
        'serve: loop {
            disable(&self.name, ctx.memory, queue)?;
            loop {
                let wait = self.tx_limiter.wait();
                if !wait.is_zero() {
                    count(&stats.throttled, 1);
                    pause = Some(wait);
                    break 'serve;
                }
                if done >= BUDGET || bytes >= BUDGET_BYTES {
                    self.kick.arm();
                    break 'serve;
                }
                let Some(chain) = next_chain(&self.name, ctx.memory, queue)? else {
                    break;
                };
                let len = chain.readable_len() as usize;
                let Some(frame) = self.tx_frame.get_mut(..len) else {
                    return Err(driver_error(&self.name, format_args!("frame of {len} bytes")));
                };
                chain
                    .read_at(ctx.memory, 0, frame)
                    .map_err(|e| driver_error(&self.name, e))?;
                let sent = if len <= VNET_HEADER || self.status & S_LINK_UP == 0 {
                    Sent::Dropped
                } else {
                    self.backend.send(frame)
                };
                match sent {
                    Sent::WouldBlock if self.tx_retries < RETRIES_MAX => {
                        // The chain stays in the ring, as if it had not been looked at.
                        queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                        self.tx_retries += 1;
                        pause = Some(RETRY);
                        break 'serve;
                    }
                    Sent::Done => {
                        count(&stats.tx_frames, 1);
                        count(&stats.tx_bytes, (len - VNET_HEADER) as u64);
                        self.tx_limiter.charge(1, len as u64);
                    }
                    Sent::WouldBlock | Sent::Dropped => count(&stats.tx_dropped, 1),
                }
                self.tx_retries = 0;
                used(&self.name, ctx.memory, queue, chain.head, 0)?;
                done += 1;
                bytes += len as u64;
            }
            if !enable(&self.name, ctx.memory, queue)? {
                break;
            }
        }
        if done > 0 {
            signal(&self.name, ctx.memory, queue, TX, ctx.interrupt)?;
        }
        pause.map_or(Ok(()), |delay| self.arm(delay))
    }

    fn receive(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let Some(queue) = ctx.queues.get_mut(RX).filter(|q| q.ready()) else {
            return Ok(());
        };
        let stats = Arc::clone(&self.handle.stats);
        let since = queue.next_used();
        let (mut frames, mut bytes) = (0, 0);
        let mut pause = None;
        while self.rx_ready || self.rx_len > 0 {
            if frames >= BUDGET || bytes >= BUDGET_BYTES {
                self.kick.arm();
                break;
            }
            if self.rx_len == 0 {
                let wait = self.rx_limiter.wait();
                if !wait.is_zero() {
                    count(&stats.throttled, 1);
                    pause = Some(wait);
                    break;
                }
                match self.backend.receive(&mut self.rx_frame) {
                    Ok(Some(n)) if n <= VNET_HEADER || self.status & S_LINK_UP == 0 => {
                        count(&stats.rx_dropped, 1);
                        frames += 1;
                        continue;
                    }
                    Ok(Some(n)) => {
                        self.rx_len = n.min(FRAME_MAX);
                        self.rx_limiter.charge(1, n as u64);
                    }
                    Ok(None) => {
                        self.rx_ready = false;
                        break;
                    }
                    Err(error) => {
                        tracing::debug!(device = %self.name, %error, "frame not received");
                        count(&stats.rx_dropped, 1);
                        frames += 1;
                        continue;
                    }
                }
            }
            match self.deliver(ctx.memory, queue)? {
                Delivered::Frame => {
                    count(&stats.rx_frames, 1);
                    count(&stats.rx_bytes, (self.rx_len - VNET_HEADER) as u64);
                    bytes += self.rx_len as u64;
                }
                Delivered::TooLarge => count(&stats.rx_dropped, 1),
                Delivered::NoBuffers => break,
            }
            self.rx_len = 0;
            frames += 1;
        }
        signal_since(&self.name, ctx.memory, queue, since, RX, ctx.interrupt)?;
        pause.map_or(Ok(()), |delay| self.arm(delay))
    }

    /// Puts the waiting frame into buffers of the guest.
    fn deliver(
        &mut self,
        memory: &crate::memory::GuestMemory,
        queue: &mut Queue,
    ) -> Result<Delivered, DeviceError> {
        let first = queue.next_avail();
        let merge = self.features & F_MRG_RXBUF != 0;
        self.chains.clear();
        let mut room = 0;
        while room < self.rx_len {
            if !merge && !self.chains.is_empty() {
                // The driver's buffers are smaller than its own features ask for.
                queue.set_next_avail(first);
                return Ok(Delivered::TooLarge);
            }
            match next_chain(&self.name, memory, queue)? {
                Some(chain) if (chain.writable_len() as usize) < VNET_HEADER => {
                    return Err(driver_error(&self.name, "receive buffer smaller than a header"));
                }
                Some(chain) => {
                    room += chain.writable_len() as usize;
                    self.chains.push(chain);
                }
                None => {
                    queue.set_next_avail(first);
                    if self.chains.len() >= usize::from(queue.size()) {
                        // All its buffers together are too small: waiting would be for ever.
                        return Ok(Delivered::TooLarge);
                    }
                    if enable(&self.name, memory, queue)?
                        && queue
                            .avail_idx(memory, Ordering::Acquire)
                            .is_ok_and(|i| usize::from(i.0.wrapping_sub(first)) > self.chains.len())
                    {
                        // More came meanwhile.
                        self.chains.clear();
                        room = 0;
                        continue;
                    }
                    return Ok(Delivered::NoBuffers);
                }
            }
        }
        // Modern drivers find the number of buffers in every header (virtio 1.2, 5.1.6.4).
        let buffers = self.chains.len() as u16;
        put(&mut self.rx_frame, 10, &buffers.to_le_bytes());
        self.used_heads.clear();
        let mut at = 0;
        for chain in &self.chains {
            let written = chain
                .write_at(memory, 0, &self.rx_frame[at..self.rx_len])
                .map_err(|e| driver_error(&self.name, e))?;
            self.used_heads.push((chain.head, written as u32));
            at += written;
        }
        used_together(&self.name, memory, queue, &self.used_heads)?;
        Ok(Delivered::Frame)
    }

    fn control(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let Some(queue) = ctx.queues.get_mut(CTRL).filter(|q| q.ready()) else {
            return Ok(());
        };
        let mut done = 0;
        'serve: loop {
            disable(&self.name, ctx.memory, queue)?;
            loop {
                if done == BUDGET {
                    self.kick.arm();
                    break 'serve;
                }
                let Some(chain) = next_chain(&self.name, ctx.memory, queue)? else {
                    break;
                };
                let mut command = vec![0; chain.readable_len().min(control::COMMAND_MAX) as usize];
                chain
                    .read_at(ctx.memory, 0, &mut command)
                    .map_err(|e| driver_error(&self.name, e))?;
                if chain.writable_len() == 0 || command.len() < 2 {
                    return Err(driver_error(
                        &self.name,
                        "control command without class, command or answer",
                    ));
                }
                let whole = command.len() == chain.readable_len() as usize;
                let ack = if whole && self.command(&command) { 0u8 } else { 1 };
                chain
                    .write_at(ctx.memory, 0, &[ack])
                    .map_err(|e| driver_error(&self.name, e))?;
                used(&self.name, ctx.memory, queue, chain.head, 1)?;
                done += 1;
            }
            if !enable(&self.name, ctx.memory, queue)? {
                break;
            }
        }
        if done > 0 {
            signal(&self.name, ctx.memory, queue, CTRL, ctx.interrupt)?;
        }
        Ok(())
    }

    fn command(&mut self, command: &[u8]) -> bool {
        match control::parse(command) {
            Some(control::Command::Filter(change)) => {
                self.filter.apply(change);
                true
            }
            Some(control::Command::SetMac(mac)) if mac[0] & 1 == 0 => {
                self.mac = mac;
                true
            }
            Some(control::Command::Announced) => {
                self.status &= !S_ANNOUNCE;
                true
            }
            _ => false,
        }
    }

    /// Brings the wishes of the handle into the configuration.
    fn change(&mut self, ctx: &mut Context<'_>) {
        let mut status = self.status | S_LINK_UP;
        if self.handle.wishes.link_down.load(Ordering::SeqCst) {
            status &= !S_LINK_UP;
        }
        let announced = self.handle.wishes.announce.swap(false, Ordering::SeqCst);
        if announced && ctx.features & F_GUEST_ANNOUNCE != 0 {
            status |= S_ANNOUNCE;
        }
        let news = status != self.status || (announced && status & S_ANNOUNCE != 0);
        self.status = status;
        if news && ctx.features & F_STATUS != 0 {
            ctx.interrupt.config();
        }
    }

    fn begin(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.features = ctx.features;
        let has = |bit: u64| ctx.features & bit != 0;
        let offloads = Offloads {
            checksum: has(F_GUEST_CSUM),
            tso4: has(F_GUEST_TSO4),
            tso6: has(F_GUEST_TSO6),
            ecn: has(F_GUEST_ECN),
        };
        self.backend
            .set_offloads(offloads)
            .map_err(|e| host_error(&self.name, "setting offloads", e))?;
        let edge = EventFlags::IN | EventFlags::ET;
        let registered = Registration::with(ctx.io, self.backend.fd(), TOKEN_BACKEND, edge).and_then(|r| {
            self.registration = Some(r);
            self.kick.register(ctx.io, TOKEN_KICK)?;
            self.timer.register(ctx.io, TOKEN_TIMER)?;
            self.change.register(ctx.io, TOKEN_CHANGE)
        });
        registered.map_err(|e| host_error(&self.name, "registering with its I/O thread", e))?;
        self.rx_ready = true;
        self.change.arm();
        self.kick.arm();
        Ok(())
    }
}

enum Delivered {
    Frame,
    TooLarge,
    NoBuffers,
}

impl VirtioDevice for Net {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Net
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let mut features =
            F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR | F_GUEST_ANNOUNCE;
        if self.backend.can_offload() {
            features |= OFFLOADS;
        }
        if self.mtu.is_some() {
            features |= F_MTU;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        put(&mut config, 0, &self.mac);
        put(&mut config, 6, &self.status.to_le_bytes());
        put(&mut config, 8, &1u16.to_le_bytes());
        put(&mut config, 10, &self.mtu.unwrap_or(0).to_le_bytes());
        common::copy_config(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // Read-only since virtio 1.0; the address is set over the control queue.
    }

    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let begun = self.begin(ctx);
        if begun.is_err() {
            self.reset();
        }
        begun
    }

    fn queue_notified(&mut self, ctx: &mut Context<'_>, queue: usize) -> Result<(), DeviceError> {
        match queue {
            RX => self.receive(ctx),
            TX => self.transmit(ctx),
            CTRL => self.control(ctx),
            _ => Ok(()),
        }
    }

    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKEN_BACKEND => {
                self.rx_ready = true;
                self.receive(ctx)
            }
            TOKEN_KICK => {
                self.kick.clear();
                self.transmit(ctx)?;
                self.control(ctx)?;
                self.receive(ctx)
            }
            TOKEN_TIMER => {
                self.timer.clear();
                self.transmit(ctx)?;
                self.receive(ctx)
            }
            TOKEN_CHANGE => {
                self.change.clear();
                self.change(ctx);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.registration = None;
        self.kick.unregister();
        self.timer.unregister();
        self.change.unregister();
        self.filter = control::Filter::default();
        self.features = 0;
        self.status &= !S_ANNOUNCE;
        self.rx_len = 0;
        self.tx_retries = 0;
    }

    fn drain(&mut self, _ctx: Option<&mut Context<'_>>, _within: Duration) -> Result<(), DeviceError> {
        // Frames are handed over inside the call that took them.
        Ok(())
    }

    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError> {
        let state = State {
            mac: self.mac,
            status: self.status,
            filter: self.filter,
            waiting: self.rx_frame[..self.rx_len].to_vec(),
        };
        StateRecord::encode(StateKind::VirtioNet, instance, 1, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        common::expect_kind(record, StateKind::VirtioNet)?;
        let state: State = record.decode(1)?;
        let len = state.waiting.len();
        if len > FRAME_MAX || (len > 0 && len <= VNET_HEADER) || state.mac[0] & 1 != 0 {
            return Err(StateError::Refused(format!(
                "{}: impossible waiting frame ({len} bytes) or address",
                self.name
            )));
        }
        self.rx_frame[..len].copy_from_slice(&state.waiting);
        self.rx_len = len;
        self.mac = state.mac;
        self.status = state.status & (S_LINK_UP | S_ANNOUNCE);
        self.filter = state.filter;
        self.handle
            .wishes
            .link_down
            .store(self.status & S_LINK_UP == 0, Ordering::SeqCst);
        Ok(())
    }
}

/// Fuzz entry: see [`common::testkit::fuzz`]. Frames wait on the backend.
#[doc(hidden)]
pub fn fuzz_net(data: &[u8]) {
    let Ok((ours, theirs)) = std::os::unix::net::UnixDatagram::pair() else {
        return;
    };
    if theirs.set_nonblocking(true).is_err() {
        return;
    }
    for len in [13, 60, 1500, 9000, 65000] {
        let _ = theirs.send(&vec![0x5a; len]);
    }
    let Ok(backend) = SocketBackend::new(ours) else {
        return;
    };
    let config = NetConfig {
        name: "net".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        tx_rate: RateHandle::default(),
        rx_rate: RateHandle::default(),
    };
    if let Ok(device) = Net::new(config, Box::new(backend)) {
        let merge = if data.first().is_some_and(|b| b & 1 != 0) {
            F_MRG_RXBUF
        } else {
            0
        };
        common::testkit::fuzz(device, merge | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE, data);
    }
}

#[cfg(test)]
mod tests;
