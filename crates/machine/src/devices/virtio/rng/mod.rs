//! Virtio entropy device (virtio 1.2, section 5.4): host randomness from getrandom(2).
//!
//! A request is answered with at most [`REQUEST_MAX`] bytes, which the specification allows, and all requests
//! together are held to a rate, so that a guest cannot make the host spend its time on random numbers.
//! No request is ever in flight outside a call: the device's state is empty.

use super::common::{
    self, Kick, Rate, RateHandle, RateLimiter, Timer, count, disable, enable, host_error, next_chain, signal,
    used,
};
use super::{Context, DeviceError, VirtioDevice, VirtioKind};
use crate::state::{StateError, StateKind, StateRecord};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Most bytes for one request.
pub const REQUEST_MAX: u32 = 65536;
/// Default rate: 4 MiB per second.
pub const DEFAULT_RATE: Rate = Rate {
    bytes_per_s: 4 << 20,
    ops_per_s: 0,
};
/// Requests served in one call.
const BUDGET: usize = 32;
const QUEUE_SIZES: [u16; 1] = [64];
const TOKEN_KICK: u32 = 1;
const TOKEN_TIMER: u32 = 2;

/// Counters.
#[derive(Debug, Default)]
pub struct Stats {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Bytes given.
    pub bytes: AtomicU64,
    /// Times that the rate limit held the guest back.
    pub throttled: AtomicU64,
}

/// The device.
pub struct Rng {
    name: String,
    limiter: RateLimiter,
    kick: Kick,
    timer: Timer,
    scratch: Vec<u8>,
    stats: Arc<Stats>,
}

impl Rng {
    /// A device held to `rate`.
    ///
    /// # Errors
    /// eventfd or timerfd could not be made.
    pub fn new(name: impl Into<String>, rate: RateHandle) -> io::Result<Self> {
        Ok(Self {
            name: name.into(),
            limiter: RateLimiter::new(rate),
            kick: Kick::new()?,
            timer: Timer::new()?,
            scratch: Vec::new(),
            stats: Arc::default(),
        })
    }

    /// The counters.
    #[must_use]
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }

    fn serve(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let name = self.name.as_str();
        let Some(queue) = ctx.queues.first_mut().filter(|q| virtio_queue::QueueT::ready(*q)) else {
            return Ok(());
        };
        let mut done = 0;
        'serve: loop {
            disable(name, ctx.memory, queue)?;
            loop {
                let wait = self.limiter.wait();
                if !wait.is_zero() {
                    count(&self.stats.throttled, 1);
                    self.timer
                        .arm(wait)
                        .map_err(|e| host_error(name, "arming its timer", e))?;
                    break 'serve;
                }
                if done == BUDGET {
                    self.kick.arm();
                    break 'serve;
                }
                let Some(chain) = next_chain(name, ctx.memory, queue)? else {
                    break;
                };
                let len = chain.writable_len().min(REQUEST_MAX) as usize;
                self.scratch.resize(len, 0);
                fill(&mut self.scratch).map_err(|e| host_error(name, "getrandom", e))?;
                let written = chain
                    .write_at(ctx.memory, 0, &self.scratch)
                    .map_err(|e| common::driver_error(name, e))?;
                used(name, ctx.memory, queue, chain.head, written as u32)?;
                self.limiter.charge(1, written as u64);
                count(&self.stats.requests, 1);
                count(&self.stats.bytes, written as u64);
                done += 1;
            }
            if !enable(name, ctx.memory, queue)? {
                break;
            }
        }
        if done > 0 {
            signal(name, ctx.memory, queue, 0, ctx.interrupt)?;
        }
        Ok(())
    }
}

