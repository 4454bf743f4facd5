//! A world small enough to read: replicas, a perfect network with a tap on every message, one store, and a runtime that
//! does everything at once. Time moves only when the world is told to.
#![allow(dead_code, clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, VecDeque};
use steadfast_epoch::arbiter::compare_and_swap;
use steadfast_epoch::*;
use steadfast_types::{Epoch, HostId, Term};

pub fn host(n: &str) -> HostId {
    HostId::new(n).unwrap()
}

/// What a node's "guest" has done, as the test sees it.
#[derive(Default, Clone, Debug)]
pub struct Seen {
    pub released: Vec<(Term, u64)>,
    pub applied: u64,
    pub promoted: Option<(Term, EpochRef)>,
    pub booted: Option<Term>,
    pub speculated: Option<EpochRef>,
    pub discarded: bool,
    pub stopped: bool,
    pub frozen: bool,
    pub notices: Vec<Notice>,
    pub chunks: u64,
    pub truncated: Vec<EpochRef>,
}

pub struct Node {
    pub replica: Replica,
    pub seen: Seen,
    pub up: bool,
}

/// What happens to one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Lost,
    Doubled,
    Late,
}

pub struct World {
    pub now: u64,
    pub nodes: BTreeMap<HostId, Node>,
    pub net: VecDeque<(HostId, HostId, Message)>,
    pub record: VmRecord,
    pub store_id: StoreId,
    pub store_up: bool,
    /// Answers to compare-and-swaps are lost (they take effect all the same).
    pub cas_unknown: bool,
    pub cut_off: Vec<(HostId, HostId)>,
    pub settings: Settings,
    pub delivered: u64,
    /// Kill this host right after so many messages were delivered.
    pub kill_at: Option<(u64, HostId)>,
    pub cut_on_output: bool,
    pub flush: bool,
    pub instances: u64,
    pub rollback_ok: bool,
    /// Does something to the message with this number.
    pub tamper: Option<(u64, Fate)>,
    pub late: Vec<(u64, HostId, HostId, Message)>,
    pub record_frames: bool,
    pub recorded: Vec<(HostId, HostId, Message)>,
}

impl World {
    pub fn new(settings: Settings, hosts: &[&str]) -> Self {
        let mut w = Self {
            now: 1_000_000,
            nodes: BTreeMap::new(),
            net: VecDeque::new(),
            record: VmRecord::new(host(hosts[0]), StoreId(1)),
            store_id: StoreId(1),
            store_up: true,
            cas_unknown: false,
            cut_off: Vec::new(),
            settings,
            delivered: 0,
            kill_at: None,
            cut_on_output: false,
            flush: false,
            instances: 0,
            rollback_ok: false,
            tamper: None,
            late: Vec::new(),
            record_frames: false,
            recorded: Vec::new(),
        };
        for h in hosts {
            w.start(h);
        }
        w
    }

    pub fn start(&mut self, h: &str) {
        self.start_with_disk(h, EpochRef::ZERO);
    }

    pub fn start_with_disk(&mut self, h: &str, disk: EpochRef) {
        self.instances += 1_000_000;
        let i = Instance(self.instances);
        let replica = Replica::new(self.now, host(h), i, self.settings.clone(), disk);
        self.nodes.insert(
            host(h),
            Node {
                replica,
                seen: Seen::default(),
                up: true,
            },
        );
    }

    pub fn kill(&mut self, h: &str) {
        self.nodes.get_mut(&host(h)).unwrap().up = false;
        self.net.retain(|(_, to, _)| to != &host(h));
    }

    pub fn node(&self, h: &str) -> &Node {
        &self.nodes[&host(h)]
    }

    pub fn give(&mut self, h: &str, e: Event) {
        let mut todo = VecDeque::from([(host(h), e)]);
        let mut bound = 1_000;
        while let Some((h, e)) = todo.pop_front() {
            bound -= 1;
            assert!(bound > 0, "{h} is busy without end: {e:?}");
            let now = self.now;
            let Some(n) = self.nodes.get_mut(&h).filter(|n| n.up) else {
                continue;
            };
            let actions = n.replica.handle(now, e);
            for a in actions {
                for e in self.act(&h, a) {
                    todo.push_back((h.clone(), e));
                }
            }
        }
    }

