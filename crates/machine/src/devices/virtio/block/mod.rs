//! Virtio block device (virtio 1.2, section 5.2).
//!
//! Data passes through buffers of the device's own ([`buffer`]): writes are copied when they are submitted, reads
//! when they complete, both with the device's lock held. So whoever holds the lock knows that no disk request
//! changes guest memory, and what is saved then is exact: a request is either answered in the used ring, or is in
//! the list of requests in flight and is issued again after a restore. Issuing again is harmless: every operation
//! can be repeated, and a driver does not touch the range of a request that is not answered.
//!
//! A reset waits for what is in the host, so that no old write lands after a new one.

pub mod backend;
pub mod buffer;
mod engine;
pub mod image;
mod request;
pub mod threaded;
pub mod uring;

pub use backend::{BackendInfo, BlockBackend, ErrorPolicy, Failure, HoldErrors, ReportErrors, Verdict};
pub use fuzz::fuzz_block;
pub use image::image_backend;
pub use threaded::{BlockingDisk, RawFile, ThreadBackend};
pub use uring::UringBackend;

use super::common::{
    self, Kick, RateHandle, RateLimiter, Registration, Timer, chain_at, count, disable, enable, host_error,
    next_chain, put, signal,
};
use super::{Context, DeviceError, VirtioDevice, VirtioKind};
use crate::state::{StateError, StateKind, StateRecord};
use engine::Engine;
use request::{SECTOR, SEGMENT_SECTORS_MAX, SEGMENTS_MAX, SERIAL};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use virtio_queue::QueueT;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Most queues of one disk.
pub const QUEUES_MAX: u16 = 16;
const QUEUE_SIZE: u16 = 256;
const TOKEN_DONE: u32 = 1;
const TOKEN_KICK: u32 = 2;
const TOKEN_TIMER: u32 = 3;
/// Chains taken from a queue in one call.
const BUDGET: usize = 256;
/// Rounds of submit and complete in one call; more go on over the eventfd.
const TURNS: usize = 4;
const RESET_TIMEOUT: Duration = Duration::from_secs(10);

/// Counters.
#[derive(Debug, Default, Serialize)]
pub struct Stats {
    /// Reads answered.
    pub reads: AtomicU64,
    /// Writes answered.
    pub writes: AtomicU64,
    /// Flushes answered.
    pub flushes: AtomicU64,
    /// Discards answered.
    pub discards: AtomicU64,
    /// Write-zeroes answered.
    pub write_zeroes: AtomicU64,
    /// Bytes of reads answered.
    pub bytes_read: AtomicU64,
    /// Bytes of writes answered.
    pub bytes_written: AtomicU64,
    /// Requests that the host failed.
    pub errors: AtomicU64,
    /// Of these, how many were kept from the guest.
    pub held: AtomicU64,
    /// Requests that were not valid (outside the disk, unknown, write to a read-only disk).
    pub refused: AtomicU64,
    /// Times that the rate limit held the guest back.
    pub throttled: AtomicU64,
}

/// Settings of a disk.
pub struct BlockConfig {
    /// Name for messages.
    pub name: String,
    /// Serial number that the guest sees, at most 20 bytes.
    pub serial: String,
    /// Queues, 1 to [`QUEUES_MAX`]; one per vCPU is good.
    pub queues: u16,
    /// Limits.
    pub rate: RateHandle,
    /// What the guest sees of errors.
    pub policy: Box<dyn ErrorPolicy>,
}

/// Reaches a running disk from outside its lock.
#[derive(Clone)]
pub struct BlockHandle {
    kick: Arc<vmm_sys_util::eventfd::EventFd>,
    retry: Arc<AtomicBool>,
    stats: Arc<Stats>,
    rate: RateHandle,
}

