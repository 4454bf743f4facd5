//! Takeover: suspicion, speculative resume, the grant, and what follows from each answer (I2, I4, I7).
//!
//! ```text
//!   following --silence--> asking: guest runs, outputs held
//!      ^                     | read the record (linearizable)
//!      |                     |-- not in sync, or another owner rose -----> refused: undo; follow or stop
//!      |                     |-- restored store: wait, hold
//!      |                     |-- fewer acks than standbys: poll the others first
//!      |                     v
//!      |                   compare-and-swap term+1, owner = me
//!      |                     |-- done ---------------------------> Primary, from the newest acknowledged epoch
//!      |                     |-- conflict: look at the record that won
//!      |                     `-- unknown: read back; the nonce tells
//!      +-- primary heard again before a compare-and-swap was sent (and the run can be undone)
//! ```
//!
//! **Which epoch.** The newest one acknowledged (staged whole), not the newest known as committed: the primary may have
//! committed and released anything that was acknowledged. While asking, nothing is acknowledged and nothing staged, so
//! the choice cannot go stale.
//!
//! **Fewer acknowledgements than standbys.** If `k` of `n` must acknowledge, a committed epoch may be missing here. Then
//! `n - k` others must first say what they have staged and promise to acknowledge nothing more of this term: any `k`
//! acknowledging standbys include one of those asked, or this one. One who has more takes over instead.

use crate::Micros;
use crate::arbiter::{CasOutcome, Fate, Proposal, Refusal, StoreId, StoreReply, VmRecord};
use crate::arbiter::{may_cold_start, may_take_over};
use crate::io::{Action, Notice};
use crate::message::EpochRef;
use crate::primary::{Flight, Inheritance, Primary, Window};
use crate::sabotage::Sabotage;
use crate::standby::{Session, Standby, StandbyStep};
use std::collections::BTreeMap;
use steadfast_types::HostId;

/// A takeover under way.
#[derive(Clone, Debug)]
pub(crate) struct Takeover {
    /// The epoch to go on from; `None`: start from the disks.
    pub(crate) at: Option<EpochRef>,
    /// Whose silence it is about.
    suspect: Option<HostId>,
    proposal: Option<Proposal>,
    /// The record to propose on, while others are polled.
    pub(crate) polling: Option<(StoreId, VmRecord)>,
    pub(crate) polls: BTreeMap<HostId, (EpochRef, bool)>,
    /// The record that the answers in `polls` are about.
    pub(crate) polled: Option<VmRecord>,
    pub(crate) next_poll: Micros,
    pub(crate) rounds: u64,
    /// It is this standby's turn, so it may run the guest before it is granted.
    first: bool,
}

impl Standby {
    /// What time alone brings: suspicion, retries.
    pub(crate) fn watch(&mut self, now: Micros, out: &mut Vec<Action>) -> StandbyStep {
        self.store.expired(now);
        // One after the other: who is first in the set asks first.
        let later = u64::from(self.rank.unwrap_or(0)).saturating_mul(self.settings.suspect_us / 2);
        let suspicious =
            self.silence >= self.settings.suspect_us.saturating_add(later) && now >= self.retry_at;
        if self.takeover.is_none()
            && suspicious
            && self.owner.is_some()
            && self.intact().is_some()
            && !self.undoing
        {
            if let Some(owner) = self.owner.clone() {
                out.push(Action::Notice(Notice::Suspected(owner)));
            }
            let first = self.rank == Some(0);
            self.ask(first, out);
            if self.settings.broken(Sabotage::TakeoverWithoutGrant) {
                let mut forged = VmRecord::new(self.me.clone(), StoreId::default());
                forged.term = self.seen.next();
                return self.promote(now, forged, out);
            }
        }
        let poll = self.takeover.as_ref().is_some_and(|t| t.polling.is_some());
        if poll {
            self.poll_step(now, out);
        }
        let want = self.takeover.is_some() && !poll || self.outstanding.is_some() && now >= self.retry_at;
        if want && self.store.ready(now) {
            self.retry_at = self
                .retry_at
                .max(now.saturating_add(self.settings.store_timeout_us));
            let id = self.store.request(now);
            out.push(Action::StoreRead { id });
        }
        StandbyStep::Stay
    }

