//! A checksum for every 4 KiB block of the image, in a file beside it.
//!
//! `sum(block) = crc32(crc32(bytes) ‖ block number)`: bytes that are right but stand in the wrong block do not match
//! either, nor does the block that should have received them. A block shorter than 4 KiB at the end of the image
//! counts as filled up with zeroes.
//!
//! Two values are set aside: 0 means that the block's sum is not known yet (a fresh image: the first scrub learns
//! it), `0xffff_ffff` that the block is known to be bad. Sums are written after the blocks, by applying epochs; the
//! journal keeps an epoch until both files are synced, and applying it again after a crash writes both again. So an
//! entry of 4 bytes needs no protection of its own: if it rots, its block looks bad, and comparing with the peer
//! tells.

use crate::journal::record::{u32_at, u64_at};
use crate::storage::StorageFile;
use crate::volume::VolumeError;
use std::sync::Arc;

/// The unit of checksums in bytes.
pub const BLOCK: u64 = 4096;
/// The sum is not known.
pub const UNKNOWN: u32 = 0;
/// The block is known to be bad.
pub const BAD: u32 = u32::MAX;

const HEADER: u64 = 4096;
const MAGIC: u64 = 0x534d_5553_4644_5453; // "STDFSUMS"
const VERSION: u32 = 1;
/// Sums written in one go for a run of zeroed blocks.
const RUN: u64 = 16 * 1024;

/// Checksum of a block. `data` is at most [`BLOCK`] bytes; the rest counts as zeroes.
#[must_use]
pub fn block_sum(block: u64, data: &[u8]) -> u32 {
    let inner = if data.len() == BLOCK as usize {
        crc32fast::hash(data)
    } else {
        let mut whole = [0_u8; BLOCK as usize];
        whole[..data.len()].copy_from_slice(data);
        crc32fast::hash(&whole)
    };
    mix(block, inner)
}

fn mix(block: u64, inner: u32) -> u32 {
    let mut b = [0_u8; 12];
    b[..4].copy_from_slice(&inner.to_le_bytes());
    b[4..].copy_from_slice(&block.to_le_bytes());
    match crc32fast::hash(&b) {
        UNKNOWN => 1,
        BAD => BAD - 1,
        sum => sum,
    }
}

/// The file of checksums.
#[derive(Clone)]
pub struct Sums {
    file: Arc<dyn StorageFile>,
    blocks: u64,
}

impl Sums {
    /// Lays the file out anew: every sum unknown.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn format(file: Arc<dyn StorageFile>, volume: u64, capacity: u64) -> Result<Self, VolumeError> {
        let blocks = capacity.div_ceil(BLOCK);
        let len = HEADER + blocks * 4;
        file.allocate(len)
            .map_err(VolumeError::io("allocate", "sums", len))?;
        file.zero(0, len, false)
            .map_err(VolumeError::io("clear", "sums", 0))?;
        let mut b = [0_u8; 40];
        b[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[16..24].copy_from_slice(&volume.to_le_bytes());
        b[24..32].copy_from_slice(&capacity.to_le_bytes());
        let crc = crc32fast::hash(&b[..36]);
        b[36..40].copy_from_slice(&crc.to_le_bytes());
        file.write_parts(0, &[&b, &b])
            .map_err(VolumeError::io("write", "sums", 0))?;
        file.sync().map_err(VolumeError::io("sync", "sums", 0))?;
        Ok(Self { file, blocks })
    }

    /// Opens it.
    ///
    /// # Errors
    /// [`VolumeError::Mismatch`] if it belongs to another volume, [`VolumeError::Damaged`], [`VolumeError::Io`].
    pub fn open(file: Arc<dyn StorageFile>, volume: u64, capacity: u64) -> Result<Self, VolumeError> {
        let mut two = [0_u8; 80];
        file.read_at(0, &mut two)
            .map_err(VolumeError::io("read", "sums", 0))?;
        let b = [&two[..40], &two[40..]]
            .into_iter()
            .find(|b| u64_at(b, 0) == MAGIC && u32_at(b, 36) == crc32fast::hash(&b[..36]))
            .ok_or(VolumeError::Damaged {
                what: "checksum file",
                at: 0,
            })?;
        if u32_at(b, 8) != VERSION {
            return Err(VolumeError::Version {
                what: "checksum file",
                found: u32_at(b, 8),
                known: VERSION,
            });
        }
        if u64_at(b, 16) != volume || u64_at(b, 24) != capacity {
            return Err(VolumeError::Mismatch(
                "the checksum file belongs to another volume".to_owned(),
            ));
        }
        Ok(Self {
            file,
            blocks: capacity.div_ceil(BLOCK),
        })
    }

    /// Number of blocks.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The sums of `count` blocks from `first`.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn read(&self, first: u64, count: usize) -> Result<Vec<u32>, VolumeError> {
        let mut bytes = vec![0_u8; count * 4];
        let at = HEADER + first * 4;
        self.file
            .read_at(at, &mut bytes)
            .map_err(VolumeError::io("read", "sums", at))?;
        Ok(bytes.chunks_exact(4).map(|c| u32_at(c, 0)).collect())
    }

    /// The same out of memory, if that takes no waiting for a disk.
    pub(crate) fn read_cached(&self, first: u64, count: usize) -> Option<Vec<u32>> {
        let mut bytes = vec![0_u8; count * 4];
        let there = self.file.read_cached(HEADER + first * 4, &mut bytes);
        there.then(|| bytes.chunks_exact(4).map(|c| u32_at(c, 0)).collect())
    }

    /// Writes the sums of consecutive blocks from `first`.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn write(&self, first: u64, sums: &[u32]) -> Result<(), VolumeError> {
        let bytes: Vec<u8> = sums.iter().flat_map(|s| s.to_le_bytes()).collect();
        let at = HEADER + first * 4;
        self.file
            .write_at(at, &bytes)
            .map_err(VolumeError::io("write", "sums", at))
    }

    /// Writes the sums of `count` blocks of zeroes.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn write_zeroed(&self, first: u64, count: u64) -> Result<(), VolumeError> {
        let inner = crc32fast::hash(&[0_u8; BLOCK as usize]);
        let (mut at, end) = (first, first + count);
        while at < end {
            let n = RUN.min(end - at);
            let sums: Vec<u32> = (at..at + n).map(|b| mix(b, inner)).collect();
            self.write(at, &sums)?;
            at += n;
        }
        Ok(())
    }

    /// Forgets all sums: the image was replaced.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn forget_all(&self) -> Result<(), VolumeError> {
        self.file
            .zero(HEADER, self.blocks * 4, false)
            .map_err(VolumeError::io("clear", "sums", HEADER))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`VolumeError::Io`].
    pub fn sync(&self) -> Result<(), VolumeError> {
        self.file.sync().map_err(VolumeError::io("sync", "sums", 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn right_bytes_in_the_wrong_block_do_not_match() {
        let data = [7_u8; BLOCK as usize];
        assert_ne!(block_sum(1, &data), block_sum(2, &data));
        let mut other = data;
        other[100] ^= 1;
        assert_ne!(block_sum(1, &data), block_sum(1, &other));
        assert_eq!(block_sum(3, &data[..512]), {
            let mut padded = [0_u8; BLOCK as usize];
            padded[..512].copy_from_slice(&data[..512]);
            block_sum(3, &padded)
        });
    }
}
