//! How the disk below a volume does: failed jobs, jobs that do not come back, blocks that were bad.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Failures in a row after which a disk counts as failed. Jobs are still tried again, once a second.
const FAULTS_MAX: u32 = 5;
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_LATER: Duration = Duration::from_secs(1);

/// What a job works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Journal,
    Image,
}

#[derive(Debug, Default)]
struct Thread {
    fault: Option<String>,
    row: u32,
    since: Option<Instant>,
}

/// Kept by the threads of a volume and by repairs.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    journal: Mutex<Thread>,
    image: Mutex<Thread>,
    pub(crate) bad: AtomicU64,
    pub(crate) repaired: AtomicU64,
    pub(crate) served: AtomicU64,
}

/// A snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Why the journal counts as failed, if it does.
    pub journal_fault: Option<String>,
    /// Why the image counts as failed, if it does.
    pub image_fault: Option<String>,
    /// How long the present job of the journal runs.
    pub journal_job: Duration,
    /// How long the present job of the image runs.
    pub image_job: Duration,
    /// Blocks that were unreadable or did not match their checksum.
    pub bad: u64,
    /// Of these, written anew with the peer's content.
    pub repaired: u64,
    /// Reads that were answered with the peer's content, because the disk gives a block no more.
    pub served: u64,
}

impl Watch {
    fn thread(&self, part: Part) -> MutexGuard<'_, Thread> {
        let thread = match part {
            Part::Journal => &self.journal,
            Part::Image => &self.image,
        };
        thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job begins.
    pub(super) fn begin(&self, part: Part) {
        self.thread(part).since = Some(Instant::now());
    }

    /// A job has ended; how long to wait before the next.
    pub(super) fn end<E: std::fmt::Display>(&self, part: Part, result: &Result<(), E>) -> Option<Duration> {
        let mut t = self.thread(part);
        t.since = None;
        match result {
            Ok(()) => {
                t.row = 0;
                t.fault = None;
                None
            }
            Err(e) => {
                t.row = t.row.saturating_add(1);
                tracing::error!(error = %e, row = t.row, ?part, "volume job failed, to be tried again");
                if t.row >= FAULTS_MAX {
                    t.fault = Some(e.to_string());
                }
                Some(if t.row < FAULTS_MAX {
                    RETRY_FIRST
                } else {
                    RETRY_LATER
                })
            }
        }
    }

    pub(super) fn fault(&self) -> Option<String> {
        let journal = self.thread(Part::Journal).fault.clone();
        journal.or_else(|| self.thread(Part::Image).fault.clone())
    }

    pub(super) fn health(&self) -> Health {
        let look = |part| {
            let t = self.thread(part);
            (t.fault.clone(), t.since.map_or(Duration::ZERO, |s| s.elapsed()))
        };
        let ((journal_fault, journal_job), (image_fault, image_job)) =
            (look(Part::Journal), look(Part::Image));
        let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Health {
            journal_fault,
            image_fault,
            journal_job,
            image_job,
            bad: count(&self.bad),
            repaired: count(&self.repaired),
            served: count(&self.served),
        }
    }
}
