//! The ring in memory: positions are given out at once, records are written and synced in batches by whoever calls
//! [`Batch::run`], outside of any lock.
//!
//! ```text
//!   append ──> queue ──take──> Batch::run (write, maybe sync) ──complete──> written ──(sync)──> gone from the queue
//! ```
//!
//! A record stays in the queue, with its payload in memory, until a sync covered it. So when a sync fails (after
//! which the kernel may have thrown the data away) everything since the last good one is simply written again.

use super::record::{ALIGN, HEADER_BYTES, Header, Kind};
use super::{RESERVE, RING_START, Superblock};
use crate::storage::StorageFile;
use crate::volume::VolumeError;
use std::collections::VecDeque;
use std::sync::Arc;

/// A place in the journal: a logical byte count that only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(pub u64);

/// The bytes of a write.
pub type Payload = Arc<Vec<u8>>;

#[derive(Clone, Debug)]
struct Record {
    header: Header,
    payload: Option<Payload>,
}

/// State of the ring. Every record between `synced` and `head` is in the queue.
#[derive(Debug)]
pub struct Ring {
    volume: u64,
    size: u64,
    generation: u32,
    head: u64,
    sequence: u64,
    trim: u64,
    synced: u64,
    synced_sequence: u64,
    queue: VecDeque<Record>,
    /// How many at the front of the queue were handed to the file since the last sync.
    written: usize,
    taken: bool,
}

/// What a new record says; the ring adds the rest.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Kind.
    pub kind: Kind,
    /// Epoch.
    pub epoch: u64,
    /// Term.
    pub term: u64,
    /// First byte in the volume.
    pub offset: u64,
    /// Bytes in the volume, or a count.
    pub length: u64,
    /// For the end of an epoch.
    pub flush: bool,
}

impl Ring {
    /// The ring after recovery: everything before `head` is durable.
    #[must_use]
    pub fn new(superblock: &Superblock, head: Position, sequence: u64) -> Self {
        Self {
            volume: superblock.volume,
            size: superblock.ring,
            generation: superblock.generation,
            head: head.0,
            sequence,
            trim: superblock.trim,
            synced: head.0,
            synced_sequence: sequence,
            queue: VecDeque::new(),
            written: 0,
            taken: false,
        }
    }

    /// The place behind the last record.
    #[must_use]
    pub const fn head(&self) -> Position {
        Position(self.head)
    }

    /// Number of the next record.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Everything before this survives power loss.
    #[must_use]
    pub const fn synced(&self) -> Position {
        Position(self.synced)
    }

    /// Number of the first record that is not known to be durable.
    #[must_use]
    pub const fn synced_sequence(&self) -> u64 {
        self.synced_sequence
    }

    /// Bytes in use.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.head - self.trim
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether some record was not yet handed to the file.
    #[must_use]
    pub fn has_unwritten(&self) -> bool {
        self.queue.len() > self.written
    }

    /// How far the head moves for a record with this payload: its span, and what is skipped at the ring's end.
    fn step(&self, head: u64, payload_len: usize) -> u64 {
        let span = Header::span_of(payload_len);
        let room = self.size - head % self.size;
        if span > room { room + span } else { span }
    }

    /// Whether records with these payloads would fit now, all of them.
    #[must_use]
    pub fn fits(&self, payloads: impl Iterator<Item = usize>) -> bool {
        let mut head = self.head;
        for len in payloads {
            head += self.step(head, len);
        }
        head - self.trim + RESERVE <= self.size
    }

    /// Whether the end of an epoch would fit now.
    #[must_use]
    pub fn fits_end(&self) -> bool {
        self.head - self.trim + self.step(self.head, 0) + RESERVE / 2 <= self.size
    }

    /// Gives a record its place. Ends of epochs may use half of the reserve, commits and rollbacks all of it.
    ///
    /// # Errors
    /// [`VolumeError::JournalFull`]: commit, apply and trim first.
    pub fn append(&mut self, entry: Entry, payload: Option<Payload>) -> Result<Position, VolumeError> {
        let len = payload.as_ref().map_or(0, |p| p.len());
        let reserve = match entry.kind {
            Kind::Commit | Kind::Rollback => 0,
            Kind::EpochEnd | Kind::Barrier => RESERVE / 2,
            _ => RESERVE,
        };
        let step = self.step(self.head, len);
        if self.head - self.trim + step + reserve > self.size {
            return Err(VolumeError::JournalFull {
                used: self.used(),
                size: self.size,
            });
        }
        let span = Header::span_of(len);
        let skip = step - span;
        if skip >= HEADER_BYTES as u64 {
            let pad = Entry {
                kind: Kind::Pad,
                offset: 0,
                length: 0,
                flush: false,
                ..entry
            };
            self.push(pad, None, (skip - HEADER_BYTES as u64) as u32);
        } else {
            // Too little for a header before the ring's end: the scan skips it by the same rule.
            self.head += skip;
        }
        let at = Position(self.head);
        self.push(entry, payload, len as u32);
        Ok(at)
    }

    fn push(&mut self, entry: Entry, payload: Option<Payload>, payload_len: u32) {
        let header = Header {
            kind: entry.kind,
            flush: entry.flush,
            volume: self.volume,
            position: self.head,
            sequence: self.sequence,
            generation: self.generation,
            payload_len,
            epoch: entry.epoch,
            term: entry.term,
            offset: entry.offset,
            length: entry.length,
            durable: 0,
            payload_crc: 0,
        };
        self.head += header.span();
        self.sequence += 1;
        self.queue.push_back(Record { header, payload });
    }