    /// Begins to ask for the grant, to go on from the acknowledged state.
    fn ask(&mut self, speculate: bool, out: &mut Vec<Action>) {
        let rash = self.settings.broken(Sabotage::PromoteFromCommitted);
        let committed = self.committed;
        if let Some(s) = self.state.as_mut()
            && let Some(staged) = s.staged
        {
            let mut at = staged;
            if rash && committed < staged.epoch && committed >= s.floor.epoch {
                at = s
                    .held
                    .iter()
                    .find(|h| h.epoch.epoch == committed)
                    .map_or(s.base, |h| h.epoch);
                s.staged = Some(at);
            }
            // What has not been staged yet was not acknowledged either: it does not count.
            if s.tip.epoch > at.epoch {
                while s.held.back().is_some_and(|h| h.epoch.epoch > at.epoch) {
                    s.held.pop_back();
                }
                s.tip = at;
                out.push(Action::Truncate { after: at });
            }
        }
        self.begin(self.intact(), speculate, out);
    }

    fn begin(&mut self, at: Option<EpochRef>, speculate: bool, out: &mut Vec<Action>) {
        self.takeover = Some(Takeover {
            at,
            suspect: self.owner.clone(),
            proposal: None,
            polling: None,
            polls: BTreeMap::new(),
            polled: None,
            next_poll: 0,
            rounds: 0,
            first: speculate,
        });
        // What cannot be undone waits for the store's first answer: with the store lost and the primary heard again, this
        // standby must be able to follow on.
        if speculate && self.settings.can_roll_back {
            self.speculate(out);
        }
    }

    /// Runs the guest from the state to go on from, outputs held.
    fn speculate(&mut self, out: &mut Vec<Action>) {
        if let Some(at) = self.takeover.as_ref().filter(|t| t.first).and_then(|t| t.at)
            && self.settings.speculate
            && !self.speculating
        {
            self.speculating = true;
            out.push(Action::Speculate { at });
        }
    }

    /// Start from the disks (or, with complete state here, from that).
    pub(crate) fn cold_start(&mut self, out: &mut Vec<Action>) {
        if self.takeover.is_some() || self.undoing {
            out.push(Action::Notice(Notice::Refused(
                "the grant is being asked for already",
            )));
        } else if self.intact().is_some() {
            self.ask(true, out);
        } else if matches!(self.session, Session::Joining { .. })
            || self.silence < self.settings.suspect_us && self.owner.is_some()
        {
            out.push(Action::Notice(Notice::Refused(
                "a primary is heard; it runs the VM",
            )));
        } else {
            self.begin(None, false, out);
        }
    }

    /// The primary has said in so many words that the VM is ours.
    pub(crate) fn handed(&mut self, now: Micros, out: &mut Vec<Action>) {
        self.retry_at = 0;
        if self.takeover.is_none() && !self.undoing {
            self.ask(true, out);
            // The old primary has stopped for good.
            self.speculate(out);
        }
        self.store.not_before = now;
    }

    /// The owner is heard. `risen`: under a term above the one known, so that a proposal of ours is dead.
    pub(crate) fn unsuspect(&mut self, now: Micros, risen: bool, out: &mut Vec<Action>) {
        let Some(t) = &self.takeover else { return };
        if risen {
            self.refuse(now, out);
        } else if t.proposal.is_none() && self.may_return() {
            self.call_off(now, out);
        }
    }

    /// Whether the acknowledged state can be had back.
    fn may_return(&self) -> bool {
        !self.speculating || self.settings.can_roll_back
    }

