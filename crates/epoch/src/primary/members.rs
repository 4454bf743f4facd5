//! What the primary knows of each standby, and the conversation with it: greet, match or copy, stream, listen.
//!
//! ```text
//!            Hello               state matches: Resume
//!   Greeting ------> (Welcome) ------------------------------> Streaming
//!      ^                 |  no match, and out of the in-sync set   ^
//!      |                 +---> Copying --all acknowledged--> Closing (base epoch cut)
//!      +---- silence, NoSession, too slow while not in sync
//! ```

use super::{Primary, window::Window};
use crate::Micros;
use crate::arbiter::Instance;
use crate::io::{Action, Notice};
use crate::message::{Base, Body, Cursors, EpochHeader, EpochRef, Message, Welcome};
use crate::sabotage::Sabotage;
use steadfast_types::{Epoch, HostId};

/// Where the conversation with a standby stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Talk {
    /// Hello is sent from time to time.
    Greeting { next_hello: Micros },
    /// It has no usable state, and must leave the in-sync set before it is copied to.
    Empty,
    /// A full copy runs while the VM runs.
    Copying,
    /// All chunks arrived: the next cut completes the copy.
    Closing,
    /// It follows the epochs.
    Streaming,
}

/// A full copy.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Copy {
    pub join: u64,
    /// Chunks asked of the runtime; acknowledged by the standby.
    pub issued: u64,
    pub acked: u64,
    pub remaining: u64,
    /// Enough is copied: no more chunks.
    pub full: bool,
    pub progress_at: Micros,
    pub have: EpochRef,
}

/// One standby.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub host: HostId,
    pub session: u64,
    pub talk: Talk,
    pub copy: Option<Copy>,
    pub base: Option<(Epoch, Base)>,
    /// Acknowledged: staged, and journal fsynced for flush epochs.
    pub staged: Epoch,
    pub durable: Epoch,
    /// It may be listed as in sync only when its journal is fsynced up to here.
    pub must_sync: Epoch,
    /// Next epoch to send.
    pub next: Epoch,
    pub echo: u64,
    /// Pieces of bulk that it has told of in this session.
    pub heard: u64,
    pub silence: Micros,
    pub lost: bool,
    /// Time without progress while epochs wait for it; it answers, but does not acknowledge.
    pub stall: Micros,
    pub stalled: bool,
    /// The process that answers; and the one that was there when it was listed as in sync under this primary.
    pub instance: Option<Instance>,
    pub known: Option<Instance>,
    /// To be removed as soon as the record no longer lists it. Until then it must be talked to: a standby that is
    /// listed and hears nothing would take over.
    pub leaving: bool,
}

impl Member {
    pub fn new(host: HostId, now: Micros) -> Self {
        Self {
            host,
            session: 0,
            talk: Talk::Greeting { next_hello: now },
            copy: None,
            base: None,
            staged: Epoch::ZERO,
            durable: Epoch::ZERO,
            must_sync: Epoch::ZERO,
            next: Epoch::ZERO,
            echo: 0,
            heard: 0,
            silence: 0,
            lost: false,
            stall: 0,
            stalled: false,
            instance: None,
            known: None,
            leaving: false,
        }
    }

    /// The oldest epoch that must be kept for it.
    pub fn needs_after(&self) -> Epoch {
        self.base.map_or(self.staged, |(e, _)| self.staged.max(e.prev()))
    }

    /// Acknowledged something new.
    fn progressed(&mut self) {
        self.stall = 0;
        self.stalled = false;
    }

    fn alive(&mut self) {
        self.silence = 0;
        self.lost = false;
    }
}

impl Primary {
    pub(super) fn greet(&mut self, now: Micros, i: usize, out: &mut Vec<Action>) {
        self.sessions += 1;
        let m = &mut self.members[i];
        m.session = self.sessions;
        m.heard = 0;
        m.talk = Talk::Greeting {
            next_hello: now.saturating_add(self.settings.hello_retry_us),
        };
        self.tell(i, Body::Hello, out);
    }

    pub(super) fn tell(&self, i: usize, body: Body, out: &mut Vec<Action>) {
        let m = &self.members[i];
        let message = Message {
            term: self.record.term,
            session: m.session,
            body,
        };
        out.push(Action::Send {
            to: m.host.clone(),
            message,
        });
    }

    pub(super) fn cursors(&self, i: usize) -> Cursors {
        let m = &self.members[i];
        let sent = if m.talk == Talk::Streaming {
            m.next.prev()
        } else {
            Epoch::ZERO
        };
        Cursors {
            sent,
            committed: self.progress.committed(),
            released: self.progress.released(),
            stable: self.stable(),
        }
    }

