//! A transport and a driver for device tests and fuzzing: real queues in real guest memory, a real I/O thread, and
//! interrupts that are counted instead of delivered. Not part of the machine.

use super::super::{Context, DeviceError, Interrupt, VirtioDevice};
use crate::devices::io_thread::{IoRegistrar, IoTarget, IoThread};
use crate::memory::GuestMemory;
use crate::state::{StateError, StateRecord};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// A device of a test comes to rest within this.
pub const DRAIN: Duration = Duration::from_secs(10);

/// Guest RAM of the harness: 8 MiB at zero, and 64 KiB behind a hole at 16 MiB.
pub const RAM_BYTES: u64 = 8 << 20;
/// Where data buffers may start; rings lie below.
pub const DATA: u64 = 1 << 20;
const RING_STRIDE: u64 = 0x1_0000;

/// Counts interrupts.
#[derive(Default, Debug)]
pub struct Recorder {
    /// Per queue.
    pub queues: [AtomicU64; 16],
    /// Configuration changes.
    pub config: AtomicU64,
}

impl Interrupt for Recorder {
    fn queue(&self, queue: usize) {
        if let Some(n) = self.queues.get(queue) {
            n.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

/// What the lock of a device guards.
pub struct Wired<D> {
    /// The device.
    pub device: D,
    /// Its queues.
    pub queues: Vec<Queue>,
    /// Negotiated features.
    pub features: u64,
    /// First error of a device method.
    pub failed: Option<DeviceError>,
    /// Whether it is activated.
    pub active: bool,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    io: Option<IoRegistrar>,
}

impl<D: VirtioDevice> Wired<D> {
    /// Calls the device with a context, noting its first error.
    pub fn call(&mut self, f: impl FnOnce(&mut D, &mut Context<'_>) -> Result<(), DeviceError>) -> bool {
        let Some(io) = &self.io else { return false };
        let mut ctx = Context {
            memory: &self.memory,
            queues: &mut self.queues,
            interrupt: &self.interrupt,
            io,
            features: self.features,
        };
        match f(&mut self.device, &mut ctx) {
            Ok(()) => true,
            Err(e) => {
                self.failed.get_or_insert(e);
                false
            }
        }
    }
}

impl<D: VirtioDevice> IoTarget for Wired<D> {
    fn io_ready(&mut self, token: u32) {
        if self.active && self.failed.is_none() {
            self.call(|d, ctx| d.io_ready(ctx, token));
            if self.failed.is_some() {
                self.device.reset();
                self.active = false;
            }
        }
    }
}

/// One buffer for [`Harness::add`].
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    /// Guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device may write it.
    pub write: bool,
}

/// Readable buffer.
#[must_use]
pub fn r(addr: u64, len: u32) -> Desc {
    Desc {
        addr,
        len,
        write: false,
    }
}

/// Writable buffer.
#[must_use]
pub fn w(addr: u64, len: u32) -> Desc {
    Desc {
        addr,
        len,
        write: true,
    }
}

/// A device with its transport, driver and I/O thread.
pub struct Harness<D: VirtioDevice + 'static> {
    /// The locked device.
    pub wired: Arc<Mutex<Wired<D>>>,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// Interrupts seen.
    pub interrupts: Arc<Recorder>,
    next_desc: Vec<u16>,
    avail: Vec<u16>,
    seen: Vec<u16>,
    _thread: IoThread,
}

/// Guest RAM as the harness makes it.
///
/// # Errors
/// mmap failed.
pub fn ram() -> io::Result<GuestMemory> {
    let ranges = [
        (GuestAddress(0), RAM_BYTES as usize),
        (GuestAddress(16 << 20), 65536),
    ];
    GuestMemory::from_ranges(&ranges).map_err(io::Error::other)
}

impl<D: VirtioDevice + 'static> Harness<D> {
    /// Wires `device` up to `memory`, with all its queues set up at `size` (or less) entries; not activated.
    ///
    /// # Errors
    /// Threads or queues could not be made.
    pub fn on(memory: GuestMemory, device: D, size: u16, features: u64) -> io::Result<Self> {
        let thread = IoThread::start("io-harness", || {})?;
        let interrupts = Arc::new(Recorder::default());
        let mut queues = Vec::new();
        for (n, max) in device.queue_sizes().iter().enumerate() {
            let mut q = Queue::new(*max).map_err(io::Error::other)?;
            let base = (n as u64 + 1) * RING_STRIDE;
            q.set_size(size.min(*max));
            q.set_desc_table_address(Some(base as u32), None);
            q.set_avail_ring_address(Some(base as u32 + 0x8000), None);
            q.set_used_ring_address(Some(base as u32 + 0xa000), None);
            q.set_event_idx(features & (1 << 29) != 0);
            q.set_ready(true);
            queues.push(q);
        }
        let count = queues.len();
        let wired = Arc::new(Mutex::new(Wired {
            device,
            queues,
            features,
            failed: None,
            active: false,
            memory: memory.clone(),
            interrupt: interrupts.clone() as Arc<dyn Interrupt>,
            io: None,
        }));
        let target: Arc<Mutex<dyn IoTarget>> = wired.clone();
        let io = thread.registrar(Arc::downgrade(&target) as Weak<Mutex<dyn IoTarget>>);
        let this = Self {
            wired,
            memory,
            interrupts,
            next_desc: vec![0; count],
            avail: vec![0; count],
            seen: vec![0; count],
            _thread: thread,
        };
        this.lock().io = Some(io);
        Ok(this)
    }

    /// The device, locked.
    pub fn lock(&self) -> MutexGuard<'_, Wired<D>> {
        self.wired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Activates the device.
    pub fn activate(&self) -> bool {
        let mut wired = self.lock();
        let ok = wired.call(|d, ctx| d.activate(ctx));
        wired.active = ok;
        ok
    }

    /// Resets device and queues' positions, as a driver would.
    pub fn reset(&mut self) {
        let mut wired = self.lock();
        wired.device.reset();
        wired.active = false;
        for q in &mut wired.queues {
            q.set_next_avail(0);
            q.set_next_used(0);
        }
        drop(wired);
        for n in 0..self.avail.len() {
            self.avail[n] = 0;
            self.seen[n] = 0;
            let base = (n as u64 + 1) * RING_STRIDE;
            let _ = self.memory.write_obj(0u32, GuestAddress(base + 0x8000));
            let _ = self.memory.write_obj(0u32, GuestAddress(base + 0xa000));
        }
    }

    /// Notifies a queue; `false` if the device refused.
    pub fn notify(&self, queue: usize) -> bool {
        let mut wired = self.lock();
        wired.active && wired.call(|d, ctx| d.queue_notified(ctx, queue))
    }

    /// Puts a chain into a queue without notifying; returns its head.
    pub fn add(&mut self, queue: usize, descs: &[Desc]) -> u16 {
        let size = self.lock().queues[queue].size();
        let base = (queue as u64 + 1) * RING_STRIDE;
        let head = self.next_desc[queue] % size;
        for (i, d) in descs.iter().enumerate() {
            let at = self.next_desc[queue] % size;
            self.next_desc[queue] = self.next_desc[queue].wrapping_add(1);
            let next = self.next_desc[queue] % size;
            let flags = u16::from(i + 1 < descs.len()) | (u16::from(d.write) << 1);
            self.descriptor(queue, at, d.addr, d.len, flags, next);
        }
        let slot = base + 0x8000 + 4 + 2 * u64::from(self.avail[queue] % size);
        let _ = self.memory.write_obj(head, GuestAddress(slot));
        self.avail[queue] = self.avail[queue].wrapping_add(1);
        self.set_avail(queue, self.avail[queue]);
        head
    }

    /// Writes a raw descriptor.
    pub fn descriptor(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = (queue as u64 + 1) * RING_STRIDE + 16 * u64::from(index);
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let _ = self.memory.write_slice(&raw, GuestAddress(at));
    }

    /// Sets the available index as the driver would.
    pub fn set_avail(&self, queue: usize, index: u16) {
        let base = (queue as u64 + 1) * RING_STRIDE;
        let _ = self
            .memory
            .store(index.to_le(), GuestAddress(base + 0x8002), Ordering::SeqCst);
    }

    /// Used entries that came since the last call: (head, length).
    pub fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let size = self.lock().queues[queue].size();
        let base = (queue as u64 + 1) * RING_STRIDE + 0xa000;
        let index: u16 = self
            .memory
            .load(GuestAddress(base + 2), Ordering::SeqCst)
            .unwrap_or(0);
        let mut all = Vec::new();
        while self.seen[queue] != index {
            let at = base + 4 + 8 * u64::from(self.seen[queue] % size);
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap_or(0);
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap_or(0);
            all.push((head as u16, len));
            self.seen[queue] = self.seen[queue].wrapping_add(1);
        }
        all
    }

