//! Asynchronous submission for images that have no file descriptor of their own contents (qcow2, memory).
//!
//! A fixed number of worker threads takes requests from a bounded queue, runs them through [`BlockIo`], and hands
//! each to the completion callback, in any order. Buffers are owned: a request carries its data in, its completion
//! carries the buffer back, so no guest memory is touched by the workers.
//!
//! Invariants: at most `depth` requests are queued or running; every accepted request completes exactly once, also
//! when the image panics inside or the queue is dropped.

use super::BlockIo;
use crate::error::DiskError;
use crate::guard::no_panic;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What to do.
#[derive(Debug)]
pub enum Op {
    /// Fill the buffer from `offset`.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Filled to its length.
        buf: Vec<u8>,
    },
    /// Write the buffer at `offset`.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// What to write.
        buf: Vec<u8>,
    },
    /// Make everything that completed before durable.
    Flush,
    /// Give a range back.
    Discard {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Comes back with the completion; means nothing here.
    pub token: u64,
}

/// One finished request.
#[derive(Debug)]
pub struct Completion {
    /// From the request.
    pub token: u64,
    /// The buffer of a read (filled, if the result is `Ok`) or write; empty for others.
    pub buf: Vec<u8>,
    /// How it went.
    pub result: Result<(), DiskError>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Request>,
    running: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    idle: Condvar,
    depth: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code that can panic runs under this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image behind worker threads.
pub struct ThreadedImage {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    image: Arc<dyn BlockIo>,
}

impl ThreadedImage {
    /// Starts `workers` threads (at least one) on `image`. At most `depth` requests are accepted at a time.
    ///
    /// `complete` is called from the workers; it must be quick, for example push to a list and write an eventfd.
    ///
    /// # Errors
    /// [`DiskError::File`] when a thread cannot be started.
    pub fn new(
        image: Arc<dyn BlockIo>,
        workers: usize,
        depth: usize,
        complete: impl Fn(Completion) + Send + Sync + 'static,
    ) -> Result<Self, DiskError> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            work: Condvar::new(),
            idle: Condvar::new(),
            depth: depth.max(1),
        });
        let mut this = Self {
            shared,
            workers: Vec::new(),
            image,
        };
        let complete: Arc<dyn Fn(Completion) + Send + Sync> = Arc::new(complete);
        for n in 0..workers.max(1) {
            let (shared, image, complete) = (this.shared.clone(), this.image.clone(), complete.clone());
            let worker = std::thread::Builder::new()
                .name(format!("disk-{n}"))
                .spawn(move || work(&shared, image.as_ref(), complete.as_ref()))
                .map_err(|source| DiskError::File {
                    what: "cannot start a disk thread",
                    path: std::path::PathBuf::new(),
                    source,
                })?;
            this.workers.push(worker);
        }
        Ok(this)
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<dyn BlockIo> {
        &self.image
    }

    /// Queues a request. It completes through the callback, once.
    ///
    /// # Errors
    /// [`DiskError::QueueFull`], with the request given back: wait for a completion and submit it again.
    pub fn submit(&self, request: Request) -> Result<(), (Request, DiskError)> {
        let mut queue = self.shared.lock();
        if queue.waiting.len() + queue.running >= self.shared.depth {
            return Err((
                request,
                DiskError::QueueFull {
                    depth: self.shared.depth,
                },
            ));
        }
        queue.waiting.push_back(request);
        drop(queue);
        self.shared.work.notify_one();
        Ok(())
    }

    /// How many requests are queued or running.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        let queue = self.shared.lock();
        queue.waiting.len() + queue.running
    }

    /// Waits until no request is in flight, callbacks included. Whoever quiesces a device stops submitting first.
    ///
    /// Returns whether that was so within `timeout`.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut queue = self.shared.lock();
        while !queue.waiting.is_empty() || queue.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self
                .shared
                .idle
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

impl Drop for ThreadedImage {
    /// Finishes what was accepted, then ends the workers.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        for worker in self.workers.drain(..) {
            // A worker cannot panic: both the operation and the callback run behind the fence.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, image: &dyn BlockIo, complete: &(dyn Fn(Completion) + Send + Sync)) {
    loop {
        let mut queue = shared.lock();
        let request = loop {
            if let Some(request) = queue.waiting.pop_front() {
                break request;
            }
            if queue.closed {
                return;
            }
            queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        };
        queue.running += 1;
        drop(queue);
        let completion = run(image, request);
        if let Err(error) = no_panic("completing a disk request", || {
            complete(completion);
            Ok(())
        }) {
            tracing::error!(%error, "completion callback failed");
        }
        let mut queue = shared.lock();
        queue.running -= 1;
        if queue.running == 0 && queue.waiting.is_empty() {
            shared.idle.notify_all();
        }
    }
}

fn run(image: &dyn BlockIo, request: Request) -> Completion {
    let Request { op, token } = request;
    let mut kept = Vec::new();
    let result = no_panic("a disk request", || match op {
        Op::Read { offset, mut buf } => {
            let result = image.read_at(offset, &mut buf);
            kept = buf;
            result
        }
        Op::Write { offset, buf } => {
            let result = image.write_at(offset, &buf);
            kept = buf;
            result
        }
        Op::Flush => image.flush(),
        Op::Discard { offset, len } => image.discard(offset, len),
        Op::WriteZeroes { offset, len } => image.write_zeroes(offset, len),
    });
    Completion {
        token,
        buf: kept,
        result,
    }
}
