//! A volume as a block device's image.

use super::{EpochOp, Volume};
use crate::error::DiskError;
use crate::image::{BlockIo, ImageFormat, ImageInfo};
use std::os::fd::RawFd;
use std::sync::Arc;

/// See the module. Reads and writes go through the open epoch; flush obeys the volume's mode.
#[derive(Clone)]
pub struct VolumeBlock {
    volume: Volume,
    info: ImageInfo,
}

impl VolumeBlock {
    /// Wraps a volume.
    #[must_use]
    pub fn new(volume: Volume) -> Self {
        let info = ImageInfo {
            capacity_bytes: volume.capacity(),
            read_only: false,
            format: ImageFormat::Raw,
            logical_block: 512,
            discard: true,
            write_zeroes: true,
        };
        Self { volume, info }
    }

    /// The volume.
    #[must_use]
    pub const fn volume(&self) -> &Volume {
        &self.volume
    }
}

impl BlockIo for VolumeBlock {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        Ok(self.volume.read(offset, buf)?)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
        Ok(self.volume.submit(EpochOp::Write {
            offset,
            data: Arc::new(buf.to_vec()),
        })?)
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(self.volume.flush()?)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        Ok(self.volume.submit(EpochOp::Discard { offset, len })?)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        Ok(self.volume.submit(EpochOp::WriteZeroes { offset, len })?)
    }

    /// None: the bytes are spread over image and journal.
    fn raw_fd(&self) -> Option<RawFd> {
        None
    }

    fn release(&self) -> Result<(), DiskError> {
        Err(DiskError::Invalid(
            "a replicated volume changes hands by its epochs, not by its files".into(),
        ))
    }

    fn reacquire(&self) -> Result<(), DiskError> {
        Ok(())
    }
}
