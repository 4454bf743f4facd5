//! virtio-blk (virtio 1.2, section 5.2), one queue, polled. A request lives in a fixed slot with three descriptors; each
//! user of the disk has its own slots, so no request ever waits for a free one.

use crate::cpu::{pause, rdtsc};
use crate::shared::*;
use crate::state::{fail, shared, ticks};
use crate::virtio::{Device, NEXT, Queue, WRITE};
use crate::{count, get, set};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;

/// Slots: the counter, the flush loop, the verify ring; from here on the benchmark.
pub const SLOT_COUNTER: usize = 0;
pub const SLOT_FLUSH: usize = 1;
pub const SLOT_RING: usize = 2;
pub const SLOT_BENCH: usize = 3;
pub const SLOTS: usize = 64;

#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Header {
    typ: u32,
    reserved: u32,
    sector: u64,
}

static mut HEADERS: [Header; SLOTS] = [Header {
    typ: 0,
    reserved: 0,
    sector: 0,
}; SLOTS];
static mut STATUS: [u8; SLOTS] = [0; SLOTS];
static mut BUFFERS: [[u64; 512]; SLOT_BENCH] = [[0; 512]; SLOT_BENCH];

#[derive(Clone, Copy, PartialEq)]
pub enum Slot {
    Free,
    Busy,
    Done(bool),
}

pub struct Disk {
    queue: Queue,
    slots: [Slot; SLOTS],
    lens: [u32; SLOTS],
    started: [u64; SLOTS],
    usable: usize,
    can_flush: bool,
    /// Size in sectors.
    pub sectors: u64,
}

impl Disk {
    pub fn new(dev: Device) -> Option<Self> {
        const F_FLUSH: u64 = 1 << 9;
        let features = dev.begin(F_FLUSH)?;
        let queue = dev.queue(0, 2)?;
        dev.finish();
        let sectors = u64::from(dev.config32(4)) << 32 | u64::from(dev.config32(0));
        if sectors < BENCH_LBA {
            crate::serial::text("PULSE ERROR the disk is smaller than 8 MiB\n");
            return None;
        }
        let usable = (usize::from(queue.size()) / 3).min(SLOTS);
        if usable <= SLOT_BENCH {
            crate::serial::text("PULSE ERROR the disk's queue has less than 16 entries\n");
            return None;
        }
        Some(Self {
            queue,
            slots: [Slot::Free; SLOTS],
            lens: [0; SLOTS],
            started: [0; SLOTS],
            usable,
            can_flush: features & F_FLUSH != 0,
            sectors,
        })
    }

    /// How many requests the benchmark may have in flight.
    pub fn bench_slots(&self) -> usize {
        self.usable - SLOT_BENCH
    }