impl BlockHandle {
    /// Issues requests again that were held after an error.
    pub fn retry(&self) {
        self.retry.store(true, Ordering::SeqCst);
        let _ = self.kick.write(1);
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The limits.
    #[must_use]
    pub fn rate(&self) -> &RateHandle {
        &self.rate
    }
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    capacity_bytes: u64,
    writeback: bool,
    /// (queue, head), oldest first.
    in_flight: Vec<(u16, u16)>,
}

/// The device.
pub struct Block {
    name: Arc<str>,
    queue_sizes: Vec<u16>,
    done: Option<Registration>,
    engine: Engine,
    info: BackendInfo,
    limiter: RateLimiter,
    kick: Kick,
    timer: Timer,
    handle: BlockHandle,
    writeback: bool,
    features: u64,
    /// Queues that have chains waiting while the engine is congested or limited.
    stalled: u64,
    /// Requests to issue again at activation.
    resume: Vec<(u16, u16)>,
}

/// A backend for a raw file or block device: io_uring, or threads where the host does not allow that.
///
/// # Errors
/// Neither could be set up.
pub fn raw_backend(file: File, info: BackendInfo) -> io::Result<Box<dyn BlockBackend>> {
    match UringBackend::new(file.try_clone()?, info.clone()) {
        Ok(backend) => Ok(Box::new(backend)),
        Err(error) => {
            tracing::warn!(%error, "io_uring is not available on this host; disks use threads, which is slower");
            Ok(Box::new(ThreadBackend::new(
                Arc::new(RawFile::new(file, info)),
                4,
            )?))
        }
    }
}

impl Block {
    /// A disk on `backend`.
    ///
    /// # Errors
    /// [`DeviceError::Config`] for impossible settings, [`DeviceError::Host`] if eventfds could not be made.
    pub fn new(config: BlockConfig, backend: Box<dyn BlockBackend>) -> Result<Self, DeviceError> {
        let refuse = |why: String| {
            Err(DeviceError::Config {
                device: config.name.clone(),
                why,
            })
        };
        let info = backend.info().clone();
        if config.queues == 0 || config.queues > QUEUES_MAX {
            return refuse(format!("{} queues; use 1 to {QUEUES_MAX}", config.queues));
        }
        if config.serial.len() > SERIAL {
            return refuse(format!(
                "serial number {:?} is longer than {SERIAL} bytes",
                config.serial
            ));
        }
        if info.capacity_bytes < SECTOR {
            return refuse("the disk is empty; it needs at least 512 bytes".to_owned());
        }
        if !matches!(info.logical_block, 512 | 4096) {
            return refuse(format!(
                "logical blocks of {} bytes; 512 or 4096 are possible",
                info.logical_block
            ));
        }
        let made = Kick::new().and_then(|k| Ok((k.handle()?, k, Timer::new()?)));
        let (kick_handle, kick, timer) =
            made.map_err(|e| host_error(&config.name, "making its eventfds", e))?;
        let mut serial = [0; SERIAL];
        serial[..config.serial.len()].copy_from_slice(config.serial.as_bytes());
        let handle = BlockHandle {
            kick: Arc::new(kick_handle),
            retry: Arc::default(),
            stats: Arc::default(),
            rate: config.rate.clone(),
        };
        let name: Arc<str> = config.name.into();
        Ok(Self {
            queue_sizes: vec![QUEUE_SIZE; usize::from(config.queues)],
            done: None,
            engine: Engine::new(
                Arc::clone(&name),
                backend,
                config.policy,
                serial,
                Arc::clone(&handle.stats),
            ),
            info,
            limiter: RateLimiter::new(config.rate),
            kick,
            timer,
            handle,
            writeback: true,
            features: 0,
            stalled: 0,
            resume: Vec::new(),
            name,
        })
    }

    /// Reaches the disk from outside.
    #[must_use]
    pub fn handle(&self) -> BlockHandle {
        self.handle.clone()
    }

    /// Decides anew what the guest sees of errors, for example when the VM becomes protected.
    pub fn set_policy(&mut self, policy: Box<dyn ErrorPolicy>) {
        self.engine.policy = policy;
    }

    fn choose_cache(&mut self) {
        // Without a flush command a guest must be able to rely on every write (virtio 1.2, 5.2.6.2).
        self.engine.write_through =
            self.features & F_FLUSH == 0 || (self.features & F_CONFIG_WCE != 0 && !self.writeback);
    }