    fn act(&mut self, h: &HostId, a: Action) -> Vec<Event> {
        let flush = self.flush;
        let rollback_ok = self.rollback_ok;
        let n = self.nodes.get_mut(h).unwrap();
        match a {
            Action::Send { to, message } => {
                self.net.push_back((h.clone(), to, message));
                vec![]
            }
            Action::SendChunk {
                to,
                message,
                join,
                seq,
                ..
            } => {
                self.net.push_back((h.clone(), to.clone(), message));
                let remaining = 10u64.saturating_sub(seq + 1) << 20;
                vec![Event::ChunkSent {
                    to,
                    join,
                    seq,
                    remaining,
                }]
            }
            Action::StoreRead { id } if self.store_up => {
                let record = Some(self.record.clone());
                vec![Event::Store(StoreReply::Read {
                    id,
                    store: self.store_id,
                    record,
                })]
            }
            Action::StoreRead { id } => vec![Event::Store(StoreReply::Failed { id })],
            Action::StoreCas { id, expect, record } => {
                let mut outcome = CasOutcome::Unknown;
                if self.store_up {
                    outcome = compare_and_swap(&self.record, self.store_id, &expect, &record);
                    if outcome == CasOutcome::Done {
                        self.record = record;
                    }
                    if self.cas_unknown {
                        outcome = CasOutcome::Unknown;
                    }
                }
                vec![Event::Store(StoreReply::Cas { id, outcome })]
            }
            Action::Cut { epoch, freeze, .. } => {
                n.seen.frozen = freeze;
                vec![Event::Sealed(SealedEpoch {
                    epoch,
                    bytes: 4096,
                    flush,
                    pause_us: 300,
                    whole: true,
                })]
            }
            Action::ResumeGuest => {
                n.seen.frozen = false;
                vec![]
            }
            Action::SyncJournal { through } => vec![Event::JournalSynced { through }],
            Action::Release { through } => {
                n.seen.released.push((n.replica.term(), through.0));
                vec![]
            }
            Action::Stage { epoch, flush } => {
                let mut v = vec![Event::Staged { epoch }];
                if flush {
                    v.push(Event::JournalSynced { through: epoch.epoch });
                }
                v
            }
            Action::Apply { through } => {
                n.seen.applied = through.0;
                vec![Event::Applied { through }]
            }
            Action::StoreChunk { .. } => {
                n.seen.chunks += 1;
                vec![]
            }
            Action::Speculate { at } => {
                n.seen.speculated = Some(at);
                vec![]
            }
            Action::DiscardSpeculation => {
                n.seen.discarded = true;
                vec![Event::SpeculationDiscarded { intact: rollback_ok }]
            }
            Action::Promote { term, at, .. } => {
                n.seen.promoted = Some((term, at));
                vec![]
            }
            Action::ColdBoot { term, .. } => {
                n.seen.booted = Some(term);
                vec![]
            }
            Action::StopGuest { .. } => {
                n.seen.stopped = true;
                vec![]
            }
            Action::Truncate { after } => {
                n.seen.truncated.push(after);
                vec![]
            }
            Action::Notice(x) => {
                n.seen.notices.push(x);
                vec![]
            }
            Action::Commit { .. }
            | Action::Forget { .. }
            | Action::Throttle { .. }
            | Action::BeginJoin { .. } => {
                vec![]
            }
        }
    }

    /// Delivers what is in the network until it is empty (or so many messages).
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            if let Some((at, h)) = self.kill_at.clone()
                && self.delivered >= at
            {
                self.kill_at = None;
                self.kill(h.as_str());
            }
            let Some((from, to, m)) = self.net.pop_front() else {
                return;
            };
            if self.cut_off.contains(&(from.clone(), to.clone())) {
                continue;
            }
            self.delivered += 1;
            if self.record_frames {
                self.recorded.push((from.clone(), to.clone(), m.clone()));
            }
            match self.tamper.take_if(|t| t.0 == self.delivered).map(|t| t.1) {
                Some(Fate::Lost) => continue,
                Some(Fate::Late) => {
                    self.late.push((self.now + 30_000, from, to, m));
                    continue;
                }
                Some(Fate::Doubled) => {
                    self.net.push_back((from.clone(), to.clone(), m.clone()));
                    self.late
                        .push((self.now + 30_000, from.clone(), to.clone(), m.clone()));
                }
                None => {}
            }
            if self.nodes.get(&to).is_some_and(|n| n.up) {
                self.give(to.as_str(), Event::Message { from, message: m });
            }
        }
        panic!("messages without end");
    }

    /// Lets time pass in steps of a millisecond.
    pub fn run(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now += 1_000;
            let now = self.now;
            let (due, rest) = std::mem::take(&mut self.late)
                .into_iter()
                .partition(|l| l.0 <= now);
            self.late = rest;
            for (_, from, to, m) in due {
                self.net.push_back((from, to, m));
            }
            let hosts: Vec<_> = self.nodes.keys().cloned().collect();
            for h in hosts {
                self.give(h.as_str(), Event::Tick);
            }
            self.settle();
        }
    }

    /// A VM on `a`, mirrored to the others, protected.
    pub fn protected(&mut self) {
        let others: Vec<_> = self.nodes.keys().filter(|h| h.as_str() != "a").cloned().collect();
        self.give("a", Event::ColdStart);
        for h in &others {
            self.give("a", Event::AddStandby(h.clone()));
        }
        self.run(300);
        assert_eq!(self.record.in_sync, others, "{:?}", self.primary("a").status());
        assert_eq!(self.primary("a").phase(), Phase::Protected);
    }

    pub fn primary(&self, h: &str) -> &Primary {
        self.node(h)
            .replica
            .primary()
            .unwrap_or_else(|| panic!("{h} is not primary"))
    }

    pub fn is_primary(&self, h: &str) -> bool {
        let n = self.node(h);
        n.up && n.replica.primary().is_some()
    }

    /// The highest epoch whose outputs anybody has seen.
    pub fn released(&self) -> u64 {
        self.nodes
            .values()
            .flat_map(|n| n.seen.released.iter().map(|r| r.1))
            .max()
            .unwrap_or(0)
    }

    pub fn output(&mut self, h: &str) -> Epoch {
        self.give(h, Event::Output);
        self.run(3);
        self.primary(h).progress().sealed()
    }
}
