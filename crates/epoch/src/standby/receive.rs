//! Receive, stage, acknowledge, apply (I3, I5).

use super::{Session, Standby, Tips};
use crate::Micros;
use crate::invariants;
use crate::io::{Action, Notice};
use crate::message::{Body, Cursors, EpochHeader, EpochRef};
use crate::sabotage::Sabotage;
use std::collections::VecDeque;
use steadfast_types::{Epoch, HostId, Term};

/// One epoch held by the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub epoch: EpochRef,
    pub flush: bool,
    pub bytes: u64,
    pub staged: bool,
}

impl Standby {
    /// An epoch arrived whole.
    pub(super) fn epoch(&mut self, now: Micros, h: EpochHeader, out: &mut Vec<Action>) {
        if self.takeover.is_some() || self.speculating || self.undoing {
            // What a takeover goes on from is fixed; all this is asked for again if it comes to nothing.
            return;
        }
        let may = match self.session {
            Session::Following => true,
            Session::Joining { join, next } => {
                let complete = h.base.is_some_and(|b| b.join == join && b.chunks == next);
                if complete {
                    // The copy plus this epoch is the first complete state.
                    let held = VecDeque::new();
                    let (base, tip) = (h.prev, h.prev);
                    let applied = EpochRef::ZERO;
                    let applying = Epoch::ZERO;
                    self.state = Some(Tips {
                        tip,
                        staged: None,
                        floor: h.epoch,
                        applying,
                        applied,
                        held,
                        base,
                    });
                    self.durable = Epoch::ZERO;
                    self.session = Session::Following;
                }
                complete
            }
            Session::Idle | Session::Greeted => false,
        };
        if !may {
            self.greet_again(now, out);
            return;
        }
        let Some(s) = self.state.as_mut() else { return };
        let gaps = self.settings.broken(Sabotage::AcceptGaps) && h.epoch.epoch > s.tip.epoch;
        if h.prev == s.tip && h.epoch.epoch == s.tip.epoch.next() || gaps {
            if !gaps {
                invariants::i3_follows(s.tip, h.prev, h.epoch);
            }
            s.tip = h.epoch;
            s.held.push_back(Held {
                epoch: h.epoch,
                flush: h.flush,
                bytes: h.bytes,
                staged: false,
            });
            out.push(Action::Stage {
                epoch: h.epoch,
                flush: h.flush,
            });
            if self.settings.broken(Sabotage::AckBeforeStage) {
                self.staged(h.epoch, out);
            }
        } else if h.epoch.epoch > s.tip.epoch {
            self.ask_again(now, out);
        } else {
            // Seen before: the acknowledgement may have been lost.
            self.ack(out);
        }
        self.cursors(now, h.cursors, out);
    }

    /// A piece of a record arrived: the owner lives, and so does the way to it.
    pub(super) fn bulk(&mut self, now: Micros, from: &HostId, term: Term, out: &mut Vec<Action>) {
        let busy = self.takeover.is_some() || self.speculating || self.undoing;
        let owner = self.owner.as_ref() == Some(from) && term == self.term && term >= self.seen;
        if busy || !owner || self.session == Session::Idle {
            return;
        }
        self.silence = 0;
        self.heard += 1;
        if now >= self.tell_at {
            self.tell_at = now.saturating_add(self.settings.heartbeat_us);
            self.tell_owner(Body::Alive { heard: self.heard }, out);
        }
    }

    /// Something that should have come before was lost: asks for a new Hello, at most so often.
    pub(super) fn greet_again(&mut self, now: Micros, out: &mut Vec<Action>) {
        let busy = self.takeover.is_some() || self.speculating || self.undoing;
        if self.session == Session::Greeted && now >= self.resend_at && !busy {
            self.resend_at = now.saturating_add(self.settings.resend_us);
            self.tell_owner(Body::NoSession, out);
        }
    }

    /// Asks for everything after the tip, at most so often.
    fn ask_again(&mut self, now: Micros, out: &mut Vec<Action>) {
        if now < self.resend_at || self.takeover.is_some() {
            return;
        }
        let after = match (&self.state, self.session) {
            (Some(s), Session::Following) => s.tip,
            _ => return,
        };
        self.resend_at = now.saturating_add(self.settings.resend_us);
        self.tell_owner(Body::Resend { after }, out);
        out.push(Action::Notice(Notice::AskedAgain(after)));
    }

    pub(super) fn corrupt(&mut self, now: Micros, from: &HostId, out: &mut Vec<Action>) {
        if self.owner.as_ref() == Some(from) {
            self.silence = 0;
            self.ask_again(now, out);
        }
    }