    /// The suspicion was wrong.
    fn call_off(&mut self, now: Micros, out: &mut Vec<Action>) {
        if let Some(owner) = self.owner.clone() {
            out.push(Action::Notice(Notice::Unsuspected(owner)));
        }
        self.outstanding = self
            .takeover
            .take()
            .and_then(|t| t.proposal)
            .or(self.outstanding.take());
        self.retry_at = now.saturating_add(self.settings.store_timeout_us);
        self.undo(out);
        if !self.undoing && self.session == Session::Following {
            self.ack(out);
        }
    }

    /// Somebody else has, or keeps, the right.
    fn refuse(&mut self, now: Micros, out: &mut Vec<Action>) {
        self.takeover = None;
        self.retry_at = now.saturating_add(self.settings.suspect_us);
        self.silence = 0;
        self.undo(out);
    }

    fn undo(&mut self, out: &mut Vec<Action>) {
        if self.speculating {
            self.speculating = false;
            self.undoing = true;
            out.push(Action::DiscardSpeculation);
        }
    }

    /// The speculative run is gone; so is the state, unless it could be undone.
    pub(crate) fn undone(&mut self, intact: bool, out: &mut Vec<Action>) {
        if !self.undoing {
            return;
        }
        self.undoing = false;
        if !intact {
            self.lose_state(out);
        }
        match self.session {
            Session::Greeted => self.welcome(out),
            Session::Following => self.ack(out),
            _ => {}
        }
    }

    pub(crate) fn store_reply(
        &mut self,
        now: Micros,
        reply: StoreReply,
        out: &mut Vec<Action>,
    ) -> StandbyStep {
        if !self.store.take(reply.id()) {
            return StandbyStep::Stay;
        }
        match reply {
            StoreReply::Failed { .. } | StoreReply::Read { record: None, .. } => {
                self.store.failed(now);
                self.return_if_heard(now, out);
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
                if let Some(p) = self.takeover.as_mut().and_then(|t| t.proposal.take()) {
                    return self.promote(now, p.record, out);
                }
            }
            StoreReply::Cas {
                outcome: CasOutcome::Unknown,
                ..
            } => {
                self.store.failed(now);
                if self.settings.broken(Sabotage::UnknownMeansGranted)
                    && let Some(p) = self.takeover.as_mut().and_then(|t| t.proposal.take())
                {
                    return self.promote(now, p.record, out);
                }
                self.return_if_heard(now, out);
            }
            StoreReply::Cas {
                outcome: CasOutcome::Conflict { store, current },
                ..
            } => {
                self.store.succeeded();
                return self.look(now, store, &current, out);
            }
        }
        StandbyStep::Stay
    }

    /// With the store out of reach and the primary heard, go back to following; a proposal under way is remembered.
    pub(crate) fn return_if_heard(&mut self, now: Micros, out: &mut Vec<Action>) -> bool {
        let heard = self.silence < self.settings.suspect_us / 2 && self.owner.is_some();
        let back = self.takeover.as_ref().is_some_and(|t| t.at.is_some()) && heard && self.may_return();
        if back {
            self.call_off(now, out);
        }
        back
    }

