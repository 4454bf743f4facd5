//! What goes wrong in a run: drawn from the seed beforehand, injected at its time, counted when it really happened.

use crate::rng::Rng;
use crate::world::{Ev, World};
use std::collections::BTreeMap;
use steadfast_epoch::{Action, Body, Event};

/// Kinds of faults. The number in brackets is the row of the fault catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    PowerPrimary,       // [1]
    PowerStandby,       // [2]
    PowerAll,           // [3]
    Freeze,             // [4]
    KillProcess,        // [6]
    TornWrites,         // [15]
    CorruptWire,        // [19]
    PartitionBoth,      // [22]
    PartitionOneWay,    // [23]
    StoreCutFromHost,   // [24]
    PeerCutStoreOk,     // [24, the reverse]
    Clog,               // [25]
    Chaos,              // [26] delay, loss, duplication, reordering
    Drift,              // [28]
    Starve,             // [30]
    StoreDown,          // [32]
    StoreLeaderKilled,  // [33] a short outage in which answers are lost
    StoreDownInTakeover, // [34]
    StoreSlow,          // [35]
    StoreRestored,      // [37]
    KilledInEpoch,      // [38]
    KilledInPromotion,  // [39]
    KilledInResync,     // [40]
    KilledInMigration,  // [41]
    SecondFault,        // [45]
    QuorumChurn,        // [46]
    OldFrames,          // [48]
    Handover,
    CancelHandover,
    ClientCut,
    Isolate,
    SlowDisk,
    Hints,
}

