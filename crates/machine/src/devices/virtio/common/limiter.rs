//! Token buckets for bytes and operations per second, changeable while a device runs.
//!
//! A device asks [`RateLimiter::wait`] before it takes a chain and charges what the chain cost afterwards; a bucket
//! may go into debt by one request, so that a request larger than the burst is delayed, never refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Limits; zero means none. The burst is what 100 ms give, at least one unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second.
    pub bytes_per_s: u64,
    /// Operations per second.
    pub ops_per_s: u64,
}

#[derive(Default, Debug)]
struct Shared {
    bytes_per_s: AtomicU64,
    ops_per_s: AtomicU64,
}

/// Changes the limits of a running device. A device that waits notices within 100 ms.
#[derive(Clone, Default, Debug)]
pub struct RateHandle(Arc<Shared>);

impl RateHandle {
    /// Handle with these limits.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        let handle = Self::default();
        handle.set(rate);
        handle
    }

    /// Sets the limits.
    pub fn set(&self, rate: Rate) {
        self.0.bytes_per_s.store(rate.bytes_per_s, Ordering::Relaxed);
        self.0.ops_per_s.store(rate.ops_per_s, Ordering::Relaxed);
    }

    /// The limits.
    #[must_use]
    pub fn get(&self) -> Rate {
        Rate {
            bytes_per_s: self.0.bytes_per_s.load(Ordering::Relaxed),
            ops_per_s: self.0.ops_per_s.load(Ordering::Relaxed),
        }
    }
}

/// Longest wait at a time; after it the limits are looked at again.
const WAIT_MAX: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Bucket {
    /// Millionths of a unit; negative is debt.
    level: i128,
    rate: u64,
}

impl Bucket {
    fn refill(&mut self, rate: u64, elapsed: Duration) {
        let burst = i128::from((rate / 10).max(1)) * 1_000_000;
        if self.rate != rate {
            self.rate = rate;
            // A new limit starts with a full burst, and old debt is forgiven.
            self.level = burst;
        }
        let gained = i128::from(rate) * elapsed.as_micros().min(3_600_000_000) as i128;
        self.level = (self.level + gained).min(burst);
    }

    fn wait(&self) -> Duration {
        if self.rate == 0 || self.level > 0 {
            return Duration::ZERO;
        }
        let micros = (1 - self.level) / i128::from(self.rate) + 1;
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }
}

/// The buckets of one device.
#[derive(Debug)]
pub struct RateLimiter {
    handle: RateHandle,
    bytes: Bucket,
    ops: Bucket,
    last: Instant,
}

impl RateLimiter {
    /// Buckets that start full.
    #[must_use]
    pub fn new(handle: RateHandle) -> Self {
        let empty = || Bucket { level: 0, rate: 0 };
        Self {
            handle,
            bytes: empty(),
            ops: empty(),
            last: Instant::now(),
        }
    }

    /// How long to wait before the next operation; zero to go on.
    pub fn wait(&mut self) -> Duration {
        let rate = self.handle.get();
        if rate == Rate::default() {
            return Duration::ZERO;
        }
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(self.last);
        self.last = now;
        self.bytes.refill(rate.bytes_per_s, elapsed);
        self.ops.refill(rate.ops_per_s, elapsed);
        self.bytes.wait().max(self.ops.wait()).min(WAIT_MAX)
    }

    /// Takes what an operation cost.
    pub fn charge(&mut self, ops: u64, bytes: u64) {
        self.bytes.level -= i128::from(bytes) * 1_000_000;
        self.ops.level -= i128::from(ops) * 1_000_000;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_bite_and_can_be_lifted() {
        let handle = RateHandle::new(Rate {
            bytes_per_s: 1000,
            ops_per_s: 0,
        });
        let mut limiter = RateLimiter::new(handle.clone());
        assert_eq!(limiter.wait(), Duration::ZERO);
        limiter.charge(1, 5000);
        let wait = limiter.wait();
        assert!(wait > Duration::from_millis(50) && wait <= WAIT_MAX, "{wait:?}");
        handle.set(Rate::default());
        assert_eq!(limiter.wait(), Duration::ZERO);
        handle.set(Rate {
            bytes_per_s: 0,
            ops_per_s: 10,
        });
        assert_eq!(limiter.wait(), Duration::ZERO);
        limiter.charge(1, 1 << 40);
        assert!(limiter.wait() > Duration::ZERO);
    }
}
