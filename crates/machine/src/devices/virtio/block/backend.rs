//! What a block device stands on: asynchronous requests with owned buffers.
//!
//! A backend never sees guest memory. It is called with the lock of its device held, so a request is submitted
//! wholly before or wholly after a cut: a backend that journals by epoch tags a write with the epoch that is open
//! when [`BlockBackend::submit`] is called, and that is right.
//!
//! Contract: every accepted request completes exactly once, in any order. Requests in flight at the same time have
//! no order among them; a flush makes durable what had *completed* before it was submitted.

use super::buffer::IoBuffer;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// Geometry and abilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// Size in bytes; what is beyond the last whole sector of 512 is not used.
    pub capacity_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Logical block size in bytes (512 or 4096), shown to the guest.
    pub logical_block: u32,
    /// Physical block size in bytes, a power of two not below the logical.
    pub physical_block: u32,
    /// Frees space on discard. Where it cannot, a discard is accepted and does nothing.
    pub discard: bool,
    /// Writes zeroes by itself. Where it cannot, the device writes buffers of zeroes.
    pub write_zeroes: bool,
}

/// One operation. Buffers have the length of the transfer.
pub enum Op {
    /// Fill the buffer from `offset`.
    Read {
        /// Byte offset, a multiple of 512.
        offset: u64,
        /// Filled when the result is `Ok`.
        buf: IoBuffer,
    },
    /// Write the buffer at `offset`.
    Write {
        /// Byte offset, a multiple of 512.
        offset: u64,
        /// What to write.
        buf: IoBuffer,
    },
    /// Make durable what completed before.
    Flush,
    /// Give a range back.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Space may be given back.
        unmap: bool,
    },
}

/// One request.
pub struct Request {
    /// Comes back with the completion; means nothing to the backend.
    pub token: u64,
    /// What to do.
    pub op: Op,
}

/// One finished request.
pub struct Completion {
    /// From the request.
    pub token: u64,
    /// The buffer of a read or write.
    pub buf: Option<IoBuffer>,
    /// How it went. `Unsupported` for a discard or write-zeroes that the storage cannot do.
    pub result: io::Result<()>,
}

/// Asynchronous storage.
pub trait BlockBackend: Send {
    /// Geometry and abilities; fixed for the life of the backend.
    fn info(&self) -> &BackendInfo;

    /// A descriptor that is readable while completions wait.
    fn event_fd(&self) -> RawFd;

    /// Takes a request; it may start only at the next [`BlockBackend::kick`].
    ///
    /// # Errors
    /// The request, when the backend is full: submit it again after a completion.
    fn submit(&mut self, request: Request) -> Result<(), Box<Request>>;

    /// Starts all that was submitted, in one system call where that can be.
    ///
    /// # Errors
    /// The storage can take no more requests at all (not: a request failed).
    fn kick(&mut self) -> io::Result<()>;

    /// Moves finished requests to `into`, and clears the descriptor.
    fn poll_completions(&mut self, into: &mut Vec<Completion>);

    /// Accepted requests that were not handed out as completions yet.
    fn in_flight(&self) -> usize;

    /// Waits until all accepted requests are finished, at most `timeout`, and moves them to `into`.
    /// Returns whether nothing is left.
    fn drain(&mut self, timeout: Duration, into: &mut Vec<Completion>) -> bool;
}

/// What to do about a request that failed in the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Tell the guest (`VIRTIO_BLK_S_IOERR`).
    Report,
    /// Keep it from the guest: the request stays in flight until [`super::BlockHandle::retry`], or goes along with
    /// the device's state to a host whose disk works.
    Hold,
}

/// The failure that an [`ErrorPolicy`] decides on.
#[derive(Debug)]
pub struct Failure<'a> {
    /// Which device.
    pub device: &'a str,
    /// `read`, `write`, `flush`, `discard` or `write zeroes`.
    pub op: &'static str,
    /// Byte offset of the guest's request.
    pub offset: u64,
    /// Length of the guest's request in bytes.
    pub len: u64,
    /// What the storage said.
    pub error: &'a io::Error,
}

/// Decides what a guest sees of the errors of its disk. Called with the device's lock held: be quick.
pub trait ErrorPolicy: Send {
    /// One failure, one verdict.
    fn on_error(&mut self, failure: &Failure<'_>) -> Verdict;
}

/// Tells the guest: the behaviour of a real disk.
pub struct ReportErrors;

impl ErrorPolicy for ReportErrors {
    fn on_error(&mut self, _failure: &Failure<'_>) -> Verdict {
        Verdict::Report
    }
}

/// Never tells the guest.
pub struct HoldErrors;

impl ErrorPolicy for HoldErrors {
    fn on_error(&mut self, _failure: &Failure<'_>) -> Verdict {
        Verdict::Hold
    }
}