impl Kind {
    /// All of them, with the catalogue's rows.
    pub const ALL: [(Self, &'static str); 33] = [
        (Self::PowerPrimary, "1"),
        (Self::PowerStandby, "2"),
        (Self::PowerAll, "3"),
        (Self::Freeze, "4"),
        (Self::KillProcess, "6"),
        (Self::TornWrites, "15"),
        (Self::CorruptWire, "19"),
        (Self::PartitionBoth, "22"),
        (Self::PartitionOneWay, "23"),
        (Self::StoreCutFromHost, "24"),
        (Self::PeerCutStoreOk, "24"),
        (Self::Clog, "25"),
        (Self::Chaos, "26"),
        (Self::Drift, "28"),
        (Self::Starve, "30"),
        (Self::StoreDown, "32"),
        (Self::StoreLeaderKilled, "33"),
        (Self::StoreDownInTakeover, "34"),
        (Self::StoreSlow, "35"),
        (Self::StoreRestored, "37"),
        (Self::KilledInEpoch, "38"),
        (Self::KilledInPromotion, "39"),
        (Self::KilledInResync, "40"),
        (Self::KilledInMigration, "41"),
        (Self::SecondFault, "45"),
        (Self::QuorumChurn, "46"),
        (Self::OldFrames, "48"),
        (Self::Handover, "41"),
        (Self::CancelHandover, "41"),
        (Self::ClientCut, "20"),
        (Self::Isolate, "20, 21"),
        (Self::SlowDisk, "13"),
        (Self::Hints, "-"),
    ];
}

/// A step of the protocol at which a process can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Step {
    Cut,
    SendEpoch,
    SyncJournal,
    Commit,
    Release,
    Stage,
    Ack,
    Apply,
    Speculate,
    StoreRead,
    StoreCas,
    Promote,
    Discard,
    Stop,
    Truncate,
    Welcome,
    Resume,
    BeginJoin,
    Chunk,
    StoreChunk,
    ChunkAck,
    SendHandover,
    ResumeGuest,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 23] = [
        Self::Cut,
        Self::SendEpoch,
        Self::SyncJournal,
        Self::Commit,
        Self::Release,
        Self::Stage,
        Self::Ack,
        Self::Apply,
        Self::Speculate,
        Self::StoreRead,
        Self::StoreCas,
        Self::Promote,
        Self::Discard,
        Self::Stop,
        Self::Truncate,
        Self::Welcome,
        Self::Resume,
        Self::BeginJoin,
        Self::Chunk,
        Self::StoreChunk,
        Self::ChunkAck,
        Self::SendHandover,
        Self::ResumeGuest,
    ];

    fn of(a: &Action) -> Option<Self> {
        Some(match a {
            Action::Cut { .. } => Self::Cut,
            Action::SyncJournal { .. } => Self::SyncJournal,
            Action::Commit { .. } => Self::Commit,
            Action::Release { .. } => Self::Release,
            Action::Stage { .. } => Self::Stage,
            Action::Apply { .. } => Self::Apply,
            Action::Speculate { .. } => Self::Speculate,
            Action::StoreRead { .. } => Self::StoreRead,
            Action::StoreCas { .. } => Self::StoreCas,
            Action::Promote { .. } => Self::Promote,
            Action::DiscardSpeculation => Self::Discard,
            Action::StopGuest { .. } => Self::Stop,
            Action::Truncate { .. } => Self::Truncate,
            Action::BeginJoin { .. } => Self::BeginJoin,
            Action::SendChunk { .. } => Self::Chunk,
            Action::StoreChunk { .. } => Self::StoreChunk,
            Action::ResumeGuest => Self::ResumeGuest,
            Action::Send { message, .. } => match message.body {
                Body::Epoch(_) => Self::SendEpoch,
                Body::Ack { .. } => Self::Ack,
                Body::Welcome(_) => Self::Welcome,
                Body::Resume { .. } => Self::Resume,
                Body::ChunkAck { .. } => Self::ChunkAck,
                Body::Handover { .. } => Self::SendHandover,
                _ => return None,
            },
            _ => return None,
        })
    }

    /// What sets the step going, so that there is something to kill.
    fn trigger(self) -> Option<Kind> {
        match self {
            Self::Speculate | Self::Promote | Self::StoreCas | Self::StoreRead => Some(Kind::KillProcess),
            Self::Discard | Self::Truncate | Self::Stop => Some(Kind::PartitionBoth),
            Self::Welcome | Self::Resume => Some(Kind::PartitionOneWay),
            Self::BeginJoin | Self::Chunk | Self::StoreChunk | Self::ChunkAck => Some(Kind::PowerStandby),
            Self::SendHandover => Some(Kind::Handover),
            Self::ResumeGuest => Some(Kind::CancelHandover),
            _ => None,
        }
    }

    /// Which row it belongs to.
    fn kind(self) -> Kind {
        match self {
            Self::Speculate | Self::Promote | Self::StoreCas | Self::StoreRead | Self::Discard | Self::Stop => {
                Kind::KilledInPromotion
            }
            Self::Welcome
            | Self::Resume
            | Self::BeginJoin
            | Self::Chunk
            | Self::StoreChunk
            | Self::ChunkAck
            | Self::Truncate => Kind::KilledInResync,
            Self::SendHandover | Self::ResumeGuest => Kind::KilledInMigration,
            _ => Kind::KilledInEpoch,
        }
    }
}

/// One planned fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// When.
    pub at: u64,
    /// What.
    pub kind: Kind,
    /// For how long, in microseconds.
    pub us: u64,
    /// Chance for the details.
    pub dice: u64,
}

/// A process is killed when it does this for the so-many-eth time.
#[derive(Clone, Copy, Debug)]
struct KillAt {
    step: Step,
    left: u64,
    after: bool,
    from: u64,
    back_us: u64,
}

/// How much may go wrong in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Hosts are slow or starved within the detector's bounds; nothing fails.
    Slow,
    /// One fault.
    Single,
    /// A process is killed at one step of the protocol.
    Step,
    /// Two to six faults, overlapping.
    Many,
}

