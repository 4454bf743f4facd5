//! The state of one replica of a volume, without threads: every method returns at once. I/O is handed out as jobs
//! (a journal batch, an apply, a checkpoint) that the caller runs outside of any lock and then completes. The
//! runtime does that on two threads, tests and the simulation do it in any order they like.
//!
//! Cursors, all epochs: `trimmed <= applied <= durable_commit <= committed <= tip` and `synced <= tip`.

use super::apply::Files;
use super::op::{EpochOp, EpochWrites, JournalReader, JournaledOp, Sealed, pop_back_if};
use super::overlay::Overlay;
use super::{Options, Progress, VolumeError};
use crate::journal::record::check_range;
use crate::journal::ring::{Entry, Payload};
use crate::journal::{Kind, PAYLOAD_MAX, Position, Ring, State, Superblock, Terms};
use crate::resync::DirtyMap;
use std::collections::VecDeque;
use std::sync::Arc;
use steadfast_types::{Epoch, Term};

/// The most standbys a volume keeps a map of changes for.
pub const PEERS: usize = 3;

/// See the module.
pub struct Core {
    pub(super) files: Arc<Files>,
    pub(super) options: Options,
    pub(super) ring: Ring,
    pub(super) superblock: Superblock,
    pub(super) overlay: Overlay,
    /// Sealed or staged epochs that are not trimmed yet, in order without gaps.
    pub(super) epochs: VecDeque<Arc<EpochWrites>>,
    /// The write set being filled; only a primary has one.
    pub(super) open: Option<EpochWrites>,
    pub(super) tip: Epoch,
    pub(super) tip_term: Term,
    pub(super) synced: Epoch,
    pub(super) committed: Epoch,
    pub(super) durable_commit: Epoch,
    pub(super) applied: Epoch,
    pub(super) applied_term: Term,
    /// Commit records that are not durable yet: epoch, and the place behind the record.
    pub(super) commits: VecDeque<(Epoch, Position)>,
    pub(super) commit_recorded: Epoch,
    /// While a rollback is not durable, nothing behind this may be trimmed: place and number of the first dropped
    /// record, and the place behind the rollback.
    pub(super) rollback: Option<(Position, u64, Position)>,
    /// Operations whose bytes may be in memory, oldest first.
    pub(super) resident: VecDeque<Arc<JournaledOp>>,
    pub(super) memory: usize,
    pub(super) ops: usize,
    pub(super) want_sync: Position,
    /// Up to here the image may hold parts of epochs that count as not applied.
    pub(super) redo_until: Epoch,
    pub(super) applying: bool,
    pub(super) applying_through: Epoch,
    pub(super) state_unsaved: bool,
    pub(super) checkpointing: bool,
    pub(crate) maps: [DirtyMap; PEERS],
    /// The past up to the tip.
    pub(super) terms: Terms,
    /// Jobs that failed so far.
    pub(super) faults: u32,
}

impl Core {
    /// State after recovery; see `recover`.
    pub(super) fn new(
        files: Arc<Files>,
        options: Options,
        ring: Ring,
        superblock: Superblock,
        maps: [DirtyMap; PEERS],
    ) -> Self {
        let mut terms = superblock.terms;
        terms.note(superblock.applied_term, superblock.applied);
        Self {
            files,
            options,
            ring,
            superblock,
            overlay: Overlay::default(),
            epochs: VecDeque::new(),
            open: None,
            tip: superblock.applied,
            tip_term: superblock.applied_term,
            synced: superblock.applied,
            committed: superblock.applied,
            durable_commit: superblock.applied,
            applied: superblock.applied,
            applied_term: superblock.applied_term,
            commits: VecDeque::new(),
            commit_recorded: superblock.applied,
            rollback: None,
            resident: VecDeque::new(),
            memory: 0,
            ops: 0,
            want_sync: Position(0),
            redo_until: Epoch::ZERO,
            applying: false,
            applying_through: Epoch::ZERO,
            state_unsaved: false,
            checkpointing: false,
            maps,
            terms,
            faults: 0,
        }
    }

