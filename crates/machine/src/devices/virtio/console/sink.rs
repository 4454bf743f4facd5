//! Where console output goes and where input comes from, bounded in both directions.
//!
//! The guest is never blocked by a reader that is slow or gone: what does not fit is dropped and counted
//! (fault row 53). The far ends may be used from any thread.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Takes console output without blocking.
pub trait ConsoleSink: Send {
    /// Takes a prefix of `data` and returns its length; the rest is lost.
    fn write(&mut self, data: &[u8]) -> usize;
}

/// Any non-blocking writer (pipe, socket, terminal) as a sink; an error loses the bytes.
pub struct WriteSink<W: Write + Send>(pub W);

impl<W: Write + Send> ConsoleSink for WriteSink<W> {
    fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        while done < data.len() {
            match self.0.write(&data[done..]) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        done
    }
}

#[derive(Default)]
struct RingState {
    bytes: VecDeque<u8>,
    closed: bool,
}

struct Ring {
    state: Mutex<RingState>,
    filled: Condvar,
    capacity: usize,
    dropped: AtomicU64,
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, RingState> {
        // Only whole operations of VecDeque run under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writing end of a bounded output ring.
pub struct RingSink(Arc<Ring>);

/// Reading end of a bounded output ring.
#[derive(Clone)]
pub struct RingReader(Arc<Ring>);

/// A ring of `capacity` bytes between a console and whoever shows it.
#[must_use]
pub fn ring(capacity: usize) -> (RingSink, RingReader) {
    let ring = Arc::new(Ring {
        state: Mutex::default(),
        filled: Condvar::new(),
        capacity,
        dropped: AtomicU64::new(0),
    });
    (RingSink(Arc::clone(&ring)), RingReader(ring))
}

impl ConsoleSink for RingSink {
    fn write(&mut self, data: &[u8]) -> usize {
        let mut state = self.0.lock();
        let take = data.len().min(self.0.capacity.saturating_sub(state.bytes.len()));
        state.bytes.extend(&data[..take]);
        drop(state);
        self.0
            .dropped
            .fetch_add((data.len() - take) as u64, Ordering::Relaxed);
        self.0.filled.notify_all();
        take
    }
}

impl Drop for RingSink {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.filled.notify_all();
    }
}

impl RingReader {
    /// Takes what is there, waiting up to `timeout` for the first byte. Empty after the timeout; `None` when the
    /// console is gone and everything was read.
    #[must_use]
    pub fn read(&self, timeout: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + timeout;
        let mut state = self.0.lock();
        while state.bytes.is_empty() {
            if state.closed {
                return None;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some(Vec::new());
            }
            state = self
                .0
                .filled
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Some(state.bytes.drain(..).collect())
    }

    /// Bytes lost because nobody read.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

/// Bytes that wait for the guest to take them.
pub const INPUT_MAX: usize = 64 << 10;

/// Types into a console.
#[derive(Clone)]
pub struct ConsoleInput {
    pub(super) waiting: Arc<Mutex<VecDeque<u8>>>,
    pub(super) kick: Arc<EventFd>,
}

impl ConsoleInput {
    /// Takes a prefix of `data` and returns its length; less than all when the guest does not read.
    #[must_use]
    pub fn send(&self, data: &[u8]) -> usize {
        let mut waiting = self.lock();
        let take = data.len().min(INPUT_MAX.saturating_sub(waiting.len()));
        waiting.extend(&data[..take]);
        drop(waiting);
        // A full eventfd is ready already.
        let _ = self.kick.write(1);
        take
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
