//! Files and block devices of the operating system, buffered, with `fdatasync`.

use super::{Storage, StorageFile};
use crate::error::DiskError;
use crate::image::BlockIo;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How much is zeroed at a time where the file system cannot do it.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
/// The most parts the kernel takes in one call (IOV_MAX).
const IOV_MAX: usize = 1024;

/// Fills `buf` from `file` if all of it is in the page cache.
pub(crate) fn read_cached(file: &File, offset: u64, buf: &mut [u8]) -> bool {
    let mut done = 0;
    while done < buf.len() {
        let mut rest = [IoSliceMut::new(&mut buf[done..])];
        match rustix::io::preadv2(file, &mut rest, offset + done as u64, ReadWriteFlags::NOWAIT) {
            Ok(n) if n > 0 => done += n,
            // The end, not in memory, or a file system that cannot tell: whoever may wait finds out.
            _ => return false,
        }
    }
    true
}

/// A file or block device.
#[derive(Debug)]
pub struct OsFile {
    file: File,
}

impl OsFile {
    /// Wraps a file that is open for reading and writing.
    #[must_use]
    pub const fn new(file: File) -> Self {
        Self { file }
    }

    /// Opens `path` for reading and writing; it takes no lock.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::new(OpenOptions::new().read(true).write(true).open(path)?))
    }

    fn zero_by_writing(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len);
        while offset < end {
            let n = (end - offset).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..n as usize], offset)?;
            offset += n;
        }
        Ok(())
    }
}

impl StorageFile for OsFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        read_cached(&self.file, offset, buf)
    }

    fn write_parts(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        if let [one] = parts {
            return self.file.write_all_at(one, offset);
        }
        let mut at = offset;
        for group in parts.chunks(IOV_MAX) {
            let mut slices: Vec<IoSlice<'_>> = group.iter().map(|p| IoSlice::new(p)).collect();
            let mut rest = slices.as_mut_slice();
            IoSlice::advance_slices(&mut rest, 0);
            while !rest.is_empty() {
                match rustix::io::pwritev(&self.file, rest, at) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(n) => {
                        at += n as u64;
                        IoSlice::advance_slices(&mut rest, n);
                    }
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, free: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let how = if free {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self.zero_by_writing(offset, len),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    fn len(&self) -> io::Result<u64> {
        // Seeking to the end gives the size of block devices too; all reads and writes name their offset.
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let meta = self.file.metadata()?;
        if meta.file_type().is_block_device() {
            return if self.len()? >= len {
                Ok(())
            } else {
                Err(io::ErrorKind::StorageFull.into())
            };
        }
        let old = meta.len();
        match fallocate(&self.file, FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            // A file system without preallocation: write the space, which is as good.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) if old < len => self.zero_by_writing(old, len - old),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

/// An opened image ([`crate::image::open`], with its lock) as the file below a volume.
pub struct BlockFile(pub Arc<dyn BlockIo>);

fn as_io(e: DiskError) -> io::Error {
    match e {
        DiskError::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}

impl StorageFile for BlockFile {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf).map_err(as_io)
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.0.read_at_once(offset, buf)
    }

    fn write_parts(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut at = offset;
        for part in parts {
            self.0.write_at(at, part).map_err(as_io)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64, free: bool) -> io::Result<()> {
        // A discarded range of an image reads as anything; replicas must be equal, so it is zeroed in any case.
        let zeroed = match free {
            true => self.0.zero_and_free(offset, len),
            false => self.0.write_zeroes(offset, len),
        };
        zeroed.map_err(as_io)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.flush().map_err(as_io)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.info().capacity_bytes)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        if self.0.info().capacity_bytes >= len {
            Ok(())
        } else {
            Err(io::ErrorKind::StorageFull.into())
        }
    }
}

/// A directory.
#[derive(Debug)]
pub struct DirStorage {
    path: PathBuf,
}

impl DirStorage {
    /// Uses the directory at `path`; creates it if it is missing.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        std::fs::create_dir_all(&path)?;
        Ok(Self { path })
    }

    fn at(&self, name: &str) -> io::Result<PathBuf> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name:?} is no plain file name"),
            ));
        }
        Ok(self.path.join(name))
    }
}

impl Storage for DirStorage {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn StorageFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .open(self.at(name)?)?;
        Ok(Arc::new(OsFile::new(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.at(from)?, self.at(to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match std::fs::remove_file(self.at(name)?) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn sync_names(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}
