//! Backends for the images of `steadfast-disk`: io_uring where the image is a plain file, threads otherwise.

use super::backend::{BackendInfo, BlockBackend, Completion, Op, Request};
use super::threaded::{BlockingDisk, ThreadBackend};
use super::uring::UringBackend;
use rustix::fs::OFlags;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use steadfast_disk::DiskError;
use steadfast_disk::image::BlockIo;

/// Threads of an image that has no file descriptor of its own contents.
const WORKERS: usize = 4;
/// Longer reads are for those threads, which run side by side.
const AT_ONCE_MAX: usize = 64 << 10;

struct Image {
    image: Arc<dyn BlockIo>,
    info: BackendInfo,
}

fn host(error: DiskError) -> io::Error {
    match error.errno() {
        libc::EOPNOTSUPP => io::ErrorKind::Unsupported.into(),
        errno => {
            // The errno is all that fits into the request; the words are for the operator.
            tracing::warn!(%error, "disk image request failed");
            io::Error::from_raw_os_error(errno)
        }
    }
}

impl BlockingDisk for Image {
    fn info(&self) -> BackendInfo {
        self.info.clone()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.image.read_at(offset, buf).map_err(host)
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.image.write_at(offset, buf).map_err(host)
    }
    fn flush(&self) -> io::Result<()> {
        self.image.flush().map_err(host)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image.discard(offset, len).map_err(host)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.image.write_zeroes(offset, len).map_err(host)
    }
    fn at_once(&self, op: &mut Op) -> Option<io::Result<()>> {
        let done = match op {
            Op::Read { offset, buf } if buf.len() <= AT_ONCE_MAX => {
                self.image.read_at_once(*offset, buf).then_some(Ok(()))
            }
            Op::Write { offset, buf } => self.image.write_at_once(*offset, buf),
            Op::Flush => self.image.flush_at_once(),
            _ => None,
        };
        done.map(|d| d.map_err(host))
    }
}

/// Keeps the image (and its lock) for as long as the ring drives its file.
struct Driven {
    ring: UringBackend,
    _image: Arc<dyn BlockIo>,
}

impl BlockBackend for Driven {
    fn info(&self) -> &BackendInfo {
        self.ring.info()
    }
    fn event_fd(&self) -> RawFd {
        self.ring.event_fd()
    }
    fn submit(&mut self, request: Request) -> Result<(), Box<Request>> {
        self.ring.submit(request)
    }
    fn kick(&mut self) -> io::Result<()> {
        self.ring.kick()
    }
    fn poll_completions(&mut self, into: &mut Vec<Completion>) {
        self.ring.poll_completions(into);
    }
    fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }
    fn drain(&mut self, timeout: Duration, into: &mut Vec<Completion>) -> bool {
        self.ring.drain(timeout, into)
    }
}

/// The best backend for `image` on this host.
///
/// The guest always sees blocks of 512 bytes: a partition table must mean the same on every host. An image that
/// bypasses the page cache (O_DIRECT) takes only aligned requests on its descriptor, so it is driven by threads,
/// through the image's own handling of what is not aligned.
///
/// # Errors
/// Neither a ring nor threads could be made.
pub fn image_backend(image: Arc<dyn BlockIo>) -> io::Result<Box<dyn BlockBackend>> {
    let told = image.info();
    let info = BackendInfo {
        capacity_bytes: told.capacity_bytes,
        read_only: told.read_only,
        logical_block: 512,
        physical_block: 4096,
        discard: told.discard,
        write_zeroes: true,
    };
    if let Some(fd) = image.raw_fd() {
        // SAFETY: the descriptor lives as long as the image, which is borrowed here.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if !rustix::fs::fcntl_getfl(fd)?.contains(OFlags::DIRECT) {
            match UringBackend::new(File::from(fd.try_clone_to_owned()?), info.clone()) {
                Ok(ring) => return Ok(Box::new(Driven { ring, _image: image })),
                Err(error) => {
                    tracing::warn!(%error, "io_uring is not available on this host; disks use threads, which is slower");
                }
            }
        }
    }
    let disk = Arc::new(Image { image, info });
    Ok(Box::new(ThreadBackend::new(disk, WORKERS)?))
}
