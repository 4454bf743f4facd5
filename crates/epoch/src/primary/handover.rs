//! Planned promote: one last frozen cut, everything committed and released, then the record names the standby.
//!
//! ```text
//!   Cutting --sealed, guest stands--> Draining --committed, target has it--> Granting --CAS done--> standby
//!      \--cancel, timeout---------------/ \--- (the CAS was not sent yet) ---/
//! ```
//! The old primary stands exactly at the handed-over epoch and the new record lists it as in sync: if the target dies
//! before it runs, the old primary takes over again by the ordinary way, from the same epoch.

use super::{Primary, PrimaryStep, Talk};
use crate::Micros;
use crate::arbiter::VmRecord;
use crate::io::{Action, Notice};
use crate::message::{Body, EpochRef};
use steadfast_types::HostId;

/// How far a handover is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandoverStep {
    Cutting,
    Draining,
    Granting,
}

/// A handover under way.
#[derive(Clone, Debug)]
pub(crate) struct Handover {
    pub to: HostId,
    pub step: HandoverStep,
    pub at: EpochRef,
    pub until: Micros,
}

impl Primary {
    pub(super) fn hand_over(&mut self, now: Micros, to: HostId, out: &mut Vec<Action>) {
        let streaming = self
            .members
            .iter()
            .any(|m| m.host == to && m.talk == Talk::Streaming && !m.lost);
        let refuse = if self.handover.is_some() {
            Some("a handover is under way already")
        } else if !self.record.in_sync.contains(&to) || !streaming {
            Some("only a standby that is in sync and connected can be handed the VM")
        } else if self.proposal.is_some() {
            Some("the in-sync set is being changed; try again")
        } else {
            None
        };
        if let Some(why) = refuse {
            out.push(Action::Notice(Notice::Refused(why)));
            return;
        }
        let until = now.saturating_add(self.settings.handover_timeout_us);
        self.handover = Some(Handover {
            to,
            step: HandoverStep::Cutting,
            at: EpochRef::ZERO,
            until,
        });
    }

    /// Called when the frozen cut is sealed.
    pub(super) fn frozen(&mut self, _now: Micros, at: EpochRef, out: &mut Vec<Action>) {
        match self.handover.as_mut() {
            Some(h) => {
                h.at = at;
                h.step = HandoverStep::Draining;
            }
            // Cancelled in the meantime.
            None => out.push(Action::ResumeGuest),
        }
    }

    pub(super) fn handover_step(&mut self, now: Micros, out: &mut Vec<Action>) {
        let Some(h) = self.handover.as_mut() else { return };
        let target = self.members.iter().find(|m| m.host == h.to);
        let ready = self.progress.released() == h.at.epoch && target.is_some_and(|m| m.staged == h.at.epoch);
        if h.step == HandoverStep::Draining && ready {
            h.step = HandoverStep::Granting;
        }
        // Or it has lost what it had: it says so in a new session.
        let gone =
            target.is_none_or(|m| m.lost || !matches!(m.talk, Talk::Streaming | Talk::Greeting { .. }));
        if now >= h.until || gone {
            self.cancel_hand_over(out);
        }
    }

    /// Cancels if the outcome is still in our hands.
    pub(super) fn cancel_hand_over(&mut self, out: &mut Vec<Action>) {
        if self.proposal.is_some() {
            return;
        }
        if let Some(h) = self.handover.take() {
            out.push(Action::Notice(Notice::Refused(
                "the handover was cancelled; the VM runs on here",
            )));
            // With the cut still outstanding, `frozen` lets the guest go when it comes.
            if h.step != HandoverStep::Cutting {
                out.push(Action::ResumeGuest);
            }
        }
    }

    pub(super) fn handed_over(&mut self, record: VmRecord, out: &mut Vec<Action>) -> PrimaryStep {
        let at = self.handover.as_ref().map_or(self.window.tip(), |h| h.at);
        if let Some(i) = self.members.iter().position(|m| m.host == record.owner) {
            let released = self.progress.released();
            let term = record.term;
            self.record.term = term;
            self.tell(i, Body::Handover { at, released }, out);
        }
        PrimaryStep::HandedOver { record, at }
    }
}