    /// Size of the volume in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.superblock.capacity
    }

    /// The files below.
    #[must_use]
    pub fn files(&self) -> &Arc<Files> {
        &self.files
    }

    /// Where everything stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            tip: self.tip,
            tip_term: self.tip_term,
            synced: self.synced,
            committed: self.committed,
            durable_commit: self.durable_commit,
            applied: self.applied,
            journal_used: self.ring.used(),
            journal_size: self.ring.size(),
            memory_bytes: self.memory,
            state: self.superblock.state,
        }
    }

    /// Whether it is in the middle of a copy.
    pub(super) fn must_be_whole(&self) -> Result<(), VolumeError> {
        match self.superblock.state {
            State::Copying { join } => Err(VolumeError::Copying { join }),
            _ => Ok(()),
        }
    }

    pub(crate) fn has_open_writes(&self) -> bool {
        self.open.as_ref().is_some_and(|o| !o.ops.is_empty())
    }

    pub(crate) fn busy(&self) -> bool {
        self.applying || self.checkpointing || self.ring.busy()
    }

    pub(crate) fn applied_term(&self) -> Term {
        self.applied_term
    }

    pub(crate) fn superblock(&self) -> Superblock {
        self.superblock
    }

    pub(crate) fn ring_head(&self) -> (Position, u64) {
        (self.ring.head(), self.ring.sequence())
    }

    /// Forgets everything in the journal and stands at what the superblock, durable already, says.
    pub(crate) fn restart(&mut self, superblock: Superblock) {
        self.ring.reset();
        self.superblock = superblock;
        self.overlay = Overlay::default();
        self.epochs.clear();
        self.open = None;
        self.resident.clear();
        self.commits.clear();
        self.rollback = None;
        (self.memory, self.ops) = (0, 0);
        self.terms = superblock.terms;
        let at = superblock.applied;
        (
            self.tip,
            self.synced,
            self.committed,
            self.durable_commit,
            self.applied,
        ) = (at, at, at, at, at);
        (self.tip_term, self.applied_term) = (superblock.applied_term, superblock.applied_term);
        (self.commit_recorded, self.redo_until, self.applying_through) = (at, Epoch::ZERO, Epoch::ZERO);
        self.want_sync = Position(0);
        self.state_unsaved = false;
    }

    /// Whether that epoch, made in that term, is part of what this replica stands on for certain.
    #[must_use]
    pub fn holds(&self, epoch: Epoch, term: Term) -> bool {
        epoch <= self.tip && self.terms.contains(epoch, term)
    }

    /// The term in which `epoch` (applied, or not trimmed yet) was made.
    pub(super) fn term_of(&self, epoch: Epoch) -> Term {
        if epoch == self.applied {
            return self.applied_term;
        }
        let found = self.epochs.iter().find(|e| e.epoch == epoch);
        found.map_or(self.applied_term, |e| e.term)
    }

    /// Whether the epoch could be sealed now: there is room for its end in the journal.
    #[must_use]
    pub fn can_seal(&self) -> bool {
        self.epochs.len() < self.options.epochs_max && self.ring.fits_end()
    }

    // ---- primary -------------------------------------------------------------------------------------------------

    /// Makes this replica the primary's: it takes guest writes after `tip`, under this term.
    ///
    /// # Errors
    /// [`VolumeError::Copying`] (I3); [`VolumeError::Refused`] if it is one already.
    pub fn promote(&mut self, term: Term) -> Result<(), VolumeError> {
        self.must_be_whole()?;
        if self.open.is_some() {
            return Err(VolumeError::Refused("this replica is the primary's already"));
        }
        self.tip_term = self.tip_term.max(term);
        self.open = Some(self.new_open(term));
        Ok(())
    }

    fn new_open(&self, term: Term) -> EpochWrites {
        EpochWrites {
            epoch: self.tip.next(),
            term,
            flush: false,
            ops: Vec::new(),
            start: (self.ring.head(), self.ring.sequence()),
            end: self.ring.head(),
        }
    }

    /// Takes guest operations into the open epoch, all or none.
    ///
    /// # Errors
    /// [`VolumeError::JournalFull`] and [`VolumeError::Throttled`]: wait and try again. [`VolumeError::OutOfRange`].
    pub fn write(&mut self, op: EpochOp) -> Result<(), VolumeError> {
        let Some(open) = &self.open else {
            return Err(VolumeError::Refused("a standby's replica takes no guest writes"));
        };
        let (epoch, term) = (open.epoch, open.term);
        let parts = self.admit(std::slice::from_ref(&op))?;
        let start = (self.ring.head(), self.ring.sequence());
        let mut done = Vec::with_capacity(parts.len());
        for part in parts {
            done.push(self.journal(part, epoch, term)?);
        }
        for op in &done {
            self.overlay.insert(op);
        }
        if let Some(open) = &mut self.open {
            if open.ops.is_empty() {
                open.start = start;
            }
            open.ops.extend(done);
        }
        Ok(())
    }

    /// Checks operations against every bound and splits long writes into parts that fit a record.
    fn admit(&mut self, ops: &[EpochOp]) -> Result<Vec<EpochOp>, VolumeError> {
        let mut parts = Vec::with_capacity(ops.len());
        for op in ops {
            let (offset, len) = op.range();
            check_range(offset, len, self.superblock.capacity)?;
            match op {
                EpochOp::Write { data, .. } if data.len() > PAYLOAD_MAX => {
                    for (i, chunk) in data.chunks(PAYLOAD_MAX).enumerate() {
                        let offset = offset + (i * PAYLOAD_MAX) as u64;
                        parts.push(EpochOp::Write {
                            offset,
                            data: Arc::new(chunk.to_vec()),
                        });
                    }
                }
                _ if len == 0 => {}
                other => parts.push(other.clone()),
            }
        }
        let payload = |op: &EpochOp| match op {
            EpochOp::Write { data, .. } => data.len(),
            _ => 0,
        };
        if self.ops + parts.len() > self.options.ops_max || !self.ring.fits(parts.iter().map(payload)) {
            self.request_sync_all();
            return Err(VolumeError::JournalFull {
                used: self.ring.used(),
                size: self.ring.size(),
            });
        }
        let bytes: usize = parts.iter().map(payload).sum();
        let max = self.options.memory_bytes_max;
        if self.memory + bytes > max {
            self.evict(max.saturating_sub(bytes));
            // One request larger than the bound passes alone.
            if self.memory > 0 && self.memory + bytes > max {
                self.request_sync_all();
                return Err(VolumeError::Throttled {
                    bytes: self.memory as u64,
                    max: max as u64,
                });
            }
        }
        Ok(parts)
    }

    fn journal(&mut self, op: EpochOp, epoch: Epoch, term: Term) -> Result<Arc<JournaledOp>, VolumeError> {
        let (offset, length) = op.range();
        let (kind, payload): (Kind, Option<Payload>) = match op {
            EpochOp::Write { data, .. } => (Kind::Write, Some(data)),
            EpochOp::Discard { .. } => (Kind::Discard, None),
            EpochOp::WriteZeroes { .. } => (Kind::WriteZeroes, None),
        };
        let entry = Entry {
            kind,
            epoch: epoch.0,
            term: term.0,
            offset,
            length,
            flush: false,
        };
        let at = self.ring.append(entry, payload.clone())?;
        let held = payload.as_ref().map_or(0, |p| p.len());
        let op = Arc::new(JournaledOp::new(
            kind,
            offset,
            length,
            at,
            self.ring.head(),
            payload,
        ));
        self.memory += held;
        self.ops += 1;
        if held > 0 {
            self.resident.push_back(op.clone());
        }
        for map in &mut self.maps {
            map.mark(offset, length);
        }
        Ok(op)
    }

    /// Frees memory of operations that are durable in the journal, oldest first, down to `target` bytes.
    pub(super) fn evict(&mut self, target: usize) {
        while self.memory > target {
            match self.resident.front() {
                Some(op) if op.end <= self.ring.synced() => {
                    self.memory -= op.evict();
                    self.resident.pop_front();
                }
                _ => break,
            }
        }
    }

    /// Frees operations that are done with. Their places in `resident` go when they come to the front.
    pub(super) fn release(&mut self, ops: &[Arc<JournaledOp>]) {
        for op in ops {
            self.memory -= op.evict();
        }
        while self.resident.front().is_some_and(|op| op.in_memory().is_none()) {
            self.resident.pop_front();
        }
    }

    /// A guest flush in protected mode: the open epoch will commit only when durable everywhere. Returns at once.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] on a standby's replica.
    pub fn flush_with_epoch(&mut self) -> Result<(), VolumeError> {
        let open = self
            .open
            .as_mut()
            .ok_or(VolumeError::Refused("a standby's replica takes no guest flush"))?;
        open.flush = true;
        Ok(())
    }

    /// A guest flush without any standby: everything so far counts as committed once the returned place is synced.
    ///
    /// # Errors
    /// [`VolumeError::JournalFull`].
    pub fn flush_alone(&mut self) -> Result<Position, VolumeError> {
        let open = self
            .open
            .as_mut()
            .ok_or(VolumeError::Refused("a standby's replica takes no guest flush"))?;
        open.flush = true;
        let entry = Entry {
            kind: Kind::Barrier,
            epoch: open.epoch.0,
            term: open.term.0,
            offset: 0,
            length: 0,
            flush: true,
        };
        self.ring.append(entry, None)?;
        let at = self.ring.head();
        self.want_sync = self.want_sync.max(at);
        Ok(at)
    }

    /// Closes the open epoch under its number and yields its writes; the next one is open.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`]; [`VolumeError::JournalFull`], after which the epoch is still open.
    pub fn seal(&mut self, epoch: Epoch, term: Term) -> Result<Sealed, VolumeError> {
        let Some(open) = &self.open else {
            return Err(VolumeError::Refused("a standby's replica seals no epoch"));
        };
        if open.epoch != epoch {
            return Err(VolumeError::OutOfOrder {
                expected: open.epoch,
                got: epoch,
            });
        }
        let (count, flush) = (open.ops.len(), open.flush);
        let start = if count == 0 {
            (self.ring.head(), self.ring.sequence())
        } else {
            open.start
        };
        self.end_epoch(epoch, term, flush, count)?;
        let Some(open) = self.open.take() else {
            return Err(VolumeError::Closed);
        };
        let writes = Arc::new(EpochWrites {
            term,
            start,
            end: self.ring.head(),
            ..open
        });
        self.accept(writes.clone());
        self.open = Some(self.new_open(term));
        Ok(Sealed {
            writes,
            journal: self.reader(),
        })
    }

    fn end_epoch(&mut self, epoch: Epoch, term: Term, flush: bool, count: usize) -> Result<(), VolumeError> {
        if self.epochs.len() >= self.options.epochs_max {
            self.request_sync_all();
            return Err(VolumeError::JournalFull {
                used: self.ring.used(),
                size: self.ring.size(),
            });
        }
        let entry = Entry {
            kind: Kind::EpochEnd,
            epoch: epoch.0,
            term: term.0,
            offset: 0,
            length: count as u64,
            flush,
        };
        self.ring.append(entry, None).map(|_| ())
    }

    fn accept(&mut self, writes: Arc<EpochWrites>) {
        assert!(
            writes.epoch == self.tip.next(),
            "I3: epochs of a volume follow each other"
        );
        self.tip = writes.epoch;
        self.tip_term = writes.term;
        self.terms.note(writes.term, writes.epoch);
        for map in &mut self.maps {
            map.epoch_ended(writes.epoch);
        }
        self.epochs.push_back(writes);
    }

    pub(super) fn reader(&self) -> JournalReader {
        JournalReader {
            file: self.files.journal.clone(),
            volume: self.superblock.volume,
            ring: self.superblock.ring,
        }
    }

    // ---- standby -------------------------------------------------------------------------------------------------

    /// Takes a whole epoch from the primary into the journal, or nothing of it.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`], [`VolumeError::JournalFull`], [`VolumeError::OutOfRange`],
    /// [`VolumeError::Copying`].
    pub fn stage(
        &mut self,
        epoch: Epoch,
        term: Term,
        flush: bool,
        ops: &[EpochOp],
    ) -> Result<(), VolumeError> {
        self.must_be_whole()?;
        if self.open.is_some() {
            return Err(VolumeError::Refused("the primary's replica stages no epoch"));
        }
        if epoch != self.tip.next() {
            return Err(VolumeError::OutOfOrder {
                expected: self.tip.next(),
                got: epoch,
            });
        }
        let full = self.epochs.len() >= self.options.epochs_max;
        let parts = self.admit(ops)?;
        if full {
            self.request_sync_all();
            return Err(VolumeError::JournalFull {
                used: self.ring.used(),
                size: self.ring.size(),
            });
        }
        let start = (self.ring.head(), self.ring.sequence());
        let mut done = Vec::with_capacity(parts.len());
        for part in parts {
            done.push(self.journal(part, epoch, term)?);
        }
        self.end_epoch(epoch, term, flush, done.len())?;
        for op in &done {
            self.overlay.insert(op);
        }
        let end = self.ring.head();
        self.accept(Arc::new(EpochWrites {
            epoch,
            term,
            flush,
            ops: done,
            start,
            end,
        }));
        if flush {
            self.want_sync = self.want_sync.max(end);
        }
        Ok(())
    }

    /// Drops all epochs after `after`, and the open one; a primary's replica becomes a standby's.
    ///
    /// # Errors
    /// [`VolumeError::Refused`] when one of them is committed (I4); [`VolumeError::JournalFull`].
    pub fn discard_after(&mut self, after: Epoch) -> Result<(), VolumeError> {
        if after < self.committed {
            return Err(VolumeError::Refused("a committed epoch is never dropped (I4)"));
        }
        let leftover = self.open.take().filter(|o| !o.ops.is_empty());
        let first = self.epochs.iter().find(|e| e.epoch > after).map(|e| e.start);
        let Some(first) = first.or(leftover.as_ref().map(|o| o.start)) else {
            return Ok(());
        };
        let entry = Entry {
            kind: Kind::Rollback,
            epoch: after.0.min(self.tip.0),
            term: self.tip_term.0,
            offset: 0,
            length: 0,
            flush: false,
        };
        if let Err(e) = self.ring.append(entry, None) {
            self.open = leftover;
            return Err(e);
        }
        let floor = self.rollback.map_or(first, |(p, n, _)| (p, n));
        self.rollback = Some((floor.0, floor.1, self.ring.head()));
        let mut dropped: Vec<Arc<JournaledOp>> = leftover.map_or_else(Vec::new, |o| o.ops);
        while let Some(e) = pop_back_if(&mut self.epochs, |e| e.epoch > after) {
            dropped.extend(e.ops.iter().cloned());
        }
        self.release(&dropped);
        self.ops -= dropped.len();
        self.tip = self.tip.min(after);
        self.tip_term = self.epochs.back().map_or(self.applied_term, |e| e.term);
        self.terms = self.terms.up_to(self.tip, self.tip_term);
        self.synced = self.synced.min(self.tip);
        self.rebuild_overlay();
        Ok(())
    }

    pub(super) fn rebuild_overlay(&mut self) {
        self.overlay = Overlay::default();
        let open = self.open.iter().flat_map(|o| o.ops.iter());
        for op in self
            .epochs
            .iter()
            .filter(|e| e.epoch > self.applied)
            .flat_map(|e| e.ops.iter())
            .chain(open)
        {
            self.overlay.insert(op);
        }
    }
}
