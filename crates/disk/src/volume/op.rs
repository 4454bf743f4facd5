//! One operation on a volume, and the write set of one epoch.

use crate::journal::ring::Payload;
use crate::journal::{Kind, Position, scan};
use crate::storage::StorageFile;
use crate::volume::VolumeError;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use steadfast_types::{Epoch, Term};

/// An operation as it travels to a standby.
#[derive(Clone, PartialEq, Eq)]
pub enum EpochOp {
    /// `data` is written at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes, at most [`crate::journal::PAYLOAD_MAX`] as they come from a sealed epoch.
        data: Payload,
    },
    /// The range is given back and reads as zeroes.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl EpochOp {
    /// First byte and number of bytes.
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Write { offset, data } => (*offset, data.len() as u64),
            Self::Discard { offset, len } | Self::WriteZeroes { offset, len } => (*offset, *len),
        }
    }
}

impl fmt::Debug for EpochOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Write { .. } => "Write",
            Self::Discard { .. } => "Discard",
            Self::WriteZeroes { .. } => "WriteZeroes",
        };
        let (offset, len) = self.range();
        write!(f, "{name}({offset}+{len})")
    }
}

/// An operation with its place in the journal. Its bytes are in memory until they are evicted, which happens only
/// after they are durable in the journal.
pub struct JournaledOp {
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) at: Position,
    /// Behind the record.
    pub(crate) end: Position,
    data: Mutex<Option<Payload>>,
}

impl fmt::Debug for JournaledOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({}+{} @{})", self.kind, self.offset, self.len, self.at.0)
    }
}

impl JournaledOp {
    pub(crate) fn new(
        kind: Kind,
        offset: u64,
        len: u64,
        at: Position,
        end: Position,
        data: Option<Payload>,
    ) -> Self {
        Self {
            kind,
            offset,
            len,
            at,
            end,
            data: Mutex::new(data),
        }
    }

    /// Takes the bytes out of memory; how many that freed.
    pub(crate) fn evict(&self) -> usize {
        self.data
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .map_or(0, |d| d.len())
    }

    pub(crate) fn in_memory(&self) -> Option<Payload> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bytes of a write, from memory or else from the journal.
    pub(crate) fn load(&self, journal: &JournalReader) -> Result<Payload, VolumeError> {
        match self.in_memory() {
            Some(d) => Ok(d),
            None => journal.read(self.at, self.len as usize).map(Arc::new),
        }
    }
}

/// Reads payloads of records that are no longer in memory.
#[derive(Clone)]
pub struct JournalReader {
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) volume: u64,
    pub(crate) ring: u64,
}

impl JournalReader {
    fn read(&self, at: Position, len: usize) -> Result<Vec<u8>, VolumeError> {
        scan::read_payload(&*self.file, self.volume, self.ring, at, len)
    }
}

/// The write set of one epoch, in the order of the guest's requests.
#[derive(Debug)]
pub struct EpochWrites {
    /// The epoch.
    pub epoch: Epoch,
    /// The term in which it was made.
    pub term: Term,
    /// The guest flushed in it: it commits only when durable on all required hosts.
    pub flush: bool,
    pub(crate) ops: Vec<Arc<JournaledOp>>,
    /// Its first record, and that record's number.
    pub(crate) start: (Position, u64),
    /// Behind its last record.
    pub(crate) end: Position,
}

/// A sealed epoch on its way to the standbys.
///
/// It may be read until the epoch is committed; after that the journal may have reused the place of bytes that are no
/// longer in memory, and reading them gives [`VolumeError::Damaged`].
#[derive(Clone)]
pub struct Sealed {
    pub(crate) writes: Arc<EpochWrites>,
    pub(crate) journal: JournalReader,
}

impl Sealed {
    /// The epoch.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.writes.epoch
    }

    /// The term in which it was made.
    #[must_use]
    pub fn term(&self) -> Term {
        self.writes.term
    }

    /// Whether the guest flushed in it.
    #[must_use]
    pub fn flush(&self) -> bool {
        self.writes.flush
    }

    /// Number of operations.
    #[must_use]
    pub fn len(&self) -> usize {
        self.writes.ops.len()
    }

    /// Whether the guest wrote nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.ops.is_empty()
    }

    /// Bytes of all writes.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.writes
            .ops
            .iter()
            .filter(|o| o.kind == Kind::Write)
            .map(|o| o.len)
            .sum()
    }

    /// The operations in order. Payloads still in memory are shared, not copied.
    pub fn ops(&self) -> impl Iterator<Item = Result<EpochOp, VolumeError>> + '_ {
        self.writes.ops.iter().map(|op| {
            Ok(match op.kind {
                Kind::Write => EpochOp::Write {
                    offset: op.offset,
                    data: op.load(&self.journal)?,
                },
                Kind::Discard => EpochOp::Discard {
                    offset: op.offset,
                    len: op.len,
                },
                _ => EpochOp::WriteZeroes {
                    offset: op.offset,
                    len: op.len,
                },
            })
        })
    }
}

/// Takes the first element if `which` holds for it.
pub(super) fn pop_front_if<T>(queue: &mut VecDeque<T>, which: impl Fn(&T) -> bool) -> Option<T> {
    if queue.front().is_some_and(which) {
        queue.pop_front()
    } else {
        None
    }
}

/// Takes the last element if `which` holds for it.
pub(super) fn pop_back_if<T>(queue: &mut VecDeque<T>, which: impl Fn(&T) -> bool) -> Option<T> {
    if queue.back().is_some_and(which) {
        queue.pop_back()
    } else {
        None
    }
}
