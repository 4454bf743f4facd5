//! An image in memory: for cloud-init seeds and tests.

use super::{BlockIo, ImageFormat, ImageInfo, SECTOR};
use crate::error::DiskError;
use std::os::fd::RawFd;
use std::sync::{PoisonError, RwLock};

/// Bytes as a disk.
#[derive(Debug)]
pub struct MemImage {
    info: ImageInfo,
    bytes: RwLock<Vec<u8>>,
}

impl MemImage {
    /// Takes `bytes`, padded with zeroes to a whole sector.
    #[must_use]
    pub fn new(mut bytes: Vec<u8>, read_only: bool) -> Self {
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        let info = ImageInfo {
            capacity_bytes: bytes.len() as u64,
            read_only,
            format: ImageFormat::Memory,
            logical_block: SECTOR as u32,
            discard: false,
            write_zeroes: !read_only,
        };
        Self {
            info,
            bytes: RwLock::new(bytes),
        }
    }

    fn change(&self, offset: u64, len: u64, f: impl FnOnce(&mut [u8])) -> Result<(), DiskError> {
        self.info.check_write(offset, len)?;
        let mut bytes = self.bytes.write().unwrap_or_else(PoisonError::into_inner);
        // In range: checked against the capacity, which is the length of the vector.
        f(&mut bytes[offset as usize..(offset + len) as usize]);
        Ok(())
    }
}

impl BlockIo for MemImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.info.check(offset, buf.len() as u64)?;
        let bytes = self.bytes.read().unwrap_or_else(PoisonError::into_inner);
        buf.copy_from_slice(&bytes[offset as usize..offset as usize + buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        self.change(offset, buf.len() as u64, |range| range.copy_from_slice(buf))
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.info.check_write(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.change(offset, len, |range| range.fill(0))
    }

    fn raw_fd(&self) -> Option<RawFd> {
        None
    }

    fn release(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        Ok(())
    }
}
