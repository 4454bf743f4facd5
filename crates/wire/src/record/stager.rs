//! Receiver of records: takes chunks in order, validates each as it arrives, and hands out a [`StagedRecord`] only when
//! the whole of it is here and right. Nothing is applied here.

use super::chunk::{ChunkError, ChunkHead, ChunkKind, Totals, fold_digest};
use super::encoder::DEVICE_BYTES_MAX;
use super::staged::{Lease, Part, StagedRecord};
use super::{DiskOp, FLAG_COPY, FLAG_RESET, RecordId};
use crate::buf::{Buf, BufPool};
use crate::frame::{Frame, Kind};
use crate::page::codec::PageRecord;
use crate::page::delta::walk_runs;
use crate::page::{PAGE_BYTES, Page};
use crate::varint;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use steadfast_types::{Gfn, Term};

/// Limits of a stager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageConfig {
    /// Bytes that all records that are staged and not yet dropped may take together.
    pub bytes_max: usize,
    /// Largest device state in bytes.
    pub device_bytes_max: usize,
    /// Largest body of an unpacked disk chunk in bytes.
    pub chunk_bytes_max: usize,
}

impl Default for StageConfig {
    fn default() -> Self {
        Self {
            bytes_max: 256 << 20,
            device_bytes_max: 8 << 20,
            chunk_bytes_max: 4 << 20,
        }
    }
}

/// Why a record was refused. The record under way is dropped; the one before stays the last.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// Not a bulk frame, or not of a record that can be.
    #[error("a frame that is not a chunk of a record")]
    NotAChunk,
    /// A record that does not follow the last one that was staged.
    #[error("record {found} does not follow record {last:?}: one was missed, the sender must start anew")]
    Gap {
        /// Its number.
        found: u64,
        /// The last that was staged whole.
        last: Option<u64>,
    },
    /// A chunk that does not follow the one before.
    #[error("chunk {found} of record {record} where chunk {expected} was due")]
    Order {
        /// Number of the record.
        record: u64,
        /// Number of the chunk due.
        expected: u32,
        /// Number of the chunk that came.
        found: u32,
    },
    /// A chunk with wrong content.
    #[error("chunk {index} of record {record}: {source}")]
    Chunk {
        /// Number of the record.
        record: u64,
        /// Number of the chunk.
        index: u32,
        /// What is wrong.
        source: ChunkError,
    },
    /// All chunks came, and are not what the sender says they are.
    #[error("record {record}: the sender announced {announced:?}, here are {found:?}")]
    Totals {
        /// Number of the record.
        record: u64,
        /// As sent.
        announced: Box<Totals>,
        /// As found.
        found: Box<Totals>,
    },
    /// No room. Try again when records have been applied.
    #[error("staging is full: {held} bytes are held, {wanted} more wanted, the limit is {limit}")]
    Full {
        /// Bytes held.
        held: usize,
        /// Bytes wanted.
        wanted: usize,
        /// Limit in bytes.
        limit: usize,
    },
}

/// What came of a chunk.
#[derive(Debug)]
pub enum Staged {
    /// More is to come.
    Partial,
    /// The record is whole.
    Complete(StagedRecord),
    /// A chunk of a record that is staged already; nothing was done.
    Duplicate,
}

struct Open {
    stream: u32,
    record: u64,
    id: RecordId,
    term: Term,
    flags: u8,
    totals: Totals,
    parts: Vec<Part>,
    lease: Lease,
    device: Option<DeviceParts>,
}

struct DeviceParts {
    pages: Vec<Page>,
    len: usize,
    next: usize,
    delta: bool,
}

/// Collects chunks into records.
pub struct Stager {
    config: StageConfig,
    held: Arc<AtomicUsize>,
    last: Option<(u32, u64)>,
    device: Vec<Page>,
    device_len: usize,
    open: Option<Open>,
    valid: Box<dyn Fn(Gfn) -> bool + Send>,
    scratch: Box<Page>,
    pool: BufPool,
}

impl Stager {
    /// A stager that accepts pages for which `valid` is true.
    #[must_use]
    pub fn new(config: StageConfig, valid: impl Fn(Gfn) -> bool + Send + 'static) -> Self {
        Self {
            config,
            held: Arc::default(),
            last: None,
            device: Vec::new(),
            device_len: 0,
            open: None,
            valid: Box::new(valid),
            scratch: Box::new([0; PAGE_BYTES]),
            pool: BufPool::new(8 << 20),
        }
    }

    /// Number of the last record that was staged whole.
    #[must_use]
    pub fn last_record(&self) -> Option<u64> {
        self.last.map(|(_, record)| record)
    }

    /// Bytes held by records that are staged and not dropped.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Forgets where the stream stands: only a record that refers to nothing is taken next.
    pub fn forget(&mut self) {
        self.open = None;
        self.last = None;
        self.device.clear();
        self.device_len = 0;
    }

