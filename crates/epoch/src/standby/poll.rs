//! Asking the other standbys before a takeover, where fewer acknowledgements than standbys are required (I4, I5).
//!
//! With `k` of `n` acknowledgements a committed epoch may be missing here. A candidate needs `n - k` promises: each says
//! what that standby has staged and that it acknowledges nothing more of this term. Then any `k` acknowledging
//! standbys include the candidate or one of those, so what none of them has was never committed. A promise is kept until
//! the term changes; a candidate that learns of more elsewhere gives way.

use super::Standby;
use crate::Micros;
use crate::io::Action;
use crate::message::{Body, EpochRef, Message};
use steadfast_types::{HostId, Term};

impl Standby {
    /// Polls the others until enough have promised; gives way to one who has more.
    pub(crate) fn poll_step(&mut self, now: Micros, out: &mut Vec<Action>) {
        let me = self.me.clone();
        let resend = self.settings.resend_us;
        let durable = self.durable_through();
        let Some(t) = self.takeover.as_mut() else { return };
        let (Some((store, rec)), Some(at)) = (t.polling.clone(), t.at) else {
            return;
        };
        let newer = |r: &EpochRef| (r.term, r.epoch) > (at.term, at.epoch) && r.epoch > at.epoch;
        let promised = t
            .polls
            .values()
            .filter(|(staged, yes)| *yes && !newer(staged))
            .count();
        let behind = t.polls.values().any(|(staged, _)| newer(staged));
        // A flush that was committed by the fsyncs of others must be on this disk too before this host is named as the
        // owner, whose disk is the one that counts (I5).
        if !behind && promised >= rec.polls_needed() && durable >= at.epoch {
            t.polling = None;
            self.propose(now, store, rec, out);
            return;
        }
        if now < t.next_poll {
            return;
        }
        t.next_poll = now.saturating_add(resend);
        t.rounds += 1;
        for to in rec.in_sync.iter().filter(|&h| *h != me) {
            let message = Message {
                term: rec.term,
                session: 0,
                body: Body::Poll,
            };
            out.push(Action::Send {
                to: to.clone(),
                message,
            });
        }
        // From time to time look at the record again: another, who has more, may have taken over.
        if t.rounds.is_multiple_of(4) {
            t.polling = None;
        }
    }

    /// Another standby of the VM asks what is here, and for the promise.
    pub(crate) fn polled(&mut self, from: &HostId, term: Term, out: &mut Vec<Action>) {
        let Some(staged) = self.intact() else { return };
        // Who hears the primary well does not help to depose it (I7).
        let silent = self.takeover.is_some() || self.silence >= self.settings.suspect_us / 2;
        let promised = silent && self.term <= term && !self.undoing;
        if promised {
            self.promised = self.promised.max(term);
        }
        let message = Message {
            term,
            session: 0,
            body: Body::PollReply { staged, promised },
        };
        out.push(Action::Send {
            to: from.clone(),
            message,
        });
    }

    pub(crate) fn poll_reply(
        &mut self,
        now: Micros,
        from: &HostId,
        term: Term,
        staged: EpochRef,
        promised: bool,
        out: &mut Vec<Action>,
    ) {
        let Some(t) = self.takeover.as_mut() else { return };
        if t.polling
            .as_ref()
            .is_some_and(|(_, r)| r.term == term && r.in_sync.contains(from))
        {
            t.polls.insert(from.clone(), (staged, promised));
            self.poll_step(now, out);
        }
    }
}
