//! Raw images: a plain file or a block device.
//!
//! The image holds one file descriptor, which a device model may drive with io_uring ([`BlockIo::raw_fd`]); the
//! blocking calls here use the same one. With `direct` it is open with O_DIRECT: then the device model must align its
//! requests to [`RawImage::direct_alignment`], while the calls here take any range (through an aligned bounce buffer).

use super::lock::{self, Mode};
use super::{BlockIo, ImageFormat, ImageInfo, ImageOptions, SECTOR};
use crate::error::DiskError;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Covers the alignment that any Linux storage of today asks of O_DIRECT.
const DIRECT_ALIGN: usize = 4096;
/// How much is bounced or zeroed at a time.
const CHUNK: usize = 1 << 20;

/// An open raw image.
#[derive(Debug)]
pub struct RawImage {
    info: ImageInfo,
    file: File,
    path: PathBuf,
    direct: bool,
    /// Serializes read-modify-write of unaligned direct writes.
    bounce: Mutex<()>,
}

/// Anything but a regular file or a block device is refused before it is opened: opening a FIFO would hang.
pub(crate) fn refuse_odd_file_types(path: &Path) -> Result<(), DiskError> {
    let meta = std::fs::metadata(path).map_err(|source| DiskError::Open {
        path: path.to_owned(),
        source,
    })?;
    let kind = meta.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() {
        "a directory"
    } else {
        "not a regular file or block device"
    };
    Err(DiskError::Unsuitable {
        path: path.to_owned(),
        why: format!("is {what}; name a disk image"),
    })
}

impl RawImage {
    /// Opens the file or block device at `path`.
    ///
    /// # Errors
    /// [`DiskError::Open`], [`DiskError::InUse`] when another VM has it, [`DiskError::Unsuitable`] when it is empty or
    /// not a file.
    pub fn open(path: &Path, options: &ImageOptions) -> Result<Self, DiskError> {
        refuse_odd_file_types(path)?;
        let mut open = OpenOptions::new();
        open.read(true).write(!options.read_only);
        if options.direct {
            open.custom_flags(libc::O_DIRECT);
        }
        let file = open.open(path).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) if options.direct => DiskError::Unsupported {
                path: path.to_owned(),
                feature: "direct=on on this file system".to_owned(),
                way_out: "use direct=off".to_owned(),
            },
            _ => DiskError::Open {
                path: path.to_owned(),
                source,
            },
        })?;
        if options.lock {
            let mode = if options.read_only {
                Mode::Shared
            } else {
                Mode::Exclusive
            };
            lock::set(&file, mode, path)?;
        }
        Self::from_file(file, path, options.read_only, options.direct)
    }

    /// Wraps a file that is already open, for example one passed by another process. Its lock, if any, comes with it.
    ///
    /// `path` is for messages only; `direct` must say whether the file was opened with O_DIRECT.
    ///
    /// # Errors
    /// [`DiskError::Unsuitable`] when it is smaller than one sector.
    pub fn from_file(file: File, path: &Path, read_only: bool, direct: bool) -> Result<Self, DiskError> {
        let unsuitable = |why: String| DiskError::Unsuitable {
            path: path.to_owned(),
            why,
        };
        let error = |source: io::Error| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let is_block = file.metadata().map_err(error)?.file_type().is_block_device();
        // Seeking to the end gives the size of block devices too.
        let len = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| error(e.into()))?;
        let capacity_bytes = len / SECTOR * SECTOR;
        if capacity_bytes == 0 {
            return Err(unsuitable(format!(
                "has {len} bytes, less than one sector; create or grow it first"
            )));
        }
        if capacity_bytes != len {
            tracing::warn!(image = %path.display(), len, capacity_bytes, "size is not a multiple of 512 bytes: the tail is not used");
        }
        let logical_block = if is_block {
            rustix::fs::ioctl_blksszget(&file).unwrap_or(SECTOR as u32)
        } else {
            SECTOR as u32
        };
        // Punching behind the end of a regular file changes nothing and tells whether the file system can.
        // Block devices do it in all but exotic cases, and `discard` copes with the rest.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let can_punch = !read_only
            && (is_block
                || fallocate(
                    &file,
                    punch,
                    len.next_multiple_of(DIRECT_ALIGN as u64),
                    DIRECT_ALIGN as u64,
                )
                .is_ok());
        let info = ImageInfo {
            capacity_bytes,
            read_only,
            format: ImageFormat::Raw,
            logical_block,
            discard: can_punch,
            write_zeroes: can_punch,
        };
        Ok(Self {
            info,
            file,
            path: path.to_owned(),
            direct,
            bounce: Mutex::new(()),
        })
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// With O_DIRECT: what offsets, lengths and addresses of requests to the descriptor must be multiples of.
    /// `None` without.
    #[must_use]
    pub fn direct_alignment(&self) -> Option<usize> {
        self.direct.then_some(DIRECT_ALIGN)
    }

    /// Gives up the lock, so that another process can take the image over; this one must not write any more.
    ///
    /// # Errors
    /// [`DiskError::File`].
    pub fn unlock(&self) -> Result<(), DiskError> {
        lock::set(&self.file, Mode::None, &self.path)
    }

    /// Takes the lock for writing, or for reading if the image is read-only.
    ///
    /// # Errors
    /// [`DiskError::InUse`].
    pub fn lock(&self) -> Result<(), DiskError> {
        lock::set(
            &self.file,
            if self.info.read_only {
                Mode::Shared
            } else {
                Mode::Exclusive
            },
            &self.path,
        )
    }

    /// Calls `f(position, buffer, from, to)` for each aligned chunk that covers the range, where `from..to` of the
    /// buffer is the part of the range.
    fn bounced(
        offset: u64,
        len: u64,
        mut f: impl FnMut(u64, &mut [u8], usize, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut memory = vec![0_u8; CHUNK + DIRECT_ALIGN];
        let skip = memory.as_ptr().align_offset(DIRECT_ALIGN);
        let buffer = &mut memory[skip..skip + CHUNK];
        let align = DIRECT_ALIGN as u64;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let start = at / align * align;
            let stop = end.next_multiple_of(align).min(start + CHUNK as u64);
            let upto = end.min(stop);
            f(
                start,
                &mut buffer[..(stop - start) as usize],
                (at - start) as usize,
                (upto - start) as usize,
            )?;
            at = upto;
        }
        Ok(())
    }

    /// Reads until the buffer is full or the file ends; the rest is zeroed.
    fn read_padded(&self, position: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], position + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buffer[done..].fill(0);
        Ok(())
    }

    /// Zeroes a range in the first of these ways that the storage knows.
    fn zero_by(&self, ways: [FallocateFlags; 2], offset: u64, len: u64) -> Result<(), DiskError> {
        self.info.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        for how in ways {
            match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(e) => {
                    return Err(DiskError::Io {
                        op: "write zeroes",
                        offset,
                        len,
                        source: e.into(),
                    });
                }
            }
        }
        self.zero_by_writing(offset, len)
    }

    fn zero_by_writing(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let zeroes = vec![0_u8; CHUNK.min(len as usize)];
        let mut at = offset;
        while at < offset + len {
            let n = (offset + len - at).min(zeroes.len() as u64);
            self.write_at(at, &zeroes[..n as usize])?;
            at += n;
        }
        Ok(())
    }
}