/// What goes wrong in a run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How much.
    pub profile: Profile,
    /// What and when.
    pub faults: Vec<Fault>,
    kill: Option<KillAt>,
    /// Dead hosts that come back, and when.
    pub back: Vec<(usize, u64)>,
    now: u64,
    /// Frames are recorded for a replay.
    pub keeps_frames: bool,
}

/// When faults may begin, and when the world heals.
pub const BEGIN: u64 = 400_000;
/// See [`BEGIN`].
pub const HEAL: u64 = 1_800_000;

impl Plan {
    /// Draws a plan.
    #[must_use]
    pub fn draw(rng: &mut Rng) -> Self {
        let profile = rng.pick(&[
            Profile::Slow,
            Profile::Single,
            Profile::Step,
            Profile::Step,
            Profile::Many,
            Profile::Many,
            Profile::Many,
        ]);
        let mut faults = Vec::new();
        let mut kill = None;
        let usual: Vec<Kind> = Kind::ALL
            .iter()
            .map(|k| k.0)
            .filter(|k| {
                !matches!(
                    k,
                    Kind::TornWrites
                        | Kind::KilledInEpoch
                        | Kind::KilledInPromotion
                        | Kind::KilledInResync
                        | Kind::KilledInMigration
                        | Kind::SecondFault
                )
            })
            .collect();
        let mut fault = |rng: &mut Rng, kind: Option<Kind>, from: u64, to: u64| {
            let kind = kind.unwrap_or_else(|| rng.pick(&usual));
            let us = rng.pick(&[20_000, 60_000, 120_000, 200_000, 400_000, 800_000]);
            let (at, us) = (rng.range(from, to), rng.range(us / 2, us));
            faults.push(Fault { at, kind, us, dice: rng.next() });
        };
        match profile {
            Profile::Slow => {
                for _ in 0..3 {
                    let kind = rng.pick(&[Kind::Starve, Kind::Clog, Kind::SlowDisk, Kind::Drift, Kind::Freeze]);
                    fault(rng, Some(kind), BEGIN, HEAL - 300_000);
                }
            }
            Profile::Single => fault(rng, None, BEGIN, HEAL - 600_000),
            Profile::Step => {
                let step = rng.pick(&Step::ALL);
                let from = rng.range(BEGIN, HEAL - 900_000);
                let left = rng.pick(&[0, 0, 0, 1, 2, 5, 20]);
                let after = rng.per_mille(500);
                kill = Some(KillAt { step, left, after, from, back_us: rng.range(20_000, 500_000) });
                if let Some(k) = step.trigger() {
                    fault(rng, Some(k), from, from + 50_000);
                }
            }
            Profile::Many => {
                for _ in 0..rng.range(2, 6) {
                    fault(rng, None, BEGIN, HEAL - 100_000);
                }
            }
        }
        let keeps_frames = faults.iter().any(|f| f.kind == Kind::OldFrames);
        Self { profile, faults, kill, back: Vec::new(), now: 0, keeps_frames }
    }

    /// Whether the process is to be killed at this action: before (`false`) or after it (`true`).
    pub fn kill_at(&mut self, a: &Action) -> Option<bool> {
        let k = self.kill.as_mut()?;
        if self.now < k.from || Step::of(a) != Some(k.step) {
            return None;
        }
        if k.left > 0 {
            k.left -= 1;
            return None;
        }
        let after = k.after;
        self.now = 0;
        self.kill.take().map(|k| {
            self.back.push((usize::MAX, k.back_us));
            after
        })
    }

    /// A host was killed by [`Plan::kill_at`]: it comes back later.
    pub fn returns(&mut self, h: usize, now: u64) {
        for b in self.back.iter_mut().filter(|b| b.0 == usize::MAX) {
            *b = (h, now + b.1);
        }
    }

    /// The time, for faults that wait for something.
    pub fn tell_time(&mut self, now: u64) {
        self.now = now;
    }

    /// Nothing goes wrong any more.
    pub fn end(&mut self) {
        self.kill = None;
    }
}

