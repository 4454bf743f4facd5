//! Many seeds on all CPUs.

use crate::faults::{Coverage, Kind, Profile};
use crate::run::{Report, run};
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use steadfast_epoch::Sabotage;

/// What many runs were like.
#[derive(Debug, Default)]
pub struct Total {
    /// Runs made.
    pub runs: u64,
    /// Those with a broken promise (at most as many as were asked for).
    pub failures: Vec<Report>,
    /// What went wrong in the worlds.
    pub coverage: Coverage,
    /// Replies, promotions, boots from disk.
    pub replies: u64,
    /// See `replies`.
    pub promotions: u64,
    /// See `replies`.
    pub cold_boots: u64,
    /// The longest wait of a client with a single fault.
    pub longest_single_us: u64,
}

impl fmt::Display for Total {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} runs, {} replies, {} promotions, {} boots from disk, longest wait with one fault {} ms",
            self.runs,
            self.replies,
            self.promotions,
            self.cold_boots,
            self.longest_single_us / 1000
        )?;
        for (k, row) in Kind::ALL {
            writeln!(f, "  {:>8} {k:?} (row {row})", self.coverage.kinds.get(&k).unwrap_or(&0))?;
        }
        for (s, n) in &self.coverage.steps {
            writeln!(f, "  {n:>8} killed at {s:?}")?;
        }
        for r in &self.failures {
            if let Some(v) = &r.violation {
                let how: String = v.how.chars().take(400).collect();
                writeln!(f, "SEED {} ({:?}) breaks {}: {how}", r.seed, r.profile, v.what)?;
            }
        }
        Ok(())
    }
}

/// A failed assertion of the protocol is a finding, reported with its seed: no backtrace of it is wanted.
fn quiet_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.payload_as_str().unwrap_or_default();
            let ours = text.starts_with('I') && text.as_bytes().get(1).is_some_and(u8::is_ascii_digit);
            if !ours {
                usual(info);
            }
        }));
    });
}

/// Runs `count` seeds from `from` on; stops early after so many failures.
#[must_use]
pub fn run_with(from: u64, count: u64, stop_after: usize, sabotage: Sabotage) -> Total {
    let next = AtomicU64::new(from);
    let total = Mutex::new(Total::default());
    quiet_panics();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|s| {
        for _ in 0..workers {
            s.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        return;
                    }
                    let r = run(seed, sabotage, false);
                    let Ok(mut t) = total.lock() else { return };
                    if t.failures.len() >= stop_after {
                        return;
                    }
                    t.runs += 1;
                    t.coverage.add(&r.coverage);
                    t.replies += r.replies;
                    t.promotions += r.promotions;
                    t.cold_boots += r.cold_boots;
                    if r.profile == Profile::Single {
                        t.longest_single_us = t.longest_single_us.max(r.longest_us);
                    }
                    if r.violation.is_some() {
                        t.failures.push(r);
                    }
                }
            });
        }
    });
    let mut t = total.into_inner().unwrap_or_default();
    t.failures.sort_by_key(|r| r.seed);
    t
}

/// Runs seeds of the protocol as it is.
#[must_use]
pub fn run_seeds(from: u64, count: u64, stop_after: usize) -> Total {
    run_with(from, count, stop_after, Sabotage::None)
}