    /// Goes back to just behind `record` (the newest that is kept): what followed it will be sent again as it was.
    pub fn rewind_to(&mut self, record: &StagedRecord) {
        self.open = None;
        self.last = Some((record.stream(), record.record()));
        self.device_len = record.device().len();
        self.device = record.device().chunks(PAGE_BYTES).map(padded).collect();
    }

    /// Drops a record that is under way (its connection was lost for good).
    pub fn abort(&mut self) {
        self.open = None;
    }

    /// Takes one chunk frame.
    ///
    /// # Errors
    /// [`StageError`]; the record under way is then dropped.
    pub fn chunk(&mut self, frame: Frame) -> Result<Staged, StageError> {
        let result = self.take(frame);
        if result.is_err() {
            self.open = None;
        }
        result
    }

    fn take(&mut self, frame: Frame) -> Result<Staged, StageError> {
        let known = FLAG_COPY | FLAG_RESET;
        if frame.kind != Kind::Bulk || frame.flags & !known != 0 {
            return Err(StageError::NotAChunk);
        }
        let (index, len, crc) = (frame.index, frame.payload().len(), frame.crc());
        let payload = frame.shared_payload();
        let (head, body) = ChunkHead::read(&payload).map_err(|source| StageError::Chunk {
            record: 0,
            index,
            source,
        })?;
        let (record, stream) = (head.record, head.stream);
        let id = RecordId::from_wire(frame.epoch.0, head.part, frame.flags);
        if index == 0
            && let Some(duplicate) = self.start(&frame, stream, record, id)?
        {
            return Ok(duplicate);
        }
        let reset = frame.flags & FLAG_RESET != 0;
        let Some(open) = &mut self.open else {
            // The rest of a record that is known, or of one whose beginning was refused.
            return if self.knows(stream, record) {
                Ok(Staged::Duplicate)
            } else {
                Err(StageError::Gap {
                    found: record,
                    last: self.last_record(),
                })
            };
        };
        let same = (open.stream, open.record, open.id) == (stream, record, id)
            && (open.term, open.flags) == (frame.term, frame.flags);
        if !same || open.totals.chunks != index {
            return Err(StageError::Order {
                record,
                expected: open.totals.chunks,
                found: index,
            });
        }
        let wrap = |source| StageError::Chunk {
            record,
            index,
            source,
        };
        match head.kind {
            ChunkKind::End => return self.finish(Totals::read(body).map_err(wrap)?),
            ChunkKind::Device => {
                let base = if reset { &[][..] } else { &self.device[..] };
                let limit = self.config.device_bytes_max.min(DEVICE_BYTES_MAX);
                take_device(open, base, self.device_len, limit, head.items, body).map_err(wrap)?;
            }
            ChunkKind::Pages => {
                check_pages(body, head.items, &self.valid, &mut self.scratch).map_err(wrap)?;
                open.lease.grow(len, self.config.bytes_max)?;
                open.totals.pages += u64::from(head.items);
                open.parts.push(Part::Pages(Arc::clone(&payload)));
            }
            ChunkKind::Disk => {
                let unpacked = head.unpacked as usize;
                if unpacked > self.config.chunk_bytes_max {
                    return Err(wrap(ChunkError::Unpack));
                }
                open.lease
                    .grow(if unpacked == 0 { len } else { unpacked }, self.config.bytes_max)?;
                let part = if unpacked == 0 {
                    check_disk(body, head.items).map_err(wrap)?;
                    Part::Disk(Arc::clone(&payload), len - body.len())
                } else {
                    let mut out = self.pool.take(unpacked);
                    let n = lz4_flex::block::decompress_into(body, &mut out);
                    if n.ok() != Some(unpacked) {
                        return Err(wrap(ChunkError::Unpack));
                    }
                    check_disk(&out, head.items).map_err(wrap)?;
                    Part::Disk(Arc::new(out), 0)
                };
                open.totals.disk_ops += u64::from(head.items);
                open.parts.push(part);
            }
        }
        open.totals.digest = fold_digest(open.totals.digest, index, len, crc);
        open.totals.chunks += 1;
        Ok(Staged::Partial)
    }

    /// Whether this record was staged already.
    fn knows(&self, stream: u32, record: u64) -> bool {
        self.last.is_some_and(|(s, last)| s == stream && record <= last)
    }

    /// The first chunk of a record: does it follow?
    fn start(
        &mut self,
        frame: &Frame,
        stream: u32,
        record: u64,
        id: RecordId,
    ) -> Result<Option<Staged>, StageError> {
        // A first chunk ends whatever was under way: the sender began again.
        self.open = None;
        if self.knows(stream, record) {
            return Ok(Some(Staged::Duplicate));
        }
        let follows = self
            .last
            .is_some_and(|(s, last)| s == stream && record == last.wrapping_add(1));
        if !follows && frame.flags & FLAG_RESET == 0 {
            return Err(StageError::Gap {
                found: record,
                last: self.last_record(),
            });
        }
        self.open = Some(Open {
            stream,
            record,
            id,
            term: frame.term,
            flags: frame.flags,
            totals: Totals::default(),
            parts: Vec::new(),
            lease: Lease::new(&self.held),
            device: None,
        });
        Ok(None)
    }