    /// Takes chains from one queue.
    fn serve(&mut self, ctx: &mut Context<'_>, index: usize) -> Result<(), DeviceError> {
        let bit = 1u64 << (index & 63);
        self.stalled &= !bit;
        let mut taken = 0;
        loop {
            match ctx.queues.get_mut(index) {
                Some(queue) if queue.ready() => disable(&self.name, ctx.memory, queue)?,
                _ => return Ok(()),
            }
            loop {
                if self.engine.congested() {
                    // The next completion comes back to this queue.
                    self.stalled |= bit;
                    return Ok(());
                }
                if taken == BUDGET {
                    self.stalled |= bit;
                    self.kick.arm();
                    return Ok(());
                }
                let wait = self.limiter.wait();
                if !wait.is_zero() {
                    count(&self.handle.stats.throttled, 1);
                    self.stalled |= bit;
                    return self
                        .timer
                        .arm(wait)
                        .map_err(|e| host_error(&self.name, "arming its timer", e));
                }
                let Some(queue) = ctx.queues.get_mut(index) else {
                    return Ok(());
                };
                let Some(chain) = next_chain(&self.name, ctx.memory, queue)? else {
                    break;
                };
                let bytes = self.engine.accept(ctx, index, chain)?;
                self.limiter.charge(1, bytes);
                taken += 1;
            }
            let Some(queue) = ctx.queues.get_mut(index) else {
                return Ok(());
            };
            if !enable(&self.name, ctx.memory, queue)? {
                return Ok(());
            }
        }
    }

    /// Submits, completes, and takes more from stalled queues, for a bounded number of rounds; then interrupts.
    fn run(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        for turn in 0.. {
            let progress = self.engine.turn(ctx)?;
            if !progress {
                break;
            }
            if turn == TURNS {
                self.kick.arm();
                break;
            }
            if !self.engine.congested() {
                self.serve_stalled(ctx)?;
            }
        }
        self.run_signals(ctx)
    }

    fn run_signals(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let touched = self.engine.take_touched();
        for index in 0..ctx.queues.len() {
            if touched & (1 << (index & 63)) != 0
                && let Some(queue) = ctx.queues.get_mut(index)
            {
                signal(&self.name, ctx.memory, queue, index, ctx.interrupt)?;
            }
        }
        Ok(())
    }

    fn serve_stalled(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let stalled = self.stalled;
        for index in 0..self.queue_sizes.len() {
            if stalled & (1 << (index & 63)) != 0 {
                self.serve(ctx, index)?;
            }
        }
        Ok(())
    }

    fn begin(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let registered =
            Registration::new(ctx.io, self.engine.backend.event_fd(), TOKEN_DONE).and_then(|r| {
                self.done = Some(r);
                self.kick.register(ctx.io, TOKEN_KICK)?;
                self.timer.register(ctx.io, TOKEN_TIMER)
            });
        registered.map_err(|e| host_error(&self.name, "registering with its I/O thread", e))?;
        self.features = ctx.features;
        self.choose_cache();
        self.engine.start(ctx.queues.iter().map(QueueT::size));
        // What was in flight when the state was taken goes first, in its order. It is not held to the rate: it was
        // charged when it was taken.
        for (queue, head) in std::mem::take(&mut self.resume) {
            let Some(q) = ctx.queues.get(usize::from(queue)).filter(|q| q.ready()) else {
                return Err(common::driver_error(
                    &self.name,
                    format_args!("request in flight in queue {queue}, which is not in use"),
                ));
            };
            let chain = chain_at(&self.name, ctx.memory, q, head)?;
            self.engine.accept(ctx, usize::from(queue), chain)?;
        }
        self.run(ctx)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Block
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE;
        if self.queue_sizes.len() > 1 {
            features |= F_MQ;
        }
        // Discard and write-zeroes do not depend on the storage: a guest may meet another after a failover.
        features
            | if self.info.read_only {
                F_RO
            } else {
                F_DISCARD | F_WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut c = [0u8; 60];
        let blocks = self.info.physical_block.max(self.info.logical_block) / self.info.logical_block;
        put(&mut c, 0, &(self.info.capacity_bytes / SECTOR).to_le_bytes());
        put(&mut c, 12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(&mut c, 20, &self.info.logical_block.to_le_bytes());
        // Physical block exponent, alignment offset, minimal and optimal I/O size in logical blocks.
        put(&mut c, 24, &[blocks.ilog2() as u8, 0]);
        put(&mut c, 26, &(blocks as u16).to_le_bytes());
        put(&mut c, 32, &[u8::from(self.writeback)]);
        put(&mut c, 34, &(self.queue_sizes.len() as u16).to_le_bytes());
        put(&mut c, 36, &SEGMENT_SECTORS_MAX.to_le_bytes());
        put(&mut c, 40, &SEGMENTS_MAX.to_le_bytes());
        put(
            &mut c,
            44,
            &(self.info.logical_block / SECTOR as u32).to_le_bytes(),
        );
        put(&mut c, 48, &SEGMENT_SECTORS_MAX.to_le_bytes());
        put(&mut c, 52, &SEGMENTS_MAX.to_le_bytes());
        put(&mut c, 56, &[1]);
        common::copy_config(&c, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == 32
            && let Some(byte) = data.first()
        {
            self.writeback = *byte != 0;
            self.choose_cache();
        }
    }

    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        if self.engine.backend.in_flight() > 0 && !self.engine.abandon(Duration::ZERO) {
            let busy = io::ErrorKind::ResourceBusy.into();
            return Err(host_error(
                &self.name,
                "requests from before its reset are still in the disk",
                busy,
            ));
        }
        let begun = self.begin(ctx);
        if begun.is_err() {
            self.reset();
        }
        begun
    }

    fn queue_notified(&mut self, ctx: &mut Context<'_>, queue: usize) -> Result<(), DeviceError> {
        self.serve(ctx, queue)?;
        self.run(ctx)
    }

    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKEN_DONE => {}
            TOKEN_KICK => {
                self.kick.clear();
                if self.handle.retry.swap(false, Ordering::SeqCst) {
                    self.engine.retry_held();
                }
                self.serve_stalled(ctx)?;
            }
            TOKEN_TIMER => {
                self.timer.clear();
                self.serve_stalled(ctx)?;
            }
            _ => return Ok(()),
        }
        self.run(ctx)
    }

