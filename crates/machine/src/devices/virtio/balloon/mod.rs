//! Virtio memory balloon device (virtio 1.2, section 5.5): inflate and deflate, statistics, free page reporting.
//!
//! Memory goes back to the host through a [`PageReclaimer`], which knows how RAM is backed and what replication must
//! hear of it. Only whole pages that lie in RAM are handed over; what a guest claims beyond that is ignored.

use super::common::{
    self, Chain, Kick, count, disable, driver_error, enable, host_error, next_chain, put, signal, used,
};
use super::{Context, DeviceError, VirtioDevice, VirtioKind};
use crate::memory::GuestMemory;
use crate::state::{StateError, StateKind, StateRecord};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use steadfast_types::PAGE_SIZE;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
const QUEUE_SIZES: [u16; 4] = [128, 128, 64, 64];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const TOKEN_KICK: u32 = 1;
const TOKEN_CHANGE: u32 = 2;
/// Page numbers in one chain; Linux sends 256.
const PAGES_MAX: u32 = 65536;
/// Page numbers, and chains, handled in one call.
const BUDGET_PAGES: u64 = 65536;
const BUDGET: usize = 64;
/// Statistics in one report; 16 are defined.
const STATS_MAX: usize = 64;

/// Gives pages back to the host. They read as zeroes afterwards, or keep their contents; the guest knows both.
///
/// Called with the lock of the balloon held: be quick. The implementation decides whether a replica must hear of
/// the page's new contents (it need not: the guest does not read a page it gave away before it writes it, except
/// through free page reporting with poisoning, which is not offered).
pub trait PageReclaimer: Send {
    /// Takes `pages` pages from guest page number `first_gfn` on; all of them lie in one region of RAM.
    fn reclaim(&self, first_gfn: u64, pages: u64);
}

/// Counters.
#[derive(Debug, Default)]
pub struct Stats {
    /// Pages that the guest gave away by inflating.
    pub inflated: AtomicU64,
    /// Pages that it took back.
    pub deflated: AtomicU64,
    /// Pages reported free.
    pub reported: AtomicU64,
    /// Page numbers outside RAM.
    pub ignored: AtomicU64,
}

#[derive(Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    want_stats: AtomicBool,
    guest: Mutex<BTreeMap<u16, u64>>,
    stats: Stats,
}

/// Reaches a running balloon from outside its lock.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
    kick: Arc<vmm_sys_util::eventfd::EventFd>,
}

impl BalloonHandle {
    /// Asks the guest to give `pages` pages of 4 KiB away, in all.
    pub fn set_target(&self, pages: u32) {
        self.shared.target.store(pages, Ordering::SeqCst);
        let _ = self.kick.write(1);
    }

    /// Pages asked for.
    #[must_use]
    pub fn target(&self) -> u32 {
        self.shared.target.load(Ordering::SeqCst)
    }

    /// Pages that the guest says it has given away.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.shared.actual.load(Ordering::SeqCst)
    }

    /// Asks the guest for fresh statistics.
    pub fn refresh(&self) {
        self.shared.want_stats.store(true, Ordering::SeqCst);
        let _ = self.kick.write(1);
    }

    /// The last statistics, by tag (virtio 1.2, 5.5.6.4). A guest's word.
    #[must_use]
    pub fn guest_stats(&self) -> BTreeMap<u16, u64> {
        self.shared
            .guest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.shared.stats
    }
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    target: u32,
    actual: u32,
    /// The buffer that the guest left for the next statistics.
    stats_head: Option<u16>,
}

/// The device.
pub struct Balloon {
    name: String,
    reclaimer: Box<dyn PageReclaimer>,
    kick: Kick,
    change: Kick,
    handle: BalloonHandle,
    shown: u32,
    features: u64,
    stats_head: Option<u16>,
    numbers: Vec<u8>,
}

impl Balloon {
    /// A balloon that is empty.
    ///
    /// # Errors
    /// eventfds could not be made.
    pub fn new(name: impl Into<String>, reclaimer: Box<dyn PageReclaimer>) -> io::Result<Self> {
        let change = Kick::new()?;
        Ok(Self {
            name: name.into(),
            reclaimer,
            kick: Kick::new()?,
            handle: BalloonHandle {
                shared: Arc::default(),
                kick: Arc::new(change.handle()?),
            },
            change,
            shown: 0,
            features: 0,
            stats_head: None,
            numbers: Vec::new(),
        })
    }

    /// Reaches the balloon from outside.
    #[must_use]
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    /// Statistics and reporting queues exist only if negotiated, and are numbered without gaps.
    fn stats_queue(&self) -> Option<usize> {
        (self.features & F_STATS_VQ != 0).then_some(2)
    }

