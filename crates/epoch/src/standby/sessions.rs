//! The standby's side of the conversation: which messages count, greeting, resuming, joining.
//!
//! A message counts if it is of the current session and of no older term. A session's number grows with the term of
//! its primary, so a Hello that was delayed or replayed never opens an older session again.

use super::{Session, Standby, StandbyStep};
use crate::Micros;
use crate::io::{Action, Notice};
use crate::message::{Body, EpochRef, Message, Welcome};
use crate::sabotage::Sabotage;
use steadfast_types::{Epoch, HostId};

impl Standby {
    pub(super) fn message(
        &mut self,
        now: Micros,
        from: &HostId,
        m: Message,
        out: &mut Vec<Action>,
    ) -> StandbyStep {
        match m.body {
            Body::Poll => {
                self.polled(from, m.term, out);
                return StandbyStep::Stay;
            }
            Body::PollReply { staged, promised } => {
                self.poll_reply(now, from, m.term, staged, promised, out);
                return StandbyStep::Stay;
            }
            Body::Fenced => {
                self.seen = self.seen.max(m.term);
                return StandbyStep::Stay;
            }
            Body::Welcome(_)
            | Body::Ack { .. }
            | Body::ChunkAck { .. }
            | Body::Alive { .. }
            | Body::Resend { .. }
            | Body::NoSession => {
                // Meant for a primary that this instance is no longer, or never was.
                out.push(Action::Notice(Notice::Stale(from.clone())));
                return StandbyStep::Stay;
            }
            _ => {}
        }
        let lax = self.settings.broken(Sabotage::AcceptOldTerm);
        if m.term < self.seen && !lax {
            // Fault 48: an old primary, or an old frame.
            let fenced = Message {
                term: self.seen,
                session: m.session,
                body: Body::Fenced,
            };
            out.push(Action::Send {
                to: from.clone(),
                message: fenced,
            });
            out.push(Action::Notice(Notice::Stale(from.clone())));
            return StandbyStep::Stay;
        }
        if m.body == Body::Hello {
            self.hello(now, from, &m, out);
            return StandbyStep::Stay;
        }
        let current = self.owner.as_ref() == Some(from)
            && m.session == self.session_id
            && self.session != Session::Idle;
        if let Body::Handover { at, released } = m.body {
            // Proof enough by itself: only the owner, after its compare-and-swap, says so. But it counts only for the
            // very state that this standby has.
            if current && self.intact() == Some(at) {
                self.seen = self.seen.max(m.term);
                self.released = self.released.max(released);
                self.committed = self.committed.max(at.epoch);
                self.handed(now, out);
            }
            return StandbyStep::Stay;
        }
        let accepted = current || lax && self.session != Session::Idle;
        if !accepted {
            if m.session >= self.session_id {
                // A session whose Hello was lost, or that ended here.
                let body = Body::NoSession;
                out.push(Action::Send {
                    to: from.clone(),
                    message: Message {
                        term: self.seen,
                        session: m.session,
                        body,
                    },
                });
            } else {
                out.push(Action::Notice(Notice::Stale(from.clone())));
            }
            return StandbyStep::Stay;
        }
        self.heard_owner(now, m.term, out);
        match m.body {
            Body::Resume { after } => self.resume(after, out),
            Body::Join { join, next } => self.join(join, next, out),
            Body::Chunk { join, seq } => self.chunk(now, join, seq, out),
            Body::Epoch(h) => self.epoch(now, h, out),
            Body::Heartbeat { seq, cursors, rank } => {
                self.rank = rank;
                self.echo = self.echo.max(seq);
                self.cursors(now, cursors, out);
                match self.session {
                    Session::Joining { join, next } => {
                        self.tell_owner(
                            Body::ChunkAck {
                                join,
                                next,
                                echo: self.echo,
                            },
                            out,
                        );
                    }
                    _ => self.ack(out),
                }
            }
            _ => {}
        }
        StandbyStep::Stay
    }

    /// The owner lives, under this term.
    fn heard_owner(&mut self, now: Micros, term: steadfast_types::Term, out: &mut Vec<Action>) {
        self.silence = 0;
        let risen = term > self.term;
        self.term = self.term.max(term);
        self.seen = self.seen.max(term);
        if risen {
            // The record has moved: a proposal on the old one is dead, a promise for the old term is void.
            self.outstanding = None;
        }
        self.unsuspect(now, risen, out);
    }

