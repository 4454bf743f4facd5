//! What a block device stands on: [`BlockIo`], and opening an image of any supported format.
//!
//! ```text
//!  raw file, block device ── RawImage    ── fd ──> io_uring, driven by the device model
//!  qcow2 (+ backing chain) ─ Qcow2Image  ── threads of the device model
//!  bytes ─────────────────── MemImage       (cloud-init seeds, tests)
//! ```
//!
//! Everything here is blocking and made for plain threads, but for what is named `at_once`.
//!
//! Formats are told apart by content unless the caller names one. A raw disk whose guest wrote a qcow2 header into
//! its first sector must therefore be *declared* raw to stay raw, or the guest could make the host open other files
//! at the next start; callers should remember the format of a disk when they first see it.

pub mod convert;
pub mod create;
mod lock;
mod memory;
mod qcow2;
mod qcow2_check;
mod qcow2_tables;
mod raw;

pub use memory::MemImage;
pub use qcow2::Qcow2Image;
pub use raw::RawImage;

use crate::error::DiskError;
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// The unit of virtio-blk addresses, in bytes (virtio 1.2, 5.2.5).
pub const SECTOR: u64 = 512;

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes of the disk, nothing else: a file or a block device.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// Bytes in memory.
    Memory,
}

impl ImageFormat {
    /// As it is written in specifications.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Memory => "memory",
        }
    }
}

impl std::str::FromStr for ImageFormat {
    type Err = DiskError;

    fn from_str(s: &str) -> Result<Self, DiskError> {
        match s {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(DiskError::Invalid(format!(
                "unknown image format {other:?}: use raw or qcow2"
            ))),
        }
    }
}

/// Geometry and abilities of an opened image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Size of the disk in bytes, a multiple of [`SECTOR`].
    pub capacity_bytes: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// What it is.
    pub format: ImageFormat,
    /// Logical block size in bytes: the smallest unit that the storage below takes without read-modify-write.
    pub logical_block: u32,
    /// [`BlockIo::discard`] frees space. Without it, discard is accepted and does nothing.
    pub discard: bool,
    /// [`BlockIo::write_zeroes`] is cheaper than writing zeroes.
    pub write_zeroes: bool,
}

impl ImageInfo {
    /// Checks that a request lies inside the image.
    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.capacity_bytes => Ok(()),
            _ => Err(DiskError::OutOfRange {
                offset,
                len,
                capacity: self.capacity_bytes,
            }),
        }
    }

    /// The same for a request that changes the image.
    pub(crate) fn check_write(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.check(offset, len)
    }
}

/// Blocking access to an image: for boot discovery, tools, replay, and the worker threads of a device.
///
/// Any byte range inside the image is accepted, aligned or not. Requests from several threads may run at once; the
/// order of overlapping requests in flight is not defined, as on a disk.
pub trait BlockIo: Send + Sync {
    /// Geometry and abilities.
    fn info(&self) -> &ImageInfo;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`DiskError::OutOfRange`], or the storage's own error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`], [`DiskError::OutOfRange`], or the storage's own error.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError>;

    /// Returns once everything written before is on stable storage.
    ///
    /// # Errors
    /// The storage's own error.
    fn flush(&self) -> Result<(), DiskError>;

    /// Gives the range back to the storage below where it can; what it reads as afterwards is undefined.
    ///
    /// # Errors
    /// As [`BlockIo::write_at`].
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;

    /// Makes the range read as zeroes.
    ///
    /// # Errors
    /// As [`BlockIo::write_at`].
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError>;

    /// The same, and gives the range's space back where the storage can.
    ///
    /// # Errors
    /// As [`BlockIo::write_at`].
    fn zero_and_free(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.write_zeroes(offset, len)
    }

    /// Fills `buf` from `offset` out of memory, without waiting for anything; `false`: not possible now, or it would fail. The caller then
    /// uses [`BlockIo::read_at`] from a thread that may wait.
    fn read_at_once(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Does a write without waiting for anything, if that is possible now; `None`: it is not, and nothing was done. The
    /// caller then uses [`BlockIo::write_at`] from a thread that may wait.
    fn write_at_once(&self, _offset: u64, _buf: &[u8]) -> Option<Result<(), DiskError>> {
        None
    }

    /// As [`BlockIo::write_at_once`], for [`BlockIo::flush`].
    fn flush_at_once(&self) -> Option<Result<(), DiskError>> {
        None
    }

    /// The file whose byte N is the disk's byte N, where there is one: a device model may then drive it with
    /// io_uring directly. It lives as long as the image.
    fn raw_fd(&self) -> Option<RawFd>;

    /// Gives up the lock, all that was written being in the file, so that another process can take the image over.
    /// No other call may be made until [`BlockIo::reacquire`].
    ///
    /// # Errors
    /// As [`BlockIo::flush`].
    fn release(&self) -> Result<(), DiskError>;

    /// Takes the lock again, and forgets what was cached of a file that another process may have changed.
    ///
    /// # Errors
    /// [`DiskError::InUse`] while another process has it.
    fn reacquire(&self) -> Result<(), DiskError>;
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The format; `None` looks at the contents.
    pub format: Option<ImageFormat>,
    /// Refuse writes, and let other readers share the image.
    pub read_only: bool,
    /// Bypass the page cache (O_DIRECT). Raw images only.
    pub direct: bool,
    /// Take the lock that keeps two VMs from writing one image. Only a tool that looks at an image which a VM of
    /// its own already holds has a reason to go without.
    pub lock: bool,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            direct: false,
            lock: true,
        }
    }
}

