//! Fuzz entry of the block device, and the small synchronous disk under it.

use super::super::common::testkit;
use super::backend::{Completion, ErrorPolicy, Op, Request};
use super::{BackendInfo, Block, BlockBackend, BlockConfig, HoldErrors, ReportErrors};
use crate::devices::virtio::common::RateHandle;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// A disk in memory. Requests finish when they are polled, newest first; every `fail_every`th fails.
pub struct MemoryBackend {
    info: BackendInfo,
    bytes: Vec<u8>,
    event: EventFd,
    waiting: Vec<Request>,
    fail_every: u64,
    served: u64,
}

impl MemoryBackend {
    /// A disk of zeroes.
    ///
    /// # Errors
    /// eventfd could not be made.
    pub fn new(sectors: usize, write_zeroes: bool, fail_every: u64) -> io::Result<Self> {
        Ok(Self {
            info: BackendInfo {
                capacity_bytes: sectors as u64 * 512,
                read_only: false,
                logical_block: 512,
                physical_block: 4096,
                discard: true,
                write_zeroes,
            },
            bytes: vec![0; sectors * 512],
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            waiting: Vec::new(),
            fail_every,
            served: 0,
        })
    }

    fn serve(&mut self, op: &mut Op) -> io::Result<()> {
        self.served += 1;
        if self.fail_every != 0 && self.served.is_multiple_of(self.fail_every) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let outside = || io::Error::from(io::ErrorKind::UnexpectedEof);
        match op {
            Op::Read { offset, buf } => {
                let at = *offset as usize;
                let len = buf.len();
                buf.copy_from_slice(self.bytes.get(at..at + len).ok_or_else(outside)?);
            }
            Op::Write { offset, buf } => {
                let at = *offset as usize;
                let place = self.bytes.get_mut(at..at + buf.len()).ok_or_else(outside)?;
                place.copy_from_slice(buf);
            }
            Op::Flush => {}
            Op::WriteZeroes { .. } if !self.info.write_zeroes => {
                return Err(io::ErrorKind::Unsupported.into());
            }
            Op::Discard { offset, len } | Op::WriteZeroes { offset, len, .. } => {
                let at = *offset as usize;
                let place = self.bytes.get_mut(at..at + *len as usize).ok_or_else(outside)?;
                place.fill(0);
            }
        }
        Ok(())
    }
}

impl BlockBackend for MemoryBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }
    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
    fn submit(&mut self, request: Request) -> Result<(), Box<Request>> {
        if self.waiting.len() >= 24 {
            return Err(Box::new(request));
        }
        self.waiting.push(request);
        Ok(())
    }
    fn kick(&mut self) -> io::Result<()> {
        if !self.waiting.is_empty() {
            let _ = self.event.write(1);
        }
        Ok(())
    }
    fn poll_completions(&mut self, into: &mut Vec<Completion>) {
        let _ = self.event.read();
        while let Some(Request { token, mut op }) = self.waiting.pop() {
            let result = self.serve(&mut op);
            let buf = match op {
                Op::Read { buf, .. } | Op::Write { buf, .. } => Some(buf),
                _ => None,
            };
            into.push(Completion { token, buf, result });
        }
    }
    fn in_flight(&self) -> usize {
        self.waiting.len()
    }
    fn drain(&mut self, _timeout: Duration, into: &mut Vec<Completion>) -> bool {
        self.poll_completions(into);
        true
    }
}

/// Fuzz entry: see [`testkit::fuzz`]. The first byte chooses the disk.
#[doc(hidden)]
pub fn fuzz_block(data: &[u8]) {
    let shape = data.first().copied().unwrap_or(0);
    let fail_every = if shape & 2 == 0 { 0 } else { 5 };
    let Ok(backend) = MemoryBackend::new(4096, shape & 1 == 0, fail_every) else {
        return;
    };
    let policy: Box<dyn ErrorPolicy> = if shape & 4 == 0 {
        Box::new(ReportErrors)
    } else {
        Box::new(HoldErrors)
    };
    let config = BlockConfig {
        name: "block".to_owned(),
        serial: "fuzz".to_owned(),
        queues: 2,
        rate: RateHandle::default(),
        policy,
    };
    if let Ok(device) = Block::new(config, Box::new(backend)) {
        let features = if shape & 8 == 0 { 0x200 } else { 0 };
        testkit::fuzz(device, features, data);
    }
}