    /// The 4 KiB buffer of one of the first slots.
    pub fn buffer(&mut self, slot: usize) -> &'static mut [u64; 512] {
        // SAFETY: each slot has one user, which looks at the buffer only while no request is in flight.
        unsafe { &mut *core::ptr::addr_of_mut!(BUFFERS[slot]) }
    }

    /// Starts a request of the slot's own buffer.
    pub fn start(&mut self, slot: usize, typ: u32, sector: u64, len: u32) {
        // SAFETY: address only.
        let addr = unsafe { core::ptr::addr_of!(BUFFERS[slot]) } as u64;
        self.start_at(slot, typ, sector, addr, len);
    }

    /// Starts a request; the slot must not be busy.
    pub fn start_at(&mut self, slot: usize, typ: u32, sector: u64, addr: u64, len: u32) {
        if typ == FLUSH && !self.can_flush {
            // The device promised that writes are durable when they complete.
            self.slots[slot] = Slot::Done(true);
            return;
        }
        self.slots[slot] = Slot::Busy;
        self.lens[slot] = len;
        self.started[slot] = rdtsc();
        let d = slot as u16 * 3;
        // SAFETY: this slot's header and status are ours while it is not in flight.
        let (header, status) = unsafe {
            let h = core::ptr::addr_of_mut!(HEADERS[slot]);
            h.write_volatile(Header {
                typ,
                reserved: 0,
                sector,
            });
            let s = core::ptr::addr_of_mut!(STATUS[slot]);
            s.write_volatile(0xff);
            (h as u64, s as u64)
        };
        if typ == FLUSH {
            self.queue.desc(d, header, 16, NEXT, d + 2);
        } else {
            self.queue.desc(d, header, 16, NEXT, d + 1);
            self.queue
                .desc(d + 1, addr, len, NEXT | if typ == IN { WRITE } else { 0 }, d + 2);
        }
        self.queue.desc(d + 2, status, 1, WRITE, 0);
        self.queue.push(d);
    }

    /// Notifies, takes completions, watches for requests that never end.
    pub fn poll(&mut self) {
        self.queue.kick();
        while let Some((id, _)) = self.queue.pop() {
            let slot = usize::from(id / 3);
            if slot >= SLOTS || self.slots[slot] != Slot::Busy {
                fail(error::DEVICE, u64::from(id), 0, 0);
                continue;
            }
            // SAFETY: in bounds; the device is done with it.
            let (h, st) = unsafe {
                (
                    core::ptr::addr_of!(HEADERS[slot]).read_volatile(),
                    core::ptr::addr_of!(STATUS[slot]).read_volatile(),
                )
            };
            if st != 0 {
                fail(error::DISK_IO, h.sector, 0, u64::from(st));
            }
            match h.typ {
                IN => count!(disk_reads, 1),
                OUT => count!(disk_writes, 1),
                _ => count!(disk_flushes, 1),
            }
            if h.typ != FLUSH {
                count!(disk_bytes, u64::from(self.lens[slot]));
            }
            self.slots[slot] = Slot::Done(st == 0);
        }
    }

    /// The slot's state; a finished one becomes free.
    pub fn take(&mut self, slot: usize) -> Slot {
        let s = self.slots[slot];
        match s {
            Slot::Done(_) => self.slots[slot] = Slot::Free,
            Slot::Busy if rdtsc().wrapping_sub(self.started[slot]) > ticks(60_000) => {
                fail(error::DISK_TIMEOUT, slot as u64, 0, 0);
                self.started[slot] = rdtsc();
            }
            _ => {}
        }
        s
    }

    /// Polls until the slot is done; false on an I/O error or after a minute.
    pub fn wait(&mut self, slot: usize) -> bool {
        let begun = rdtsc();
        loop {
            self.poll();
            if let Slot::Done(ok) = self.take(slot) {
                return ok;
            }
            if rdtsc().wrapping_sub(begun) > ticks(60_000) {
                fail(error::DISK_TIMEOUT, slot as u64, 0, 0);
                return false;
            }
            pause();
        }
    }

    /// Waits (bounded) until nothing is in flight.
    pub fn drain(&mut self) {
        for slot in 0..SLOTS {
            if self.slots[slot] == Slot::Busy {
                self.wait(slot);
            }
        }
    }

    /// Reads a sector into the slot's buffer, which is zero on an error.
    pub fn read_sync(&mut self, slot: usize, sector: u64, len: u32) -> bool {
        self.start(slot, IN, sector, len);
        self.wait(slot)
    }

    /// Takes the counter up from the disk, if a valid block is there.
    pub fn resume(&mut self) {
        if !self.read_sync(SLOT_COUNTER, COUNTER_LBA, 512) {
            return;
        }
        let rec = record(self.buffer(SLOT_COUNTER));
        let s = shared();
        if rec.is_valid(DISK_MAGIC) {
            set!(s, counter, rec.counter);
            set!(s, counter_inv, !rec.counter);
            set!(s, boot_counter, rec.counter);
            set!(s, disk_counter, rec.counter);
            set!(s, disk_seq, rec.seq);
        } else if rec != DiskRecord::default() {
            fail(error::DISK_CONTENT, COUNTER_LBA, DISK_MAGIC, rec.magic);
        }
    }

    /// Writes the counter's block and flushes it.
    pub fn save_counter(&mut self) -> bool {
        let s = shared();
        let (counter, seq) = (get!(s, counter), get!(s, disk_seq).wrapping_add(1));
        if self.slots[SLOT_COUNTER] != Slot::Free {
            return false; // a request before this one never ended
        }
        put(
            self.buffer(SLOT_COUNTER),
            &DiskRecord::new(DISK_MAGIC, counter, seq),
        );
        self.start(SLOT_COUNTER, OUT, COUNTER_LBA, 512);
        if !self.wait(SLOT_COUNTER) {
            return false;
        }
        self.start(SLOT_COUNTER, FLUSH, 0, 0);
        if !self.wait(SLOT_COUNTER) {
            return false;
        }
        set!(s, disk_seq, seq);
        set!(s, disk_counter, counter);
        true
    }
}

/// The record at the start of a buffer.
pub fn record(buf: &[u64; 512]) -> DiskRecord {
    DiskRecord::from_words(&[buf[0], buf[1], buf[2], buf[3]])
}

/// Puts a record at the start of a buffer.
pub fn put(buf: &mut [u64; 512], rec: &DiskRecord) {
    buf[..4].copy_from_slice(&rec.to_words());
}
