//! Records: one epoch (or one piece of a full copy) as a sequence of chunk frames.
//!
//! ```text
//!  record = chunk 0, chunk 1, ... chunk n        each one frame of kind Bulk, index = its number
//!  chunk  = head (32 bytes) + body
//!  body   = pages    page records, see [`crate::page`]
//!         | device   part of the device state: runs against the record before, or against zeros
//!         | disk     disk operations in order, perhaps LZ4
//!         | end      counts, flags, boundary of the output stream, digest over all chunks
//! ```
//!
//! The frame carries the sender's term, in `epoch` the number of the epoch or of the copy, and in `flags` what it is.
//! Records are numbered without gaps by their encoder. A record refers to the content as of the one before, so the
//! receiver takes number n + 1 only on top of n, or a record that says it refers to nothing (`FLAG_RESET`).
//!
//! Early sending: pages may be encoded while the epoch is still open; a page that is written again is encoded again,
//! and the later record wins.

mod chunk;
mod disk;
mod encoder;
mod staged;
mod stager;

pub use chunk::{CHUNK_HEAD_BYTES, ChunkError, Totals};
pub use disk::{DiskKind, DiskOp};
pub use encoder::{ChunkSink, EncodeError, Encoder, PageSource, Trailer};
pub use staged::{ApplyAt, ApplyError, PageSink, StagedRecord};
pub use stager::{StageConfig, StageError, Staged, Stager};

use steadfast_types::Epoch;

/// Frame flag: a piece of a full copy, not an epoch.
pub const FLAG_COPY: u8 = 1;
/// Frame flag: the record refers to nothing before it.
pub const FLAG_RESET: u8 = 2;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordId {
    /// An epoch.
    Epoch(Epoch),
    /// A piece of a full copy.
    Copy {
        /// Number of the copy.
        join: u64,
        /// Number of the piece.
        seq: u64,
    },
}

impl RecordId {
    /// What goes into the frame header's epoch field and the chunk's part field.
    const fn to_wire(self) -> (u64, u64, u8) {
        match self {
            Self::Epoch(e) => (e.0, 0, 0),
            Self::Copy { join, seq } => (join, seq, FLAG_COPY),
        }
    }

    const fn from_wire(epoch: u64, part: u64, flags: u8) -> Self {
        if flags & FLAG_COPY != 0 {
            Self::Copy {
                join: epoch,
                seq: part,
            }
        } else {
            Self::Epoch(Epoch(epoch))
        }
    }
}

#[cfg(test)]
mod tests;