    /// Takes up to about `bytes_max` of unwritten records to be written; the batch ends with a sync if it reaches
    /// `sync_at`. At most one batch is out at a time. `None` if there is nothing to do.
    pub fn take(&mut self, bytes_max: usize, sync_at: Option<Position>) -> Option<Batch> {
        if self.taken {
            return None;
        }
        let mut records = Vec::new();
        let mut bytes = 0;
        for r in self.queue.iter().skip(self.written) {
            if bytes > 0 && bytes + r.header.span() > bytes_max as u64 {
                break;
            }
            bytes += if r.header.kind == Kind::Pad {
                HEADER_BYTES as u64
            } else {
                r.header.span()
            };
            records.push(r.clone());
        }
        // A sync is worth it only when there is something to make durable.
        let last = self.queue.get((self.written + records.len()).wrapping_sub(1));
        let reached = last.map_or(self.synced, |r| r.header.position + r.header.span());
        let sync = !self.queue.is_empty() && sync_at.is_some_and(|at| reached >= at.0);
        if records.is_empty() && !sync {
            return None;
        }
        self.taken = true;
        Some(Batch {
            records,
            sync,
            durable: self.synced,
            ring: self.size,
        })
    }

    /// Says how a batch went.
    pub fn complete(&mut self, batch: &Batch, ok: bool) {
        assert!(self.taken, "a journal batch is completed once");
        self.taken = false;
        if !ok {
            // What the file holds of anything unsynced is unknown: all of it again.
            self.written = 0;
            return;
        }
        self.written += batch.records.len();
        if batch.sync {
            for _ in 0..self.written {
                if let Some(r) = self.queue.pop_front() {
                    self.synced = r.header.position + r.header.span();
                    self.synced_sequence = r.header.sequence + 1;
                }
            }
            self.written = 0;
        }
        assert!(
            self.trim <= self.synced && self.synced <= self.head,
            "journal cursors in order"
        );
    }

    /// Frees everything before `to`; the caller has made the superblock that says so durable.
    pub fn trim(&mut self, to: Position) {
        assert!(
            self.trim <= to.0 && to.0 <= self.synced,
            "trim moves forward over durable records"
        );
        self.trim = to.0;
    }

    /// Whether a batch is out.
    #[must_use]
    pub const fn busy(&self) -> bool {
        self.taken
    }

    /// Forgets everything: the ring begins anew at its head, and all before it is free.
    pub fn reset(&mut self) {
        assert!(!self.taken, "no batch is out");
        self.queue.clear();
        self.written = 0;
        self.synced = self.head;
        self.synced_sequence = self.sequence;
        self.trim = self.head;
    }
}

/// Records on their way to the file.
#[derive(Debug)]
pub struct Batch {
    records: Vec<Record>,
    sync: bool,
    durable: u64,
    ring: u64,
}

static ZEROES: [u8; ALIGN as usize] = [0; ALIGN as usize];

impl Batch {
    /// Whether it ends with a sync.
    #[must_use]
    pub const fn syncs(&self) -> bool {
        self.sync
    }

    /// Bytes it writes, nearly.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.records
            .iter()
            .filter(|r| r.header.kind != Kind::Pad)
            .map(|r| r.header.span())
            .sum()
    }

    /// Writes the records, in one call for each run that is contiguous in the file, then syncs.
    ///
    /// # Errors
    /// [`VolumeError::Io`]. The batch must then be completed as failed.
    pub fn run(&self, file: &dyn StorageFile) -> Result<(), VolumeError> {
        self.write_records(file)?;
        if self.sync {
            file.sync().map_err(VolumeError::io("sync", "journal", 0))?;
        }
        Ok(())
    }

    pub(crate) fn write_records(&self, file: &dyn StorageFile) -> Result<(), VolumeError> {
        let headers: Vec<[u8; HEADER_BYTES]> = self
            .records
            .iter()
            .map(|r| {
                let payload_crc = r.payload.as_ref().map_or(0, |p| crc32fast::hash(p));
                Header {
                    durable: self.durable,
                    payload_crc,
                    ..r.header
                }
                .encode()
            })
            .collect();
        let mut parts: Vec<&[u8]> = Vec::with_capacity(self.records.len() * 3);
        let (mut start, mut end) = (0, 0);
        for (r, header) in self.records.iter().zip(&headers) {
            let at = r.header.position % self.ring;
            if at != end && !parts.is_empty() {
                write(file, start, &parts)?;
                parts.clear();
            }
            if parts.is_empty() {
                start = at;
            }
            parts.push(header);
            let mut len = HEADER_BYTES as u64;
            if let Some(p) = &r.payload {
                parts.push(p);
                let fill = r.header.span() - len - p.len() as u64;
                if fill > 0 {
                    parts.push(&ZEROES[..fill as usize]);
                }
                len = r.header.span();
            }
            end = at + len;
        }
        if parts.is_empty() {
            Ok(())
        } else {
            write(file, start, &parts)
        }
    }
}

fn write(file: &dyn StorageFile, at: u64, parts: &[&[u8]]) -> Result<(), VolumeError> {
    file.write_parts(RING_START + at, parts)
        .map_err(VolumeError::io("write", "journal", RING_START + at))
}