    /// Every in-sync standby has staged up to here.
    pub(super) fn stable(&self) -> Epoch {
        let in_sync = self
            .members
            .iter()
            .filter(|m| self.record.in_sync.contains(&m.host));
        in_sync
            .map(|m| m.staged)
            .chain([self.progress.committed()])
            .min()
            .unwrap_or_default()
    }

    pub(super) fn heartbeat(&mut self, out: &mut Vec<Action>) {
        self.ping += 1;
        for i in 0..self.members.len() {
            if !matches!(self.members[i].talk, Talk::Greeting { .. }) {
                let host = &self.members[i].host;
                let rank = self.record.in_sync.iter().position(|h| h == host);
                let rank = rank.map(|r| u8::try_from(r).unwrap_or(u8::MAX));
                let body = Body::Heartbeat {
                    seq: self.ping,
                    cursors: self.cursors(i),
                    rank,
                };
                self.tell(i, body, out);
            }
        }
    }

    /// A standby's message of the current session. Whether something moved that may commit epochs.
    pub(super) fn heard(&mut self, now: Micros, i: usize, body: Body, out: &mut Vec<Action>) {
        match body {
            Body::Welcome(w) => {
                if matches!(self.members[i].talk, Talk::Greeting { .. }) {
                    self.members[i].alive();
                    self.welcomed(now, i, w, out);
                }
            }
            Body::Ack {
                staged,
                durable,
                echo,
                top,
            } => {
                self.rumour(top);
                let ping = self.ping;
                let m = &mut self.members[i];
                if echo > m.echo || staged.epoch > m.staged && m.talk == Talk::Streaming {
                    m.alive();
                }
                m.echo = m.echo.max(echo.min(ping));
                if m.talk != Talk::Streaming {
                    return;
                }
                // Count only what was sent to anybody at all, and what this window knows under that very reference.
                let known = staged.epoch <= self.progress.sent()
                    && (staged == self.window.base()
                        || self.window.get(staged.epoch).is_some_and(|f| f.epoch == staged));
                if known && staged.epoch > m.staged {
                    self.rate(now, i, staged.epoch);
                    self.members[i].staged = staged.epoch;
                    self.members[i].progressed();
                }
                let m = &mut self.members[i];
                let durable = durable.min(m.staged);
                if durable > m.durable {
                    m.durable = durable;
                    m.progressed();
                }
            }
            Body::ChunkAck { join, next, echo } => {
                let m = &mut self.members[i];
                if echo > m.echo {
                    m.alive();
                    m.echo = echo.min(self.ping);
                }
                if let Some(c) = m
                    .copy
                    .as_mut()
                    .filter(|c| c.join == join && next <= c.issued && next > c.acked)
                {
                    c.acked = next;
                    c.progress_at = now;
                    m.alive();
                }
            }
            Body::Alive { heard } => {
                let m = &mut self.members[i];
                if heard > m.heard {
                    m.heard = heard;
                    m.alive();
                    m.progressed();
                }
            }
            Body::Resend { after } => {
                let m = &mut self.members[i];
                let broken = self.settings.broken(Sabotage::NeverResend);
                if m.talk == Talk::Streaming && after.epoch < m.next.prev() && !broken {
                    let first = m.needs_after().next();
                    m.next = after.epoch.next().max(first);
                    out.push(Action::Notice(Notice::AskedAgain(after)));
                }
            }
            Body::NoSession => self.greet(now, i, out),
            _ => out.push(Action::Notice(Notice::Refused(
                "a standby sent a message that only a primary sends",
            ))),
        }
    }

    fn rate(&mut self, now: Micros, i: usize, through: Epoch) {
        let Some(f) = self.window.get(through) else { return };
        let took = now.saturating_sub(f.sealed_at).max(1);
        // Over what is in the window, not over the numbers: after a full copy a standby goes from zero to where a VM that
        // runs for months is.
        let staged = self.members[i].staged;
        let bytes = self
            .window
            .iter()
            .filter(|f| f.epoch.epoch > staged && f.epoch.epoch <= through)
            .fold(0, |sum: u64, f| sum.saturating_add(f.bytes));
        self.cutting.link_rate(bytes, took);
    }