impl BlockIo for RawImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        self.info.check(offset, len)?;
        let result = if self.direct {
            let mut done = 0;
            Self::bounced(offset, len, |position, chunk, from, to| {
                self.read_padded(position, chunk)?;
                buf[done..done + to - from].copy_from_slice(&chunk[from..to]);
                done += to - from;
                Ok(())
            })
        } else {
            self.read_padded(offset, buf)
        };
        result.map_err(|source| DiskError::Io {
            op: "read",
            offset,
            len,
            source,
        })
    }

    fn read_at_once(&self, offset: u64, buf: &mut [u8]) -> bool {
        !self.direct
            && self.info.check(offset, buf.len() as u64).is_ok()
            && crate::storage::read_cached(&self.file, offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        self.info.check_write(offset, len)?;
        let result = if self.direct {
            let _one_at_a_time = self.bounce.lock().unwrap_or_else(PoisonError::into_inner);
            let mut done = 0;
            Self::bounced(offset, len, |position, chunk, from, to| {
                // The file may end inside the last aligned block; never grow it.
                let inside = chunk.len().min((self.info.capacity_bytes - position) as usize);
                if from != 0 || to != inside {
                    self.read_padded(position, chunk)?;
                }
                chunk[from..to].copy_from_slice(&buf[done..done + to - from]);
                done += to - from;
                self.file.write_all_at(&chunk[..inside], position)
            })
        } else {
            self.file.write_all_at(buf, offset)
        };
        result.map_err(|source| DiskError::Io {
            op: "write",
            offset,
            len,
            source,
        })
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.info.read_only {
            return Ok(());
        }
        fdatasync(&self.file).map_err(|e| DiskError::Io {
            op: "flush",
            offset: 0,
            len: 0,
            source: e.into(),
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.info.check_write(offset, len)?;
        if !self.info.discard || len == 0 {
            return Ok(());
        }
        match fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            // Advice only: storage that cannot, need not.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            Err(e) => Err(DiskError::Io {
                op: "discard",
                offset,
                len,
                source: e.into(),
            }),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.zero_by(
            [FallocateFlags::ZERO_RANGE, FallocateFlags::PUNCH_HOLE],
            offset,
            len,
        )
    }

    fn zero_and_free(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        // Both read as zero afterwards, on files and on block devices.
        self.zero_by(
            [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE],
            offset,
            len,
        )
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }

    fn release(&self) -> Result<(), DiskError> {
        if !self.info.read_only {
            self.flush()?;
        }
        self.unlock()
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        self.lock()
    }
}
