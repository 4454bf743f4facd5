//! The standby: receive, validate, stage, acknowledge whole epochs, apply what is committed; suspect; take over.
//!
//! ```text
//!                Join            base epoch staged
//!   no state  ----------> joining ----------------> following <--- Resume (state matches) --- greeting
//!      ^                                                |
//!      +--- state lost, does not match, speculation ----+---- silence: asking (`takeover.rs`) ----> Primary
//!           not undoable and refused
//! ```
//!
//! What it holds is an unbroken sequence of epochs: `applied <= staged <= tip`. The tip is what has arrived, `staged` is
//! what it has acknowledged or may; both only grow within one primary's stream. Only a primary of a later term may
//! make it drop staged epochs (`Resume`), and never behind what is applied (I3).

mod poll;
mod receive;
mod sessions;

use crate::Micros;
use crate::arbiter::{Instance, Proposal, StoreClient};
use crate::io::{Action, Event, Notice};
use crate::message::{Body, EpochRef, Message};
use crate::primary::Primary;
use crate::settings::Settings;
use crate::takeover::Takeover;
use receive::Held;
use std::collections::VecDeque;
use steadfast_types::{Epoch, HostId, Term};

/// What the standby is doing, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyMode {
    /// No session with a primary.
    Idle,
    /// A session is being opened.
    Greeting,
    /// A full copy is being received.
    Joining,
    /// Follows the epochs.
    Following,
    /// Suspects its primary and asks for the grant.
    Asking,
}

/// The standby, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Highest term seen.
    pub term: Term,
    /// What it is doing.
    pub mode: StandbyMode,
    /// Its primary's host.
    pub owner: Option<HostId>,
    /// Newest acknowledged epoch; `None`: no usable state.
    pub staged: Option<EpochRef>,
    /// Newest applied epoch.
    pub applied: EpochRef,
    /// The guest runs here speculatively, outputs held.
    pub speculating: bool,
}

/// Where the session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Session {
    Idle,
    Greeted,
    Joining { join: u64, next: u64 },
    Following,
}

/// The complete state that this standby holds, unless it is empty.
#[derive(Clone, Debug)]
pub(crate) struct Tips {
    /// Newest epoch received in order and handed to staging.
    pub tip: EpochRef,
    /// Newest epoch of the unbroken staged sequence; `None` until the base epoch of a copy is staged.
    pub staged: Option<EpochRef>,
    /// It cannot go back behind this: applied, or the base of its copy.
    pub floor: EpochRef,
    /// `Action::Apply` was given up to here; reported back up to here.
    pub applying: Epoch,
    pub applied: EpochRef,
    /// Epochs after `base`, up to the tip.
    pub held: VecDeque<Held>,
    pub base: EpochRef,
}

/// Result of an event.
pub(crate) enum StandbyStep {
    Stay,
    Promoted(Box<Primary>),
}

/// The standby's state.
#[derive(Clone, Debug)]
pub struct Standby {
    pub(crate) me: HostId,
    pub(crate) settings: Settings,
    /// Highest term seen, from anyone.
    pub(crate) seen: Term,
    pub(crate) owner: Option<HostId>,
    /// The term of the session: what this standby acknowledges under.
    pub(crate) term: Term,
    pub(crate) session_id: u64,
    pub(crate) session: Session,
    pub(crate) state: Option<Tips>,
    pub(crate) committed: Epoch,
    pub(crate) released: Epoch,
    pub(crate) stable: Epoch,
    pub(crate) durable: Epoch,
    pub(crate) disk: EpochRef,
    pub(crate) echo: u64,
    /// Pieces of bulk that arrived in this session, and when the primary is told next.
    pub(crate) heard: u64,
    pub(crate) tell_at: Micros,
    /// Place among the in-sync standbys, as last heard.
    pub(crate) rank: Option<u8>,
    pub(crate) silence: Micros,
    pub(crate) last_seen: Micros,
    pub(crate) resend_at: Micros,
    pub(crate) takeover: Option<Takeover>,
    /// The guest was told to run speculatively and not yet to stop.
    pub(crate) speculating: bool,
    /// A discarded speculation is being undone: no acknowledgement until it is.
    pub(crate) undoing: bool,
    /// Promised another standby to acknowledge nothing of this term any more.
    pub(crate) promised: Term,
    /// A compare-and-swap of this instance whose outcome is unknown.
    pub(crate) outstanding: Option<Proposal>,
    pub(crate) retry_at: Micros,
    pub(crate) top_term: Term,
    pub(crate) store: StoreClient,
}

impl Standby {
    /// An empty standby. `disk`: the newest epoch that its volumes stand at.
    #[must_use]
    pub fn new(now: Micros, me: HostId, instance: Instance, settings: Settings, disk: EpochRef) -> Self {
        Self {
            store: StoreClient::new(instance, settings.store_timeout_us),
            me,
            settings,
            seen: Term::ZERO,
            owner: None,
            term: Term::ZERO,
            session_id: 0,
            session: Session::Idle,
            state: None,
            committed: Epoch::ZERO,
            released: Epoch::ZERO,
            stable: Epoch::ZERO,
            durable: Epoch::ZERO,
            disk,
            echo: 0,
            heard: 0,
            tell_at: 0,
            rank: None,
            silence: 0,
            last_seen: now,
            resend_at: 0,
            takeover: None,
            speculating: false,
            undoing: false,
            promised: Term::ZERO,
            outstanding: None,
            retry_at: 0,
            top_term: Term::ZERO,
        }
    }

