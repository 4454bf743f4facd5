//! When the primary cuts: feeds the pure policy, keeps its running means, asks the runtime for one cut at a time.

use super::{HandoverStep, Primary, Talk};
use crate::Micros;
use crate::io::{Action, Notice, SealedEpoch};
use crate::message::{Base, EpochRef};
use crate::policy::{self, Cut, PolicyInput};
use crate::primary::window::Flight;
use steadfast_types::{Epoch, HostId};

/// Bytes below which a guest counts as idle, whatever it says: what waits for a cut asks for its own, so the interval is only about
/// what a cut has to copy, and so little costs hardly more than nothing.
const IDLE_BYTES: u64 = 1 << 20;
/// Bytes below which a transfer tells nothing of the link's rate.
const RATE_BYTES: u64 = 64 << 10;
/// What a cut is believed to cost at most while nothing is known.
const COST_FIRST_US: Micros = 500;

/// A cut that was asked for and is not yet sealed.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub epoch: Epoch,
    /// Standbys whose copy it completes, with the number of that copy.
    pub bases: Vec<(HostId, Base)>,
    pub freeze: bool,
}

/// State of the cutting.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cutting {
    pub asked: Option<Asked>,
    last_cut: Micros,
    pub output_since: Option<Micros>,
    pub wanted_since: Option<Micros>,
    pub flush_since: Option<Micros>,
    pub dirty_bytes: u64,
    cut_cost_us: Micros,
    link_bytes_per_s: u64,
    idle_cuts: u32,
    throttle: u8,
}

impl Cutting {
    pub fn starting(now: Micros) -> Self {
        Self {
            last_cut: now,
            ..Self::default()
        }
    }

    pub fn link_rate(&mut self, bytes: u64, took_us: Micros) {
        if bytes > RATE_BYTES {
            let rate = bytes.saturating_mul(1_000_000) / took_us.max(1);
            self.link_bytes_per_s = policy::ewma(self.link_bytes_per_s, rate);
        }
    }
}

impl Primary {
    fn policy_input(&self, now: Micros) -> PolicyInput {
        let c = &self.cutting;
        PolicyInput {
            now,
            last_cut: c.last_cut,
            output_since: c.output_since,
            wanted_since: c.wanted_since,
            flush_since: c.flush_since,
            dirty_bytes: c.dirty_bytes,
            in_flight: self.window.len(),
            window: self.settings.window_epochs,
            bytes_full: self.window.bytes() >= self.settings.window_bytes,
            cut_cost_us: c.cut_cost_us,
            link_bytes_per_s: c.link_bytes_per_s,
            idle_cuts: c.idle_cuts,
        }
    }

    /// Asks for a cut if one is due.
    pub(super) fn cut_if_due(&mut self, now: Micros, out: &mut Vec<Action>) {
        let input = self.policy_input(now);
        let throttle = policy::throttle(&self.settings.policy, &input);
        if throttle.abs_diff(self.cutting.throttle) >= 10 || (throttle == 0 && self.cutting.throttle != 0) {
            self.cutting.throttle = throttle;
            out.push(Action::Throttle { percent: throttle });
        }
        let freeze = match self.handover.as_ref().map(|h| h.step) {
            Some(HandoverStep::Cutting) => true,
            Some(_) => return,
            None => false,
        };
        if self.cutting.asked.is_some() {
            return;
        }
        let bases: Vec<_> = self
            .members
            .iter()
            .filter(|m| m.talk == Talk::Closing)
            .filter_map(|m| {
                m.copy.map(|c| {
                    (
                        m.host.clone(),
                        Base {
                            join: c.join,
                            chunks: c.issued,
                        },
                    )
                })
            })
            .collect();
        let due = match policy::decide(&self.settings.policy, &input) {
            Cut::WhenRoom => false,
            Cut::Now => true,
            Cut::NotBefore(_) => freeze || !bases.is_empty(),
        };
        if !due {
            return;
        }
        let epoch = self.progress.sealed().next();
        let c = &mut self.cutting;
        c.output_since = None;
        c.wanted_since = None;
        c.flush_since = None;
        c.dirty_bytes = 0;
        let hosts = bases.iter().map(|(h, _)| h.clone()).collect();
        c.asked = Some(Asked { epoch, bases, freeze });
        out.push(Action::Cut {
            epoch,
            bases: hosts,
            freeze,
        });
    }

    pub(super) fn sealed(&mut self, now: Micros, s: SealedEpoch, out: &mut Vec<Action>) {
        let Some(asked) = self.cutting.asked.take_if(|a| a.epoch == s.epoch) else {
            out.push(Action::Notice(Notice::Refused(
                "an epoch was sealed that was not asked for",
            )));
            return;
        };
        let c = &mut self.cutting;
        c.last_cut = now;
        // A pause that contains a time slice of somebody else says nothing of what cuts cost: one that is far longer
        // than usual counts as a part of itself. If cuts have become dear, a few of them tell.
        let usual = c.cut_cost_us.saturating_mul(4).saturating_add(COST_FIRST_US);
        c.cut_cost_us = policy::ewma(c.cut_cost_us, s.pause_us.min(usual));
        c.idle_cuts = if s.bytes < IDLE_BYTES {
            c.idle_cuts.saturating_add(1)
        } else {
            0
        };

        let epoch = EpochRef {
            epoch: s.epoch,
            term: self.record.term,
        };
        self.progress.seal(s.epoch);
        self.window.push(Flight {
            epoch,
            flush: s.flush,
            bytes: s.bytes,
            sealed_at: now,
            whole: s.whole,
        });
        if s.flush {
            out.push(Action::SyncJournal { through: s.epoch });
        }
        for (host, base) in asked.bases {
            let closing = self.members.iter_mut().find(|m| {
                m.host == host && m.talk == Talk::Closing && m.copy.is_some_and(|c| c.join == base.join)
            });
            if let Some(m) = closing {
                m.base = Some((s.epoch, base));
                m.must_sync = s.epoch;
                m.copy = None;
                m.next = s.epoch;
                m.talk = Talk::Streaming;
            }
        }
        if asked.freeze {
            self.frozen(now, epoch, out);
        }
    }

    /// When the policy wants to be asked again.
    pub(super) fn cut_deadline(&self, now: Micros) -> Option<Micros> {
        if self.cutting.asked.is_some() || self.handover.is_some() {
            return None;
        }
        match policy::decide(&self.settings.policy, &self.policy_input(now)) {
            Cut::Now => Some(now),
            Cut::NotBefore(t) => Some(t),
            Cut::WhenRoom => None,
        }
    }
}
