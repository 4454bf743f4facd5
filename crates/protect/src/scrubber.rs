//! The thread that walks over all disks, slowly and for ever: rot is found before the copy that could repair it is needed.
//!
//! Each step is one MiB; between two steps no volume is held, so that it can be laid out anew. What a copy is under way to is
//! left alone.

use crate::ask::Shelf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use steadfast_disk::journal::State;
use steadfast_disk::resync::RateLimit;
use steadfast_disk::scrub::Scrub;

/// Bytes that one step looks at.
const STEP: u64 = 1 << 20;
/// The thread looks so often whether it is to end.
const LOOK: Duration = Duration::from_millis(50);
/// After a step that failed.
const AGAIN: Duration = Duration::from_secs(1);

/// What all walks found.
#[derive(Debug, Default)]
pub struct Found {
    /// Walks over all disks that were completed.
    pub walks: AtomicU64,
    /// Blocks looked at.
    pub blocks: AtomicU64,
    /// Blocks that did not match, or could not be read.
    pub bad: AtomicU64,
    /// Of these, repaired from another host.
    pub repaired: AtomicU64,
}

/// Ends the thread when dropped, soon.
pub struct Scrubber {
    stop: Arc<AtomicBool>,
    /// See [`Found`].
    pub found: Arc<Found>,
}

impl Drop for Scrubber {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

struct Walk {
    stop: Arc<AtomicBool>,
    found: Arc<Found>,
    rate: RateLimit,
    began: Instant,
}

impl Scrubber {
    /// Walks over `disks` at `bytes_per_s` (0: never), with `pause` before each walk.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(disks: Vec<Shelf>, bytes_per_s: u64, pause: Duration) -> std::io::Result<Self> {
        let it = Self {
            stop: Arc::default(),
            found: Arc::default(),
        };
        if bytes_per_s == 0 || disks.is_empty() {
            return Ok(it);
        }
        let mut walk = Walk {
            stop: Arc::clone(&it.stop),
            found: Arc::clone(&it.found),
            rate: RateLimit::new(bytes_per_s),
            began: Instant::now(),
        };
        std::thread::Builder::new()
            .name("disk-scrub".into())
            .spawn(move || {
                while walk.wait(pause) {
                    if disks.iter().all(|d| walk.over(d)) {
                        walk.found.walks.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })?;
        Ok(it)
    }
}

impl Walk {
    /// False when the thread is to end.
    fn wait(&self, how_long: Duration) -> bool {
        let until = Instant::now() + how_long;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }

    /// One disk, from its beginning to its end; false if it could not be done.
    fn over(&mut self, disk: &Shelf) -> bool {
        let mut next = 0;
        loop {
            let wait = {
                let shelf = disk.read().unwrap_or_else(PoisonError::into_inner);
                let Some(volume) = shelf.as_ref() else {
                    return false;
                };
                if matches!(volume.progress().state, State::Copying { .. }) {
                    return false;
                }
                if next >= volume.capacity() {
                    return true;
                }
                let mut scrub = Scrub::at(volume, next);
                let stepped = scrub.step(0);
                let report = scrub.report();
                let add = |to: &AtomicU64, n: u64| to.fetch_add(n, Ordering::Relaxed);
                add(&self.found.blocks, report.blocks);
                add(&self.found.bad, report.bad);
                add(&self.found.repaired, report.repaired);
                match stepped {
                    Ok(_) => {
                        next += STEP;
                        Duration::from_micros(self.rate.spend(self.began.elapsed().as_micros() as u64, STEP))
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a step of a scrub failed");
                        AGAIN
                    }
                }
            };
            if !self.wait(wait) {
                return false;
            }
        }
    }
}