    /// The primary's cursors: what is committed may be applied, what is stable forgotten.
    pub(super) fn cursors(&mut self, now: Micros, c: Cursors, out: &mut Vec<Action>) {
        if self.session != Session::Following {
            // Before Resume the tail may be of another history: these numbers do not speak of it. But if epochs are
            // being sent, the Resume was lost.
            if self.session == Session::Greeted && c.sent > Epoch::ZERO {
                self.greet_again(now, out);
            }
            return;
        }
        self.committed = self.committed.max(c.committed);
        self.released = self.released.max(c.released.min(c.committed));
        self.stable = self.stable.max(c.stable.min(c.committed));
        let behind = self.state.as_ref().is_some_and(|s| c.sent > s.tip.epoch);
        if behind {
            self.ask_again(now, out);
        }
        self.apply(out);
    }

    pub(super) fn staged(&mut self, epoch: EpochRef, out: &mut Vec<Action>) {
        let Some(s) = self.state.as_mut() else { return };
        let Some(h) = s.held.iter_mut().find(|h| h.epoch == epoch) else {
            return;
        };
        h.staged = true;
        // Unbroken only: stop at the first that is not staged.
        let unbroken = s.held.iter().take_while(|h| h.staged).last().map(|h| h.epoch);
        if unbroken.is_some_and(|u| s.staged.is_none_or(|old| u.epoch > old.epoch)) {
            s.staged = unbroken;
        }
        self.ack(out);
        self.apply(out);
    }

    /// Acknowledges the staged sequence. Not while asking for the grant or undoing a speculation: what was
    /// acknowledged must be what a takeover goes on from. Not after a promise.
    pub(crate) fn ack(&mut self, out: &mut Vec<Action>) {
        let quiet =
            self.takeover.is_some() || self.undoing || self.promised >= self.term && self.promised.0 > 0;
        if quiet || !matches!(self.session, Session::Following | Session::Greeted) {
            return;
        }
        // Before Resume only the echo speaks: what is staged may be of another history.
        let following = self.session == Session::Following;
        let staged = self.intact().filter(|_| following).unwrap_or(EpochRef::ZERO);
        let durable = if following {
            self.durable_through()
        } else {
            Epoch::ZERO
        };
        self.tell_owner(
            Body::Ack {
                staged,
                durable,
                echo: self.echo,
                top: self.seen.max(self.top_term),
            },
            out,
        );
    }

    /// Up to where every flush epoch's disk writes are fsynced: epochs without a flush need none.
    pub(crate) fn durable_through(&self) -> Epoch {
        let Some(s) = &self.state else { return Epoch::ZERO };
        let Some(staged) = s.staged else {
            return Epoch::ZERO;
        };
        let first_unsynced = s.held.iter().find(|h| h.flush && h.epoch.epoch > self.durable);
        first_unsynced
            .map_or(staged.epoch, |h| h.epoch.epoch.prev())
            .min(staged.epoch)
    }

    /// Applies what is committed and staged; memory, devices and disk together.
    pub(super) fn apply(&mut self, out: &mut Vec<Action>) {
        if self.speculating || self.undoing || self.takeover.is_some() {
            return;
        }
        let committed = self.committed;
        let Some(s) = self.state.as_mut() else { return };
        let Some(staged) = s.staged else { return };
        let rash = self.settings.broken(Sabotage::ApplyUncommitted);
        let to = if rash {
            staged.epoch
        } else {
            staged.epoch.min(committed)
        };
        if to > s.applying && to >= s.floor.epoch {
            if !rash {
                invariants::i3_apply(s.applying, staged.epoch, committed, to);
            }
            s.applying = to;
            if let Some(h) = s.held.iter().find(|h| h.epoch.epoch == to) {
                s.floor = h.epoch;
            }
            out.push(Action::Apply { through: to });
        }
    }

    /// Memory, devices and disk stand at this epoch; records that no other standby may need are dropped.
    pub(super) fn applied(&mut self, through: Epoch, out: &mut Vec<Action>) {
        let stable = self.stable;
        let Some(s) = self.state.as_mut() else { return };
        let through = through.min(s.applying);
        if let Some(h) = s.held.iter().find(|h| h.epoch.epoch == through) {
            s.applied = h.epoch;
            self.disk = h.epoch;
        }
        let done = s.applied.epoch.min(stable);
        let mut forgot = None;
        // An unsynced flush stays, however old: what is durable here is judged by what is held.
        let durable = self.durable;
        while let Some(h) = s
            .held
            .front()
            .filter(|h| h.epoch.epoch <= done && !(h.flush && h.epoch.epoch > durable))
        {
            s.base = h.epoch;
            forgot = Some(h.epoch.epoch);
            s.held.pop_front();
        }
        if let Some(through) = forgot {
            out.push(Action::Forget { through });
        }
    }
}