    /// Waits, up to 20 s, until `count` used entries came.
    pub fn wait_used(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        let mut all = Vec::new();
        self.wait(|h| {
            all.extend(h.used(queue));
            all.len() >= count
        });
        all
    }

    /// Waits, up to 20 s, until `done`; returns whether it came true.
    pub fn wait(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if done(self) {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Takes the device's state and moves memory, queues and driver over to a new device.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn migrate(self, to: D, features: u64) -> Result<Self, StateError> {
        let record = self.lock().device.save(7)?;
        self.restore_into(to, features, &record)
    }

    /// As [`Harness::migrate`], from a record taken before.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore_into(self, to: D, features: u64, record: &StateRecord) -> Result<Self, StateError> {
        let size = self.lock().queues.first().map_or(1, Queue::size);
        let mut next = Self::on(self.memory.clone(), to, size, features)
            .map_err(|e| StateError::Refused(e.to_string()))?;
        next.next_desc.clone_from(&self.next_desc);
        next.avail.clone_from(&self.avail);
        next.seen.clone_from(&self.seen);
        {
            let mut wired = next.lock();
            let old = self.lock();
            for (n, o) in wired.queues.iter_mut().zip(&old.queues) {
                n.set_next_avail(o.next_avail());
                n.set_next_used(o.next_used());
            }
            drop(old);
            wired.device.restore(record)?;
        }
        // The old device is gone before the new one runs, as on a failover.
        drop(self);
        next.activate();
        let count = next.avail.len();
        for queue in 0..count {
            next.notify(queue);
        }
        Ok(next)
    }
}

