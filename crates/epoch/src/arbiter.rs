//! The arbiter as a pure type: a VM's record in the store, the compare-and-swap on it, and one client of it.
//!
//! The record is the only proof of who may run the VM and who may take over. Every change of the owner *or of the
//! in-sync set* is a compare-and-swap that raises the term, so that one number fences both.
//!
//! Three things make an unknown outcome harmless:
//! - each proposal carries a [`Nonce`] that nobody else can produce; after a timeout the record is read back, and the
//!   nonce tells whether the proposal took effect;
//! - while it is unknown, a primary commits only what satisfies the old *and* the proposed in-sync set;
//! - the same proposal is sent again until the record has moved: at most one is ever outstanding per replica.
//!
//! A restored store (fault 37) has a new [`StoreId`]; a record that was not written under the id it is read under is
//! *unconfirmed*: nobody takes over on it. The running primary confirms it with a term above all it has seen, once
//! every in-sync standby has proven to be with it still.

use crate::Micros;
use crate::message::EpochRef;
use steadfast_types::{HostId, Term};

/// Identity of one incarnation of the store's data. Changes when the data is restored or replaced. etcd: the cluster
/// id, mixed with the restore generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StoreId(pub u64);

/// Identity of one running instance (process) of a replica; drawn at random at its start, never used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance(pub u64);

/// Names one proposal of one instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce {
    /// Who proposed.
    pub instance: Instance,
    /// Its how-many-eth proposal.
    pub count: u64,
}

/// The part of a VM's record that decides who runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRecord {
    /// Fencing number; every change raises it.
    pub term: Term,
    /// The host whose instance may release output in this term.
    pub owner: HostId,
    /// The standbys that may take over, sorted.
    pub in_sync: Vec<HostId>,
    /// How many of them must acknowledge an epoch; at most their number.
    pub acks: u8,
    /// Who wrote it.
    pub nonce: Nonce,
    /// The store it was written under.
    pub store: StoreId,
    /// Set by a handover: the epoch that the new owner goes on from.
    pub handover: Option<EpochRef>,
}

impl VmRecord {
    /// The record of a VM that was never started; `owner` may start it.
    #[must_use]
    pub fn new(owner: HostId, store: StoreId) -> Self {
        Self {
            term: Term::ZERO,
            owner,
            in_sync: Vec::new(),
            acks: 0,
            nonce: Nonce::default(),
            store,
            handover: None,
        }
    }

    /// Whether a compare-and-swap that expects `self` may replace `current`: the same record, not just an equal term.
    #[must_use]
    pub fn same_version(&self, current: &Self) -> bool {
        self.term == current.term && self.nonce == current.nonce && self.store == current.store
    }

    /// Answers that a taker-over needs from other in-sync standbys so that every committed epoch is known to one
    /// of those asked or to itself.
    #[must_use]
    pub fn polls_needed(&self) -> usize {
        self.in_sync.len().saturating_sub(usize::from(self.acks))
    }
}

/// What the store did, from the view of the store itself: the pure half of the compare-and-swap.
///
/// `current` is the record now, `id` the store's identity now.
#[must_use]
pub fn compare_and_swap(current: &VmRecord, id: StoreId, expect: &VmRecord, new: &VmRecord) -> CasOutcome {
    // The new record's `store` is the id that the proposer read under: a proposal to the store as it was before it
    // was restored must not land in the restored one.
    if expect.same_version(current) && new.term > current.term && new.store == id {
        CasOutcome::Done
    } else {
        CasOutcome::Conflict {
            store: id,
            current: current.clone(),
        }
    }
}

/// Answer to a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasOutcome {
    /// It took effect.
    Done,
    /// It did not, and never will (the record had moved): this is the record now.
    Conflict {
        /// The store's identity now.
        store: StoreId,
        /// The record now.
        current: VmRecord,
    },
    /// Nobody knows: it may have taken effect, or may yet.
    Unknown,
}

