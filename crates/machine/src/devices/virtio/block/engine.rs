//! Requests on their way between rings and backend: accept, submit in parts, complete, hold.
//!
//! ```text
//!   accept ─> backlog ─ submit ─> backend ─ completion ─> answered
//!                ^                              │
//!                └── retry ── held <── policy ──┘ error
//! ```
//!
//! Invariants: a head of a queue is in at most one flight; a flight's memory is bounded by the pool; a request is
//! answered exactly once, and is in the saved state exactly until it is.

use super::super::common::{Chain, count, driver_error, host_error, used};
use super::super::{Context, DeviceError};
use super::Stats;
use super::backend::{BlockBackend, Completion, ErrorPolicy, Failure, Op, Request, Verdict};
use super::buffer::{BUFFER_MAX, BufferPool, IoBuffer};
use super::request::{Flight, HEADER, Kind, Limits, Parsed, Part, S_IOERR, S_OK, SECTOR, SERIAL, parse};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Buffers of one disk, in use and kept.
const POOL_BYTES: usize = 16 << 20;

pub(super) struct Engine {
    pub(super) name: Arc<str>,
    pub(super) backend: Box<dyn BlockBackend>,
    pub(super) policy: Box<dyn ErrorPolicy>,
    pub(super) stats: Arc<Stats>,
    pub(super) serial: [u8; SERIAL],
    pub(super) write_through: bool,
    limits: Limits,
    pool: BufferPool,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Slot by queue and head.
    heads: Vec<Vec<Option<usize>>>,
    backlog: VecDeque<usize>,
    held: Vec<usize>,
    generation: u32,
    order: u64,
    native_zeroes: bool,
    /// Queues with used entries since the last interrupt, by bit.
    touched: u64,
    finished: Vec<Completion>,
}

fn token(generation: u32, slot: usize, position: u64) -> u64 {
    (u64::from(generation & 0xff_ffff) << 40) | ((slot as u64 & 0xffff) << 24) | (position / SECTOR)
}

impl Engine {
    pub(super) fn new(
        name: Arc<str>,
        backend: Box<dyn BlockBackend>,
        policy: Box<dyn ErrorPolicy>,
        serial: [u8; SERIAL],
        stats: Arc<Stats>,
    ) -> Self {
        let info = backend.info();
        Self {
            name,
            limits: Limits {
                capacity_bytes: info.capacity_bytes / SECTOR * SECTOR,
                read_only: info.read_only,
            },
            native_zeroes: info.write_zeroes,
            backend,
            policy,
            stats,
            serial,
            write_through: false,
            pool: BufferPool::new(POOL_BYTES),
            flights: Vec::new(),
            free: Vec::new(),
            heads: Vec::new(),
            backlog: VecDeque::new(),
            held: Vec::new(),
            generation: 0,
            order: 0,
            touched: 0,
            finished: Vec::new(),
        }
    }

    /// Makes room for the queues as negotiated.
    pub(super) fn start(&mut self, sizes: impl Iterator<Item = u16>) {
        self.heads = sizes.map(|s| vec![None; usize::from(s)]).collect();
    }

    /// Requests that were accepted and not answered, in their order: (queue, head).
    pub(super) fn in_flight(&self) -> Vec<(u16, u16)> {
        let mut all: Vec<_> = self.flights.iter().flatten().collect();
        all.sort_by_key(|f| f.order);
        all.iter().map(|f| (f.queue, f.chain.head)).collect()
    }

    /// Whether accepted requests still wait for buffers or a place in the backend.
    pub(super) fn congested(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Takes one chain; returns the bytes it moves. Requests that need no disk are answered at once.
    pub(super) fn accept(
        &mut self,
        ctx: &mut Context<'_>,
        queue: usize,
        chain: Chain,
    ) -> Result<u64, DeviceError> {
        let head = usize::from(chain.head);
        let place = self.heads.get(queue).and_then(|h| h.get(head));
        if place != Some(&None) {
            let why = format!("descriptor {head} of queue {queue} made available while it is in use");
            return Err(driver_error(&self.name, why));
        }
        match parse(&self.name, ctx.memory, &chain, self.limits)? {
            Parsed::Answer(status) => {
                count(&self.stats.refused, 1);
                self.answer(ctx, queue, &chain, status, 0)?;
                Ok(0)
            }
            Parsed::GetId => {
                let room = (chain.writable_len() - 1).min(SERIAL as u32) as usize;
                let written = chain
                    .write_at(ctx.memory, 0, &self.serial[..room])
                    .map_err(|e| driver_error(&self.name, e))?;
                self.answer(ctx, queue, &chain, S_OK, written as u32)?;
                Ok(0)
            }
            Parsed::Io { kind, ranges } => {
                self.order += 1;
                let mut flight = Flight::new(queue as u16, chain, kind, ranges, self.order);
                flight.sync |= self.write_through && matches!(kind, Kind::Write | Kind::WriteZeroes);
                flight.emulate = kind == Kind::WriteZeroes && !self.native_zeroes;
                let bytes = if kind == Kind::Discard { 0 } else { flight.len() };
                let slot = self.free.pop().unwrap_or_else(|| {
                    self.flights.push(None);
                    self.flights.len() - 1
                });
                self.flights[slot] = Some(flight);
                self.heads[queue][head] = Some(slot);
                self.backlog.push_back(slot);
                self.pump(ctx)?;
                Ok(bytes)
            }
        }
    }

    /// Submits what the pool and the backend can take.
    pub(super) fn pump(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        while let Some(&slot) = self.backlog.front() {
            if !self.submit_parts(ctx, slot)? {
                break;
            }
            self.backlog.pop_front();
            if let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut) {
                flight.queued = false;
            }
            self.settle(ctx, slot)?;
        }
        Ok(())
    }

