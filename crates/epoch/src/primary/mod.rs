//! The primary: seals, sends, commits, releases; looks after its standbys; asks the store when the set changes.
//!
//! ```text
//!                   standby caught up, store granted           standby lost
//!   Alone / WarmUp ----------------------------> Protected ------------------> Holding
//!      ^                                          |    ^                       |    |
//!      |                                          |    +---- heard again ------+    |
//!      +------------------------------ store granted to go on without it -----------+
//!   any ---- handover: HandingOver ----> Standby (with state)
//!   any ---- another holds a higher term ----> Standby (empty): the guest is stopped
//! ```
//!
//! The phases are derived, not stored: what holds outputs is only the commit rule (`commit.rs`), which looks at the
//! record in force, a proposal that may be in force, and the acknowledgements. There is no flag that could be wrong.

mod commit;
mod cutting;
mod grant;
mod handover;
mod members;
mod window;

use crate::Micros;
use crate::arbiter::{Instance, Proposal, StoreClient, VmRecord};
use crate::invariants;
use crate::io::{Action, Event, Notice};
use crate::message::{Body, EpochRef, Message};
use crate::progress::Progress;
use crate::sabotage::Sabotage;
use crate::settings::Settings;
use cutting::Cutting;
use handover::{Handover, HandoverStep};
use members::{Member, Talk};
use steadfast_types::{Epoch, HostId, Term};
pub(crate) use window::{Flight, Window};

/// Most standbys of one VM.
pub const STANDBYS_MAX: usize = 3;

/// What the primary is doing, for status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No standby, none wanted.
    Alone,
    /// No standby in sync yet; a copy is under way or awaited.
    WarmUp,
    /// Could survive the loss of this host right now.
    Protected,
    /// Outputs are held until a standby is heard again or the store grants to go on without it.
    Holding,
    /// A planned promote is under way.
    HandingOver,
}

/// One standby, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberStatus {
    /// Which host.
    pub host: HostId,
    /// Listed as in sync.
    pub in_sync: bool,
    /// Does not answer.
    pub lost: bool,
    /// Newest acknowledged epoch.
    pub staged: Epoch,
    /// Full copy under way: chunks acknowledged and bytes still to be copied.
    pub copying: Option<(u64, u64)>,
}

/// The primary, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimaryStatus {
    /// The term held.
    pub term: Term,
    /// See [`Phase`].
    pub phase: Phase,
    /// The cursors.
    pub progress: Progress,
    /// Sealed bytes that are not yet acknowledged by all.
    pub bytes_in_flight: u64,
    /// The standbys.
    pub members: Vec<MemberStatus>,
    /// Whom it is being handed over to.
    pub handing_to: Option<HostId>,
}

/// What became of the role after an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PrimaryStep {
    /// Still primary.
    Stay,
    /// Another instance holds this higher term.
    Lost { term: Term },
    /// Handed over at this epoch, under this record.
    HandedOver { record: VmRecord, at: EpochRef },
}

/// The primary's state.
#[derive(Clone, Debug)]
pub struct Primary {
    me: HostId,
    pub(crate) settings: Settings,
    record: VmRecord,
    progress: Progress,
    window: Window,
    members: Vec<Member>,
    cutting: Cutting,
    store: StoreClient,
    proposal: Option<Proposal>,
    handover: Option<Handover>,
    journal_synced: Epoch,
    sessions: u64,
    ping: u64,
    next_heartbeat: Micros,
    next_check: Micros,
    last_seen: Micros,
    top_term: Term,
    rumour: Term,
    reassert: Option<u64>,
    was_holding: bool,
}

/// What a new primary begins with.
pub(crate) struct Inheritance {
    pub record: VmRecord,
    pub seen: Term,
    pub window: Window,
    pub committed: Epoch,
    pub released: Epoch,
    pub journal_synced: Epoch,
}

impl Primary {
    pub(crate) fn new(
        now: Micros,
        me: HostId,
        instance: Instance,
        settings: Settings,
        from: Inheritance,
    ) -> Self {
        invariants::i2_owner(&me, &from.record.owner);
        invariants::i2_term_grows(from.seen, from.record.term);
        let term = from.record.term;
        let progress = Progress::starting(from.window.tip().epoch, from.committed, from.released);
        let members = from
            .record
            .in_sync
            .iter()
            .map(|h| Member::new(h.clone(), now))
            .collect();
        Self {
            store: StoreClient::new(instance, settings.store_timeout_us),
            me,
            record: from.record,
            progress,
            window: from.window,
            members,
            cutting: Cutting::starting(now),
            proposal: None,
            handover: None,
            journal_synced: from.journal_synced,
            sessions: term.0 << 24,
            ping: 0,
            next_heartbeat: now,
            next_check: now.saturating_add(settings.record_check_us),
            last_seen: now,
            top_term: term,
            rumour: Term::ZERO,
            reassert: None,
            was_holding: false,
            settings,
        }
    }

