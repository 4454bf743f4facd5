//! What must hold, one file per invariant, judged from outside: by what left the hosts, what the disks hold and what the
//! store says, never by what the protocol believes of itself.

pub mod i1;
pub mod i2;
pub mod i3;
pub mod i4;
pub mod i5;
pub mod i6;
pub mod i7;
pub mod i8;
pub mod liveness;

use crate::guest::State;
use std::collections::{BTreeMap, HashMap};
use steadfast_epoch::EpochRef;
use steadfast_types::Term;

/// A broken promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which invariant: "I1" to "I10", "liveness" or "runtime".
    pub what: String,
    /// What happened.
    pub how: String,
}

/// What the checkers remember.
#[derive(Debug, Default)]
pub struct Checks {
    /// The first broken promise.
    pub failed: Option<Violation>,
    /// The newest state that the outside world has been told of.
    pub tip: u32,
    /// The newest flushed state that it has been told of, directly or by what followed.
    pub flushed: u32,
    /// The newest committed state.
    pub committed: u32,
    /// Which process acts in a term.
    pub acting: BTreeMap<Term, (usize, u64)>,
    /// The last epoch that each host has staged.
    pub last_staged: BTreeMap<usize, EpochRef>,
    /// The guest's state at each sealed epoch.
    pub snapshots: HashMap<EpochRef, State>,
    /// How many takeovers and handovers, suspicions, lone primaries, cold boots there were.
    pub promotions: u64,
    /// See `promotions`.
    pub suspicions: u64,
    /// See `promotions`.
    pub alone: u64,
    /// See `promotions`.
    pub cold_boots: u64,
    /// The replica asked for the record that has just arrived to be staged.
    pub stage_asked: bool,
    /// Since when a primary calls itself protected that is not.
    pub false_status_since: Option<u64>,
}

impl Checks {
    /// Records the first violation.
    pub fn fail(&mut self, what: &str, how: String) {
        if self.failed.is_none() {
            self.failed = Some(Violation { what: what.to_owned(), how });
        }
    }

    /// A host has staged this epoch.
    pub fn staged(&mut self, epoch: EpochRef, h: usize) {
        self.last_staged.insert(h, epoch);
    }

    /// The state at an epoch.
    #[must_use]
    pub fn node_of(&self, epoch: EpochRef) -> Option<u32> {
        self.snapshots.get(&epoch).map(|s| s.node)
    }
}
