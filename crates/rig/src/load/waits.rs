//! How long operations took: counted for ever, measured since a moment.

use crate::link::mux::lock;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Durations kept for the percentiles; later ones only count.
const KEPT_MAX: usize = 1 << 18;

#[derive(Debug, Default)]
struct Inner {
    count: u64,
    measured: u64,
    longest: Duration,
    kept: Vec<u32>,
}

/// Operations of one kind, by any number of threads.
#[derive(Debug, Default)]
pub struct Waits(Mutex<Inner>);

/// What a [`Waits`] holds.
#[derive(Clone, Debug, Default)]
pub struct WaitsSeen {
    /// Operations since the start.
    pub count: u64,
    /// Of those, in the time that is measured.
    pub measured: u64,
    /// The longest of them.
    pub longest: Duration,
    /// Their median.
    pub median: Duration,
    /// 99 of 100 were no longer.
    pub p99: Duration,
}

impl Waits {
    /// An operation that began then is done now.
    pub fn done(&self, began: Instant) {
        let took = began.elapsed();
        let mut inner = lock(&self.0);
        inner.count += 1;
        inner.measured += 1;
        inner.longest = inner.longest.max(took);
        if inner.kept.len() < KEPT_MAX {
            inner
                .kept
                .push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
        }
    }

    /// Measures from now on.
    pub fn begin(&self) {
        let mut inner = lock(&self.0);
        (inner.measured, inner.longest) = (0, Duration::ZERO);
        inner.kept.clear();
    }

    /// Operations since the start.
    pub fn count(&self) -> u64 {
        lock(&self.0).count
    }

    /// What it holds.
    pub fn seen(&self) -> WaitsSeen {
        let inner = lock(&self.0);
        let mut kept = inner.kept.clone();
        kept.sort_unstable();
        let at = |per_cent: usize| {
            let index = (kept.len() * per_cent / 100).min(kept.len().saturating_sub(1));
            Duration::from_micros(kept.get(index).copied().unwrap_or(0).into())
        };
        WaitsSeen {
            count: inner.count,
            measured: inner.measured,
            longest: inner.longest,
            median: at(50),
            p99: at(99),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_for_ever_and_measures_since_a_moment() {
        let waits = Waits::default();
        let ago = |ms| Instant::now().checked_sub(Duration::from_millis(ms)).unwrap();
        waits.done(ago(500));
        waits.begin();
        for ms in [10, 20, 30] {
            waits.done(ago(ms));
        }
        let seen = waits.seen();
        assert_eq!((seen.count, seen.measured), (4, 3));
        assert!(seen.longest >= Duration::from_millis(30) && seen.longest < Duration::from_millis(500));
        assert!(seen.median >= Duration::from_millis(20) && seen.median <= seen.p99);
        assert_eq!(Waits::default().seen().median, Duration::ZERO);
    }
}