/// How often each kind of fault really happened.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// By kind.
    pub kinds: BTreeMap<Kind, u64>,
    /// Kills by step.
    pub steps: BTreeMap<Step, u64>,
}

impl Coverage {
    /// It happened.
    pub fn count(&mut self, k: Kind) {
        *self.kinds.entry(k).or_default() += 1;
    }

    /// A process was killed at this action.
    pub fn step(&mut self, a: &Action) {
        if let Some(s) = Step::of(a) {
            *self.steps.entry(s).or_default() += 1;
            self.count(s.kind());
        }
    }

    /// Adds another run's.
    pub fn add(&mut self, o: &Self) {
        for (k, n) in &o.kinds {
            *self.kinds.entry(*k).or_default() += n;
        }
        for (k, n) in &o.steps {
            *self.steps.entry(*k).or_default() += n;
        }
    }

    /// Kinds and steps that never happened.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        let kinds = Kind::ALL.iter().filter(|k| !self.kinds.contains_key(&k.0)).map(|k| format!("{:?}", k.0));
        let steps = Step::ALL.iter().filter(|s| !self.steps.contains_key(s)).map(|s| format!("kill at {s:?}"));
        kinds.chain(steps).collect()
    }
}

impl World {
    fn primary_host(&self) -> usize {
        self.index(&self.store.record.owner)
    }

    fn standby_host(&self) -> usize {
        let p = self.primary_host();
        match self.store.record.in_sync.first() {
            Some(s) => self.index(s),
            None => (p + 1) % self.hosts.len(),
        }
    }

    fn cut_link(&mut self, a: usize, b: usize, cut: bool) {
        let l = &mut self.links[a][b].cut;
        *l = if cut { *l + 1 } else { l.saturating_sub(1) };
    }

