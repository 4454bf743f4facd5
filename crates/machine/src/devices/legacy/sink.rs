//! Where console bytes go.

use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// Takes output bytes of a device. It never blocks: what it does not take stays with the device, which is bounded.
pub trait OutputSink: Send {
    /// Takes a prefix of `bytes` and says how long it is; 0 when there is no room now.
    fn put(&mut self, bytes: &[u8]) -> usize;
}

/// Takes everything and keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullSink;

impl OutputSink for NullSink {
    fn put(&mut self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

/// A file descriptor; the caller made it nonblocking. When it is broken (the reader went away), output is
/// swallowed rather than kept.
#[derive(Debug)]
pub struct FdSink(OwnedFd);

impl FdSink {
    /// Wraps a nonblocking descriptor.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl OutputSink for FdSink {
    fn put(&mut self, bytes: &[u8]) -> usize {
        match rustix::io::write(&self.0, bytes) {
            Ok(n) => n,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => bytes.len(),
        }
    }
}
