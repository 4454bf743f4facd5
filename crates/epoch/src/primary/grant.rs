//! The primary and the store: changes of the in-sync set, handover, unknown outcomes, a restored store.
//!
//! One request at a time, always read first: a primary that cannot reach the store never has a proposal under way,
//! so with the store lost and the standby visible it simply runs on.

use super::{HandoverStep, Primary, PrimaryStep, Talk};
use crate::Micros;
use crate::arbiter::{CasOutcome, Fate, Proposal, StoreId, StoreReply, VmRecord};
use crate::invariants;
use crate::io::{Action, Notice};
use crate::sabotage::Sabotage;
use steadfast_types::{HostId, Term};

impl Primary {
    /// The in-sync set as it should be: in sync and not lost, plus those that have caught up.
    fn desired(&self) -> Vec<HostId> {
        let lag = (self.settings.window_epochs / 2).max(1) as u64;
        let tip = self.progress.sealed().0;
        let mut set: Vec<HostId> = self
            .members
            .iter()
            .filter(|m| !m.lost && !m.stalled && !m.leaving)
            .filter(|m| {
                if self.record.in_sync.contains(&m.host) {
                    m.talk != Talk::Empty
                } else {
                    m.talk == Talk::Streaming
                        && m.staged >= self.progress.committed()
                        && m.staged.0 > 0
                        && m.durable >= m.must_sync
                        && tip.saturating_sub(m.staged.0) <= lag
                }
            })
            .map(|m| m.host.clone())
            .collect();
        set.sort();
        set
    }

    fn handover_ready(&self) -> bool {
        self.handover
            .as_ref()
            .is_some_and(|h| h.step == HandoverStep::Granting)
    }

    fn wants_store(&self, now: Micros) -> bool {
        self.proposal.is_some()
            || self.rumour > self.record.term
            || self.handover_ready()
            || self.reassert.is_some()
            || (self.handover.is_none() && self.desired() != self.record.in_sync)
            || now >= self.next_check
    }

    pub(super) fn store_step(&mut self, now: Micros, out: &mut Vec<Action>) {
        self.store.expired(now);
        if self.settings.broken(Sabotage::AloneWithoutGrant) {
            let want = self.desired();
            if want.len() < self.record.in_sync.len() {
                self.record.term = self.record.term.next();
                self.record.acks = self.settings.acks_for(want.len());
                self.record.in_sync = want;
            }
        }
        if self.store.ready(now) && self.wants_store(now) {
            let id = self.store.request(now);
            out.push(Action::StoreRead { id });
        }
    }

    pub(super) fn store_reply(
        &mut self,
        now: Micros,
        reply: StoreReply,
        out: &mut Vec<Action>,
    ) -> PrimaryStep {
        if !self.store.take(reply.id()) {
            return PrimaryStep::Stay;
        }
        match reply {
            StoreReply::Failed { .. } => self.store.failed(now),
            StoreReply::Read { record: None, .. } => {
                self.store.failed(now);
                out.push(Action::Notice(Notice::Refused(
                    "the store has no record of this VM",
                )));
            }
            StoreReply::Read {
                store,
                record: Some(current),
                ..
            } => {
                self.store.succeeded();
                return self.look(now, store, &current, out);
            }
            StoreReply::Cas {
                outcome: CasOutcome::Done,
                ..
            } => {
                self.store.succeeded();
                if let Some(p) = self.proposal.take() {
                    return self.adopt(now, p.record, out);
                }
            }
            StoreReply::Cas {
                outcome: CasOutcome::Unknown,
                ..
            } => {
                self.store.failed(now);
                if self.settings.broken(Sabotage::UnknownMeansGranted)
                    && let Some(p) = self.proposal.take()
                {
                    return self.adopt(now, p.record, out);
                }
            }
            StoreReply::Cas {
                outcome: CasOutcome::Conflict { store, current },
                ..
            } => {
                self.store.succeeded();
                if self
                    .proposal
                    .as_ref()
                    .is_some_and(|p| p.fate(store, &current) == Fate::Open)
                {
                    // The store says that the record is as expected and yet refused: never true of a real one.
                    self.store.failed(now);
                    return PrimaryStep::Stay;
                }
                return self.look(now, store, &current, out);
            }
        }
        PrimaryStep::Stay
    }