    fn reporting_queue(&self) -> Option<usize> {
        (self.features & F_REPORTING != 0).then(|| self.stats_queue().map_or(2, |s| s + 1))
    }

    fn serve(&mut self, ctx: &mut Context<'_>, index: usize) -> Result<(), DeviceError> {
        let reporting = self.reporting_queue() == Some(index);
        let stats = self.stats_queue() == Some(index);
        if !reporting && !stats && index > DEFLATE {
            return Ok(());
        }
        let Some(queue) = ctx.queues.get_mut(index).filter(|q| q.ready()) else {
            return Ok(());
        };
        let (mut chains, mut pages, mut answered) = (0, 0, false);
        'serve: loop {
            disable(&self.name, ctx.memory, queue)?;
            loop {
                if chains >= BUDGET || pages >= BUDGET_PAGES {
                    self.kick.arm();
                    break 'serve;
                }
                let Some(chain) = next_chain(&self.name, ctx.memory, queue)? else {
                    break;
                };
                chains += 1;
                if stats {
                    self.read_stats(ctx.memory, &chain)?;
                    // The buffer stays here until the next statistics are wanted; a second one releases the first.
                    if let Some(old) = self.stats_head.replace(chain.head) {
                        used(&self.name, ctx.memory, queue, old, 0)?;
                        answered = true;
                    }
                    continue;
                }
                pages += if reporting {
                    self.report(ctx.memory, &chain)
                } else {
                    self.numbers(ctx.memory, &chain, index == INFLATE)?
                };
                used(&self.name, ctx.memory, queue, chain.head, 0)?;
                answered = true;
            }
            if !enable(&self.name, ctx.memory, queue)? {
                break;
            }
        }
        if answered {
            signal(&self.name, ctx.memory, queue, index, ctx.interrupt)?;
        }
        if stats {
            self.request_stats(ctx)?;
        }
        Ok(())
    }

    /// Reads page numbers and hands runs of them to the reclaimer.
    fn numbers(&mut self, memory: &GuestMemory, chain: &Chain, inflate: bool) -> Result<u64, DeviceError> {
        let len = chain.readable_len();
        if !len.is_multiple_of(4) || len / 4 > PAGES_MAX {
            return Err(driver_error(
                &self.name,
                format_args!("page numbers in {len} bytes"),
            ));
        }
        let pages = u64::from(len / 4);
        let stats = &self.handle.shared.stats;
        if !inflate {
            count(&stats.deflated, pages);
            return Ok(pages);
        }
        self.numbers.resize(len as usize, 0);
        chain
            .read_at(memory, 0, &mut self.numbers)
            .map_err(|e| driver_error(&self.name, e))?;
        let mut gfns: Vec<u64> = self
            .numbers
            .chunks_exact(4)
            .map(|n| u64::from(u32::from_le_bytes([n[0], n[1], n[2], n[3]])))
            .collect();
        // Linux hands them out in falling order; sorting makes runs of them.
        gfns.sort_unstable();
        gfns.dedup();
        let mut run: Option<(u64, u64)> = None;
        let mut given = 0;
        for gfn in gfns {
            run = match run {
                Some((first, n)) if first + n == gfn => Some((first, n + 1)),
                other => {
                    given += self.reclaim(memory, other);
                    Some((gfn, 1))
                }
            };
        }
        given += self.reclaim(memory, run);
        count(&stats.inflated, given);
        count(&stats.ignored, pages - given);
        Ok(pages)
    }

    /// Hands over the parts of a run that lie in RAM, region by region.
    fn reclaim(&self, memory: &GuestMemory, run: Option<(u64, u64)>) -> u64 {
        let Some((first, pages)) = run else { return 0 };
        let mut given = 0;
        for region in memory.iter() {
            use vm_memory::GuestMemoryRegion;
            let start = region.start_addr().0.div_ceil(PAGE_SIZE);
            let end = (region.start_addr().0 + region.len()) / PAGE_SIZE;
            let from = first.max(start);
            let to = first.saturating_add(pages).min(end);
            if from < to {
                self.reclaimer.reclaim(from, to - from);
                given += to - from;
            }
        }
        given
    }

    /// Free pages are described by the buffers of the chain themselves.
    fn report(&self, memory: &GuestMemory, chain: &Chain) -> u64 {
        let mut pages = 0;
        for buffer in chain.writable() {
            let first = buffer.addr.div_ceil(PAGE_SIZE);
            let end = (buffer.addr + u64::from(buffer.len)) / PAGE_SIZE;
            if first < end && memory.address_in_range(GuestAddress(buffer.addr)) {
                pages += self.reclaim(memory, Some((first, end - first)));
            }
        }
        count(&self.handle.shared.stats.reported, pages);
        pages.max(1)
    }

    fn read_stats(&self, memory: &GuestMemory, chain: &Chain) -> Result<(), DeviceError> {
        let mut raw = [0u8; STATS_MAX * 10];
        let n = chain
            .read_at(memory, 0, &mut raw)
            .map_err(|e| driver_error(&self.name, e))?;
        let mut guest = self
            .handle
            .shared
            .guest
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        guest.clear();
        for entry in raw[..n].chunks_exact(10) {
            let (tag, value) = entry.split_at(2);
            let tag = u16::from_le_bytes([tag[0], tag[1]]);
            guest.insert(tag, value.iter().rev().fold(0, |v, b| (v << 8) | u64::from(*b)));
        }
        Ok(())
    }

    /// Returns the statistics buffer, which asks the guest to fill it anew.
    fn request_stats(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let (Some(index), true) = (
            self.stats_queue(),
            self.handle.shared.want_stats.load(Ordering::SeqCst),
        ) else {
            return Ok(());
        };
        let Some(queue) = ctx.queues.get_mut(index).filter(|q| q.ready()) else {
            return Ok(());
        };
        if let Some(head) = self.stats_head.take() {
            self.handle.shared.want_stats.store(false, Ordering::SeqCst);
            used(&self.name, ctx.memory, queue, head, 0)?;
            signal(&self.name, ctx.memory, queue, index, ctx.interrupt)?;
        }
        Ok(())
    }

    fn change(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let target = self.handle.target();
        if target != self.shown {
            self.shown = target;
            ctx.interrupt.config();
        }
        self.request_stats(ctx)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Balloon
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // num_pages, actual, free_page_hint_cmd_id, poison_val.
        let mut config = [0; 16];
        put(&mut config, 0, &self.handle.target().to_le_bytes());
        put(&mut config, 4, &self.handle.actual().to_le_bytes());
        common::copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.handle.actual().to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            if let Some(place) = at
                .checked_sub(4)
                .and_then(|i| usize::try_from(i).ok())
                .and_then(|i| actual.get_mut(i))
            {
                *place = *byte;
            }
        }
        self.handle
            .shared
            .actual
            .store(u32::from_le_bytes(actual), Ordering::SeqCst);
    }

    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        self.features = ctx.features;
        self.shown = self.handle.target();
        let registered = self
            .kick
            .register(ctx.io, TOKEN_KICK)
            .and_then(|()| self.change.register(ctx.io, TOKEN_CHANGE));
        registered.map_err(|e| {
            self.reset();
            host_error(&self.name, "registering with its I/O thread", e)
        })
    }

    fn queue_notified(&mut self, ctx: &mut Context<'_>, queue: usize) -> Result<(), DeviceError> {
        self.serve(ctx, queue)
    }

    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKEN_KICK => {
                self.kick.clear();
                for queue in 0..QUEUE_SIZES.len() {
                    self.serve(ctx, queue)?;
                }
                Ok(())
            }
            TOKEN_CHANGE => {
                self.change.clear();
                self.change(ctx)
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.kick.unregister();
        self.change.unregister();
        self.features = 0;
        self.stats_head = None;
        // The new driver starts with an empty balloon.
        self.handle.shared.actual.store(0, Ordering::SeqCst);
    }

    fn drain(&mut self, _ctx: Option<&mut Context<'_>>, _within: Duration) -> Result<(), DeviceError> {
        // The statistics buffer rests here by design, and is in the state.
        Ok(())
    }

    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError> {
        let state = State {
            target: self.handle.target(),
            actual: self.handle.actual(),
            stats_head: self.stats_head,
        };
        StateRecord::encode(StateKind::VirtioBalloon, instance, 1, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        common::expect_kind(record, StateKind::VirtioBalloon)?;
        let state: State = record.decode(1)?;
        if state.stats_head.is_some_and(|h| h >= QUEUE_SIZES[2]) {
            return Err(StateError::Refused(format!(
                "{}: impossible statistics buffer",
                self.name
            )));
        }
        self.handle.shared.target.store(state.target, Ordering::SeqCst);
        self.handle.shared.actual.store(state.actual, Ordering::SeqCst);
        self.stats_head = state.stats_head;
        Ok(())
    }
}

/// Fuzz entry: see [`common::testkit::fuzz`].
#[doc(hidden)]
pub fn fuzz_balloon(data: &[u8]) {
    struct Nothing;
    impl PageReclaimer for Nothing {
        fn reclaim(&self, _first_gfn: u64, _pages: u64) {}
    }
    if let Ok(device) = Balloon::new("balloon", Box::new(Nothing)) {
        device.handle().set_target(100);
        device.handle().refresh();
        common::testkit::fuzz(device, F_STATS_VQ | F_REPORTING, data);
    }
}

#[cfg(test)]
mod tests;
