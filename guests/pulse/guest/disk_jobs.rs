//! What goes on on the disk by itself: the flush loop, the verify ring, the throughput benchmark. Each is a small state
//! machine that vCPU 0 steps between two polls, so that the network is answered meanwhile.

use crate::config::{Config, DiskMode, Loop, Op};
use crate::disk::{Disk, FLUSH, IN, OUT, SLOT_BENCH, SLOT_FLUSH, SLOT_RING, Slot, put, record};
use crate::shared::*;
use crate::state::{fail, shared};
use crate::{get, set};

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Idle,
    Writing,
    Flushing,
    Reading(u64),
}

/// Sequence number last written to each block of the ring (0: none).
static mut RING: [u64; RING_MAX] = [0; RING_MAX];

fn ring(i: u64) -> *mut u64 {
    // SAFETY: in bounds; used by vCPU 0 only.
    unsafe { core::ptr::addr_of_mut!(RING[i as usize % RING_MAX]) }
}

fn ring_get(i: u64) -> u64 {
    // SAFETY: see `ring`.
    unsafe { *ring(i) }
}

pub struct Jobs {
    flush: bool,
    flush_phase: Phase,
    flush_seq: u64,
    report: bool,
    verify: bool,
    ring_phase: Phase,
    blocks: u64,
    ring_seq: u64,
    random: u64,
    bench: Option<Bench>,
}

struct Bench {
    op: Op,
    bs: u64,
    qd: usize,
    /// In units of `bs`.
    next: u64,
}

impl Jobs {
    pub fn new(c: &Config) -> Self {
        let fits = (BENCH_BYTES / c.bs).min(c.qd) as usize;
        let bench = if c.looping == Loop::DiskBench {
            Some(Bench {
                op: c.op,
                bs: c.bs,
                qd: fits,
                next: 0,
            })
        } else {
            None
        };
        Self {
            flush: c.looping == Loop::Flush,
            flush_phase: Phase::Idle,
            flush_seq: 0,
            report: false,
            verify: c.disk == DiskMode::Verify,
            ring_phase: Phase::Idle,
            blocks: c.ring,
            ring_seq: 0,
            random: 1,
            bench,
        }
    }

    /// Reads what an earlier run left on the disk.
    pub fn resume(&mut self, d: &mut Disk) {
        if self.flush && d.read_sync(SLOT_FLUSH, FLUSH_LBA, 512) {
            let rec = record(d.buffer(SLOT_FLUSH));
            if rec.is_valid(FLUSH_MAGIC) {
                self.flush_seq = rec.seq;
                set!(shared(), flush_loops, rec.counter);
            } else if rec != DiskRecord::default() {
                fail(error::DISK_CONTENT, FLUSH_LBA, FLUSH_MAGIC, rec.magic);
            }
        }
        if self.verify {
            self.resume_ring(d);
        }
    }

    /// Every block of the ring must be empty, or whole and in its place; together they are consecutive.
    fn resume_ring(&mut self, d: &mut Disk) {
        for i in 0..self.blocks {
            if !d.read_sync(SLOT_RING, RING_LBA + i * 8, 4096) {
                continue;
            }
            let buf = d.buffer(SLOT_RING);
            if buf[0] == 0 && buf[1] == 0 {
                continue;
            }
            let seq = check_block(buf, None, RING_LBA + i * 8);
            if seq % self.blocks != i {
                fail(error::DISK_CONTENT, RING_LBA + i * 8, i, seq);
            }
            // SAFETY: see `ring`.
            unsafe { *ring(i) = seq };
            self.ring_seq = self.ring_seq.max(seq);
        }
        for i in 0..self.blocks {
            let seq = ring_get(i);
            let oldest = (self.ring_seq + 1).saturating_sub(self.blocks);
            if (seq == 0 && self.ring_seq >= self.blocks) || (seq != 0 && seq < oldest) {
                fail(error::DISK_CONTENT, RING_LBA + i * 8, oldest, seq);
            }
        }
        set!(shared(), verify_seq, self.ring_seq);
    }

    /// Whether a report is due to the collector.
    pub fn take_report(&mut self) -> bool {
        core::mem::take(&mut self.report)
    }

    pub fn step(&mut self, d: &mut Disk) {
        if self.flush {
            self.step_flush(d);
        }
        if self.verify {
            self.step_ring(d);
        }
        if let Some(b) = &mut self.bench {
            self.random = b.step(d, self.random);
        }
    }

