//! qcow2 images through the `imago` crate, in its blocking mode (no async runtime).
//!
//! What is added around it:
//! * every layer's header passes [`super::qcow2_check`] first;
//! * the backing chain is opened here, layer by layer, each read-only and with a shared lock, with a bound on its
//!   depth and a check for loops;
//! * a pointer behind the end of the file is an error, not zeroes: a cut-off image must not look like an empty one;
//! * a panic in the driver makes the image unusable ([`DiskError::GivenUp`]) instead of taking the process down.

use super::lock::{self, Mode};
use super::qcow2_check::{self, Checked};
use super::qcow2_tables;
use super::{BlockIo, ImageFormat, ImageInfo, ImageOptions, SECTOR, detect, raw};
use crate::error::DiskError;
use crate::guard::no_panic;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::raw::Raw;
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{FormatAccess, Storage};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

/// More layers than any sane chain of snapshots; each costs a descriptor and caches.
const LAYERS_MAX: usize = 32;
/// How many zeroes are written at a time where the format has no better way.
const ZEROES: usize = 1 << 20;

/// An open qcow2 image with its backing chain.
pub struct Qcow2Image {
    info: ImageInfo,
    path: PathBuf,
    /// Read side: reads, writes, flushes, which the driver lets run side by side. Write side: discard, which may
    /// move clusters under the feet of others.
    access: ManuallyDrop<RwLock<FormatAccess<Layer>>>,
    /// The top layer's file, whose lock is released and taken again.
    top: Mutex<File>,
    options: ImageOptions,
    /// Set after a panic: the driver's state can no longer be trusted.
    given_up: AtomicBool,
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Image")
            .field("path", &self.path)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl Qcow2Image {
    /// Opens the image at `path` and its backing files.
    ///
    /// # Errors
    /// [`DiskError::Open`], [`DiskError::InUse`], [`DiskError::Unsupported`] (encryption and the like),
    /// [`DiskError::Damaged`].
    pub fn open(path: &Path, options: &ImageOptions) -> Result<Self, DiskError> {
        if options.direct {
            return Err(DiskError::Unsupported {
                path: path.to_owned(),
                feature: "direct=on for qcow2".to_owned(),
                way_out: "use direct=off, or convert the image to raw".to_owned(),
            });
        }
        let mut seen = Vec::new();
        let (access, capacity, top) = no_panic("opening a qcow2 image", || {
            open_qcow2(path, !options.read_only, options.lock, Tables::Made, &mut seen)
        })?;
        let capacity_bytes = capacity / SECTOR * SECTOR;
        if capacity_bytes == 0 {
            return Err(DiskError::Unsuitable {
                path: path.to_owned(),
                why: format!("the disk has {capacity} bytes, less than one sector; resize it"),
            });
        }
        let info = ImageInfo {
            capacity_bytes,
            read_only: options.read_only,
            format: ImageFormat::Qcow2,
            logical_block: SECTOR as u32,
            discard: !options.read_only,
            write_zeroes: !options.read_only,
        };
        Ok(Self {
            info,
            path: path.to_owned(),
            access: ManuallyDrop::new(RwLock::new(access)),
            top: Mutex::new(top),
            options: options.clone(),
            given_up: AtomicBool::new(false),
        })
    }

    /// Runs one operation behind the fence.
    fn guarded(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        f: impl FnOnce(&RwLock<FormatAccess<Layer>>) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        if self.given_up.load(Ordering::Acquire) {
            return Err(DiskError::GivenUp);
        }
        let result = no_panic(op, || {
            f(&self.access).map_err(|source| DiskError::Io {
                op,
                offset,
                len,
                source,
            })
        });
        if let Err(DiskError::Panicked { message, .. }) = &result {
            self.given_up.store(true, Ordering::Release);
            tracing::error!(image = %self.path.display(), op, offset, len, message, "qcow2 driver failed: image given up");
        }
        result
    }

    fn shared(
        &self,
        op: &'static str,
        offset: u64,
        len: u64,
        f: impl FnOnce(&FormatAccess<Layer>) -> io::Result<()>,
    ) -> Result<(), DiskError> {
        self.guarded(op, offset, len, |access| {
            f(&access.read().unwrap_or_else(PoisonError::into_inner))
        })
    }
}

impl BlockIo for Qcow2Image {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        self.info.check(offset, len)?;
        self.shared("read", offset, len, |access| access.read(buf, offset))
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        let len = buf.len() as u64;
        self.info.check_write(offset, len)?;
        self.shared("write", offset, len, |access| access.write(buf, offset))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.info.read_only {
            return Ok(());
        }
        self.shared("flush", 0, 0, |access| {
            access.flush()?;
            access.sync()
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.info.check_write(offset, len)?;
        // To zero, not to anything: what the backing file holds there must not come back.
        self.guarded("discard", offset, len, |access| {
            match access
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .discard_to_zero(offset, len)
            {
                // Advice only: version 2 has no zero clusters, so a part of a cluster cannot be given back.
                Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
                other => other,
            }
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.info.check_write(offset, len)?;
        // Nobody else writes meanwhile: the driver makes a whole cluster zero when all around the range reads as zero.
        self.guarded("write zeroes", offset, len, |access| {
            let access = access.write().unwrap_or_else(PoisonError::into_inner);
            match access.write_zeroes(offset, len) {
                // Version 2 has no zero clusters.
                Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                    let zeroes = vec![0_u8; ZEROES.min(len as usize)];
                    let mut at = offset;
                    while at < offset + len {
                        let n = (offset + len - at).min(ZEROES as u64) as usize;
                        access.write(&zeroes[..n], at)?;
                        at += n as u64;
                    }
                    Ok(())
                }
                other => other,
            }
        })
    }

    fn raw_fd(&self) -> Option<RawFd> {
        None
    }

    fn release(&self) -> Result<(), DiskError> {
        if !self.info.read_only {
            self.flush()?;
        }
        let top = self.top.lock().unwrap_or_else(PoisonError::into_inner);
        lock::set(&top, Mode::None, &self.path)
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        let mut top = self.top.lock().unwrap_or_else(PoisonError::into_inner);
        // Opened anew, since the tables that the driver has cached may be another's past.
        let mut seen = Vec::new();
        let (access, _, file) = no_panic("opening a qcow2 image again", || {
            open_qcow2(
                &self.path,
                !self.options.read_only,
                true,
                Tables::Counted,
                &mut seen,
            )
        })?;
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = access;
        *top = file;
        Ok(())
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        // SAFETY: `access` is not touched again: this is the only place that takes it, and `drop` runs once.
        let access = unsafe { ManuallyDrop::take(&mut self.access) };
        if self.given_up.load(Ordering::Acquire) {
            // Dropping would flush state that cannot be trusted into the file. One leak per broken image.
            std::mem::forget(access);
            return;
        }
        // Dropping flushes, and so may fail like any other operation.
        if let Err(error) = no_panic("closing a qcow2 image", || {
            drop(access);
            Ok(())
        }) {
            tracing::error!(image = %self.path.display(), %error, "closing failed");
        }
    }
}

/// What is done for an image's tables before it is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tables {
    /// Counted anew and made: a guest is not waiting.
    Made,
    /// Second level tables counted only: the process before let the image go in order.
    Counted,
}

fn open_locked(path: &Path, writable: bool, take_lock: bool) -> Result<File, DiskError> {
    raw::refuse_odd_file_types(path)?;
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(path)
        .map_err(|source| DiskError::Open {
            path: path.to_owned(),
            source,
        })?;
    if take_lock {
        lock::set(&file, if writable { Mode::Exclusive } else { Mode::Shared }, path)?;
    }
    Ok(file)
}

/// Remembers the file and refuses one that is already part of the chain.
fn remember(file: &File, path: &Path, seen: &mut Vec<(u64, u64)>) -> Result<(), DiskError> {
    let meta = file.metadata().map_err(|source| DiskError::Open {
        path: path.to_owned(),
        source,
    })?;
    let id = (meta.dev(), meta.ino());
    let damaged = |why: String| DiskError::Damaged {
        path: path.to_owned(),
        why,
    };
    if seen.contains(&id) {
        return Err(damaged(
            "it is its own backing file, directly or through others".to_owned(),
        ));
    }
    if seen.len() >= LAYERS_MAX {
        return Err(damaged(format!(
            "its backing chain has more than {LAYERS_MAX} layers; flatten it"
        )));
    }
    seen.push(id);
    Ok(())
}

fn open_qcow2(
    path: &Path,
    writable: bool,
    take_lock: bool,
    tables: Tables,
    seen: &mut Vec<(u64, u64)>,
) -> Result<(FormatAccess<Layer>, u64, File), DiskError> {
    let file = open_locked(path, writable, take_lock)?;
    remember(&file, path, seen)?;
    let top = file.try_clone().map_err(|source| DiskError::Open {
        path: path.to_owned(),
        source,
    })?;
    let Checked {
        capacity,
        cluster,
        backing,
    } = qcow2_check::check(&file, path, writable)?;
    let damaged = |e: io::Error| DiskError::Damaged {
        path: path.to_owned(),
        why: e.to_string(),
    };
    let layer = Layer::new(file, path, Some(cluster))?;
    // Not of an image that another process has and writes.
    let (ours, make) = (writable && take_lock, tables == Tables::Made);
    let missing = match ours {
        true => qcow2_tables::count(&top, path, make)?,
        false => Vec::new(),
    };
    let mut image = imago::qcow2::Qcow2::<Layer>::open_image(layer, writable).map_err(damaged)?;
    // Set in any case, so that the driver never opens anything by itself.
    image.set_data_file(None);
    let backing = match backing {
        None => None,
        Some((name, format)) => Some(open_backing(path, &name, format.as_deref(), take_lock, seen)?),
    };
    image.set_backing(backing);
    let access = FormatAccess::new(image);
    if make && let Err(error) = make_tables(&access, missing, cluster, capacity) {
        // For want of space, say. The guest may still only read, or write where there is room.
        tracing::warn!(image = %path.display(), %error, "tables are not made ahead");
    }
    Ok((access, capacity, top))
}

/// Makes second level tables for these places: the first cluster of each is written as what it reads as.
fn make_tables(
    access: &FormatAccess<Layer>,
    missing: Vec<u64>,
    cluster: u64,
    capacity: u64,
) -> io::Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let mut buf = vec![0; cluster as usize];
    for at in missing {
        let part = &mut buf[..cluster.min(capacity - at) as usize];
        access.read(&mut *part, at)?;
        match part.iter().all(|b| *b == 0) {
            true => match access.write_zeroes(at, part.len() as u64) {
                // Version 2 has no zero clusters.
                Err(e) if e.kind() == io::ErrorKind::Unsupported => access.write(&*part, at)?,
                other => other?,
            },
            false => access.write(&*part, at)?,
        }
    }
    access.flush()?;
    access.sync()
}

fn open_backing(
    above: &Path,
    name: &str,
    format: Option<&str>,
    take_lock: bool,
    seen: &mut Vec<(u64, u64)>,
) -> Result<FormatAccess<Layer>, DiskError> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let unsupported = |feature: String| DiskError::Unsupported {
        path: above.to_owned(),
        feature,
        way_out: "flatten the image with `qemu-img convert -O qcow2`".to_owned(),
    };
    // QEMU's syntax for anything that is not a file: a scheme before the first slash.
    if name.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(unsupported(format!(
            "backing file {name:?}, which is not a plain file,"
        )));
    }
    // Relative to the image that names it; an absolute name replaces the directory.
    let path = above.parent().unwrap_or(Path::new("")).join(name);
    let format = match format {
        Some("raw" | "file" | "host_device") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        Some(other) => return Err(unsupported(format!("a backing file of format {other:?}"))),
        None => detect(&path)?,
    };
    let result = if format == ImageFormat::Qcow2 {
        open_qcow2(&path, false, take_lock, Tables::Counted, seen).map(|(access, ..)| access)
    } else {
        let file = open_locked(&path, false, take_lock)?;
        remember(&file, &path, seen)?;
        Raw::open_image(Layer::new(file, &path, None)?, false)
            .map(FormatAccess::new)
            .map_err(|source| DiskError::Open {
                path: path.clone(),
                source,
            })
    };
    if let Err(error) = &result {
        tracing::warn!(image = %above.display(), backing = %path.display(), %error, "backing file cannot be opened");
    }
    result
}

/// The file of one layer: imago's own file driver, with reads behind the end of the file refused.
#[derive(Debug)]
struct Layer {
    file: imago::file::File,
    /// `None` for raw layers, whose size is that of the file.
    cluster: Option<u64>,
}

impl Layer {
    fn new(file: File, path: &Path, cluster: Option<u64>) -> Result<Self, DiskError> {
        let file = imago::file::File::try_from(file).map_err(|source| DiskError::Open {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self { file, cluster })
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl Storage for Layer {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        if let Some(cluster) = self.cluster {
            let size = self.file.size()?;
            // The last cluster may be short: QEMU does not pad the file.
            let limit = size.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
            if offset.checked_add(bufv.len()).is_none_or(|end| end > limit) {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!(
                        "image points to {offset}, behind the end of its file of {size} bytes: it was cut short"
                    ),
                ));
            }
        }
        // SAFETY: the caller keeps the contract of `pure_readv`, which is handed on unchanged to the same file.
        unsafe { self.file.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as in `pure_readv`.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(new_size, prealloc_mode)
    }
}