    fn finish(&mut self, announced: Totals) -> Result<Staged, StageError> {
        let Some(open) = self.open.take() else {
            return Err(StageError::NotAChunk);
        };
        let record = open.record;
        let mut found = open.totals;
        found.has_flush = announced.has_flush;
        found.output_boundary = announced.output_boundary;
        if let Some(d) = &open.device {
            if d.next != d.pages.len() {
                let source = ChunkError::Device("incomplete");
                return Err(StageError::Chunk {
                    record,
                    index: found.chunks,
                    source,
                });
            }
            found.device_bytes = d.len as u64;
        }
        if found != announced {
            let (announced, found) = (Box::new(announced), Box::new(found));
            return Err(StageError::Totals {
                record,
                announced,
                found,
            });
        }
        let mut device = Buf::from(Vec::new());
        if open.flags & FLAG_RESET != 0 {
            self.device.clear();
            self.device_len = 0;
        }
        if let Some(d) = open.device {
            let mut bytes = d.pages.as_flattened().to_vec();
            bytes.truncate(d.len);
            device = Buf::from(bytes);
            self.device = d.pages;
            self.device_len = d.len;
        }
        self.last = Some((open.stream, record));
        let number = (open.stream, record);
        Ok(Staged::Complete(StagedRecord::new(
            number, open.id, open.term, found, device, open.parts, open.lease,
        )))
    }
}

fn padded(part: &[u8]) -> Page {
    let mut page = [0; PAGE_BYTES];
    page[..part.len()].copy_from_slice(part);
    page
}

/// Reads one device chunk into the parts collected so far.
fn take_device(
    open: &mut Open,
    base: &[Page],
    base_len: usize,
    limit: usize,
    items: u32,
    mut body: &[u8],
) -> Result<(), ChunkError> {
    let len = varint::get(&mut body).ok_or(ChunkError::Short)?;
    let first = varint::get(&mut body).ok_or(ChunkError::Short)?;
    let (&delta, rest) = body.split_first().ok_or(ChunkError::Short)?;
    body = rest;
    if len == 0 || len > limit as u64 || delta > 1 {
        return Err(ChunkError::Device("length"));
    }
    let len = len as usize;
    let count = len.div_ceil(PAGE_BYTES);
    if open.device.is_none() {
        let pages = if delta == 1 {
            if base_len != len || base.len() != count {
                return Err(ChunkError::Device("no base of this length"));
            }
            base.to_vec()
        } else {
            vec![[0; PAGE_BYTES]; count]
        };
        // Limited by `limit` and held only until the record is complete: not leased.
        open.device = Some(DeviceParts {
            pages,
            len,
            next: 0,
            delta: delta == 1,
        });
    }
    let Some(d) = &mut open.device else { return Ok(()) };
    if d.len != len || d.delta != (delta == 1) || d.next as u64 != first {
        return Err(ChunkError::Device("parts that do not belong together"));
    }
    for _ in 0..items {
        let n = varint::get(&mut body).ok_or(ChunkError::Short)?;
        let (runs, rest) = usize::try_from(n)
            .ok()
            .and_then(|n| body.split_at_checked(n))
            .ok_or(ChunkError::Short)?;
        body = rest;
        let page = d
            .pages
            .get_mut(d.next)
            .ok_or(ChunkError::Device("more than announced"))?;
        walk_runs(runs, |at, b| page[at..at + b.len()].copy_from_slice(b))
            .ok_or(ChunkError::Device("runs"))?;
        d.next += 1;
    }
    if body.is_empty() {
        Ok(())
    } else {
        Err(ChunkError::Device("surplus bytes"))
    }
}

fn count_is(items: u32, found: u64) -> Result<(), ChunkError> {
    if u64::from(items) == found {
        Ok(())
    } else {
        Err(ChunkError::Items {
            announced: u64::from(items),
            found,
        })
    }
}

fn check_pages(
    mut body: &[u8],
    items: u32,
    valid: &dyn Fn(Gfn) -> bool,
    scratch: &mut Page,
) -> Result<(), ChunkError> {
    let (mut prev, mut found) = (0, 0u64);
    while !body.is_empty() {
        let r = PageRecord::parse(&mut body, prev)?;
        if !valid(Gfn(r.gfn)) {
            return Err(ChunkError::PageOutside(r.gfn));
        }
        r.check(scratch)?;
        prev = r.gfn;
        found += 1;
    }
    count_is(items, found)
}

fn check_disk(mut body: &[u8], items: u32) -> Result<(), ChunkError> {
    let mut found = 0u64;
    while !body.is_empty() {
        DiskOp::read(&mut body)?;
        found += 1;
    }
    count_is(items, found)
}