impl ImageOptions {
    /// For reading only.
    #[must_use]
    pub fn read_only() -> Self {
        Self {
            read_only: true,
            ..Self::default()
        }
    }
}

/// Opens an image.
///
/// # Errors
/// [`DiskError::Open`], [`DiskError::InUse`], [`DiskError::Unsupported`], [`DiskError::Damaged`] and
/// [`DiskError::Unsuitable`], each naming the file and the way out.
pub fn open(path: &Path, options: &ImageOptions) -> Result<Arc<dyn BlockIo>, DiskError> {
    let format = match options.format {
        Some(format) => format,
        None => detect(path)?,
    };
    match format {
        ImageFormat::Raw => Ok(Arc::new(RawImage::open(path, options)?)),
        ImageFormat::Qcow2 => Ok(Arc::new(Qcow2Image::open(path, options)?)),
        ImageFormat::Memory => Err(DiskError::Invalid("a memory image has no path".to_owned())),
    }
}

/// Format and size of the disk in the image at `path`, in the format that is told, or else as whoever opens it first would see it. Takes no
/// lock.
///
/// # Errors
/// As [`open`].
pub fn look_at(path: &Path, format: Option<ImageFormat>) -> Result<ImageInfo, DiskError> {
    let options = ImageOptions {
        format,
        lock: false,
        ..ImageOptions::read_only()
    };
    Ok(open(path, &options)?.info().clone())
}

/// The format of the file at `path`, by its first bytes: qcow2 or else raw.
///
/// # Errors
/// [`DiskError::Open`], or [`DiskError::Unsupported`] for a well-known format that is neither.
pub fn detect(path: &Path) -> Result<ImageFormat, DiskError> {
    let open_error = |source| DiskError::Open {
        path: path.to_owned(),
        source,
    };
    raw::refuse_odd_file_types(path)?;
    let file = File::open(path).map_err(open_error)?;
    let mut head = [0_u8; 8];
    let mut filled = 0;
    while filled < head.len() {
        match file
            .read_at(&mut head[filled..], filled as u64)
            .map_err(open_error)?
        {
            0 => break,
            n => filled += n,
        }
    }
    let foreign = match &head {
        [b'Q', b'F', b'I', 0xfb, ..] => return Ok(ImageFormat::Qcow2),
        [b'K', b'D', b'M', b'V', ..] => "VMDK",
        b"vhdxfile" => "VHDX",
        b"conectix" => "VHD",
        _ => return Ok(ImageFormat::Raw),
    };
    Err(DiskError::Unsupported {
        path: path.to_owned(),
        feature: format!("the {foreign} format"),
        way_out: "convert it with `qemu-img convert -O qcow2`, or declare the format raw if these are the guest's bytes"
            .to_owned(),
    })
}