    fn hello(&mut self, now: Micros, from: &HostId, m: &Message, out: &mut Vec<Action>) {
        if m.session <= self.session_id {
            if m.session == self.session_id
                && self.session == Session::Greeted
                && self.owner.as_ref() == Some(from)
            {
                self.welcome(out);
            }
            return;
        }
        // Within one term there is one owner; another host with this term is a stray of a restored store.
        if m.term == self.term
            && self.owner.as_ref().is_some_and(|o| o != from)
            && self.session != Session::Idle
        {
            out.push(Action::Notice(Notice::Stale(from.clone())));
            return;
        }
        self.session_id = m.session;
        if self.owner.as_ref() != Some(from) {
            self.rank = None;
        }
        self.owner = Some(from.clone());
        self.echo = 0;
        self.heard = 0;
        let joining = match self.session {
            Session::Joining { .. } => Some(self.session),
            _ => None,
        };
        self.session = Session::Greeted;
        self.heard_owner(now, m.term, out);
        if let Some(Session::Joining { join, next }) = joining {
            self.session = Session::Joining { join, next };
            self.welcome(out);
            return;
        }
        // While a speculation runs or is undone there is no answer: what could be said is not yet known.
        if !self.speculating && !self.undoing {
            self.welcome(out);
        }
    }

    pub(crate) fn welcome(&mut self, out: &mut Vec<Action>) {
        let (staged, applied) = match &self.state {
            Some(s) => (s.staged, s.floor.max_applied(s.applied)),
            None => (None, EpochRef::ZERO),
        };
        let join = match self.session {
            Session::Joining { join, next } => Some((join, next)),
            _ => None,
        };
        let (durable, instance) = (self.durable_through(), self.store.instance());
        let body = Body::Welcome(Welcome {
            staged,
            applied,
            durable,
            join,
            instance,
            disk: self.disk,
        });
        self.tell_owner(body, out);
    }

    fn resume(&mut self, after: EpochRef, out: &mut Vec<Action>) {
        if self.session != Session::Greeted {
            return;
        }
        let Some(s) = self.state.as_mut() else { return };
        let known = after == s.base || s.held.iter().any(|h| h.epoch == after && h.staged);
        if !known || after.epoch < s.floor.epoch.max(s.applying) {
            // Does not fit what is here: start from nothing rather than from something wrong.
            self.lose_state(out);
            self.session = Session::Idle;
            self.tell_owner(Body::NoSession, out);
            return;
        }
        if after.epoch < s.tip.epoch {
            while s.held.back().is_some_and(|h| h.epoch.epoch > after.epoch) {
                s.held.pop_back();
            }
            s.tip = after;
            s.staged = Some(after);
            self.durable = self.durable.min(after.epoch);
            self.committed = self.committed.min(after.epoch);
            self.released = self.released.min(after.epoch);
            out.push(Action::Truncate { after });
        }
        self.session = Session::Following;
        self.ack(out);
    }

    fn join(&mut self, join: u64, next: u64, out: &mut Vec<Action>) {
        match self.session {
            Session::Joining { join: j, next: n } if j == join && n == next => {}
            Session::Joining { join: j, .. } if j == join => return,
            // A Join answers a Welcome. One that comes late or twice must not wipe the state that it led to.
            Session::Following | Session::Idle => return,
            _ => {
                if next != 0 {
                    // Chunks before `next` were not kept: begin again.
                    self.session = Session::Idle;
                    self.tell_owner(Body::NoSession, out);
                    return;
                }
                self.state = None;
                self.durable = Epoch::ZERO;
                self.committed = Epoch::ZERO;
                self.released = Epoch::ZERO;
                self.stable = Epoch::ZERO;
                self.session = Session::Joining { join, next: 0 };
                out.push(Action::BeginJoin { join });
            }
        }
        self.tell_owner(
            Body::ChunkAck {
                join,
                next,
                echo: self.echo,
            },
            out,
        );
    }

    fn chunk(&mut self, now: Micros, join: u64, seq: u64, out: &mut Vec<Action>) {
        let Session::Joining { join: j, next } = self.session else {
            self.greet_again(now, out);
            return;
        };
        if j != join {
            return;
        }
        if seq == next {
            out.push(Action::StoreChunk { join, seq });
            self.session = Session::Joining { join, next: next + 1 };
        }
        if seq > next && now >= self.resend_at {
            // A chunk before it was lost: go on in a new session, from exactly here.
            self.resend_at = now.saturating_add(self.settings.resend_us);
            self.tell_owner(Body::NoSession, out);
        }
        let next = if seq == next { next + 1 } else { next };
        self.tell_owner(
            Body::ChunkAck {
                join,
                next,
                echo: self.echo,
            },
            out,
        );
    }
}

impl EpochRef {
    /// The later of the two, by number.
    fn max_applied(self, other: EpochRef) -> EpochRef {
        if other.epoch > self.epoch { other } else { self }
    }
}