    fn welcomed(&mut self, now: Micros, i: usize, w: Welcome, out: &mut Vec<Action>) {
        // A claim to have more than was ever sent is worth no more than what was sent.
        let sent = self.progress.sent();
        let matched = w
            .staged
            .and_then(|tip| {
                self.window
                    .common(EpochRef::new(tip.epoch.min(sent).0, tip.term.0))
            })
            .filter(|m| m.epoch >= w.applied.epoch);
        let m = &mut self.members[i];
        m.echo = 0;
        m.instance = Some(w.instance);
        if let Some(after) = matched {
            m.known = m.instance;
            m.copy = None;
            m.base = None;
            m.staged = after.epoch;
            m.durable = w.durable.min(after.epoch);
            m.must_sync = after.epoch;
            m.next = after.epoch.next();
            m.talk = Talk::Streaming;
            self.tell(i, Body::Resume { after }, out);
            return;
        }
        // Whatever it acknowledged before, it does not have it any more.
        m.staged = Epoch::ZERO;
        m.durable = Epoch::ZERO;
        m.base = None;
        let same_copy = w.join.zip(m.copy).filter(|((join, _), c)| *join == c.join);
        match same_copy {
            Some(((_, next), c)) => {
                m.copy = Some(Copy {
                    issued: next,
                    acked: next,
                    full: false,
                    progress_at: now,
                    have: w.disk,
                    ..c
                });
            }
            None => {
                let join = self.store.join();
                let copy = Copy {
                    join,
                    progress_at: now,
                    remaining: u64::MAX,
                    have: w.disk,
                    ..Copy::default()
                };
                self.members[i].copy = Some(copy);
            }
        }
        self.members[i].talk = Talk::Empty;
        self.begin_copy(i, out);
    }

    /// The record in force, or one that may be in force, names it as in sync.
    pub(super) fn listed(&self, host: &HostId) -> bool {
        let proposed = self.proposal.as_ref().map(|p| &p.record);
        [Some(&self.record), proposed]
            .into_iter()
            .flatten()
            .any(|r| r.in_sync.contains(host))
    }

    /// Removes who is to be removed and is listed no longer.
    pub(super) fn let_go(&mut self) {
        for i in (0..self.members.len()).rev() {
            if self.members[i].leaving && !self.listed(&self.members[i].host) {
                self.members.remove(i);
            }
        }
    }

    /// Whether a chunk that was asked for is to be sent now: its session and copy are those of the present. One of an earlier session is
    /// dropped over there, and what it would carry counts as sent here.
    #[must_use]
    pub fn wants_chunk(&self, to: &HostId, session: u64, join: u64, seq: u64) -> bool {
        let asked = |m: &&Member| m.host == *to && m.session == session && m.talk == Talk::Copying;
        let member = self.members.iter().find(asked);
        let wanted = member
            .and_then(|m| m.copy)
            .is_some_and(|c| c.join == join && seq >= c.acked && seq < c.issued);
        wanted || self.settings.broken(Sabotage::SendStaleChunks)
    }

    /// Starts the copy to an empty standby once neither the record nor a proposal lists it as in sync: its state is
    /// gone, so from here on it must not be promoted.
    pub(super) fn begin_copy(&mut self, i: usize, out: &mut Vec<Action>) {
        let m = &self.members[i];
        let (Talk::Empty, Some(c)) = (m.talk, m.copy) else {
            return;
        };
        if !self.listed(&m.host) && !m.leaving {
            self.members[i].talk = Talk::Copying;
            self.tell(
                i,
                Body::Join {
                    join: c.join,
                    next: c.issued,
                },
                out,
            );
        }
    }

    /// Sends what may be sent: chunks within their window, epochs as soon as they are sealed.
    pub(super) fn pump(&mut self, now: Micros, i: usize, out: &mut Vec<Action>) {
        match self.members[i].talk {
            Talk::Copying => self.pump_chunks(now, i, out),
            Talk::Streaming => self.pump_epochs(i, out),
            _ => {}
        }
    }

    fn pump_chunks(&mut self, now: Micros, i: usize, out: &mut Vec<Action>) {
        let (term, window, max) = (
            self.record.term,
            self.settings.chunk_window,
            self.settings.max_chunks,
        );
        let m = &mut self.members[i];
        let Some(c) = m.copy.as_mut() else { return };
        let stuck = now.saturating_sub(c.progress_at) >= self.settings.standby_lost_us.saturating_mul(4);
        if c.issued > c.acked && stuck {
            // Lost on the way. A number is never sent twice within a session: the pages behind it may have changed, and
            // the standby could take the old ones and pass over the new. A new session says exactly what it has.
            self.greet(now, i, out);
            return;
        }
        if c.full && c.acked == c.issued {
            m.talk = Talk::Closing;
            return;
        }
        while !c.full && c.issued < c.acked.saturating_add(window) {
            let body = Body::Chunk {
                join: c.join,
                seq: c.issued,
            };
            out.push(Action::SendChunk {
                to: m.host.clone(),
                message: Message {
                    term,
                    session: m.session,
                    body,
                },
                join: c.join,
                seq: c.issued,
                have: c.have,
            });
            c.issued += 1;
            c.full = c.issued >= max;
        }
    }

