//! A record that is whole and valid, waiting to be applied or dropped.

use super::chunk::{CHUNK_HEAD_BYTES, Totals};
use super::stager::StageError;
use super::{DiskOp, RecordId};
use crate::buf::Buf;
use crate::page::codec::PageRecord;
use crate::page::{PAGE_BYTES, Page, PageError};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use steadfast_types::{Gfn, Term};

/// Where pages are applied: the standby's guest memory, or a file.
pub trait PageSink {
    /// Lets `change` rewrite the page, which holds its present content. `false` if there is no such page.
    fn update(&mut self, gfn: Gfn, change: &mut dyn FnMut(&mut Page)) -> bool;
}

/// Why applying stopped. The memory is then of no use any more: a full copy is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Memory has no such page, though it was valid when staged.
    #[error("page {0} is outside of the memory that records are applied to; a full copy is needed")]
    PageOutside(u64),
    /// Content is not what it should be.
    #[error("{0}; a full copy is needed")]
    Page(#[from] PageError),
}

/// Bytes that a record holds of its stager's bound; given back on drop.
#[derive(Debug)]
pub(super) struct Lease {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl Lease {
    pub fn new(held: &Arc<AtomicUsize>) -> Self {
        Self {
            held: Arc::clone(held),
            bytes: 0,
        }
    }

    pub fn grow(&mut self, bytes: usize, limit: usize) -> Result<(), StageError> {
        // Only the stager grows leases; others give back, which can only make room.
        let held = self.held.load(Ordering::Relaxed);
        if bytes > limit.saturating_sub(held) {
            return Err(StageError::Full {
                held,
                wanted: bytes,
                limit,
            });
        }
        self.held.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A piece of a staged record.
pub(super) enum Part {
    /// A chunk of page records, as it came.
    Pages(Arc<Buf>),
    /// Disk operations, from this offset of the buffer.
    Disk(Arc<Buf>, usize),
}

/// A whole, valid record. Its page records stay encoded: they are resolved against memory when they are applied, which
/// happens in the order of the records.
pub struct StagedRecord {
    stream: u32,
    record: u64,
    id: RecordId,
    term: Term,
    totals: Totals,
    device: Buf,
    parts: Vec<Part>,
    lease: Lease,
}

/// How much of a record is applied.
#[derive(Clone, Copy, Debug, Default)]
pub struct ApplyAt {
    part: usize,
    /// In the part.
    offset: usize,
    /// The page before.
    prev: u64,
}

impl fmt::Debug for StagedRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "StagedRecord({:?}, number {}, term {}, {:?})",
            self.id, self.record, self.term, self.totals
        )
    }
}

impl StagedRecord {
    pub(super) fn new(
        (stream, record): (u32, u64),
        id: RecordId,
        term: Term,
        totals: Totals,
        device: Buf,
        parts: Vec<Part>,
        lease: Lease,
    ) -> Self {
        Self {
            stream,
            record,
            id,
            term,
            totals,
            device,
            parts,
            lease,
        }
    }

    /// Number that the sender's encoder gave it.
    #[must_use]
    pub const fn record(&self) -> u64 {
        self.record
    }

    /// Nonce of the encoder that gave the number.
    pub(super) const fn stream(&self) -> u32 {
        self.stream
    }

    /// What it is.
    #[must_use]
    pub const fn id(&self) -> RecordId {
        self.id
    }

    /// Term of the sender.
    #[must_use]
    pub const fn term(&self) -> Term {
        self.term
    }

    /// What it holds.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The device state, whole; empty if the record carries none.
    #[must_use]
    pub fn device(&self) -> &[u8] {
        &self.device
    }

    /// Bytes that it holds of the staging bound.
    #[must_use]
    pub const fn held_bytes(&self) -> usize {
        self.lease.bytes
    }

    /// The disk operations, in order.
    pub fn disk_ops(&self) -> impl Iterator<Item = DiskOp<'_>> {
        self.parts.iter().flat_map(|part| {
            let mut body: &[u8] = match part {
                Part::Disk(buf, from) => &buf[*from..],
                Part::Pages(_) => &[],
            };
            // Validated when staged: an error cannot occur, and would end the list.
            std::iter::from_fn(move || {
                if body.is_empty() {
                    None
                } else {
                    DiskOp::read(&mut body).ok()
                }
            })
        })
    }

    /// The pages that it changes, in order; one that was sent early may come twice.
    pub fn gfns(&self) -> impl Iterator<Item = Gfn> {
        self.page_records().filter_map(|r| r.ok().map(|r| Gfn(r.gfn)))
    }

    fn page_records(&self) -> impl Iterator<Item = Result<PageRecord<'_>, PageError>> {
        self.parts.iter().flat_map(|part| {
            let mut body: &[u8] = match part {
                Part::Pages(buf) => &buf[CHUNK_HEAD_BYTES..],
                Part::Disk(..) => &[],
            };
            let mut prev = 0;
            std::iter::from_fn(move || {
                if body.is_empty() {
                    return None;
                }
                let r = PageRecord::parse(&mut body, prev);
                match &r {
                    Ok(r) => prev = r.gfn,
                    Err(_) => body = &[],
                }
                Some(r)
            })
        })
    }

    /// Writes the pages into memory that stands at the record before this one. Doing it again after it was interrupted
    /// is right.
    ///
    /// # Errors
    /// [`ApplyError`]: the memory has diverged and must not be used.
    pub fn apply<S: PageSink + ?Sized>(&self, sink: &mut S) -> Result<(), ApplyError> {
        self.apply_some(&mut ApplyAt::default(), usize::MAX, sink)
            .map(drop)
    }

    /// Writes up to `pages` pages, from where `at` stands; true at the end. Memory is of no epoch until then.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_some<S: PageSink + ?Sized>(
        &self,
        at: &mut ApplyAt,
        mut pages: usize,
        sink: &mut S,
    ) -> Result<bool, ApplyError> {
        let mut scratch = [0; PAGE_BYTES];
        while let Some(part) = self.parts.get(at.part) {
            let all: &[u8] = match part {
                Part::Pages(buf) => &buf[CHUNK_HEAD_BYTES..],
                Part::Disk(..) => &[],
            };
            let mut body = all.get(at.offset..).unwrap_or_default();
            while !body.is_empty() {
                if pages == 0 {
                    return Ok(false);
                }
                let r = PageRecord::parse(&mut body, at.prev)?;
                let mut result = Ok(());
                if !sink.update(Gfn(r.gfn), &mut |page| result = r.apply(page, &mut scratch)) {
                    return Err(ApplyError::PageOutside(r.gfn));
                }
                result?;
                (at.prev, at.offset) = (r.gfn, all.len() - body.len());
                pages -= 1;
            }
            *at = ApplyAt {
                part: at.part + 1,
                ..ApplyAt::default()
            };
        }
        Ok(true)
    }
}