fn fill(buf: &mut [u8]) -> io::Result<()> {
    let mut at = 0;
    while at < buf.len() {
        // Before the host's pool is initialised, `NONBLOCK` says so instead of stopping the machine.
        match rustix::rand::getrandom(&mut buf[at..], rustix::rand::GetRandomFlags::NONBLOCK) {
            Ok(n) => at += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

impl VirtioDevice for Rng {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Rng
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
        common::copy_config(&[], offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceError> {
        let registered = self
            .kick
            .register(ctx.io, TOKEN_KICK)
            .and_then(|()| self.timer.register(ctx.io, TOKEN_TIMER));
        registered.map_err(|e| {
            self.reset();
            host_error(&self.name, "registering with its I/O thread", e)
        })
    }

    fn queue_notified(&mut self, ctx: &mut Context<'_>, _queue: usize) -> Result<(), DeviceError> {
        self.serve(ctx)
    }

    fn io_ready(&mut self, ctx: &mut Context<'_>, token: u32) -> Result<(), DeviceError> {
        match token {
            TOKEN_KICK => self.kick.clear(),
            TOKEN_TIMER => self.timer.clear(),
            _ => return Ok(()),
        }
        self.serve(ctx)
    }

    fn reset(&mut self) {
        self.kick.unregister();
        self.timer.unregister();
    }

    fn drain(&mut self, _ctx: Option<&mut Context<'_>>, _within: Duration) -> Result<(), DeviceError> {
        // Every request is answered inside the call that took it.
        Ok(())
    }

    fn save(&mut self, instance: u16) -> Result<StateRecord, StateError> {
        StateRecord::encode(StateKind::VirtioRng, instance, 1, &())
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        common::expect_kind(record, StateKind::VirtioRng)?;
        record.decode::<()>(1)
    }
}

/// Fuzz entry: see [`common::testkit::fuzz`].
#[doc(hidden)]
pub fn fuzz_rng(data: &[u8]) {
    if let Ok(device) = Rng::new("rng", RateHandle::default()) {
        common::testkit::fuzz(device, 0, data);
    }
}

#[cfg(test)]
mod tests {
    use super::common::testkit::{DATA, Harness, r, ram, w};
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn harness(rate: Rate, features: u64) -> Harness<Rng> {
        let device = Rng::new("rng0", RateHandle::new(rate)).unwrap();
        let h = Harness::on(ram().unwrap(), device, 64, features).unwrap();
        assert!(h.activate());
        h
    }

    #[test]
    fn fills_buffers_and_interrupts_once_per_batch() {
        for features in [0, 1 << 29] {
            let mut h = harness(Rate::default(), features);
            let head = h.add(0, &[w(DATA, 64), w(DATA + 8192, 100)]);
            let big = h.add(0, &[w(DATA + 16384, 200_000)]);
            assert!(h.notify(0));
            assert_eq!(h.used(0), [(head, 164), (big, REQUEST_MAX)]);
            let bytes: [u8; 32] = h.memory.read_obj(GuestAddress(DATA)).unwrap();
            assert_ne!(bytes, [0; 32]);
            assert_eq!(
                h.interrupts.queues[0].load(std::sync::atomic::Ordering::SeqCst),
                1
            );
        }
    }

    #[test]
    fn more_than_the_budget_is_served_without_another_notification() {
        let mut h = harness(Rate::default(), 0);
        for _ in 0..60 {
            h.add(0, &[w(DATA, 8)]);
        }
        assert!(h.notify(0));
        assert_eq!(h.wait_used(0, 60).len(), 60);
    }

    #[test]
    fn the_rate_holds_the_guest_back_and_goes_on_by_itself() {
        let mut h = harness(
            Rate {
                bytes_per_s: 100_000,
                ops_per_s: 0,
            },
            0,
        );
        let stats = h.lock().device.stats();
        for _ in 0..3 {
            h.add(0, &[w(DATA, 20_000)]);
        }
        assert!(h.notify(0));
        assert!(h.used(0).len() < 3);
        assert!(h.wait(|_| stats.bytes.load(std::sync::atomic::Ordering::Relaxed) == 60_000));
        assert!(stats.throttled.load(std::sync::atomic::Ordering::Relaxed) > 0);
    }

    #[test]
    fn hostile_rings_are_refused() {
        type Case<'a> = &'a dyn Fn(&mut Harness<Rng>);
        let bad: [Case<'_>; 6] = [
            &|h| {
                h.add(0, &[w(0x7000_0000, 64)]);
            },
            &|h| {
                h.add(0, &[w(DATA, 0)]);
            },
            &|h| {
                h.add(0, &[w(DATA, 16), r(DATA, 16)]);
            },
            &|h| h.set_avail(0, 65),
            // A loop of two descriptors.
            &|h| {
                h.add(0, &[w(DATA, 16), w(DATA, 16)]);
                h.descriptor(0, 1, DATA, 16, 3, 0);
            },
            // An indirect table inside an indirect table.
            &|h| {
                h.add(0, &[w(DATA, 16)]);
                h.descriptor(0, 0, 0x1_0000, 16, 4, 0);
            },
        ];
        for (i, make) in bad.iter().enumerate() {
            let mut h = harness(Rate::default(), 0);
            make(&mut h);
            assert!(!h.notify(0), "case {i}");
            assert!(
                matches!(h.lock().failed, Some(DeviceError::Driver { .. })),
                "case {i}"
            );
            assert!(h.used(0).is_empty(), "case {i}");
        }
    }

    #[test]
    fn goes_on_after_restore() {
        let mut h = harness(Rate::default(), 0);
        h.add(0, &[w(DATA, 8)]);
        let next = Rng::new("rng0", RateHandle::default()).unwrap();
        let mut h = h.migrate(next, 0).unwrap();
        assert_eq!(h.used(0).len(), 1);
        let other = StateRecord::encode(StateKind::VirtioNet, 0, 1, &()).unwrap();
        assert!(h.lock().device.restore(&other).is_err());
    }

    #[test]
    fn fuzz_corpus_returns() {
        common::testkit::fuzz_many(fuzz_rng);
    }
}