    pub(crate) fn handle(&mut self, now: Micros, event: Event, out: &mut Vec<Action>) -> PrimaryStep {
        let now = now.max(self.last_seen);
        let step = now - self.last_seen;
        self.last_seen = now;
        let counted = step.min(self.settings.step_cap_us);
        let was = match event {
            Event::Store(reply) => self.store_reply(now, reply, out),
            other => {
                self.event(now, other, out);
                PrimaryStep::Stay
            }
        };
        if was != PrimaryStep::Stay {
            return was;
        }
        self.run(now, counted, out);
        PrimaryStep::Stay
    }

    /// Everything that may follow from any event.
    fn run(&mut self, now: Micros, step: Micros, out: &mut Vec<Action>) {
        self.listen(now, step, out);
        if now >= self.next_heartbeat {
            self.next_heartbeat = now.saturating_add(self.settings.heartbeat_us);
            self.heartbeat(out);
        }
        for i in 0..self.members.len() {
            self.pump(now, i, out);
        }
        self.advance(out);
        self.handover_step(now, out);
        self.shed_laggards(now, out);
        self.let_go();
        self.store_step(now, out);
        self.cut_if_due(now, out);
    }

    fn event(&mut self, now: Micros, event: Event, out: &mut Vec<Action>) {
        match event {
            Event::Message { from, message } => self.message(now, &from, message, out),
            Event::Connected(host) | Event::Disconnected(host) => {
                // Greet at once: a new connection may have lost messages of the old one.
                if let Some(i) = self.members.iter().position(|m| m.host == host) {
                    self.greet(now, i, out);
                }
            }
            Event::PeerDied(host) => {
                if let Some(m) = self.members.iter_mut().find(|m| m.host == host && !m.lost) {
                    m.silence = self.settings.standby_lost_us;
                    m.lost = true;
                    out.push(Action::Notice(Notice::StandbyLost(host)));
                }
            }
            Event::AddStandby(host) => self.add_standby(now, host, out),
            Event::RemoveStandby(host) => {
                self.members
                    .iter_mut()
                    .filter(|m| m.host == host)
                    .for_each(|m| m.leaving = true);
            }
            Event::HandOver(to) => self.hand_over(now, to, out),
            Event::CancelHandOver => self.cancel_hand_over(out),
            // Where outputs are not held, nobody waits for the cut.
            Event::Output if !self.settings.hold_outputs => {}
            Event::Output => {
                self.cutting.output_since.get_or_insert(now);
            }
            Event::CutWanted => {
                self.cutting.wanted_since.get_or_insert(now);
            }
            Event::Flush => {
                self.cutting.flush_since.get_or_insert(now);
            }
            Event::Dirty { bytes } => self.cutting.dirty_bytes = bytes,
            Event::Sealed(s) => self.sealed(now, s, out),
            Event::JournalSynced { through } => {
                self.journal_synced = self.journal_synced.max(through.min(self.progress.sealed()));
            }
            Event::ChunkSent {
                to,
                join,
                seq,
                remaining,
            } => self.chunk_sent(now, &to, join, seq, remaining, out),
            Event::ColdStart => {
                out.push(Action::Notice(Notice::Refused(
                    "this instance runs the VM already",
                )));
            }
            Event::Corrupt { .. }
            | Event::Bulk { .. }
            | Event::Tick
            | Event::Store(_)
            | Event::Staged { .. }
            | Event::Applied { .. }
            | Event::SpeculationDiscarded { .. }
            | Event::StateLost => {}
        }
    }

    /// Somebody has seen, or proposed, this term.
    fn rumour(&mut self, term: Term) {
        self.top_term = self.top_term.max(term);
        if term > self.record.term {
            self.rumour = self.rumour.max(term);
        }
    }

    fn add_standby(&mut self, now: Micros, host: HostId, out: &mut Vec<Action>) {
        if let Some(m) = self.members.iter_mut().find(|m| m.host == host && m.leaving) {
            m.leaving = false;
            return;
        }
        let refuse = if host == self.me {
            Some("a VM cannot be mirrored to its own host")
        } else if self.members.iter().any(|m| m.host == host) {
            Some("this host is a standby already")
        } else if self.members.len() >= STANDBYS_MAX {
            Some("a VM has at most three standbys; remove one first")
        } else {
            None
        };
        match refuse {
            Some(why) => out.push(Action::Notice(Notice::Refused(why))),
            None => self.members.push(Member::new(host, now)),
        }
    }

