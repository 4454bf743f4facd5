//! Commit and release (I1, I6): when an epoch is safe, and what follows from it.

use super::{Primary, Talk, window::Flight};
use crate::arbiter::VmRecord;
use crate::invariants;
use crate::io::{Action, Notice};
use crate::sabotage::Sabotage;

impl Primary {
    /// Whether enough of the record's in-sync standbys could repeat this epoch.
    fn acknowledged(&self, record: &VmRecord, f: &Flight) -> bool {
        if self.settings.broken(Sabotage::CommitWithoutAck) {
            return true;
        }
        let e = f.epoch.epoch;
        let fsync = f.flush && !self.settings.broken(Sabotage::CommitWithoutFsync);
        let have = self
            .members
            .iter()
            .filter(|m| record.in_sync.contains(&m.host))
            .filter(|m| m.staged >= e && (!fsync || m.durable >= e))
            .count();
        // An empty in-sync set was granted by the store: alone, nobody else may take over.
        have >= usize::from(record.acks).min(record.in_sync.len())
    }

    /// An epoch is safe if the record in force and the one that may be in force after a pending proposal both say so,
    /// and (with a flush) its disk writes are fsynced here too (I5).
    fn safe(&self, f: &Flight) -> bool {
        let synced = !f.flush
            || self.journal_synced >= f.epoch.epoch
            || self.settings.broken(Sabotage::CommitWithoutFsync);
        let proposed = self
            .proposal
            .as_ref()
            .filter(|_| self.handover.is_none())
            .map(|p| &p.record);
        synced && self.acknowledged(&self.record, f) && proposed.is_none_or(|r| self.acknowledged(r, f))
    }

    /// Commits and releases as far as possible, then forgets records nobody needs.
    pub(super) fn advance(&mut self, out: &mut Vec<Action>) {
        let before = self.progress.committed();
        let mut to = before;
        // Usually the next one. After a takeover by a standby whose copy was completed by a later epoch, the epochs
        // between are part of that one and commit with it.
        while let Some(f) = self.window.after(to)
            && self.safe(f)
        {
            to = f.epoch.epoch;
        }
        if to > before {
            // Alone there is nobody to send to: what is sealed counts as sent.
            if self.record.in_sync.is_empty() || self.settings.broken(Sabotage::CommitWithoutAck) {
                self.progress.send(to);
            }
            self.progress.commit(to);
            out.push(Action::Commit { through: to });
        }
        if self.progress.committed() > self.progress.released() {
            let to = self.progress.committed();
            invariants::i1_release(self.progress.committed(), to);
            self.progress.release(to);
            out.push(Action::Release { through: to });
        }
        let done = self.needed_after(&self.window).min(self.progress.committed());
        if self.window.forget(done) {
            out.push(Action::Forget { through: done });
        }
        self.note_flow(out);
    }

    /// Tells when outputs begin to be held for want of a standby, and when they flow again.
    fn note_flow(&mut self, out: &mut Vec<Action>) {
        let holding = self.holding();
        if holding != self.was_holding {
            self.was_holding = holding;
            out.push(Action::Notice(if holding {
                Notice::Holding
            } else {
                Notice::Flowing
            }));
        }
    }

    /// Whether an epoch could not commit now because a standby that must acknowledge is lost or not streaming.
    pub(super) fn holding(&self) -> bool {
        let live = |r: &VmRecord| {
            let n = self
                .members
                .iter()
                .filter(|m| r.in_sync.contains(&m.host) && !m.lost && !m.stalled && m.talk == Talk::Streaming)
                .count();
            n >= usize::from(r.acks).min(r.in_sync.len())
        };
        let proposed = self
            .proposal
            .as_ref()
            .filter(|_| self.handover.is_none())
            .map(|p| &p.record);
        !(live(&self.record) && proposed.is_none_or(live))
    }
}