/// What the runtime reports back of [`crate::Action::StoreRead`] and [`crate::Action::StoreCas`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreReply {
    /// A linearizable read.
    Read {
        /// The action's id.
        id: u64,
        /// The store's identity.
        store: StoreId,
        /// The record, if there is one.
        record: Option<VmRecord>,
    },
    /// A compare-and-swap.
    Cas {
        /// The action's id.
        id: u64,
        /// What happened.
        outcome: CasOutcome,
    },
    /// The read failed, or timed out.
    Failed {
        /// The action's id.
        id: u64,
    },
}

impl StoreReply {
    /// The id of the action that this answers.
    #[must_use]
    pub fn id(&self) -> u64 {
        match self {
            Self::Read { id, .. } | Self::Cas { id, .. } | Self::Failed { id } => *id,
        }
    }
}

/// A proposal that was sent and is not yet known to have taken effect or to be dead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub expect: VmRecord,
    pub record: VmRecord,
}

/// What a record says about a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It took effect.
    Done,
    /// The record has moved without it: it never will.
    Dead,
    /// The record has not moved: it may still arrive.
    Open,
}

impl Proposal {
    pub(crate) fn fate(&self, store: StoreId, current: &VmRecord) -> Fate {
        if current.nonce == self.record.nonce {
            Fate::Done
        } else if self.record.store == store && self.expect.same_version(current) {
            Fate::Open
        } else {
            Fate::Dead
        }
    }
}

/// One client of the store: at most one request is awaited; ids tell old answers from the awaited one.
#[derive(Clone, Debug)]
pub(crate) struct StoreClient {
    instance: Instance,
    last_id: u64,
    nonces: u64,
    joins: u64,
    awaited: Option<(u64, Micros)>,
    tries: u32,
    timeout_us: Micros,
    /// Not before this time, after a failure.
    pub not_before: Micros,
}

impl StoreClient {
    pub(crate) fn new(instance: Instance, timeout_us: Micros) -> Self {
        Self {
            instance,
            last_id: 0,
            nonces: 0,
            joins: 0,
            awaited: None,
            tries: 0,
            timeout_us,
            not_before: 0,
        }
    }

    pub(crate) fn instance(&self) -> Instance {
        self.instance
    }

    pub(crate) fn nonce(&mut self) -> Nonce {
        self.nonces += 1;
        Nonce {
            instance: self.instance,
            count: self.nonces,
        }
    }

    /// The number of a full copy that begins. It is never given twice, also when this instance is the primary for a second time: who was
    /// left half filled the first time must not go on from there.
    pub(crate) fn join(&mut self) -> u64 {
        self.joins += 1;
        self.instance.0.wrapping_add(self.joins)
    }

    /// Registers a request; returns its id.
    pub(crate) fn request(&mut self, now: Micros) -> u64 {
        self.last_id += 1;
        let wait = self.timeout_us << self.tries.min(4);
        self.awaited = Some((self.last_id, now.saturating_add(wait)));
        self.last_id
    }

    /// Whether this answers the awaited request; if so it is awaited no more.
    pub(crate) fn take(&mut self, id: u64) -> bool {
        let hit = self.awaited.is_some_and(|(want, _)| want == id);
        if hit {
            self.awaited = None;
        }
        hit
    }

    /// The request failed: wait a little before the next.
    pub(crate) fn failed(&mut self, now: Micros) {
        self.awaited = None;
        self.not_before = now.saturating_add((self.timeout_us / 4) << self.tries.min(4));
        self.tries = self.tries.saturating_add(1);
    }

    pub(crate) fn succeeded(&mut self) {
        self.tries = 0;
        self.not_before = 0;
    }

    /// Whether the awaited request has timed out (it is given up then).
    pub(crate) fn expired(&mut self, now: Micros) -> bool {
        if self.awaited.is_some_and(|(_, until)| now >= until) {
            self.failed(now);
            return true;
        }
        false
    }

    pub(crate) fn ready(&self, now: Micros) -> bool {
        self.awaited.is_none() && now >= self.not_before
    }

    pub(crate) fn deadline(&self) -> Option<Micros> {
        self.awaited.map(|(_, until)| until)
    }
}

