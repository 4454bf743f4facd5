//! Blocking storage behind a few threads: qcow2, memory, and raw files where io_uring is not allowed.

use super::backend::{BackendInfo, BlockBackend, Completion, Op, Request};
use super::uring::wait_readable;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Requests accepted at a time.
const DEPTH: usize = 256;
/// How long the threads may take to end when the backend is dropped.
const DROP_WAIT: Duration = Duration::from_secs(10);

/// Blocking access to a disk's contents; called from several threads at once.
pub trait BlockingDisk: Send + Sync {
    /// Geometry and abilities.
    fn info(&self) -> BackendInfo;
    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// The storage's own.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// The storage's own.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Returns once what was written before is durable.
    ///
    /// # Errors
    /// The storage's own.
    fn flush(&self) -> io::Result<()>;
    /// Gives a range back.
    ///
    /// # Errors
    /// The storage's own; `Unsupported` where it cannot.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The storage's own; `Unsupported` where it cannot.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// Does the operation if that takes no waiting; `None`: it was not done. Called with the device's lock held.
    fn at_once(&self, op: &mut Op) -> Option<io::Result<()>>;
}

/// A raw file with plain system calls.
pub struct RawFile {
    file: File,
    info: BackendInfo,
}

impl RawFile {
    /// Wraps an open file.
    #[must_use]
    pub fn new(file: File, info: BackendInfo) -> Self {
        Self { file, info }
    }

    fn fallocate(&self, mode: rustix::fs::FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(
            &self.file,
            mode | rustix::fs::FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            Err(e) => Err(e.into()),
        }
    }
}

impl BlockingDisk for RawFile {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(rustix::fs::FallocateFlags::PUNCH_HOLE, offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let mode = if unmap {
            rustix::fs::FallocateFlags::PUNCH_HOLE
        } else {
            rustix::fs::FallocateFlags::ZERO_RANGE
        };
        self.fallocate(mode, offset, len)
    }
    fn at_once(&self, _: &mut Op) -> Option<io::Result<()>> {
        None
    }
}

#[derive(Default)]
struct Queues {
    waiting: VecDeque<Request>,
    running: usize,
    finished: Vec<Completion>,
    closed: bool,
    workers: usize,
}

struct Shared {
    queues: Mutex<Queues>,
    work: Condvar,
    ended: Condvar,
    event: EventFd,
    disk: Arc<dyn BlockingDisk>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Nothing that can panic runs under this lock.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The backend.
pub struct ThreadBackend {
    shared: Arc<Shared>,
    info: BackendInfo,
}

impl ThreadBackend {
    /// Starts `workers` threads (at least one) on `disk`.
    ///
    /// # Errors
    /// Threads or the eventfd could not be made.
    pub fn new(disk: Arc<dyn BlockingDisk>, workers: usize) -> io::Result<Self> {
        let info = disk.info();
        let shared = Arc::new(Shared {
            queues: Mutex::default(),
            work: Condvar::new(),
            ended: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            disk,
        });
        let this = Self { shared, info };
        for n in 0..workers.max(1) {
            let shared = Arc::clone(&this.shared);
            this.shared.lock().workers += 1;
            let spawned = std::thread::Builder::new()
                .name(format!("blk-io-{n}"))
                .spawn(move || work(&shared));
            if let Err(e) = spawned {
                this.shared.lock().workers -= 1;
                return Err(e);
            }
        }
        Ok(this)
    }
}

fn work(shared: &Shared) {
    let mut queues = shared.lock();
    loop {
        let Some(request) = queues.waiting.pop_front() else {
            if queues.closed {
                queues.workers -= 1;
                shared.ended.notify_all();
                return;
            }
            queues = shared.work.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        queues.running += 1;
        drop(queues);
        let completion = run(shared.disk.as_ref(), request);
        queues = shared.lock();
        queues.running -= 1;
        queues.finished.push(completion);
        let _ = shared.event.write(1);
    }
}

fn run(disk: &dyn BlockingDisk, request: Request) -> Completion {
    let Request { token, mut op } = request;
    let outcome = catch_unwind(AssertUnwindSafe(|| match &mut op {
        Op::Read { offset, buf } => disk.read_at(*offset, buf),
        Op::Write { offset, buf } => disk.write_at(*offset, buf),
        Op::Flush => disk.flush(),
        Op::Discard { offset, len } => disk.discard(*offset, *len),
        Op::WriteZeroes { offset, len, unmap } => disk.write_zeroes(*offset, *len, *unmap),
    }));
    let result = outcome.unwrap_or_else(|_| Err(io::Error::other("the image driver failed on its contents")));
    let buf = match op {
        Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
        _ => None,
    };
    Completion { token, buf, result }
}

impl BlockBackend for ThreadBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn event_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn submit(&mut self, mut request: Request) -> Result<(), Box<Request>> {
        let disk = &self.shared.disk;
        // The driver of an image failed on its contents: the same as on a thread.
        let done = catch_unwind(AssertUnwindSafe(|| disk.at_once(&mut request.op)))
            .unwrap_or_else(|_| Some(Err(io::Error::other("the image driver failed on its contents"))));
        let mut queues = self.shared.lock();
        if let Some(result) = done {
            let Request { token, op } = request;
            let buf = match op {
                Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
                _ => None,
            };
            queues.finished.push(Completion { token, buf, result });
            // Whoever submits looks for completions before it waits; one that does not is told.
            let _ = self.shared.event.write(1);
            return Ok(());
        }
        if queues.waiting.len() + queues.running + queues.finished.len() >= DEPTH {
            return Err(Box::new(request));
        }
        queues.waiting.push_back(request);
        drop(queues);
        self.shared.work.notify_one();
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll_completions(&mut self, into: &mut Vec<Completion>) {
        let _ = self.shared.event.read();
        into.append(&mut self.shared.lock().finished);
    }

    fn in_flight(&self) -> usize {
        let queues = self.shared.lock();
        queues.waiting.len() + queues.running + queues.finished.len()
    }

    fn drain(&mut self, timeout: Duration, into: &mut Vec<Completion>) -> bool {
        let end = Instant::now() + timeout;
        loop {
            self.poll_completions(into);
            if self.in_flight() == 0 {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            wait_readable(self.event_fd(), left);
        }
    }
}

impl Drop for ThreadBackend {
    /// Finishes what was accepted. Threads that a dead disk holds are left behind; they own their buffers.
    fn drop(&mut self) {
        let end = Instant::now() + DROP_WAIT;
        let mut queues = self.shared.lock();
        queues.closed = true;
        self.shared.work.notify_all();
        while queues.workers > 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::error!(
                    threads = queues.workers,
                    "disk does not answer; its threads are left behind"
                );
                return;
            }
            queues = self
                .shared
                .ended
                .wait_timeout(queues, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