    /// Goes on with the store client of the primary it was, so that request ids and nonces stay unique.
    pub(crate) fn keep_store(&mut self, (store, top): (StoreClient, Term)) {
        self.store = store;
        self.top_term = self.top_term.max(top);
    }

    /// A former primary that stands exactly at `at`, which it handed over.
    pub(crate) fn with_state(mut self, at: EpochRef, owner: HostId, seen: Term, durable: Epoch) -> Self {
        self.seen = seen;
        self.term = seen;
        self.owner = Some(owner);
        // The new owner comes first if both have to find out by themselves.
        self.rank = Some(1);
        self.committed = at.epoch;
        self.released = at.epoch;
        self.stable = at.epoch;
        self.durable = durable;
        self.disk = at;
        self.state = Some(Tips {
            tip: at,
            staged: Some(at),
            floor: at,
            applying: at.epoch,
            applied: at,
            held: VecDeque::new(),
            base: at,
        });
        self
    }

    pub(crate) fn handle(&mut self, now: Micros, event: Event, out: &mut Vec<Action>) -> StandbyStep {
        let now = now.max(self.last_seen);
        let step = now - self.last_seen;
        self.last_seen = now;
        let broken = self.settings.broken(crate::Sabotage::CountOwnStarvation);
        let cap = if broken {
            Micros::MAX
        } else {
            self.settings.step_cap_us
        };
        self.silence = self.silence.saturating_add(step.min(cap));
        match event {
            Event::Message { from, message } => {
                if let StandbyStep::Promoted(p) = self.message(now, &from, message, out) {
                    return StandbyStep::Promoted(p);
                }
            }
            Event::Bulk { from, term } => self.bulk(now, &from, term, out),
            Event::Corrupt { from } => self.corrupt(now, &from, out),
            Event::Store(reply) => {
                if let StandbyStep::Promoted(p) = self.store_reply(now, reply, out) {
                    return StandbyStep::Promoted(p);
                }
            }
            Event::PeerDied(host) => {
                if self.owner.as_ref() == Some(&host) {
                    self.silence = self.settings.suspect_us;
                }
            }
            Event::Staged { epoch } => self.staged(epoch, out),
            Event::JournalSynced { through } => {
                let staged = self.staged_epoch();
                self.durable = self.durable.max(through.min(staged));
                self.ack(out);
            }
            Event::Applied { through } => self.applied(through, out),
            Event::SpeculationDiscarded { intact } => self.undone(intact, out),
            Event::StateLost => self.lose_state(out),
            Event::ColdStart => self.cold_start(out),
            Event::HandOver(_) | Event::AddStandby(_) => {
                out.push(Action::Notice(Notice::Refused(
                    "this instance is not the primary",
                )));
            }
            Event::Connected(_)
            | Event::Disconnected(_)
            | Event::Tick
            | Event::RemoveStandby(_)
            | Event::CancelHandOver
            | Event::Output
            | Event::CutWanted
            | Event::Flush
            | Event::Dirty { .. }
            | Event::Sealed(_)
            | Event::ChunkSent { .. } => {}
        }
        self.watch(now, out)
    }

    /// Newest acknowledged epoch, zero if none.
    pub(crate) fn staged_epoch(&self) -> Epoch {
        self.state
            .as_ref()
            .and_then(|s| s.staged)
            .map_or(Epoch::ZERO, |r| r.epoch)
    }

    /// The complete state it could go on from.
    pub(crate) fn intact(&self) -> Option<EpochRef> {
        self.state.as_ref().and_then(|s| s.staged)
    }

    pub(crate) fn tell(&self, to: &HostId, body: Body, out: &mut Vec<Action>) {
        let message = Message {
            term: self.seen,
            session: self.session_id,
            body,
        };
        out.push(Action::Send {
            to: to.clone(),
            message,
        });
    }

    pub(crate) fn tell_owner(&self, body: Body, out: &mut Vec<Action>) {
        if let Some(owner) = &self.owner {
            self.tell(owner, body, out);
        }
    }

    /// State is gone: never promote, and let the primary know at the next Hello.
    pub(crate) fn lose_state(&mut self, out: &mut Vec<Action>) {
        self.state = None;
        self.durable = Epoch::ZERO;
        // Also in the middle of a copy: what it has brought so far cannot be told from what it has not, and the pieces that follow
        // would be taken as if they completed it.
        if matches!(self.session, Session::Following | Session::Joining { .. }) {
            self.session = Session::Idle;
            self.tell_owner(Body::NoSession, out);
        }
    }

    /// The next moment at which time alone changes something.
    #[must_use]
    pub fn deadline(&self) -> Micros {
        // Silence is counted in steps no longer than the cap, so ticks must come at least that often.
        let mut t = self.last_seen.saturating_add(self.settings.step_cap_us / 2);
        if let Some(d) = self.store.deadline() {
            t = t.min(d);
        }
        t
    }

    /// The highest term seen.
    #[must_use]
    pub fn seen(&self) -> Term {
        self.seen
    }

    /// Everything a status page shows.
    #[must_use]
    pub fn status(&self) -> StandbyStatus {
        let mode = match self.session {
            _ if self.takeover.is_some() => StandbyMode::Asking,
            Session::Idle => StandbyMode::Idle,
            Session::Greeted => StandbyMode::Greeting,
            Session::Joining { .. } => StandbyMode::Joining,
            Session::Following => StandbyMode::Following,
        };
        StandbyStatus {
            term: self.seen,
            mode,
            owner: self.owner.clone(),
            staged: self.intact(),
            applied: self.state.as_ref().map_or(EpochRef::ZERO, |s| s.applied),
            speculating: self.speculating,
        }
    }
}
