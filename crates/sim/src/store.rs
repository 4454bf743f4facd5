//! The arbiter's store: one record, linearizable; it can be slow, out of reach, down, and restored from an old snapshot.

use crate::rng::Rng;
use std::collections::BTreeMap;
use steadfast_epoch::arbiter::compare_and_swap;
use steadfast_epoch::{CasOutcome, StoreId, VmRecord};
use steadfast_types::{HostId, Term};

/// The store.
#[derive(Debug)]
pub struct Store {
    /// The record now.
    pub record: VmRecord,
    /// Its identity.
    pub id: StoreId,
    /// No quorum: nothing is answered, nothing changes.
    pub down: bool,
    /// A request and its answer take up to so much longer.
    pub slow_us: u64,
    /// Of a thousand answers to a compare-and-swap, so many are lost though it took effect.
    pub lose_answers: u64,
    /// Every record ever in force, by term; a second one for a term is kept as a violation.
    pub by_term: BTreeMap<Term, VmRecord>,
    /// A term was given to two different records.
    pub reused: Option<(VmRecord, VmRecord)>,
    snapshots: Vec<VmRecord>,
    /// The newest record before a restore, for an operator who knows what he does.
    pub last_true: Option<VmRecord>,
}

impl Store {
    /// With the record of a VM that was never started.
    #[must_use]
    pub fn new(owner: HostId) -> Self {
        let id = StoreId(1);
        let record = VmRecord::new(owner, id);
        Self {
            snapshots: vec![record.clone()],
            record,
            id,
            down: false,
            slow_us: 0,
            lose_answers: 0,
            by_term: BTreeMap::new(),
            reused: None,
            last_true: None,
        }
    }

    /// The store's half of a compare-and-swap.
    pub fn swap(&mut self, expect: &VmRecord, new: VmRecord) -> CasOutcome {
        let outcome = compare_and_swap(&self.record, self.id, expect, &new);
        if outcome == CasOutcome::Done {
            if let Some(old) = self.by_term.insert(new.term, new.clone())
                && old.nonce != new.nonce
            {
                self.reused = Some((old, new.clone()));
            }
            self.record = new;
            self.snapshots.push(self.record.clone());
        }
        outcome
    }

    /// Comes back from an older snapshot, as something else.
    pub fn restore(&mut self, rng: &mut Rng) {
        let back = rng.below(self.snapshots.len().min(4) as u64) as usize;
        let at = self.snapshots.len() - 1 - back;
        self.last_true = self.by_term.last_key_value().map(|(_, r)| r.clone());
        self.record = self.snapshots[at].clone();
        self.id = StoreId(self.id.0 + 1);
        self.down = false;
    }
}
