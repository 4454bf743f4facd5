//! The jobs of a replica: journal batches, applies, checkpoints; and the cursors that they move.

use super::apply::{ApplyJob, Checkpoint};
use super::core::Core;
use super::op::pop_front_if;
use super::{Sabotage, VolumeError};
use crate::journal::ring::Entry;
use crate::journal::{Batch, Kind, Position, State, Superblock};
use crate::resync::DirtyMap;
use steadfast_types::Epoch;

impl Core {
    /// The epochs up to `through` are committed: they may go to the image.
    ///
    /// # Errors
    /// [`VolumeError::OutOfOrder`] beyond the tip; [`VolumeError::NotDurable`] when an epoch with a flush is not
    /// durable here (I5).
    pub fn commit(&mut self, through: Epoch) -> Result<(), VolumeError> {
        if through > self.tip {
            return Err(VolumeError::OutOfOrder {
                expected: self.tip,
                got: through,
            });
        }
        let synced = self.synced;
        if let Some(e) = self
            .epochs
            .iter()
            .find(|e| e.flush && e.epoch > synced && e.epoch <= through)
        {
            return Err(VolumeError::NotDurable {
                epoch: e.epoch,
                synced,
            });
        }
        self.committed = self.committed.max(through);
        Ok(())
    }

    /// Asks for the journal to be synced up to this epoch, soon.
    pub fn request_sync(&mut self, through: Epoch) {
        let end = self
            .epochs
            .iter()
            .take_while(|e| e.epoch <= through)
            .last()
            .map(|e| e.end);
        if let Some(end) = end {
            self.want_sync = self.want_sync.max(end);
        }
    }

    /// Asks for everything to be synced, with commit records.
    pub fn request_sync_all(&mut self) {
        self.want_sync = self.ring.head();
        self.record_commit();
        self.want_sync = self.ring.head();
    }

    fn record_commit(&mut self) {
        if self.committed <= self.commit_recorded {
            return;
        }
        let entry = Entry {
            kind: Kind::Commit,
            epoch: self.committed.0,
            term: self.tip_term.0,
            offset: 0,
            length: 0,
            flush: false,
        };
        match self.ring.append(entry, None) {
            Ok(_) => {
                self.commits.push_back((self.committed, self.ring.head()));
                self.commit_recorded = self.committed;
            }
            // The reserve is used up: what is committed already gets applied and frees room.
            Err(e) => tracing::warn!(error = %e, "commit not recorded yet"),
        }
    }

    /// Recovery: commits up to here are recorded.
    pub(super) fn recorded(&mut self, through: Epoch) {
        self.commit_recorded = through;
    }

    /// Whether a journal batch would do something.
    #[must_use]
    pub fn wants_journal(&self) -> bool {
        self.ring.has_unwritten() || self.want_sync > self.ring.synced()
    }

    /// Next job for the journal file, if any.
    pub fn take_journal(&mut self) -> Option<Batch> {
        let want = self.want_sync > self.ring.synced();
        if want {
            self.record_commit();
        }
        self.ring
            .take(self.options.batch_bytes, want.then_some(self.want_sync))
    }

    /// Takes note of a journal job's end. A failed one is tried again by the next [`Core::take_journal`].
    pub fn complete_journal(&mut self, batch: &Batch, ok: bool) {
        self.ring.complete(batch, ok);
        if !ok {
            self.faults += 1;
            return;
        }
        let at = self.ring.synced();
        let before = self.synced;
        if let Some(e) = self.epochs.iter().rev().find(|e| e.end <= at) {
            self.synced = self.synced.max(e.epoch);
        }
        while self.commits.front().is_some_and(|c| c.1 <= at) {
            if let Some((epoch, _)) = self.commits.pop_front() {
                self.durable_commit = self.durable_commit.max(epoch);
            }
        }
        if self.rollback.is_some_and(|r| r.2 <= at) {
            self.rollback = None;
        }
        assert!(
            before <= self.synced && self.synced <= self.tip,
            "I6: synced moves forward, up to the tip"
        );
        assert!(
            self.durable_commit <= self.committed,
            "I6: what is recorded as committed is committed"
        );
    }

    /// Whether room (journal, memory, operations, epochs) gets scarce, so that applying should not wait.
    #[must_use]
    pub fn pressed(&self) -> bool {
        self.ring.used() > self.ring.size() / 4
            || self.memory > self.options.memory_bytes_max / 2
            || self.ops > self.options.ops_max / 2
            || self.epochs.len() > self.options.epochs_max / 2
    }

    /// Whether a commit must become durable before its epoch can be applied.
    #[must_use]
    pub fn wants_durable_commit(&self) -> bool {
        self.committed > self.durable_commit
    }

    /// Whether a checkpoint would gain something.
    #[must_use]
    pub fn wants_checkpoint(&self) -> bool {
        let news = self.applied > self.superblock.applied || self.state_unsaved;
        !self.applying && !self.checkpointing && news
    }

