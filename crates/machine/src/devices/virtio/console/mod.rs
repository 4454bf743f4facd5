//! Virtio console device with one port (virtio 1.2, section 5.3).
//!
//! Output goes to a [`ConsoleSink`] inside the call that took it and is not part of the state. Input that the guest
//! has not taken yet is.

mod sink;

pub use sink::{ConsoleInput, ConsoleSink, INPUT_MAX, RingReader, RingSink, WriteSink, ring};

use super::common::{
    self, Kick, count, disable, driver_error, enable, host_error, next_chain, put, signal, used,
};
use super::{Context, DeviceError, VirtioDevice, VirtioKind};
use crate::state::{StateError, StateKind, StateRecord};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use virtio_queue::QueueT;

const QUEUE_SIZES: [u16; 2] = [128, 128];
const RX: usize = 0;
const TX: usize = 1;
const TOKEN_INPUT: u32 = 1;
const TOKEN_KICK: u32 = 2;
const TOKEN_RESIZE: u32 = 3;
const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;
/// Output chains, and bytes, taken in one call.
const BUDGET: usize = 64;
const BUDGET_BYTES: u64 = 256 << 10;
const CHUNK: usize = 4096;

/// Counters.
#[derive(Debug, Default)]
pub struct Stats {
    /// Bytes that the guest wrote.
    pub bytes_out: AtomicU64,
    /// Of these, bytes that the sink did not take.
    pub dropped: AtomicU64,
    /// Bytes that the guest received.
    pub bytes_in: AtomicU64,
}

/// Changes the terminal size that the guest sees.
#[derive(Clone)]
pub struct ConsoleSize {
    size: Arc<AtomicU32>,
    kick: Arc<vmm_sys_util::eventfd::EventFd>,
}

impl ConsoleSize {
    /// Sets the size in characters.
    pub fn set(&self, columns: u16, rows: u16) {
        let packed = (u32::from(rows) << 16) | u32::from(columns);
        self.size.store(packed, Ordering::SeqCst);
        let _ = self.kick.write(1);
    }
}

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    input: Vec<u8>,
    size: u32,
}

/// The device.
pub struct Console {
    name: String,
    sink: Box<dyn ConsoleSink>,
    input: ConsoleInput,
    input_ready: Kick,
    kick: Kick,
    resize: Kick,
    size: Arc<AtomicU32>,
    stats: Arc<Stats>,
    scratch: Vec<u8>,
}

impl Console {
    /// A console that writes to `sink`.
    ///
    /// # Errors
    /// eventfds could not be made.
    pub fn new(name: impl Into<String>, sink: Box<dyn ConsoleSink>) -> io::Result<Self> {
        let input_ready = Kick::new()?;
        Ok(Self {
            name: name.into(),
            sink,
            input: ConsoleInput {
                waiting: Arc::default(),
                kick: Arc::new(input_ready.handle()?),
            },
            input_ready,
            kick: Kick::new()?,
            resize: Kick::new()?,
            size: Arc::new(AtomicU32::new((25 << 16) | 80)),
            stats: Arc::default(),
            scratch: vec![0; CHUNK],
        })
    }

    /// The keyboard.
    #[must_use]
    pub fn input(&self) -> ConsoleInput {
        self.input.clone()
    }

    /// The terminal size.
    ///
    /// # Errors
    /// dup failed.
    pub fn size(&self) -> io::Result<ConsoleSize> {
        Ok(ConsoleSize {
            size: Arc::clone(&self.size),
            kick: Arc::new(self.resize.handle()?),
        })
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    fn output(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let name = self.name.as_str();
        let Some(queue) = ctx.queues.get_mut(TX).filter(|q| q.ready()) else {
            return Ok(());
        };
        let (mut done, mut bytes) = (0, 0);
        'serve: loop {
            disable(name, ctx.memory, queue)?;
            loop {
                if done == BUDGET || bytes >= BUDGET_BYTES {
                    self.kick.arm();
                    break 'serve;
                }
                let Some(chain) = next_chain(name, ctx.memory, queue)? else {
                    break;
                };
                let mut at = 0;
                // A line is at most a page in every driver; what a hostile one sends beyond the budget is dropped.
                while u64::from(at) < BUDGET_BYTES {
                    let n = chain
                        .read_at(ctx.memory, at, &mut self.scratch)
                        .map_err(|e| driver_error(name, e))?;
                    if n == 0 {
                        break;
                    }
                    let taken = self.sink.write(&self.scratch[..n]);
                    count(&self.stats.dropped, n.saturating_sub(taken) as u64);
                    at += n as u32;
                }
                count(&self.stats.dropped, u64::from(chain.readable_len() - at));
                count(&self.stats.bytes_out, u64::from(chain.readable_len()));
                bytes += u64::from(at);
                used(name, ctx.memory, queue, chain.head, 0)?;
                done += 1;
            }
            if !enable(name, ctx.memory, queue)? {
                break;
            }
        }
        if done > 0 {
            signal(name, ctx.memory, queue, TX, ctx.interrupt)?;
        }
        Ok(())
    }

