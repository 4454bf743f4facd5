//! Head of a chunk, and the last chunk of a record.

use crate::page::PageError;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a chunk's head.
pub const CHUNK_HEAD_BYTES: usize = 32;

/// What a chunk's body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum ChunkKind {
    Device = 1,
    Pages = 2,
    Disk = 3,
    End = 4,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    kind: u8,
    zero: u8,
    zero2: U16,
    items: U32,
    record: U64,
    part: U64,
    unpacked: U32,
    stream: U32,
}

const _: () = assert!(size_of::<RawHead>() == CHUNK_HEAD_BYTES);

/// A checked chunk head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkHead {
    pub kind: ChunkKind,
    /// Page records, device pages or disk operations in the body.
    pub items: u32,
    /// Number of the record.
    pub record: u64,
    /// Piece of a full copy.
    pub part: u64,
    /// Length of the body when unpacked; 0: it is not packed.
    pub unpacked: u32,
    /// Nonce of the encoder that numbers the records.
    pub stream: u32,
}

/// Why a chunk is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Too short for its head or fields.
    #[error("chunk cut short")]
    Short,
    /// Head with values that do not exist.
    #[error("chunk head with unknown kind {0} or reserved bits")]
    Head(u8),
    /// Body and item count do not agree.
    #[error("chunk announces {announced} items and holds {found}")]
    Items {
        /// In the head.
        announced: u64,
        /// In the body.
        found: u64,
    },
    /// A page record is wrong.
    #[error(transparent)]
    Page(#[from] PageError),
    /// A page that this VM does not have.
    #[error("page {0} is outside of the VM's memory")]
    PageOutside(u64),
    /// Device state that does not fit together.
    #[error("device state chunk does not fit: {0}")]
    Device(&'static str),
    /// A disk operation that is malformed.
    #[error("disk operation does not fit: {0}")]
    Disk(&'static str),
    /// LZ4 data that does not unpack to the announced length.
    #[error("packed chunk does not unpack to the announced length")]
    Unpack,
}

impl ChunkHead {
    pub fn write(&self, out: &mut [u8]) {
        let raw = RawHead {
            kind: self.kind as u8,
            zero: 0,
            zero2: U16::ZERO,
            items: self.items.into(),
            record: self.record.into(),
            part: self.part.into(),
            unpacked: self.unpacked.into(),
            stream: self.stream.into(),
        };
        out[..CHUNK_HEAD_BYTES].copy_from_slice(raw.as_bytes());
    }

    pub fn read(payload: &[u8]) -> Result<(Self, &[u8]), ChunkError> {
        let (raw, body) = RawHead::ref_from_prefix(payload).map_err(|_| ChunkError::Short)?;
        let kind = match raw.kind {
            1 => ChunkKind::Device,
            2 => ChunkKind::Pages,
            3 => ChunkKind::Disk,
            4 => ChunkKind::End,
            k => return Err(ChunkError::Head(k)),
        };
        let unpacked = raw.unpacked.get();
        if raw.zero != 0 || raw.zero2 != U16::ZERO {
            return Err(ChunkError::Head(raw.kind));
        }
        if unpacked != 0 && kind != ChunkKind::Disk {
            return Err(ChunkError::Head(raw.kind));
        }
        let (items, record, part) = (raw.items.get(), raw.record.get(), raw.part.get());
        Ok((
            Self {
                kind,
                items,
                record,
                part,
                unpacked,
                stream: raw.stream.get(),
            },
            body,
        ))
    }
}

/// What a record holds in all; its last chunk. A receiver that counts otherwise refuses the record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Chunks before the last.
    pub chunks: u32,
    /// The guest flushed a disk in this epoch.
    pub has_flush: bool,
    /// Length of the device state in bytes.
    pub device_bytes: u64,
    /// Page records.
    pub pages: u64,
    /// Disk operations.
    pub disk_ops: u64,
    /// Outputs that the guest emitted up to the end of this epoch, since it was created.
    pub output_boundary: u64,
    /// Digest over all chunks before the last.
    pub digest: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEnd {
    chunks: U32,
    flags: U32,
    device_bytes: U64,
    pages: U64,
    disk_ops: U64,
    output_boundary: U64,
    digest: U64,
}

/// Bytes of the last chunk's body.
pub(super) const END_BYTES: usize = size_of::<RawEnd>();

impl Totals {
    pub(super) fn write(&self, out: &mut [u8]) {
        let raw = RawEnd {
            chunks: self.chunks.into(),
            flags: u32::from(self.has_flush).into(),
            device_bytes: self.device_bytes.into(),
            pages: self.pages.into(),
            disk_ops: self.disk_ops.into(),
            output_boundary: self.output_boundary.into(),
            digest: self.digest.into(),
        };
        out[..END_BYTES].copy_from_slice(raw.as_bytes());
    }

    pub(super) fn read(body: &[u8]) -> Result<Self, ChunkError> {
        let raw = RawEnd::ref_from_bytes(body).map_err(|_| ChunkError::Short)?;
        if raw.flags.get() > 1 {
            return Err(ChunkError::Head(ChunkKind::End as u8));
        }
        Ok(Self {
            chunks: raw.chunks.get(),
            has_flush: raw.flags.get() == 1,
            device_bytes: raw.device_bytes.get(),
            pages: raw.pages.get(),
            disk_ops: raw.disk_ops.get(),
            output_boundary: raw.output_boundary.get(),
            digest: raw.digest.get(),
        })
    }
}

/// Takes one more chunk into a record's digest: its number, length and checksum, in order.
pub(super) fn fold_digest(digest: u64, index: u32, len: usize, crc: u32) -> u64 {
    let mut x = digest.rotate_left(23) ^ (u64::from(crc) << 32 | len as u64 & 0xffff_ffff);
    x = x
        .wrapping_add(u64::from(index))
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^ (x >> 29)
}