    /// Submits parts of one flight. `false`: stopped for lack of room.
    fn submit_parts(&mut self, ctx: &mut Context<'_>, slot: usize) -> Result<bool, DeviceError> {
        loop {
            let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut) else {
                return Ok(true);
            };
            let Some(part) = flight.peek() else {
                return Ok(true);
            };
            let mut position = 0;
            let op = match part {
                Part::Data {
                    offset,
                    position: at,
                    len,
                } => {
                    position = at;
                    let Some(mut buf) = self.pool.take(len) else {
                        return Ok(false);
                    };
                    if flight.kind == Kind::Write {
                        flight
                            .chain
                            .read_at(ctx.memory, HEADER + at as u32, &mut buf)
                            .map_err(|e| driver_error(&self.name, e))?;
                        Op::Write { offset, buf }
                    } else {
                        Op::Read { offset, buf }
                    }
                }
                Part::Zeroes { offset, len } => {
                    let Some(mut buf) = self.pool.take(len.min(BUFFER_MAX)) else {
                        return Ok(false);
                    };
                    buf.fill(0);
                    Op::Write { offset, buf }
                }
                Part::Whole(range) if range.len == 0 => {
                    flight.advance(part);
                    continue;
                }
                Part::Whole(range) if flight.kind == Kind::Discard => Op::Discard {
                    offset: range.offset,
                    len: range.len,
                },
                Part::Whole(range) => Op::WriteZeroes {
                    offset: range.offset,
                    len: range.len,
                    unmap: range.unmap,
                },
                Part::Sync => Op::Flush,
            };
            let request = Request {
                token: token(self.generation, slot, position),
                op,
            };
            match self.backend.submit(request) {
                Ok(()) => {
                    flight.outstanding += 1;
                    flight.advance(part);
                }
                Err(back) => {
                    if let Op::Read { buf, .. } | Op::Write { buf, .. } = back.op {
                        self.pool.put(buf);
                    }
                    return Ok(false);
                }
            }
        }
    }

    /// Starts what was submitted and handles what has finished. Returns whether something finished.
    pub(super) fn turn(&mut self, ctx: &mut Context<'_>) -> Result<bool, DeviceError> {
        self.pump(ctx)?;
        self.backend
            .kick()
            .map_err(|e| host_error(&self.name, "submitting to its disk", e))?;
        let mut finished = std::mem::take(&mut self.finished);
        self.backend.poll_completions(&mut finished);
        let any = !finished.is_empty();
        let result = self.handle(ctx, &mut finished);
        finished.clear();
        self.finished = finished;
        result.map(|()| any)
    }

    fn handle(&mut self, ctx: &mut Context<'_>, finished: &mut Vec<Completion>) -> Result<(), DeviceError> {
        for completion in finished.drain(..) {
            let slot = ((completion.token >> 24) & 0xffff) as usize;
            let position = (completion.token & 0xff_ffff) * SECTOR;
            let current = completion.token >> 40 == u64::from(self.generation & 0xff_ffff);
            let flight = self.flights.get_mut(slot).and_then(Option::as_mut);
            let (Some(flight), true) = (flight, current) else {
                self.recycle(completion.buf);
                continue;
            };
            flight.outstanding = flight.outstanding.saturating_sub(1);
            match completion.result {
                Ok(()) => {
                    if flight.kind == Kind::Read
                        && let Some(buf) = &completion.buf
                    {
                        // Marks the pages dirty.
                        flight
                            .chain
                            .write_at(ctx.memory, position as u32, buf)
                            .map_err(|e| driver_error(&self.name, e))?;
                    }
                }
                Err(e) => {
                    flight.error.get_or_insert(e);
                }
            }
            self.recycle(completion.buf);
            if let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut)
                && !std::mem::replace(&mut flight.queued, true)
            {
                self.backlog.push_back(slot);
            }
        }
        self.pump(ctx)
    }

    fn recycle(&mut self, buf: Option<IoBuffer>) {
        if let Some(buf) = buf {
            self.pool.put(buf);
        }
    }

    /// Answers a flight that is finished, or has its error judged.
    fn settle(&mut self, ctx: &mut Context<'_>, slot: usize) -> Result<(), DeviceError> {
        let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut) else {
            return Ok(());
        };
        if !flight.finished() {
            return Ok(());
        }
        let mut status = S_OK;
        if let Some(error) = flight.error.take() {
            let unsupported = error.kind() == io::ErrorKind::Unsupported;
            match flight.kind {
                Kind::WriteZeroes if unsupported && !flight.emulate => {
                    self.native_zeroes = false;
                    flight.restart();
                    flight.emulate = true;
                    flight.queued = true;
                    self.backlog.push_back(slot);
                    return Ok(());
                }
                // A hint: the range keeps its contents.
                Kind::Discard if unsupported => {}
                kind => {
                    count(&self.stats.errors, 1);
                    let failure = Failure {
                        device: &self.name,
                        op: kind.name(),
                        offset: flight.ranges.first().map_or(0, |r| r.offset),
                        len: flight.len(),
                        error: &error,
                    };
                    tracing::warn!(device = %self.name, op = kind.name(), offset = failure.offset,
                        len = failure.len, %error, "disk request failed");
                    if self.policy.on_error(&failure) == Verdict::Hold {
                        count(&self.stats.held, 1);
                        flight.restart();
                        self.held.push(slot);
                        return Ok(());
                    }
                    status = S_IOERR;
                }
            }
        }
        let Some(flight) = self.flights.get_mut(slot).and_then(Option::take) else {
            return Ok(());
        };
        self.free.push(slot);
        let queue = usize::from(flight.queue);
        if let Some(head) = self
            .heads
            .get_mut(queue)
            .and_then(|h| h.get_mut(usize::from(flight.chain.head)))
        {
            *head = None;
        }
        let (requests, bytes) = match flight.kind {
            Kind::Read => (&self.stats.reads, Some(&self.stats.bytes_read)),
            Kind::Write => (&self.stats.writes, Some(&self.stats.bytes_written)),
            Kind::Flush => (&self.stats.flushes, None),
            Kind::Discard => (&self.stats.discards, None),
            Kind::WriteZeroes => (&self.stats.write_zeroes, None),
        };
        count(requests, 1);
        if let Some(bytes) = bytes {
            count(bytes, flight.len());
        }
        let written = if flight.kind == Kind::Read && status == S_OK {
            flight.len() as u32
        } else {
            0
        };
        self.answer(ctx, queue, &flight.chain, status, written)
    }

    fn answer(
        &mut self,
        ctx: &mut Context<'_>,
        queue: usize,
        chain: &Chain,
        status: u8,
        written: u32,
    ) -> Result<(), DeviceError> {
        chain
            .write_at(ctx.memory, chain.writable_len() - 1, &[status])
            .map_err(|e| driver_error(&self.name, e))?;
        if let Some(q) = ctx.queues.get_mut(queue) {
            used(&self.name, ctx.memory, q, chain.head, written + 1)?;
            self.touched |= 1 << (queue & 63);
        }
        Ok(())
    }

    /// Queues to interrupt for, by bit; starts over at none.
    pub(super) fn take_touched(&mut self) -> u64 {
        std::mem::take(&mut self.touched)
    }

    /// Tries held requests again.
    pub(super) fn retry_held(&mut self) {
        for slot in self.held.drain(..) {
            if let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut) {
                flight.queued = true;
                self.backlog.push_back(slot);
            }
        }
    }

    /// Completes everything that the backend can complete within `timeout`.
    pub(super) fn drain(&mut self, ctx: &mut Context<'_>, timeout: Duration) -> Result<(), DeviceError> {
        let end = Instant::now() + timeout;
        let open = |e: &Self| e.flights.iter().flatten().count() > e.held.len();
        while open(self) {
            self.turn(ctx)?;
            let left = end.saturating_duration_since(Instant::now());
            let mut finished = Vec::new();
            let idle = self.backend.drain(left, &mut finished);
            self.handle(ctx, &mut finished)?;
            if (!idle || left.is_zero()) && open(self) {
                return Err(self.stuck());
            }
        }
        if self.held.is_empty() {
            Ok(())
        } else {
            Err(self.stuck())
        }
    }

    fn stuck(&self) -> DeviceError {
        let what = format!(
            "waiting for its disk: {} requests in flight, {} held after errors",
            self.flights.iter().flatten().count(),
            self.held.len()
        );
        host_error(&self.name, &what, io::ErrorKind::TimedOut.into())
    }

    /// Forgets the guest's requests and waits until the backend does no more of them. Returns whether it rests.
    pub(super) fn abandon(&mut self, timeout: Duration) -> bool {
        self.generation = self.generation.wrapping_add(1);
        self.backlog.clear();
        self.held.clear();
        self.flights.clear();
        self.free.clear();
        self.heads.clear();
        self.touched = 0;
        let mut finished = Vec::new();
        let _ = self.backend.kick();
        let idle = self.backend.drain(timeout, &mut finished);
        for completion in finished {
            self.recycle(completion.buf);
        }
        idle
    }
}