    fn deliver(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let name = self.name.as_str();
        let Some(queue) = ctx.queues.get_mut(RX).filter(|q| q.ready()) else {
            return Ok(());
        };
        let mut waiting = self.input.lock();
        let mut done = 0;
        // Bounded by the input, of which there are at most INPUT_MAX bytes: each chain takes one at least.
        while !waiting.is_empty() && done < BUDGET {
            let Some(chain) = next_chain(name, ctx.memory, queue)? else {
                if enable(name, ctx.memory, queue)? {
                    continue;
                }
                break;
            };
            let room = chain.writable_len() as usize;
            if room == 0 {
                return Err(driver_error(name, "receive buffer that cannot be written"));
            }
            let take = room.min(waiting.len()).min(CHUNK);
            for (to, from) in self.scratch.iter_mut().zip(waiting.iter()).take(take) {
                *to = *from;
            }
            chain
                .write_at(ctx.memory, 0, &self.scratch[..take])
                .map_err(|e| driver_error(name, e))?;
            waiting.drain(..take);
            used(name, ctx.memory, queue, chain.head, take as u32)?;
            count(&self.stats.bytes_in, take as u64);
            done += 1;
        }
        if done == BUDGET && !waiting.is_empty() {
            self.kick.arm();
        }
        drop(waiting);
        if done > 0 {
            signal(name, ctx.memory, queue, RX, ctx.interrupt)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Console
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // cols u16, rows u16, max_nr_ports u32, emerg_wr u32.
        let mut config = [0; 12];
        put(&mut config, 0, &self.size.load(Ordering::SeqCst).to_le_bytes());
        put(&mut config, 4, &1u32.to_le_bytes());
        common::copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == 8
            && let Some(byte) = data.first()
        {
            count(&self.stats.bytes_out, 1);
            let taken = self.sink.write(&[*byte]);
            count(&self.stats.dropped, 1 - taken.min(1) as u64);
        }
    }

    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let registered = self
            .input_ready
            .register(ctx.io, TOKEN_INPUT)
            .and_then(|()| self.kick.register(ctx.io, TOKEN_KICK))
            .and_then(|()| self.resize.register(ctx.io, TOKEN_RESIZE));
        registered.map_err(|e| {
            self.reset();
            host_error(&self.name, "registering with its I/O thread", e)
        })
    }

    fn queue_notified(&mut self, ctx: &mut Context<'_>, queue: usize) -> Result<(), DeviceError> {
        match queue {
            RX => self.deliver(ctx),
            TX => self.output(ctx),
            _ => Ok(()),
        }
    }

    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKEN_INPUT => {
                self.input_ready.clear();
                self.deliver(ctx)
            }
            TOKEN_KICK => {
                self.kick.clear();
                self.output(ctx)?;
                self.deliver(ctx)
            }
            TOKEN_RESIZE => {
                self.resize.clear();
                if ctx.features & F_SIZE != 0 {
                    ctx.interrupt.config();
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.input_ready.unregister();
        self.kick.unregister();
        self.resize.unregister();
    }

    fn drain(&mut self, _ctx: Option<&mut Context<'_>>, _within: Duration) -> Result<(), DeviceError> {
        // Output is handed over inside the call that took it; input waits in the state.
        Ok(())
    }

    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError> {
        let state = State {
            input: self.input.lock().iter().copied().collect(),
            size: self.size.load(Ordering::SeqCst),
        };
        StateRecord::encode(StateKind::VirtioConsole, instance, 1, &state)
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        common::expect_kind(record, StateKind::VirtioConsole)?;
        let state: State = record.decode(1)?;
        if state.input.len() > INPUT_MAX {
            return Err(StateError::Refused(format!(
                "{}: {} bytes of input in the state, at most {INPUT_MAX} are possible",
                self.name,
                state.input.len()
            )));
        }
        self.size.store(state.size, Ordering::SeqCst);
        let mut waiting = self.input.lock();
        *waiting = state.input.into();
        drop(waiting);
        self.input_ready.arm();
        Ok(())
    }
}

/// Fuzz entry: see [`common::testkit::fuzz`].
#[doc(hidden)]
pub fn fuzz_console(data: &[u8]) {
    let (sink, _reader) = ring(1000);
    if let Ok(device) = Console::new("console", Box::new(sink)) {
        let _ = device.input().send(&data[..data.len().min(100)]);
        common::testkit::fuzz(device, F_SIZE, data);
    }
}

#[cfg(test)]
mod tests;