    fn step_flush(&mut self, d: &mut Disk) {
        let ok = match (self.flush_phase, d.take(SLOT_FLUSH)) {
            (Phase::Idle, _) => true,
            (_, Slot::Done(ok)) => ok,
            _ => return,
        };
        if self.flush_phase == Phase::Writing && ok {
            d.start(SLOT_FLUSH, FLUSH, 0, 0);
            self.flush_phase = Phase::Flushing;
            return;
        }
        let s = shared();
        if self.flush_phase == Phase::Flushing && ok {
            let n = get!(s, flush_loops) + 1;
            set!(s, flush_loops, n);
            self.report |= n % 100 == 0;
        }
        self.flush_seq += 1;
        put(
            d.buffer(SLOT_FLUSH),
            &DiskRecord::new(FLUSH_MAGIC, get!(s, flush_loops) + 1, self.flush_seq),
        );
        d.start(SLOT_FLUSH, OUT, FLUSH_LBA, 512);
        self.flush_phase = Phase::Writing;
    }

    /// Writes the next block; then reads back a block chosen at random and checks it against what was last written there.
    fn step_ring(&mut self, d: &mut Disk) {
        let ok = match (self.ring_phase, d.take(SLOT_RING)) {
            (Phase::Idle, _) => true,
            (_, Slot::Done(ok)) => ok,
            _ => return,
        };
        match self.ring_phase {
            Phase::Writing if ok => {
                let slot = self.ring_seq % self.blocks;
                // SAFETY: see `ring`.
                unsafe { *ring(slot) = self.ring_seq };
                self.random = page_next(self.random);
                // Mostly any block, now and then the one just written.
                let mut which = (self.random >> 33) % self.blocks;
                if ring_get(which) == 0 || self.random >> 62 == 0 {
                    which = slot;
                }
                d.start(SLOT_RING, IN, RING_LBA + which * 8, 4096);
                self.ring_phase = Phase::Reading(which);
                return;
            }
            Phase::Reading(which) if ok => {
                check_block(d.buffer(SLOT_RING), Some(ring_get(which)), RING_LBA + which * 8);
                set!(shared(), verify_seq, self.ring_seq);
            }
            _ => {}
        }
        self.ring_seq += 1;
        let seq = self.ring_seq;
        let buf = d.buffer(SLOT_RING);
        buf[0] = RING_MAGIC;
        buf[1] = seq;
        for (i, w) in buf.iter_mut().enumerate().skip(2) {
            *w = ring_word(seq, i as u64);
        }
        d.start(SLOT_RING, OUT, RING_LBA + seq % self.blocks * 8, 4096);
        self.ring_phase = Phase::Writing;
    }
}

/// Checks a block of the ring and returns its sequence number.
fn check_block(buf: &[u64; 512], want: Option<u64>, sector: u64) -> u64 {
    let seq = buf[1];
    if buf[0] != RING_MAGIC {
        fail(error::DISK_CONTENT, sector, RING_MAGIC, buf[0]);
    } else if want.is_some_and(|w| w != seq) {
        fail(error::DISK_CONTENT, sector, want.unwrap_or(0), seq);
    } else {
        for (i, w) in buf.iter().enumerate().skip(2) {
            if *w != ring_word(seq, i as u64) {
                fail(error::DISK_CONTENT, sector, ring_word(seq, i as u64), *w);
                break;
            }
        }
    }
    seq
}

impl Bench {
    fn step(&mut self, d: &mut Disk, mut random: u64) -> u64 {
        let places = (d.sectors - BENCH_LBA) * 512 / self.bs;
        if places == 0 {
            return random;
        }
        for i in 0..self.qd.min(d.bench_slots()) {
            let slot = SLOT_BENCH + i;
            if d.take(slot) == Slot::Busy {
                continue;
            }
            let place = match self.op {
                Op::Read | Op::Write => {
                    self.next += 1;
                    (self.next - 1) % places
                }
                Op::RandRead | Op::RandWrite => {
                    random = page_next(random);
                    (random >> 16) % places
                }
            };
            let typ = if matches!(self.op, Op::Read | Op::RandRead) {
                IN
            } else {
                OUT
            };
            let addr = BENCH_GPA + i as u64 * self.bs;
            if typ == OUT {
                // SAFETY: inside the benchmark's buffers; no request of this slot is in flight.
                unsafe { (addr as *mut u64).write_volatile(random ^ self.next) };
            }
            d.start_at(
                slot,
                typ,
                BENCH_LBA + place * (self.bs / 512),
                addr,
                self.bs as u32,
            );
        }
        random
    }
}