    /// A planned fault begins or ends.
    pub fn fault(&mut self, i: usize, begin: bool) {
        if self.healing {
            return;
        }
        let f = self.planned(i);
        let slow = self.plan.profile == Profile::Slow;
        let n = self.hosts.len();
        let (p, s) = (self.primary_host(), self.standby_host());
        // The same hosts at the beginning and at the end, though roles may have changed.
        let any = (f.dice >> 8) as usize % n;
        let other = (any + 1 + (f.dice >> 16) as usize % (n - 1)) % n;
        self.log(|| format!("fault {:?} begins {begin}: {any} {other}, {} us", f.kind, f.us));
        let mut counted = begin;
        let mut ends = begin;
        match f.kind {
            Kind::PowerPrimary | Kind::PowerStandby | Kind::KillProcess => {
                if begin {
                    let h = match f.kind {
                        Kind::PowerPrimary => p,
                        Kind::PowerStandby => s,
                        _ => [p, p, s][(f.dice >> 24) as usize % 3],
                    };
                    counted = self.hosts[h].up;
                    self.kill(h, f.kind != Kind::KillProcess);
                    self.plan.back.push((h, self.now + f.us));
                    // A daemon that sees the process die tells the others.
                    if f.kind == Kind::KillProcess && f.dice & 1 == 1 && counted {
                        let id = self.hosts[h].id.clone();
                        for o in (0..n).filter(|&o| o != h) {
                            let i = self.hosts[o].instance;
                            let e = crate::world::Local::Plain(Event::PeerDied(id.clone()));
                            self.after(2_000, Ev::Local(o, i, e));
                        }
                    }
                }
                ends = false;
            }
            Kind::PowerAll => {
                if begin {
                    for h in 0..n {
                        self.kill(h, true);
                        let later = (f.dice >> (8 + h)) % 300_000;
                        self.plan.back.push((h, self.now + f.us + later));
                    }
                }
                ends = false;
            }
            Kind::Freeze => {
                if begin {
                    let h = if f.dice & 1 == 0 { p } else { any };
                    // A slow host stands still for less than the detector's bound; a standby may for longer.
                    let bound = if slow && h == p { 30_000 } else { u64::MAX };
                    self.hosts[h].frozen_until = self.now + f.us.min(bound);
                }
                ends = false;
            }
            Kind::Starve => {
                let us = if slow { 25_000 } else { f.dice % 150_000 };
                self.hosts[any].starve_us = if begin { us } else { 0 };
            }
            Kind::Clog => {
                let us = if slow { 15_000 } else { f.dice % 150_000 };
                self.links[any][other].delay_us = if begin { us } else { 0 };
            }
            Kind::SlowDisk => self.hosts[any].fsync_us = if begin { 40_000 } else { 2_000 },
            Kind::Drift => {
                let ppm = if slow { 980_000 + f.dice % 40_000 } else { 900_000 + f.dice % 200_000 };
                // The local clock must not jump: only its rate changes.
                let before = self.local_time(any);
                let clock = &mut self.hosts[any].clock;
                clock.1 = ppm;
                clock.0 = before - self.now * ppm / 1_000_000;
                ends = false;
            }
            Kind::PartitionBoth | Kind::PeerCutStoreOk => {
                self.cut_link(any, other, begin);
                self.cut_link(other, any, begin);
            }
            Kind::PartitionOneWay => self.cut_link(any, other, begin),
            Kind::Isolate => {
                for o in (0..n).filter(|&o| o != any) {
                    self.cut_link(any, o, begin);
                    self.cut_link(o, any, begin);
                }
                self.bump(any, begin, true);
                self.bump(any, begin, false);
            }
            Kind::ClientCut => self.bump(any, begin, false),
            Kind::StoreCutFromHost => self.bump(any, begin, true),
            Kind::Chaos => {
                for a in 0..n {
                    for b in 0..n {
                        let l = &mut self.links[a][b];
                        l.loss = if begin { f.dice % 100 } else { 0 };
                        l.dup = if begin { (f.dice >> 8) % 100 } else { 0 };
                        l.reorder = if begin { (f.dice >> 16) % 200 } else { 0 };
                    }
                }
            }
            Kind::CorruptWire => {
                counted = false;
                self.links[any][other].corrupt = if begin { 50 } else { 0 };
                self.links[other][any].corrupt = if begin { 50 } else { 0 };
            }
            Kind::StoreDown => self.store.down = begin,
            Kind::StoreLeaderKilled => {
                self.store.down = begin;
                self.store.lose_answers = if begin { 0 } else { 500 };
            }
            Kind::StoreSlow => self.store.slow_us = if begin { 20_000 + f.dice % 150_000 } else { 0 },
            Kind::QuorumChurn => {
                if begin {
                    for k in 0..5 {
                        self.store.lose_answers = 300;
                        self.at(self.now + (2 * k + 1) * f.us / 12, Ev::Fault(i, false));
                    }
                    self.store.down = true;
                } else {
                    self.store.down = !self.store.down && self.now < f.at + f.us * 2 / 3;
                }
            }
            Kind::StoreDownInTakeover => {
                // The primary dies; the store loses its quorum just when the standby asks.
                if begin {
                    counted = self.hosts[p].up;
                    self.kill(p, true);
                    self.plan.back.push((p, self.now + f.us + 300_000));
                    self.store.lose_answers = 1000;
                    let at = self.now + self.settings.suspect_us + f.dice % 4_000;
                    self.at(at, Ev::Fault(i, false));
                    ends = false;
                } else if self.store.lose_answers == 1000 {
                    self.store.lose_answers = 0;
                    self.store.down = true;
                    self.at(self.now + f.us.min(400_000), Ev::Fault(i, false));
                } else {
                    self.store.down = false;
                }
            }
            Kind::StoreRestored => {
                if begin {
                    // A restore takes its time; nobody is answered while it lasts.
                    self.store.down = true;
                    self.at(self.now + 400_000, Ev::Fault(i, false));
                    ends = false;
                } else {
                    self.store.restore(&mut self.rng);
                    self.log(|| format!("store restored to {:?}", self.store.record));
                }
            }
            Kind::OldFrames => {
                if begin {
                    counted = !self.old_frames.is_empty();
                    for (k, (from, to, message, bulk)) in std::mem::take(&mut self.old_frames).into_iter().enumerate() {
                        let at = self.now + k as u64 * f.us / 64;
                        self.at(at, Ev::Net { from, to, message, bulk, corrupt: false });
                    }
                }
                ends = false;
            }
            Kind::Handover | Kind::CancelHandover => {
                let (p, s) = (self.hosts[p].id.clone(), self.hosts[s].id.clone());
                let h = self.index(&p);
                counted = begin && self.hosts[h].up && self.store.record.in_sync.contains(&s);
                let e = if begin { Event::HandOver(s) } else { Event::CancelHandOver };
                if self.hosts[h].up && self.hosts[h].frozen_until <= self.now {
                    self.give(h, e);
                }
                if begin && f.kind == Kind::CancelHandover {
                    self.at(self.now + f.dice % 3_000, Ev::Fault(i, false));
                }
                ends = false;
            }
            Kind::Hints => {
                let (a, b) = (self.hosts[any].id.clone(), self.hosts[other].id.clone());
                let e = |id| if f.dice & 1 == 0 { Event::Connected(id) } else { Event::Disconnected(id) };
                for (h, id) in [(any, b), (other, a)] {
                    if self.hosts[h].up && self.hosts[h].frozen_until <= self.now {
                        self.give(h, e(id));
                    }
                }
                ends = false;
            }
            Kind::TornWrites
            | Kind::KilledInEpoch
            | Kind::KilledInPromotion
            | Kind::KilledInResync
            | Kind::KilledInMigration
            | Kind::SecondFault => counted = false,
        }
        if begin && counted {
            self.coverage.count(f.kind);
            if self.store.record.in_sync.is_empty() || self.plan.faults.iter().any(|o| o.at < f.at && o.at + o.us > f.at) {
                self.coverage.count(Kind::SecondFault);
            }
        }
        if ends {
            self.at(self.now + f.us, Ev::Fault(i, false));
        }
    }