    fn reset(&mut self) {
        self.done = None;
        self.kick.unregister();
        self.timer.unregister();
        self.stalled = 0;
        self.resume.clear();
        self.features = 0;
        self.writeback = true;
        if !self.engine.abandon(RESET_TIMEOUT) {
            tracing::error!(device = %self.name, "disk did not finish its requests before the reset; \
                the device stays down until it does");
        }
    }

    fn drain(&mut self, ctx: Option<&mut Context<'_>>, within: Duration) -> Result<(), DeviceError> {
        match ctx {
            Some(ctx) => {
                let drained = self.engine.drain(ctx, within);
                if self.stalled != 0 {
                    // Chains not taken yet stay in their rings, and are taken if the machine goes on here.
                    self.kick.arm();
                }
                self.run_signals(ctx)?;
                drained
            }
            None if self.engine.backend.in_flight() == 0 || self.engine.abandon(within) => Ok(()),
            None => Err(host_error(
                &self.name,
                "waiting for its disk",
                io::ErrorKind::TimedOut.into(),
            )),
        }
    }

    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError> {
        let mut in_flight = self.resume.clone();
        in_flight.extend(self.engine.in_flight());
        let state = State {
            capacity_bytes: self.info.capacity_bytes,
            writeback: self.writeback,
            in_flight,
        };
        StateRecord::encode(StateKind::VirtioBlock, instance, 1, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        common::expect_kind(record, StateKind::VirtioBlock)?;
        let state: State = record.decode(1)?;
        let refuse = |why: String| Err(StateError::Refused(format!("{}: {why}", self.name)));
        if state.capacity_bytes != self.info.capacity_bytes {
            return refuse(format!(
                "the machine was saved with a disk of {} bytes, this one has {}",
                state.capacity_bytes, self.info.capacity_bytes
            ));
        }
        let mut seen = std::collections::HashSet::new();
        for (queue, head) in &state.in_flight {
            let size = self.queue_sizes.get(usize::from(*queue)).copied().unwrap_or(0);
            if *head >= size || !seen.insert((*queue, *head)) {
                return refuse(format!("request in flight with head {head} of queue {queue}"));
            }
        }
        self.writeback = state.writeback;
        self.resume = state.in_flight;
        Ok(())
    }
}

#[doc(hidden)]
pub mod fuzz;
#[cfg(test)]
mod tests;