/// Reads fuzz input; zeroes after its end.
pub struct Feed<'a>(pub &'a [u8]);

impl Feed<'_> {
    /// Next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((b, rest)) => {
                self.0 = rest;
                *b
            }
            None => 0,
        }
    }
    /// Next little-endian 32 bits.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }
    /// Nothing left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Most steps that one fuzz input may cause.
const STEPS_MAX: usize = 96;

/// Drives a device with what `data` says: chains half plausible and half wild, ring pokes, notifications,
/// configuration writes, resets, drains, state taken and given back. Returns when the device is at rest.
pub fn fuzz<D: VirtioDevice + 'static>(device: D, features: u64, data: &[u8]) {
    let mut feed = Feed(data);
    let size = 1u16 << (feed.byte() % 9);
    let (Ok(memory), event_idx) = (ram(), u64::from(feed.byte() & 1) << 29) else {
        return;
    };
    let Ok(mut h) = Harness::on(memory, device, size, features | event_idx) else {
        return;
    };
    h.activate();
    let queues = h.avail.len();
    for _ in 0..STEPS_MAX {
        if feed.is_empty() {
            break;
        }
        let op = feed.byte();
        let queue = usize::from(feed.byte()) % queues.max(1);
        match op % 16 {
            0..=6 => {
                let n = usize::from(feed.byte() % 6) + 1;
                let mut descs = Vec::with_capacity(n);
                let mut at = DATA + u64::from(feed.byte()) * 4096;
                for _ in 0..n {
                    let shape = feed.byte();
                    let len = match shape & 7 {
                        0 => 16,
                        1 => 1,
                        2 => 512,
                        3 => 44,
                        4 => u32::from(feed.byte()) * 16,
                        5 => feed.word() % 70_000,
                        6 => 4096,
                        _ => feed.word(),
                    };
                    if shape & 0x18 == 0x18 {
                        at = u64::from(feed.word()) << (feed.byte() % 32);
                    }
                    descs.push(Desc {
                        addr: at,
                        len,
                        write: shape & 0x20 != 0,
                    });
                    if shape & 0x40 != 0 {
                        let bytes: Vec<u8> = (0..16).map(|_| feed.byte()).collect();
                        let _ = h.memory.write_slice(&bytes, GuestAddress(at));
                    }
                    at = at.wrapping_add(u64::from(len)) & 0xff_ffff;
                }
                h.add(queue, &descs);
                if op & 0x80 != 0 {
                    h.notify(queue);
                }
            }
            7 => h.set_avail(queue, feed.word() as u16),
            8 => {
                let (index, len) = (u16::from(feed.byte()), feed.word());
                let (addr, flags) = (u64::from(feed.word() & 0x1f_ffff), u16::from(feed.byte() & 7));
                h.descriptor(queue, index, addr, len, flags, u16::from(feed.byte()));
            }
            9 => {
                let bytes: Vec<u8> = (0..feed.byte() % 9).map(|_| feed.byte()).collect();
                let at = u64::from(feed.byte());
                let mut wired = h.lock();
                wired.device.write_config(at, &bytes);
                let mut into = [0; 16];
                wired.device.read_config(at, &mut into);
            }
            10 => {
                let token = u32::from(feed.byte());
                let mut wired = h.lock();
                if wired.active {
                    wired.call(|d, ctx| d.io_ready(ctx, token));
                }
            }
            11 => {
                let mut wired = h.lock();
                if let Ok(record) = wired.device.save(0) {
                    wired.device.reset();
                    wired.active = false;
                    if wired.device.restore(&record).is_ok() {
                        wired.active = wired.call(|d, ctx| d.activate(ctx));
                    }
                }
            }
            12 => {
                h.reset();
                h.lock().failed = None;
                h.activate();
            }
            _ => {
                h.notify(queue);
            }
        }
        let mut wired = h.lock();
        if wired.failed.take().is_some() {
            wired.device.reset();
            wired.active = false;
            drop(wired);
            h.reset();
            h.activate();
        }
    }
    let mut wired = h.lock();
    if wired.active {
        wired.call(|d, ctx| d.drain(Some(ctx), DRAIN));
    }
    wired.device.reset();
    wired.active = false;
}

/// Runs a fuzz entry over a pseudo-random corpus: a fixed one in unit tests, or for `STEADFAST_FUZZ_SECONDS` from
/// `STEADFAST_FUZZ_SEED`. The seed of each round is printed when it fails.
pub fn fuzz_many(entry: fn(&[u8])) {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let seconds = number("STEADFAST_FUZZ_SECONDS");
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let mut seed = number("STEADFAST_FUZZ_SEED").unwrap_or(1);
    let mut rounds = 0u64;
    while if seconds.is_some() {
        Instant::now() < end
    } else {
        rounds < 150
    } {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let data: Vec<u8> = (0..64 + (rounds % 150) * 8)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 24) as u8
            })
            .collect();
        if std::panic::catch_unwind(|| entry(&data)).is_err() {
            std::panic::resume_unwind(Box::new(format!(
                "fuzz input of seed {seed}, round {rounds} made the device panic"
            )));
        }
        seed += 1;
        rounds += 1;
    }
}