    fn bump(&mut self, h: usize, begin: bool, store: bool) {
        let c = if store { &mut self.store_cut[h] } else { &mut self.client_cut[h] };
        *c = if begin { *c + 1 } else { c.saturating_sub(1) };
    }

    /// Starts hosts whose time has come; called often.
    pub fn come_back(&mut self) {
        let now = self.now;
        self.plan.tell_time(now);
        let due: Vec<_> = self.plan.back.iter().filter(|b| b.1 <= now).map(|b| b.0).collect();
        self.plan.back.retain(|b| b.1 > now);
        for h in due {
            if h < self.hosts.len() && !self.hosts[h].up {
                self.boot(h);
            }
        }
    }

    /// Everything that can be mended is mended.
    pub fn heal(&mut self) {
        self.log(|| "the world heals".to_owned());
        self.healing = true;
        self.plan.end();
        for l in self.links.iter_mut().flatten() {
            *l = crate::world::Link { last_arrival: l.last_arrival, ..Default::default() };
        }
        self.store_cut.fill(0);
        self.client_cut.fill(0);
        if self.store.down && self.plan.faults.iter().any(|f| f.kind == Kind::StoreRestored && f.at + 400_000 > self.now) {
            self.store.restore(&mut self.rng);
        }
        self.store.down = false;
        self.store.slow_us = 0;
        self.store.lose_answers = 0;
        for h in 0..self.hosts.len() {
            let now = self.now;
            let host = &mut self.hosts[h];
            host.frozen_until = host.frozen_until.min(now);
            host.starve_us = 0;
            host.fsync_us = 400;
            if !host.up {
                self.boot(h);
            }
        }
        self.plan.back.clear();
    }
}
