//! The files below a volume, as a small trait, so that tests and the simulation can stand in for a disk that fails.
//!
//! A [`Storage`] is one directory that belongs to one replica of one volume; a [`StorageFile`] is one file in it, or
//! an image or block device elsewhere. Promises an implementation must keep, because recovery is built on them:
//!
//! * After [`StorageFile::sync`] returned `Ok`, every write that returned before it began survives power loss.
//! * A write that was not synced may survive whole, not at all, or in any subset of its 512-byte sectors.
//! * A write never changes bytes outside its range. (Storage that breaks this is found by checksums, not survived
//!   in silence.)
//! * A failed sync says nothing about which writes survived; the caller writes them again (see `journal`).

mod file;

pub(crate) use file::read_cached;
pub use file::{BlockFile, DirStorage, OsFile};

use std::io;
use std::sync::Arc;

/// The sector: the unit in which a write may tear.
pub const SECTOR: usize = 512;

/// One open file. All calls may come from several threads.
pub trait StorageFile: Send + Sync {
    /// Fills `buf` from `offset` (bytes).
    ///
    /// # Errors
    /// `UnexpectedEof` beyond the end; otherwise what the storage says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Fills `buf` from `offset` (bytes) out of memory, without waiting for a disk. `false`: that is not possible, and [`StorageFile::read_at`]
    /// is to be asked, by a thread that may wait.
    fn read_cached(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Writes `parts` one after another from `offset` (bytes), whole.
    ///
    /// # Errors
    /// What the storage says; nothing is known then about what was written.
    fn write_parts(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()>;

    /// Makes the range read as zeroes; gives its space back if `free`.
    ///
    /// # Errors
    /// As [`StorageFile::write_parts`].
    fn zero(&self, offset: u64, len: u64, free: bool) -> io::Result<()>;

    /// Returns once all that was written before survives power loss.
    ///
    /// # Errors
    /// What the storage says; the writes before it may be lost then.
    fn sync(&self) -> io::Result<()>;

    /// Size in bytes.
    ///
    /// # Errors
    /// What the storage says.
    fn len(&self) -> io::Result<u64>;

    /// Whether there is nothing in it.
    ///
    /// # Errors
    /// What the storage says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Makes the file at least `len` bytes long, with space reserved: later writes below `len` do not fail for
    /// want of space. New bytes read as zero.
    ///
    /// # Errors
    /// `StorageFull`, or what the storage says.
    fn allocate(&self, len: u64) -> io::Result<()>;

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// As [`StorageFile::write_parts`].
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.write_parts(offset, &[buf])
    }
}

/// One directory. Names are plain file names.
pub trait Storage: Send + Sync {
    /// Opens a file for reading and writing; creates an empty one if it is missing and `create` is set.
    ///
    /// # Errors
    /// `NotFound`, or what the storage says.
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn StorageFile>>;

    /// Gives a file another name, replacing what had it; atomic.
    ///
    /// # Errors
    /// What the storage says.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file; one that is missing is no error.
    ///
    /// # Errors
    /// What the storage says.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes created, renamed and removed names survive power loss.
    ///
    /// # Errors
    /// What the storage says.
    fn sync_names(&self) -> io::Result<()>;
}
