//! A rate limit as a pure function of time.

/// A token bucket: at most `bytes_per_s` on average, in bursts of at most a tenth of a second's worth.
#[derive(Clone, Debug)]
pub struct RateLimit {
    bytes_per_s: u64,
    /// Microseconds at which the work done so far would be paid for.
    paid_until_us: u64,
}

impl RateLimit {
    /// A limit in bytes per second; 0 means none.
    #[must_use]
    pub const fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s,
            paid_until_us: 0,
        }
    }

    /// Notes `bytes` done at `now_us` (monotonic) and says how many microseconds to wait before the next.
    pub fn spend(&mut self, now_us: u64, bytes: u64) -> u64 {
        if self.bytes_per_s == 0 {
            return 0;
        }
        let cost = bytes.saturating_mul(1_000_000) / self.bytes_per_s;
        self.paid_until_us = self
            .paid_until_us
            .max(now_us.saturating_sub(100_000))
            .saturating_add(cost);
        self.paid_until_us.saturating_sub(now_us)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_average() {
        let mut limit = RateLimit::new(1_000_000);
        let mut now = 5_000_000;
        for _ in 0..100 {
            now += limit.spend(now, 64 * 1024);
        }
        let took = now - 5_000_000;
        assert!((6_300_000..6_600_000).contains(&took), "{took}");
        assert_eq!(RateLimit::new(0).spend(0, u64::MAX), 0);
    }
}
