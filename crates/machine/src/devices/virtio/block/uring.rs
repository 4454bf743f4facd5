//! A raw file or block device driven by io_uring(7).
//!
//! One ring per disk, one `io_uring_enter` per batch, completions announced by an eventfd. A buffer belongs to the
//! ring from submission to completion; short transfers are continued here.

use super::backend::{BackendInfo, BlockBackend, Completion, Op, Request};
use super::buffer::IoBuffer;
use io_uring::{IoUring, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// Requests in flight per disk.
const DEPTH: u32 = 256;
/// How often a request that the kernel interrupted is started again.
const RESTARTS_MAX: u32 = 100;
/// How long a ring waits for its requests when it is dropped.
const DROP_WAIT: Duration = Duration::from_secs(10);

struct Flight {
    token: u64,
    op: Op,
    /// Bytes transferred so far.
    done: usize,
    restarts: u32,
}

/// The backend.
pub struct UringBackend {
    ring: IoUring,
    event: EventFd,
    file: File,
    info: BackendInfo,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Finished without the kernel.
    early: Vec<Completion>,
}

impl UringBackend {
    /// Drives `file`, whose byte N is the disk's byte N.
    ///
    /// # Errors
    /// `EPERM` or `ENOSYS` where the host does not allow io_uring; what io_uring_setup said.
    pub fn new(file: File, info: BackendInfo) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().build(DEPTH)?;
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            ring,
            event,
            file,
            info,
            flights: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH as usize).rev().collect(),
            early: Vec::new(),
        })
    }

    fn entry(&mut self, slot: usize) -> Option<squeue::Entry> {
        let fd = types::Fd(self.file.as_raw_fd());
        let flight = self.flights.get_mut(slot)?.as_mut()?;
        let done = flight.done;
        let entry = match &mut flight.op {
            Op::Read { offset, buf } => {
                let (at, left) = rest(buf, done);
                opcode::Read::new(fd, at, left)
                    .offset(*offset + done as u64)
                    .build()
            }
            Op::Write { offset, buf } => {
                let (at, left) = rest(buf, done);
                opcode::Write::new(fd, at, left)
                    .offset(*offset + done as u64)
                    .build()
            }
            Op::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Op::Discard { offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Op::WriteZeroes { offset, len, unmap } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(
                    libc::FALLOC_FL_KEEP_SIZE
                        | if *unmap {
                            libc::FALLOC_FL_PUNCH_HOLE
                        } else {
                            libc::FALLOC_FL_ZERO_RANGE
                        },
                )
                .build(),
        };
        Some(entry.user_data(slot as u64))
    }

    /// Queues the entry of a flight; fails it when the ring has no place, which its size rules out.
    fn start(&mut self, slot: usize) {
        let Some(entry) = self.entry(slot) else { return };
        // SAFETY: the buffer that the entry points into is owned by `flights[slot]` and neither moved, freed nor
        // touched until the completion of this slot is taken; the file lives as long as the ring. On drop, buffers
        // still in flight are leaked.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.end(slot, Err(io::Error::from_raw_os_error(libc::EAGAIN)));
            let _ = self.event.write(1);
        }
    }

    fn end(&mut self, slot: usize, result: io::Result<()>) {
        if let Some(flight) = self.flights.get_mut(slot).and_then(Option::take) {
            self.free.push(slot);
            let buf = match flight.op {
                Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
                _ => None,
            };
            self.early.push(Completion {
                token: flight.token,
                buf,
                result,
            });
        }
    }

    fn reap(&mut self) -> bool {
        let mut again = false;
        let finished: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|c| (c.user_data(), c.result()))
            .collect();
        for (user_data, result) in finished {
            let slot = usize::try_from(user_data).unwrap_or(usize::MAX);
            let Some(flight) = self.flights.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            let outcome = match (result, &flight.op) {
                (e, _) if matches!(-e, libc::EINTR | libc::EAGAIN | libc::ECANCELED) => {
                    // ECANCELED: the thread that submitted it has ended meanwhile.
                    flight.restarts += 1;
                    (flight.restarts > RESTARTS_MAX).then(|| Err(io::Error::from_raw_os_error(-e)))
                }
                (e, Op::Discard { .. } | Op::WriteZeroes { .. })
                    if e == -libc::EOPNOTSUPP || e == -libc::ENOSYS || e == -libc::EINVAL =>
                {
                    Some(Err(io::ErrorKind::Unsupported.into()))
                }
                (e, _) if e < 0 => Some(Err(io::Error::from_raw_os_error(-e))),
                (n, Op::Read { buf, .. } | Op::Write { buf, .. }) => {
                    flight.done += n as usize;
                    if flight.done >= buf.len() {
                        Some(Ok(()))
                    } else if n == 0 {
                        // The file is shorter than it was when it was opened.
                        Some(Err(io::ErrorKind::UnexpectedEof.into()))
                    } else {
                        None
                    }
                }
                _ => Some(Ok(())),
            };
            match outcome {
                Some(result) => self.end(slot, result),
                None => {
                    self.start(slot);
                    again = true;
                }
            }
        }
        again
    }
}

fn rest(buf: &mut IoBuffer, done: usize) -> (*mut u8, u32) {
    let left = buf.len().saturating_sub(done);
    // SAFETY: `done` is at most `len` (a transfer never exceeds what was asked for), so the pointer stays inside
    // the allocation.
    let at = unsafe { buf.as_mut_ptr().add(buf.len() - left) };
    (at, u32::try_from(left).unwrap_or(u32::MAX))
}

impl BlockBackend for UringBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn submit(&mut self, request: Request) -> Result<(), Box<Request>> {
        let Some(slot) = self.free.pop() else {
            return Err(Box::new(request));
        };
        self.flights[slot] = Some(Flight {
            token: request.token,
            op: request.op,
            done: 0,
            restarts: 0,
        });
        self.start(slot);
        Ok(())
    }

    fn kick(&mut self) -> io::Result<()> {
        for _ in 0..RESTARTS_MAX {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel is short of memory or the completion ring is full: what was not taken stays in the
                // ring, and the next kick or completion submits it.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    let _ = self.event.write(1);
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        let _ = self.event.write(1);
        Ok(())
    }

    fn poll_completions(&mut self, into: &mut Vec<Completion>) {
        let _ = self.event.read();
        let again = self.reap();
        if (again || !self.ring.submission().is_empty())
            && let Err(e) = self.kick()
        {
            tracing::error!(error = %e, "io_uring takes no more requests");
        }
        into.append(&mut self.early);
    }

    fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len() + self.early.len()
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
            wait_readable(self.event.as_raw_fd(), left);
        }
    }
}

/// Waits until `fd` is readable, or `timeout`.
pub(super) fn wait_readable(fd: RawFd, timeout: Duration) {
    // SAFETY: the caller owns `fd` for the length of the call.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(
        fd,
        rustix::event::PollFlags::IN,
    )];
    let timeout = rustix::time::Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // An error (EINTR) only means that the caller looks again early.
    let _ = rustix::event::poll(&mut fds, Some(&timeout));
}

impl Drop for UringBackend {
    fn drop(&mut self) {
        let mut done = Vec::new();
        if !self.drain(DROP_WAIT, &mut done) {
            tracing::error!(
                in_flight = self.in_flight(),
                "disk does not answer; its buffers are given up, not freed"
            );
            for flight in self.flights.drain(..).flatten() {
                // The kernel may still write to this memory.
                std::mem::forget(flight);
            }
        }
    }
}