    /// Decides on the record as it is now.
    fn look(&mut self, now: Micros, store: StoreId, rec: &VmRecord, out: &mut Vec<Action>) -> StandbyStep {
        // A proposal of this instance that was once unknown: did it win?
        if let Some(p) = self.outstanding.clone() {
            match p.fate(store, rec) {
                Fate::Done => {
                    self.outstanding = None;
                    return self.promote(now, rec.clone(), out);
                }
                Fate::Dead => self.outstanding = None,
                Fate::Open => {
                    if let Some(t) = self.takeover.as_mut().filter(|t| t.proposal.is_none()) {
                        t.proposal = Some(p);
                    }
                }
            }
        }
        let Some(t) = self.takeover.as_mut() else {
            return StandbyStep::Stay;
        };
        if let Some(p) = &t.proposal {
            match p.fate(store, rec) {
                Fate::Done => return self.promote(now, rec.clone(), out),
                Fate::Dead => t.proposal = None,
                Fate::Open => {
                    let (expect, record) = (p.expect.clone(), p.record.clone());
                    if !self.return_if_heard(now, out) {
                        let id = self.store.request(now);
                        out.push(Action::StoreCas { id, expect, record });
                    }
                    return StandbyStep::Stay;
                }
            }
        }
        let at = t.at;
        let t_suspect = t.suspect.clone();
        // A proposal of this instance won after all, though it was given up for dead (the store came back and was
        // confirmed since).
        let ours = rec.nonce.instance == self.store.instance() && at.is_some();
        let handed = rec.owner == self.me && rec.store == store && rec.term > self.term;
        if handed && (ours || rec.handover.is_some() && rec.handover == at) {
            return self.promote(now, rec.clone(), out);
        }
        if self.return_if_heard(now, out) {
            return StandbyStep::Stay;
        }
        // Another standby was faster: it is the primary now, and this one's silence is another matter.
        let overtaken = at.is_some() && t_suspect.is_some_and(|s| s != rec.owner) && rec.owner != self.me;
        if overtaken && rec.store == store && rec.term > self.term {
            self.refuse(now, out);
            self.owner = Some(rec.owner.clone());
            self.seen = self.seen.max(rec.term);
            self.session = Session::Idle;
            return StandbyStep::Stay;
        }
        let verdict = match at {
            Some(_) if self.settings.planned_only => Err(Refusal::NotHandedOver),
            Some(_) => may_take_over(rec, store, &self.me, self.seen, self.intact().is_some()),
            None if may_cold_start(rec, store, &self.me) => Ok(()),
            None => Err(Refusal::NotInSync),
        };
        let trust = self.settings.broken(Sabotage::TrustRestoredStore);
        let lax = self.settings.broken(Sabotage::PromoteOutOfSync);
        match verdict {
            Err(Refusal::Restored) if trust => self.propose(now, store, rec.clone(), out),
            Err(Refusal::NotInSync) if lax && at.is_some() => self.propose(now, store, rec.clone(), out),
            Err(Refusal::Restored) => {
                out.push(Action::Notice(Notice::TakeoverRefused(Refusal::Restored)));
                if self.silence < self.settings.suspect_us / 2 && self.owner.is_some() {
                    // The primary is there and nobody can take over from it: give way, even if the state is lost by it.
                    self.refuse(now, out);
                    return StandbyStep::Stay;
                }
                self.store.not_before = now.saturating_add(self.settings.suspect_us);
            }
            Err(why) => {
                if why == Refusal::NotInSync && at.is_some() {
                    // No longer a standby of this VM: nothing to suspect until somebody says Hello.
                    self.owner = None;
                    self.session = Session::Idle;
                }
                out.push(Action::Notice(Notice::TakeoverRefused(why)));
                self.refuse(now, out);
            }
            Ok(()) if at.is_some() && rec.polls_needed() > 0 => {
                // The same record again: the poll under way goes on.
                let new = |t: &&mut Takeover| t.polled.as_ref().is_none_or(|r| !r.same_version(rec));
                if let Some(t) = self.takeover.as_mut().filter(new) {
                    t.polls.clear();
                    t.polled = Some(rec.clone());
                    t.next_poll = now;
                }
                if let Some(t) = self.takeover.as_mut() {
                    t.polling = Some((store, rec.clone()));
                }
                self.poll_step(now, out);
            }
            Ok(()) => self.propose(now, store, rec.clone(), out),
        }
        StandbyStep::Stay
    }