/// Whether `host` may start the VM from its disks alone, with no memory state left anywhere: it must hold every
/// epoch that was committed with a flush. The owner always does; an in-sync standby does if all had to acknowledge.
#[must_use]
pub fn may_cold_start(record: &VmRecord, store: StoreId, host: &HostId) -> bool {
    let trusted = record.store == store;
    let owner = record.owner == *host;
    let full_copy = record.in_sync.contains(host) && record.polls_needed() == 0;
    trusted && (owner || full_copy)
}

/// Why a standby may not take over on this record now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The record is older than what this replica has seen, or was written under another store: it was restored.
    Restored,
    /// The record does not list this host as in sync.
    NotInSync,
    /// It has no complete state to go on from.
    NoState,
    /// The VM was not handed over to it, and that is the only way in which it may go on here.
    NotHandedOver,
}

/// Whether `me`, which has seen terms up to `seen` and has complete state if `intact`, may propose itself.
///
/// # Errors
/// [`Refusal`] says why not.
pub fn may_take_over(
    record: &VmRecord,
    store: StoreId,
    me: &HostId,
    seen: Term,
    intact: bool,
) -> Result<(), Refusal> {
    if !intact {
        Err(Refusal::NoState)
    } else if record.store != store || record.term < seen {
        Err(Refusal::Restored)
    } else if !record.in_sync.contains(me) {
        Err(Refusal::NotInSync)
    } else {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn host(n: &str) -> HostId {
        HostId::new(n).unwrap()
    }

    fn rec(term: u64, store: u64, count: u64) -> VmRecord {
        VmRecord {
            term: Term(term),
            owner: host("a"),
            in_sync: vec![host("b")],
            acks: 1,
            nonce: Nonce {
                instance: Instance(1),
                count,
            },
            store: StoreId(store),
            handover: None,
        }
    }

    #[test]
    fn swap_needs_the_same_record_a_higher_term_and_the_same_store() {
        let cur = rec(3, 1, 1);
        assert_eq!(
            compare_and_swap(&cur, StoreId(1), &cur, &rec(4, 1, 2)),
            CasOutcome::Done
        );
        assert_ne!(
            compare_and_swap(&cur, StoreId(1), &rec(3, 1, 9), &rec(4, 1, 2)),
            CasOutcome::Done
        );
        assert_ne!(
            compare_and_swap(&cur, StoreId(1), &cur, &rec(3, 1, 2)),
            CasOutcome::Done
        );
        assert_ne!(
            compare_and_swap(&cur, StoreId(2), &cur, &rec(4, 1, 2)),
            CasOutcome::Done
        );
        assert_eq!(
            compare_and_swap(&cur, StoreId(2), &cur, &rec(4, 2, 2)),
            CasOutcome::Done
        );
    }

    #[test]
    fn takeover_needs_membership_state_and_a_trusted_record() {
        let r = rec(3, 1, 1);
        let (b, c) = (host("b"), host("c"));
        assert_eq!(may_take_over(&r, StoreId(1), &b, Term(3), true), Ok(()));
        assert_eq!(
            may_take_over(&r, StoreId(1), &c, Term(3), true),
            Err(Refusal::NotInSync)
        );
        assert_eq!(
            may_take_over(&r, StoreId(2), &b, Term(3), true),
            Err(Refusal::Restored)
        );
        assert_eq!(
            may_take_over(&r, StoreId(1), &b, Term(4), true),
            Err(Refusal::Restored)
        );
        assert_eq!(
            may_take_over(&r, StoreId(1), &b, Term(3), false),
            Err(Refusal::NoState)
        );
    }

    #[test]
    fn fate_of_a_proposal() {
        let p = Proposal {
            expect: rec(3, 1, 1),
            record: rec(4, 1, 7),
        };
        assert_eq!(p.fate(StoreId(1), &rec(3, 1, 1)), Fate::Open);
        assert_eq!(p.fate(StoreId(1), &rec(4, 1, 7)), Fate::Done);
        assert_eq!(p.fate(StoreId(1), &rec(4, 1, 8)), Fate::Dead);
        assert_eq!(p.fate(StoreId(2), &rec(3, 1, 1)), Fate::Dead);
    }
}
