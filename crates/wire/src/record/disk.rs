//! Disk operations of an epoch, in the order in which the guest issued them.
//!
//! ```text
//! kind u8, varint volume, varint offset, varint length, [length bytes, for a write]
//! ```

use super::ChunkError;
use crate::varint::{self, VARINT_BYTES_MAX};

/// What a disk operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskKind {
    /// Writes `data`.
    Write = 1,
    /// Makes the range read as zeros.
    WriteZeroes = 2,
    /// The guest does not need the range any more.
    Discard = 3,
    /// The guest flushed: orders what is before and behind it.
    Flush = 4,
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOp<'a> {
    /// What.
    pub kind: DiskKind,
    /// Which of the VM's volumes.
    pub volume: u16,
    /// First byte.
    pub offset: u64,
    /// Length in bytes; that of `data` for a write.
    pub len: u64,
    /// New content, for a write.
    pub data: &'a [u8],
}

/// Most bytes that an operation takes beside its data.
pub(super) const DISK_OP_HEAD_BYTES_MAX: usize = 1 + 3 * VARINT_BYTES_MAX;

impl<'a> DiskOp<'a> {
    pub(super) fn write(&self, out: &mut [u8], at: usize) -> usize {
        out[at] = self.kind as u8;
        let p = varint::put(out, at + 1, u64::from(self.volume));
        let p = varint::put(out, p, self.offset);
        let p = varint::put(out, p, self.len);
        out[p..p + self.data.len()].copy_from_slice(self.data);
        p + self.data.len()
    }

    /// Reads one operation from the front of `input` and moves it on.
    pub(super) fn read(input: &mut &'a [u8]) -> Result<Self, ChunkError> {
        let (&kind, rest) = input.split_first().ok_or(ChunkError::Short)?;
        *input = rest;
        let kind = match kind {
            1 => DiskKind::Write,
            2 => DiskKind::WriteZeroes,
            3 => DiskKind::Discard,
            4 => DiskKind::Flush,
            _ => return Err(ChunkError::Disk("unknown kind")),
        };
        let mut number = || varint::get(input).ok_or(ChunkError::Short);
        let volume = u16::try_from(number()?).map_err(|_| ChunkError::Disk("volume number"))?;
        let (offset, len) = (number()?, number()?);
        if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
            return Err(ChunkError::Disk("range"));
        }
        let mut data: &[u8] = &[];
        if kind == DiskKind::Write {
            (data, *input) = input.split_at_checked(len as usize).ok_or(ChunkError::Short)?;
        }
        Ok(Self {
            kind,
            volume,
            offset,
            len,
            data,
        })
    }
}