    /// Whether committed epochs wait to be applied.
    #[must_use]
    pub fn wants_apply(&self) -> bool {
        self.committed > self.applied && !self.applying
    }

    /// The image holds no operation of an epoch after this, but maybe some of any up to it.
    #[must_use]
    pub fn image_holds(&self) -> Epoch {
        self.applied.max(self.applying_through).max(self.redo_until)
    }

    /// What the replica is, from the next checkpoint on also in the superblock.
    pub fn set_state(&mut self, state: State) {
        self.superblock.state = state;
        self.state_unsaved = true;
    }

    /// Next epochs to be applied to the image, if any: committed, with a durable commit record.
    pub fn take_apply(&mut self) -> Option<ApplyJob> {
        if self.applying || self.checkpointing {
            return None;
        }
        let early = self.options.sabotage == Sabotage::ApplyBeforeDurable;
        let upto = if early {
            self.committed
        } else {
            self.durable_commit
        };
        let mut job = ApplyJob::default();
        for e in self
            .epochs
            .iter()
            .filter(|e| e.epoch > self.applied && e.epoch <= upto)
        {
            let bytes: u64 = e.ops.iter().map(|o| o.len).sum();
            if job.through > Epoch::ZERO && job.bytes + bytes > self.options.apply_bytes {
                break;
            }
            job.add(e, bytes);
        }
        if job.through == Epoch::ZERO {
            return None;
        }
        // After a failure the image may hold part of this already: then old sums prove nothing.
        job.redo = self.applied < self.redo_until;
        assert!(
            early || job.through <= self.durable_commit,
            "I3: only a durable commit reaches the image"
        );
        assert!(
            early
                || self
                    .epochs
                    .iter()
                    .all(|e| e.epoch > job.through || e.end <= self.ring.synced()),
            "I3: an epoch is durable in the journal before the image changes"
        );
        self.applying = true;
        self.applying_through = job.through;
        Some(job)
    }

    /// Takes note of an apply's end.
    pub fn complete_apply(&mut self, job: &ApplyJob, ok: bool) {
        assert!(self.applying, "an apply is completed once");
        self.applying = false;
        if !ok {
            self.faults += 1;
            self.redo_until = self.redo_until.max(job.through);
            return;
        }
        for op in &job.ops {
            self.overlay.remove(op);
        }
        self.release(&job.ops);
        assert!(
            job.through > self.applied && job.through <= self.committed,
            "I6: applied moves forward, up to committed"
        );
        self.applied = job.through;
        self.applied_term = job.term;
    }

    /// Makes the image durable and frees the journal up to what was applied; `None` if there is nothing to gain.
    pub fn take_checkpoint(&mut self) -> Option<Checkpoint> {
        if self.applying || self.checkpointing {
            return None;
        }
        let to = self.trim_target();
        let news = self.applied > self.superblock.applied || self.state_unsaved;
        if to.0.0 <= self.superblock.trim && !news {
            return None;
        }
        self.checkpointing = true;
        let superblock = Superblock {
            number: self.superblock.number + 1,
            trim: to.0.0,
            trim_sequence: to.1,
            applied: self.applied,
            applied_term: self.applied_term,
            terms: self.terms.up_to(self.applied, self.applied_term),
            ..self.superblock
        };
        Some(Checkpoint {
            superblock,
            maps: self.maps.each_ref().map(DirtyMap::unsaved),
        })
    }

    /// The first record that is still needed, and its number.
    fn trim_target(&self) -> (Position, u64) {
        let mut to = (self.ring.synced(), self.ring.synced_sequence());
        let retained = self
            .epochs
            .iter()
            .find(|e| e.epoch > self.applied)
            .map(|e| e.start);
        let open = self.open.as_ref().filter(|o| !o.ops.is_empty()).map(|o| o.start);
        let rolled_back = self.rollback.map(|r| (r.0, r.1));
        for other in [retained, open, rolled_back].into_iter().flatten() {
            to = to.min(other);
        }
        to
    }

    /// Takes note of a checkpoint's end.
    pub fn complete_checkpoint(&mut self, done: &Checkpoint, ok: bool) {
        assert!(self.checkpointing, "a checkpoint is completed once");
        self.checkpointing = false;
        if !ok {
            self.faults += 1;
            // The image may have lost what was written since the last good sync: apply it again from the journal.
            self.redo_until = self.redo_until.max(self.applied);
            self.applied = self.superblock.applied;
            self.applied_term = self.superblock.applied_term;
            self.rebuild_overlay();
            return;
        }
        self.state_unsaved &= self.superblock.state != done.superblock.state;
        self.superblock = Superblock {
            state: self.superblock.state,
            ..done.superblock
        };
        self.ring.trim(Position(done.superblock.trim));
        while let Some(e) = pop_front_if(&mut self.epochs, |e| e.epoch <= done.superblock.applied) {
            self.ops -= e.ops.len();
        }
        for (map, saved) in self.maps.iter_mut().zip(&done.maps) {
            map.saved(saved);
        }
    }
}