    /// Decides on the record as it is now.
    fn look(
        &mut self,
        now: Micros,
        store: StoreId,
        current: &VmRecord,
        out: &mut Vec<Action>,
    ) -> PrimaryStep {
        self.next_check = now.saturating_add(self.settings.record_check_us);
        if let Some(p) = &self.proposal {
            match p.fate(store, current) {
                Fate::Done => {
                    let record = p.record.clone();
                    self.proposal = None;
                    return self.adopt(now, record, out);
                }
                Fate::Open => {
                    let (expect, record) = (p.expect.clone(), p.record.clone());
                    let id = self.store.request(now);
                    out.push(Action::StoreCas { id, expect, record });
                    return PrimaryStep::Stay;
                }
                Fate::Dead => self.proposal = None,
            }
        }
        let mine = current.nonce == self.record.nonce && current.term == self.record.term;
        if current.term > self.record.term && !(self.settings.broken(Sabotage::AloneWithoutGrant)) {
            out.push(Action::Notice(Notice::FencedBy(current.term)));
            return PrimaryStep::Lost { term: current.term };
        }
        let trust = self.settings.broken(Sabotage::TrustRestoredStore);
        if !trust && (!mine || current.store != store) {
            self.restored(now, store, current, out);
            return PrimaryStep::Stay;
        }
        self.reassert = None;
        // Somebody has seen a higher term than the record's (of a store that was restored since): rise above it.
        let bump = self.rumour > self.record.term;
        self.rumour = Term::ZERO;
        let next = self.next_record(store);
        let next = next.or_else(|| {
            (bump && self.handover.is_none()).then(|| self.own_record(store, self.record.in_sync.clone()))
        });
        let Some(record) = next else {
            return PrimaryStep::Stay;
        };
        self.propose(now, current.clone(), record, out);
        PrimaryStep::Stay
    }

    /// The record to propose, if a change is wanted.
    fn next_record(&mut self, store: StoreId) -> Option<VmRecord> {
        if let Some(h) = self.handover.as_ref() {
            if h.step != HandoverStep::Granting {
                return None;
            }
            let (to, at) = (h.to.clone(), h.at);
            let mut in_sync: Vec<HostId> = self
                .record
                .in_sync
                .iter()
                .filter(|&x| *x != to)
                .cloned()
                .chain([self.me.clone()])
                .collect();
            in_sync.sort();
            let acks = self.settings.acks_for(in_sync.len());
            return Some(VmRecord {
                term: self.above_all(),
                owner: to,
                in_sync,
                acks,
                nonce: self.store.nonce(),
                store,
                handover: Some(at),
            });
        }
        let in_sync = self.desired();
        (in_sync != self.record.in_sync).then(|| self.own_record(store, in_sync))
    }

    fn own_record(&mut self, store: StoreId, in_sync: Vec<HostId>) -> VmRecord {
        VmRecord {
            term: self.above_all(),
            owner: self.me.clone(),
            acks: self.settings.acks_for(in_sync.len()),
            in_sync,
            nonce: self.store.nonce(),
            store,
            handover: None,
        }
    }

    /// A term above every one this instance has held or proposed.
    fn above_all(&mut self) -> Term {
        self.top_term = self.top_term.max(self.record.term).next();
        self.top_term
    }

    fn propose(&mut self, now: Micros, expect: VmRecord, record: VmRecord, out: &mut Vec<Action>) {
        let id = self.store.request(now);
        out.push(Action::StoreCas {
            id,
            expect: expect.clone(),
            record: record.clone(),
        });
        self.proposal = Some(Proposal { expect, record });
    }

    /// The store came back older, or with another identity. The record that this instance holds is still the truth if
    /// every in-sync standby is with it *now*: then none of them has taken over, and none can on an unconfirmed
    /// record. Then it is written again under a term above all; until then nothing is proposed.
    fn restored(&mut self, now: Micros, store: StoreId, current: &VmRecord, out: &mut Vec<Action>) {
        let since = *self.reassert.get_or_insert(self.ping);
        if since == self.ping {
            out.push(Action::Notice(Notice::StoreRestored {
                store,
                term: current.term,
            }));
        }
        // It must be the very process that was listed: one started anew cannot say what the other had done.
        let with_me = self.record.in_sync.iter().all(|h| {
            self.members.iter().any(|m| {
                let same = m.known.is_some() && m.known == m.instance;
                m.host == *h && same && m.echo > since && !matches!(m.talk, Talk::Greeting { .. })
            })
        });
        if with_me && self.handover.is_none() {
            let in_sync = self.desired();
            let record = self.own_record(store, in_sync);
            self.propose(now, current.clone(), record, out);
        } else {
            self.store.not_before = now.saturating_add(self.settings.heartbeat_us);
        }
    }

    /// A proposal took effect.
    fn adopt(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Action>) -> PrimaryStep {
        invariants::i2_term_grows(self.record.term, record.term);
        self.reassert = None;
        self.next_check = now.saturating_add(self.settings.record_check_us);
        out.push(Action::Notice(Notice::Granted(record.term)));
        if record.owner != self.me {
            return self.handed_over(record, out);
        }
        for h in record
            .in_sync
            .iter()
            .filter(|&h| !self.record.in_sync.contains(h))
        {
            out.push(Action::Notice(Notice::InSync(h.clone())));
        }
        if record.in_sync.is_empty() && !self.record.in_sync.is_empty() {
            out.push(Action::Notice(Notice::Alone));
        }
        self.record = record;
        for m in &mut self.members {
            let listed = self.record.in_sync.contains(&m.host);
            m.known = if listed { m.known.or(m.instance) } else { None };
        }
        for i in 0..self.members.len() {
            self.begin_copy(i, out);
        }
        self.heartbeat(out);
        PrimaryStep::Stay
    }
}