    pub(crate) fn propose(&mut self, now: Micros, store: StoreId, rec: VmRecord, out: &mut Vec<Action>) {
        let Some(at) = self.takeover.as_ref().map(|t| t.at) else {
            return;
        };
        self.speculate(out);
        let trust = self.settings.broken(Sabotage::TrustRestoredStore);
        let floor = if trust {
            rec.term
        } else {
            rec.term.max(self.seen).max(self.top_term)
        };
        let term = floor.next();
        self.top_term = term;
        // If all in-sync standbys had to acknowledge, each of the others also has all that was committed.
        let keep = at.is_some() && rec.polls_needed() == 0;
        let in_sync: Vec<HostId> = if keep {
            rec.in_sync.iter().filter(|&h| *h != self.me).cloned().collect()
        } else {
            Vec::new()
        };
        let record = VmRecord {
            term,
            owner: self.me.clone(),
            acks: self.settings.acks_for(in_sync.len()),
            in_sync,
            nonce: self.store.nonce(),
            store,
            handover: None,
        };
        let id = self.store.request(now);
        out.push(Action::StoreCas {
            id,
            expect: rec.clone(),
            record: record.clone(),
        });
        if let Some(t) = self.takeover.as_mut() {
            t.proposal = Some(Proposal { expect: rec, record });
        }
    }

    /// The right is this instance's: become the primary.
    fn promote(&mut self, now: Micros, record: VmRecord, out: &mut Vec<Action>) -> StandbyStep {
        let kind = self.takeover.take();
        let cold = kind.as_ref().is_some_and(|t| t.at.is_none());
        if cold {
            let at = self.disk;
            out.push(Action::Notice(Notice::Granted(record.term)));
            out.push(Action::ColdBoot {
                term: record.term,
                at,
            });
            let window = Window::new(at, Vec::new());
            let (committed, released, journal_synced) = (at.epoch, at.epoch, at.epoch);
            let from = Inheritance {
                record,
                seen: self.term,
                window,
                committed,
                released,
                journal_synced,
            };
            return self.become_primary(now, from);
        }
        let Some(at) = self.intact() else {
            // Granted after all, but the state is gone: nobody can run the VM but from its disks.
            out.push(Action::Notice(Notice::TakeoverRefused(Refusal::NoState)));
            return StandbyStep::Stay;
        };
        let Some(s) = self.state.as_mut() else {
            return StandbyStep::Stay;
        };
        if s.tip.epoch > at.epoch {
            while s.held.back().is_some_and(|h| h.epoch.epoch > at.epoch) {
                s.held.pop_back();
            }
            s.tip = at;
            out.push(Action::Truncate { after: at });
        }
        let flights = s
            .held
            .iter()
            .map(|h| Flight {
                epoch: h.epoch,
                flush: h.flush,
                bytes: h.bytes,
                sealed_at: now,
                whole: self.settings.resend_inherited,
            })
            .collect();
        let unsynced = s.held.iter().any(|h| h.flush && h.epoch.epoch > self.durable);
        let window = Window::new(s.base, flights);
        let committed = self.committed.min(at.epoch);
        let released = self.released.min(committed);
        out.push(Action::Notice(Notice::Granted(record.term)));
        let running = self.speculating;
        out.push(Action::Promote {
            term: record.term,
            at,
            released,
            running,
        });
        if unsynced {
            out.push(Action::SyncJournal { through: at.epoch });
        }
        let journal_synced = if unsynced { self.durable } else { at.epoch };
        let from = Inheritance {
            record,
            seen: self.term,
            window,
            committed,
            released,
            journal_synced,
        };
        self.become_primary(now, from)
    }

    fn become_primary(&mut self, now: Micros, from: Inheritance) -> StandbyStep {
        let instance = self.store.instance();
        let mut p = Primary::new(now, self.me.clone(), instance, self.settings.clone(), from);
        p.keep_store(self.store.clone(), self.seen.max(self.top_term));
        StandbyStep::Promoted(Box::new(p))
    }
}
