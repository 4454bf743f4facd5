//! What can go wrong with a volume, and what the operator or the caller can do about it.

use crate::error::DiskError;
use crate::scrub::PeerError;
use std::io;
use steadfast_types::Epoch;

/// An error of a volume, its journal, its checksums, a scrub or a re-sync.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The journal has no room until epochs are committed and applied: throttle the guest.
    #[error(
        "journal is full ({used} of {size} bytes): wait for commits, or give the volume a larger journal"
    )]
    JournalFull {
        /// Bytes in use.
        used: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Too much is buffered in memory until it reaches the journal or is committed: throttle the guest.
    #[error(
        "{bytes} bytes of writes are buffered, the bound is {max}: wait, the disk below is slower than the guest"
    )]
    Throttled {
        /// Buffered now.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// An operation on a file failed.
    #[error("cannot {op} {file} at {offset}: {source}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file of the volume.
        file: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something that was durable is not what was written. Recover this replica from its peer.
    #[error("{what} at {at} is damaged: re-sync this replica from its peer")]
    Damaged {
        /// What.
        what: &'static str,
        /// Where: a position or a byte offset.
        at: u64,
    },
    /// A block of the image does not match its checksum and no good copy could be had.
    #[error(
        "the block at byte {offset} does not match its checksum, and the peer could not give a good copy ({why})"
    )]
    NoGoodCopy {
        /// First byte of the block.
        offset: u64,
        /// Why the peer could not help.
        #[source]
        why: PeerError,
    },
    /// Image and peer differ though the checksum here is right.
    #[error("replicas differ at byte {offset} though both checksums are right: re-sync the standby in full")]
    Diverged {
        /// First byte of the block.
        offset: u64,
    },
    /// Written by another version.
    #[error("{what} has format version {found}, this program knows up to {known}: use the newer program")]
    Version {
        /// What.
        what: &'static str,
        /// Its version.
        found: u32,
        /// The newest one known.
        known: u32,
    },
    /// The directory holds no volume, or another one.
    #[error("{0}")]
    Mismatch(String),
    /// A request reaches beyond the end.
    #[error("request of {len} bytes at {offset} is outside the volume of {capacity} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the volume in bytes.
        capacity: u64,
    },
    /// An epoch came out of order.
    #[error("epoch {got} cannot follow here: {expected} was expected")]
    OutOfOrder {
        /// What would have been right.
        expected: Epoch,
        /// What came.
        got: Epoch,
    },
    /// A flushed epoch was to be committed before its writes were durable here (I5).
    #[error("epoch {epoch} holds a flush but is durable only up to {synced}: wait for the journal")]
    NotDurable {
        /// Which.
        epoch: Epoch,
        /// Durable up to this.
        synced: Epoch,
    },
    /// The replica is in the middle of a copy from its peer.
    #[error("this replica is an unfinished copy (number {join}): let the re-sync finish first")]
    Copying {
        /// Number of the copy.
        join: u64,
    },
    /// The operation does not fit the state.
    #[error("{0}")]
    Refused(&'static str),
    /// The disk below failed for good: hand the VM over to its standby.
    #[error("the disk of this replica has failed ({0}): hand over to the standby, then replace it")]
    Faulted(String),
    /// The volume was closed.
    #[error("the volume is closed")]
    Closed,
    /// A wait ended without what it waited for.
    #[error("timed out waiting for {0}")]
    TimedOut(&'static str),
}

impl VolumeError {
    /// For `map_err` on an operation of a file.
    pub(crate) fn io(op: &'static str, file: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            op,
            file,
            offset,
            source,
        }
    }

    /// Whether waiting (for commits, the journal, the disk) is the right answer.
    #[must_use]
    pub const fn is_back_pressure(&self) -> bool {
        matches!(self, Self::JournalFull { .. } | Self::Throttled { .. })
    }
}

impl From<VolumeError> for DiskError {
    fn from(e: VolumeError) -> Self {
        match e {
            VolumeError::OutOfRange {
                offset,
                len,
                capacity,
            } => Self::OutOfRange {
                offset,
                len,
                capacity,
            },
            VolumeError::Io {
                op, offset, source, ..
            } => Self::Io {
                op,
                offset,
                len: 0,
                source,
            },
            VolumeError::Closed => Self::Closed,
            other => Self::Io {
                op: "volume request",
                offset: 0,
                len: 0,
                source: io::Error::other(other),
            },
        }
    }
}