    pub(super) fn chunk_sent(
        &mut self,
        now: Micros,
        to: &HostId,
        join: u64,
        seq: u64,
        remaining: u64,
        out: &mut Vec<Action>,
    ) {
        let threshold = self.settings.base_threshold_bytes;
        let Some(m) = self.members.iter_mut().find(|m| m.host == *to) else {
            return;
        };
        let Some(c) = m.copy.as_mut().filter(|c| c.join == join && seq < c.issued) else {
            return;
        };
        // What waited for its turn here is not late over there.
        c.progress_at = now;
        c.remaining = remaining;
        c.full |= remaining <= threshold && seq + 1 == c.issued;
        if seq.is_multiple_of(64) {
            out.push(Action::Notice(Notice::Copying {
                to: m.host.clone(),
                chunks: seq + 1,
                remaining,
            }));
        }
    }

    fn pump_epochs(&mut self, i: usize, out: &mut Vec<Action>) {
        loop {
            let e = self.members[i].next;
            let Some(header) = self.header(i, e) else { break };
            self.members[i].next = e.next();
            self.progress.send(e);
            let header = EpochHeader {
                cursors: self.cursors(i),
                ..header
            };
            self.tell(i, Body::Epoch(header), out);
            if self.settings.broken(Sabotage::ReleaseOnSend) && e > self.progress.released() {
                out.push(Action::Release { through: e });
            }
        }
    }

    fn header(&self, i: usize, e: Epoch) -> Option<EpochHeader> {
        let f = self.window.get(e)?;
        let base = self.members[i].base.filter(|(at, _)| *at == e).map(|(_, b)| b);
        Some(EpochHeader {
            epoch: f.epoch,
            prev: self.window.prev(e)?,
            // A copy counts only once all of it, the disks too, is fsynced: the other hosts may lose power for good (I5).
            flush: f.flush || base.is_some(),
            bytes: f.bytes,
            base,
            cursors: Cursors::default(),
        })
    }

    /// Silence of each standby, counted only in steps in which this host itself was running.
    pub(super) fn listen(&mut self, now: Micros, step: Micros, out: &mut Vec<Action>) {
        for i in 0..self.members.len() {
            let m = &mut self.members[i];
            m.silence = m.silence.saturating_add(step);
            let waits = m.talk == Talk::Streaming && (m.staged < m.next.prev() || m.durable < m.must_sync);
            let flush = self
                .window
                .iter()
                .any(|f| f.flush && f.epoch.epoch > m.durable && f.epoch.epoch < m.next);
            m.stall = if waits || flush {
                m.stall.saturating_add(step)
            } else {
                0
            };
            let blind = self.settings.broken(Sabotage::NeverResend);
            if m.stall >= self.settings.ack_timeout_us && !m.stalled && !blind {
                m.stalled = true;
                out.push(Action::Notice(Notice::StandbyStalled(m.host.clone())));
            }
            if m.silence >= self.settings.standby_lost_us {
                if !m.lost {
                    m.lost = true;
                    out.push(Action::Notice(Notice::StandbyLost(m.host.clone())));
                }
                if m.silence >= self.settings.standby_lost_us + self.settings.hello_retry_us {
                    // Start over: a new session tells what it still has.
                    m.silence = self.settings.standby_lost_us;
                    self.greet(now, i, out);
                    continue;
                }
            }
            if let Talk::Greeting { next_hello } = m.talk
                && now >= next_hello
            {
                self.greet(now, i, out);
            }
        }
    }

    /// A slow standby that is not in sync must not hold the VM back: it starts over when the window is full.
    pub(super) fn shed_laggards(&mut self, now: Micros, out: &mut Vec<Action>) {
        let full = self.window.len() >= self.settings.window_epochs
            || self.window.bytes() >= self.settings.window_bytes;
        if !full {
            return;
        }
        let held = self.window.base().epoch;
        for i in 0..self.members.len() {
            let m = &self.members[i];
            if !self.listed(&m.host) && m.talk == Talk::Streaming && m.needs_after() <= held {
                self.greet(now, i, out);
            }
        }
    }

    /// The oldest epoch that some standby may still need.
    pub(super) fn needed_after(&self, window: &Window) -> Epoch {
        let tip = window.tip().epoch;
        self.members
            .iter()
            .filter(|m| m.talk == Talk::Streaming || self.record.in_sync.contains(&m.host))
            .map(|m| {
                if m.talk == Talk::Empty {
                    tip
                } else {
                    m.needs_after()
                }
            })
            .min()
            .unwrap_or(tip)
    }
}