    fn message(&mut self, now: Micros, from: &HostId, message: Message, out: &mut Vec<Action>) {
        if message.term > self.record.term {
            // Somebody knows a higher term: look it up. Until then nothing more can commit without standbys.
            self.rumour(message.term);
            return;
        }
        let from_primary = matches!(
            message.body,
            Body::Hello
                | Body::Resume { .. }
                | Body::Join { .. }
                | Body::Chunk { .. }
                | Body::Epoch(_)
                | Body::Heartbeat { .. }
                | Body::Handover { .. }
        );
        if from_primary {
            // A primary of an older term: tell it.
            let fenced = Message {
                term: self.record.term,
                session: message.session,
                body: Body::Fenced,
            };
            out.push(Action::Send {
                to: from.clone(),
                message: fenced,
            });
            out.push(Action::Notice(Notice::Stale(from.clone())));
            return;
        }
        match self
            .members
            .iter()
            .position(|m| m.host == *from && m.session == message.session)
        {
            Some(i) => self.heard(now, i, message.body, out),
            None if matches!(message.body, Body::Poll) => {
                // A standby that cannot hear this primary asks another host and reaches us: we live.
                let body = Body::PollReply {
                    staged: EpochRef::ZERO,
                    promised: false,
                };
                let reply = Message {
                    term: self.record.term,
                    session: 0,
                    body,
                };
                out.push(Action::Send {
                    to: from.clone(),
                    message: reply,
                });
            }
            None => out.push(Action::Notice(Notice::Stale(from.clone()))),
        }
    }

    /// The next moment at which time alone changes something.
    #[must_use]
    pub fn deadline(&self) -> Micros {
        let mut t = self.next_heartbeat;
        if self.members.iter().any(|m| !m.lost) {
            // Silence is counted in steps no longer than the cap, so ticks must come at least that often, however rare
            // heartbeats are.
            t = t.min(self.last_seen.saturating_add(self.settings.step_cap_us / 2));
        }
        if let Some(d) = self.store.deadline() {
            t = t.min(d);
        }
        if let Some(d) = self.cut_deadline(self.last_seen) {
            t = t.min(d);
        }
        t
    }

    /// The term held.
    #[must_use]
    pub fn term(&self) -> Term {
        self.record.term
    }

    /// The record in force, as this primary knows it.
    #[must_use]
    pub fn record(&self) -> &VmRecord {
        &self.record
    }

    /// The cursors.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What it is doing.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.handover.is_some() {
            Phase::HandingOver
        } else if self.holding() && !self.settings.broken(Sabotage::AlwaysProtected) {
            Phase::Holding
        } else if !self.record.in_sync.is_empty() {
            Phase::Protected
        } else if self.members.is_empty() {
            Phase::Alone
        } else {
            Phase::WarmUp
        }
    }

    /// Everything a status page shows.
    #[must_use]
    pub fn status(&self) -> PrimaryStatus {
        let members = self.members.iter().map(|m| MemberStatus {
            host: m.host.clone(),
            in_sync: self.record.in_sync.contains(&m.host),
            lost: m.lost,
            staged: m.staged,
            copying: m.copy.map(|c| (c.acked, c.remaining)),
        });
        PrimaryStatus {
            term: self.record.term,
            phase: self.phase(),
            progress: self.progress,
            bytes_in_flight: self.window.bytes(),
            members: members.collect(),
            handing_to: self.handover.as_ref().map(|h| h.to.clone()),
        }
    }

    /// Goes on with the store client of the standby it was, so that request ids and nonces stay unique; `top` is the
    /// highest term that standby has seen or proposed.
    pub(crate) fn keep_store(&mut self, store: StoreClient, top: Term) {
        self.store = store;
        self.top_term = self.top_term.max(top);
    }

    pub(crate) fn store(&self) -> (StoreClient, Term) {
        (self.store.clone(), self.top_term)
    }

    /// The newest epoch that the volumes stand at: what has committed.
    pub(crate) fn disk(&self) -> EpochRef {
        let e = self.progress.committed();
        let term = self
            .window
            .get(e)
            .map_or(self.window.base().term, |f| f.epoch.term);
        EpochRef { epoch: e, term }
    }
}
