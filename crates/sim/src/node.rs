//! The runtime around one replica, as a model: carries out actions, reports events, runs the guest.

use crate::disk::Entry;
use crate::faults::{BEGIN, HEAL, Kind};
use crate::guest::{PAGES, Request, State};
use crate::invariants::{i1, i2, i3, i4, i5, i6, old_term};
use crate::world::{Bulk, Ev, Guest, Local, Record, Tracker, World};
use std::collections::VecDeque;
use std::rc::Rc;
use steadfast_epoch::{
    Action, Body, CasOutcome, EpochRef, Event, Message, Notice, Sabotage, SealedEpoch, StoreReply, VmRecord,
};
use steadfast_types::{Epoch, HostId};

const ITEMS: u16 = (1 << (PAGES + 1)) - 1;

fn items(state: &State, mask: u16) -> Vec<(usize, u32)> {
    let value = |i: usize| if i == PAGES { state.disk } else { state.pages[i] };
    (0..=PAGES)
        .filter(|i| mask & (1 << i) != 0)
        .map(|i| (i, value(i)))
        .collect()
}

fn put(state: &mut State, items: &[(usize, u32)]) {
    for &(i, v) in items {
        if i == PAGES {
            state.disk = v;
        } else {
            state.pages[i] = v;
        }
    }
}

impl World {
    /// Gives an event to a host's replica and carries out what it asks for.
    pub fn give(&mut self, h: usize, e: Event) {
        let mut todo = VecDeque::from([e]);
        let mut bound = 2_000;
        while let Some(e) = todo.pop_front() {
            bound -= 1;
            if bound == 0 {
                self.checks.fail(
                    "liveness",
                    format!("{} is busy without end: {e:?}", self.hosts[h].id),
                );
                return;
            }
            let now = self.local_time(h);
            if self.trace && e != Event::Tick {
                self.log(|| format!("{} <- {e:?}", self.hosts[h].id));
            }
            let Some(r) = self.hosts[h].replica.as_mut() else {
                return;
            };
            let actions = r.handle(now, e);
            for a in actions {
                let kill = self.plan.kill_at(&a);
                if kill == Some(false) {
                    self.killed_at(h, &a);
                    return;
                }
                self.log(|| format!("{} -> {a:?}", self.hosts[h].id));
                if kill == Some(true) {
                    self.act(h, a.clone());
                    self.killed_at(h, &a);
                    return;
                }
                self.act(h, a);
                if self.checks.failed.is_some() {
                    return;
                }
            }
        }
        self.schedule_tick(h);
    }

    fn killed_at(&mut self, h: usize, a: &Action) {
        self.log(|| format!("{} killed at {a:?}", self.hosts[h].id));
        self.coverage.step(a);
        let power = self.rng.per_mille(500);
        self.kill(h, power);
        // The time of its return was drawn with the plan.
        self.plan.returns(h, self.now);
    }

    fn soon(&mut self, h: usize, us: u64, l: Local) {
        let i = self.hosts[h].instance;
        self.after(us, Ev::Local(h, i, l));
    }

    fn act(&mut self, h: usize, a: Action) {
        match a {
            Action::Send { to, message } => self.send(h, &to, message),
            Action::SendChunk {
                to,
                message,
                join,
                seq,
                ..
            } => self.pace_chunk(h, to, message, join, seq),
            Action::StoreRead { id } => self.ask_store(h, id, None),
            Action::StoreCas { id, expect, record } => self.ask_store(h, id, Some((expect, record))),
            Action::Cut { epoch, bases, freeze } => self.cut(h, epoch, &bases, freeze),
            Action::ResumeGuest => {
                if let Some(g) = self.hosts[h].guest.as_mut() {
                    g.running = true;
                }
            }
            Action::SyncJournal { through } => {
                let us = 50 + self.rng.below(self.hosts[h].fsync_us);
                self.soon(h, us, Local::Synced(through, None));
            }
            Action::Commit { through } => {
                i2::acts(self, h, "commits");
                i6::commits(self, h, through);
                i4::committed(self, h, through);
                self.hosts[h].disk.checkpoint(through);
            }
            Action::Release { through } => self.release(h, through),
            Action::Forget { through } => {
                let keep = self.hosts[h].records.split_off(&(through.0 + 1));
                self.hosts[h].records = keep;
            }
            Action::BeginJoin { .. } => {
                let host = &mut self.hosts[h];
                host.mem = Some(State::default());
                host.mem_epoch = 0;
                host.filling = true;
                host.records.clear();
                host.extras.clear();
                host.disk.wipe();
            }
            // Written when the chunk arrived (see `arrive`).
            Action::StoreChunk { .. } => {}
            Action::Stage { epoch, flush } => self.stage(h, epoch, flush),
            Action::Apply { through } => self.apply(h, through),
            Action::Truncate { after } => {
                let host = &mut self.hosts[h];
                host.records.retain(|e, _| *e <= after.epoch.0);
                host.extras.retain(|e, _| *e <= after.epoch.0);
                host.disk.truncate(after);
            }
            Action::Speculate { at } => {
                let state = self.state_at(h, at.epoch.0);
                self.hosts[h].guest = Some(Guest { state, running: true });
                if !self.settings.can_roll_back {
                    self.hosts[h].mem = None;
                }
            }
            Action::DiscardSpeculation => {
                self.hosts[h].stop_guest();
                let us = 100 + self.rng.below(2_000);
                let intact = self.settings.can_roll_back;
                self.soon(h, us, Local::Undone(intact));
            }
            Action::Promote {
                term,
                at,
                released,
                running,
            } => {
                self.checks.promotions += 1;
                if !running {
                    let state = self.state_at(h, at.epoch.0);
                    self.hosts[h].guest = Some(Guest { state, running: true });
                }
                let host = &mut self.hosts[h];
                host.mem = None;
                host.released = released.0;
                let node = self.checks.node_of(at);
                self.log(|| format!("{} promoted to term {term}", self.hosts[h].id));
                i2::acts(self, h, "is promoted");
                i6::starts(self, h);
                i4::promoted(self, h, at, node);
            }
            Action::ColdBoot { at, .. } => self.cold_boot(h, at),
            Action::StopGuest { keep } => {
                let host = &mut self.hosts[h];
                if keep {
                    host.mem = host.guest.as_ref().map(|g| g.state);
                    let at = match host.replica.as_ref().map(|r| r.role()) {
                        Some(steadfast_epoch::Role::Standby(s)) => s.status().staged,
                        _ => None,
                    };
                    if let Some(at) = at {
                        host.mem_epoch = at.epoch.0;
                        self.checks.staged(at, h);
                    }
                }
                let host = &mut self.hosts[h];
                host.stop_guest();
                host.records.clear();
            }
            Action::Throttle { .. } => {}
            Action::Notice(n) => match n {
                Notice::Suspected(_) if self.store.record.in_sync.contains(&self.hosts[h].id) => {
                    self.checks.suspicions += 1;
                }
                Notice::Alone => self.checks.alone += 1,
                _ => {}
            },
        }
    }

    fn send(&mut self, h: usize, to: &HostId, message: Message) {
        let to = self.index(to);
        let bulk = match &message.body {
            Body::Epoch(e) => {
                let Some((r, _)) = self.hosts[h].records.get(&e.epoch.epoch.0) else {
                    self.checks.fail(
                        "runtime",
                        format!(
                            "{} is to send {}, which it was told to forget",
                            self.hosts[h].id, e.epoch
                        ),
                    );
                    return;
                };
                let mut missing = e
                    .base
                    .and_then(|_| self.hosts[h].base_items.get(&(to, e.epoch.epoch.0)).cloned())
                    .unwrap_or_default();
                // It continues the stream of the copy.
                if let Some(shadow) = self.hosts[h].shadows.get(&to) {
                    missing.retain(|(item, value)| shadow.get(item) != Some(value));
                }
                let bulk = Bulk::Record(r.clone(), missing);
                i6::sends(self, h, e.epoch.epoch);
                Some(bulk)
            }
            // A new session: what is sent refers to nothing before it.
            Body::Join { .. } | Body::Resume { .. } => {
                self.hosts[h].shadows.remove(&to);
                None
            }
            _ => None,
        };
        self.transmit(h, to, &message, bulk);
    }

    /// Copies give way to others: a piece may wait, and those after it with it.
    fn pace_chunk(&mut self, h: usize, to: HostId, message: Message, join: u64, seq: u64) {
        let slow = (BEGIN..HEAL).contains(&self.now) && self.rng.per_mille(60);
        let wait = match slow {
            true => self.rng.below(500_000),
            false => 0,
        };
        let at = self.hosts[h].chunks_at.max(self.now) + wait;
        if at == self.now {
            return self.send_chunk(h, &to, message, join, seq);
        }
        self.hosts[h].chunks_at = at;
        self.soon(h, at - self.now, Local::Chunk(to, message, join, seq));
    }

    fn send_chunk(&mut self, h: usize, to: &HostId, message: Message, join: u64, seq: u64) {
        let i = self.index(to);
        let host = &mut self.hosts[h];
        let primary = host.replica.as_ref().and_then(|r| r.primary());
        if !primary.is_some_and(|p| p.wants_chunk(to, message.session, join, seq)) {
            return;
        }
        let Some(g) = host.guest.as_ref() else { return };
        let t = host
            .trackers
            .entry(i)
            .and_modify(|t| {
                if t.join != join {
                    *t = Tracker {
                        join,
                        dirty: ITEMS,
                        chunks: Default::default(),
                    };
                }
            })
            .or_insert_with(|| Tracker {
                join,
                dirty: ITEMS,
                chunks: Default::default(),
            });
        // Chunks from here on were lost, or are sent for the first time.
        for (_, mask) in t.chunks.split_off(&seq) {
            t.dirty |= mask;
        }
        let mut mask = 0;
        for bit in (0..=PAGES).map(|i| 1 << i).filter(|b| t.dirty & b != 0).take(2) {
            mask |= bit;
        }
        t.dirty &= !mask;
        t.chunks.insert(seq, mask);
        let remaining = u64::from(t.dirty.count_ones()) << 20;
        let shadow = host.shadows.entry(i).or_default();
        if seq == 0 {
            shadow.clear();
        }
        let mut sent = items(&g.state, mask);
        sent.retain(|&(item, value)| shadow.insert(item, value) != Some(value));
        let bulk = Bulk::Chunk(sent);
        self.transmit(h, i, &message, Some(bulk));
        let e = Event::ChunkSent {
            to: to.clone(),
            join,
            seq,
            remaining,
        };
        self.soon(h, 30, Local::Plain(e));
    }

    fn cut(&mut self, h: usize, epoch: Epoch, bases: &[HostId], freeze: bool) {
        let bases: Vec<usize> = bases.iter().map(|b| self.index(b)).collect();
        let pause = 100 + self.rng.below(300);
        let host = &mut self.hosts[h];
        let Some(g) = host.guest.as_mut() else { return };
        g.running &= !freeze;
        let delta = host.open_pages.drain(..).map(|p| (p, g.state.pages[p])).collect();
        for b in bases {
            if let Some(t) = host.trackers.get(&b) {
                host.base_items.insert((b, epoch.0), items(&g.state, t.dirty));
            }
        }
        host.cutting = Some(Record {
            epoch: EpochRef {
                epoch,
                term: Default::default(),
            },
            delta,
            end: g.state,
            flush: std::mem::take(&mut host.open_flush),
            frames: std::mem::take(&mut host.open_frames),
        });
        self.soon(h, pause, Local::Sealed(epoch));
    }

    fn stage(&mut self, h: usize, epoch: EpochRef, flush: bool) {
        let us = 20 + self.rng.below(150);
        let fsync = 50 + self.rng.below(self.hosts[h].fsync_us);
        let host = &mut self.hosts[h];
        let Some((r, token)) = host.records.get(&epoch.epoch.0).cloned() else {
            self.checks.fail(
                "runtime",
                format!("{} is to stage {epoch}, which is not here", host.id),
            );
            return;
        };
        host.disk.append(Entry {
            epoch,
            disk: r.end.disk,
        });
        let at = host.stage_free.max(self.now) + us;
        host.stage_free = at;
        let wait = at - self.now;
        self.soon(h, wait, Local::Staged(epoch, token));
        if flush {
            self.soon(h, wait + fsync, Local::Synced(epoch.epoch, Some(token)));
        }
    }

    fn apply(&mut self, h: usize, through: Epoch) {
        let Some(mut mem) = self.hosts[h].mem else { return };
        for r in self.records_after_memory(h, through.0) {
            self.step_memory(h, &mut mem, &r);
            i3::applied(self, h, &mem, &r);
        }
        let host = &mut self.hosts[h];
        host.mem = Some(mem);
        host.mem_epoch = through.0;
        host.disk.checkpoint(through);
        self.soon(h, 50, Local::Applied(through));
    }

    fn records_after_memory(&self, h: usize, through: u64) -> Vec<Rc<Record>> {
        let host = &self.hosts[h];
        if host.mem_epoch >= through {
            return Vec::new();
        }
        host.records
            .range(host.mem_epoch + 1..=through)
            .map(|(_, (r, _))| r.clone())
            .collect()
    }

    fn step_memory(&mut self, h: usize, mem: &mut State, r: &Record) {
        let host = &mut self.hosts[h];
        if let Some(missing) = host.extras.remove(&r.epoch.epoch.0) {
            put(mem, &missing);
            host.filling = false;
        }
        put(mem, &r.delta);
        *mem = State {
            pages: mem.pages,
            ..r.end
        };
    }

    /// The standby's state after this epoch: what is applied, and the staged records on top of it.
    fn state_at(&mut self, h: usize, epoch: u64) -> State {
        let Some(mut mem) = self.hosts[h].mem else {
            self.checks.fail(
                "I3",
                format!("{} is to run from {epoch} but has no memory", self.hosts[h].id),
            );
            return State::default();
        };
        // Undo must find everything as it is, so this works on copies.
        let extras = self.hosts[h].extras.clone();
        let filling = self.hosts[h].filling;
        for r in self.records_after_memory(h, epoch) {
            self.step_memory(h, &mut mem, &r);
            i3::whole(self, h, &mem, &r);
        }
        self.hosts[h].extras = extras;
        self.hosts[h].filling = filling;
        mem
    }

    fn release(&mut self, h: usize, through: Epoch) {
        i2::acts(self, h, "releases");
        i6::releases(self, h, through);
        let from = self.hosts[h].released;
        let records: Vec<_> = self.hosts[h]
            .records
            .range(from + 1..=through.0)
            .map(|(_, (r, _))| r.clone())
            .collect();
        for r in &records {
            i1::released(self, h, r);
            // After a takeover, records of another instance are only released again if they carry their frames.
            let own = self.hosts[h]
                .replica
                .as_ref()
                .is_some_and(|p| p.term() == r.epoch.term);
            if !own && !self.carry_frames {
                continue;
            }
            for f in &r.frames {
                i1::visible(self, f);
                i5::visible(self, f);
                if self.client_cut[h] == 0 {
                    let us = 50 + self.rng.below(100);
                    self.after(us, Ev::Answer(*f));
                }
            }
        }
        self.hosts[h].released = self.hosts[h].released.max(through.0);
    }

    fn cold_boot(&mut self, h: usize, at: EpochRef) {
        let found = self.hosts[h].disk.recover();
        i2::acts(self, h, "boots");
        let disk = found.map_or(0, |e| e.disk);
        i5::booted(self, h, disk);
        let state = State::boot(&mut self.history, disk);
        self.checks.cold_boots += 1;
        self.checks.tip = state.node;
        self.checks.committed = state.node;
        let host = &mut self.hosts[h];
        host.guest = Some(Guest { state, running: true });
        host.open_pages = (0..PAGES).collect();
        host.mem = None;
        host.records.clear();
        host.released = at.epoch.0;
        i6::starts(self, h);
        self.log(|| format!("{} boots the guest from disk {disk}", self.hosts[h].id));
    }

    /// A host's own work is done.
    pub fn local(&mut self, h: usize, l: Local) {
        let host = &mut self.hosts[h];
        match l {
            Local::Sealed(epoch) => {
                let Some(mut r) = host.cutting.take().filter(|r| r.epoch.epoch == epoch) else {
                    return;
                };
                let Some(p) = host.replica.as_ref().and_then(|r| r.primary()) else {
                    return;
                };
                r.epoch.term = p.term();
                let entry = Entry {
                    epoch: r.epoch,
                    disk: r.end.disk,
                };
                let sealed = SealedEpoch {
                    epoch,
                    bytes: 4096 * r.delta.len() as u64,
                    flush: r.flush,
                    pause_us: 300,
                    whole: true,
                };
                let r = Rc::new(r);
                host.disk.append(entry);
                host.records.insert(epoch.0, (r.clone(), 0));
                i3::sealed(self, &r);
                self.give(h, Event::Sealed(sealed));
            }
            Local::Staged(epoch, token) => {
                if host.records.get(&epoch.epoch.0).is_some_and(|(_, t)| *t == token) {
                    self.checks.staged(epoch, h);
                    self.give(h, Event::Staged { epoch });
                }
            }
            Local::Synced(through, token) => {
                let still = match token {
                    None => true,
                    Some(t) => host.records.get(&through.0).is_some_and(|(_, have)| *have == t),
                };
                if still {
                    host.disk.sync(through);
                    self.give(h, Event::JournalSynced { through });
                }
            }
            Local::Applied(through) => self.give(h, Event::Applied { through }),
            Local::Undone(intact) => {
                if !intact {
                    host.mem = None;
                    host.records.clear();
                }
                self.give(h, Event::SpeculationDiscarded { intact });
            }
            Local::Chunk(to, message, join, seq) => self.send_chunk(h, &to, message, join, seq),
            Local::Plain(e) => self.give(h, e),
        }
    }

    /// A message arrives at a host that runs.
    pub fn arrive(&mut self, from: usize, to: usize, message: Message, bulk: Option<Bulk>, corrupt: bool) {
        let from_id = self.hosts[from].id.clone();
        let mut bulk = bulk;
        if corrupt {
            self.coverage.count(Kind::CorruptWire);
            if self.settings.sabotage == Sabotage::AcceptCorrupt {
                if let Some(Bulk::Record(r, _)) = &mut bulk {
                    let mut bad = (**r).clone();
                    bad.delta.iter_mut().for_each(|d| d.1 ^= 1);
                    *r = Rc::new(bad);
                }
            } else {
                self.give(to, Event::Corrupt { from: from_id });
                return;
            }
        }
        // The runtime keeps the bulk only if the replica asks for it to be staged or stored: so it is laid out
        // beforehand and taken back if nothing came of it.
        let host = &mut self.hosts[to];
        match (&message.body, bulk) {
            (Body::Epoch(h), Some(Bulk::Record(r, missing))) => {
                let e = h.epoch.epoch.0;
                let new = host.replica.as_ref().is_some_and(|r| r.primary().is_none());
                let before = host.records.get(&e).cloned();
                let extras = host.extras.get(&e).cloned();
                if new {
                    host.token += 1;
                    host.records.insert(e, (r, host.token));
                    if h.base.is_some() {
                        host.extras.insert(e, missing);
                    }
                }
                let token = host.token;
                let instance = host.instance;
                self.checks.stage_asked = false;
                let epoch = h.epoch;
                self.watch_stage(to, from_id, message, epoch);
                let host = &mut self.hosts[to];
                let same =
                    host.instance == instance && host.records.get(&e).is_some_and(|(_, t)| *t == token);
                if new && same && !self.checks.stage_asked {
                    match before {
                        Some(b) => host.records.insert(e, b),
                        None => host.records.remove(&e),
                    };
                    match extras {
                        Some(x) => host.extras.insert(e, x),
                        None => host.extras.remove(&e),
                    };
                }
            }
            (Body::Chunk { join, seq }, Some(Bulk::Chunk(items))) => {
                let wanted = Action::StoreChunk {
                    join: *join,
                    seq: *seq,
                };
                let now = self.local_time(to);
                let Some(r) = self.hosts[to].replica.as_mut() else {
                    return;
                };
                let actions = r.handle(
                    now,
                    Event::Message {
                        from: from_id,
                        message,
                    },
                );
                if actions.contains(&wanted)
                    && let Some(mem) = self.hosts[to].mem.as_mut()
                {
                    put(mem, &items);
                }
                self.perform(to, actions);
            }
            _ => self.give(
                to,
                Event::Message {
                    from: from_id,
                    message,
                },
            ),
        }
    }

    fn watch_stage(&mut self, h: usize, from: HostId, message: Message, epoch: EpochRef) {
        let now = self.local_time(h);
        self.log(|| format!("{} <- {from}: {message:?}", self.hosts[h].id));
        let Some(r) = self.hosts[h].replica.as_mut() else {
            return;
        };
        let seen = r.term();
        let actions = r.handle(
            now,
            Event::Message {
                from,
                message: message.clone(),
            },
        );
        old_term::acted(self, h, seen, &message, &actions);
        self.checks.stage_asked = actions
            .iter()
            .any(|a| matches!(a, Action::Stage { epoch: x, .. } if *x == epoch));
        self.perform(h, actions);
    }

    fn perform(&mut self, h: usize, actions: Vec<Action>) {
        for a in actions {
            let kill = self.plan.kill_at(&a);
            if kill != Some(false) {
                self.log(|| format!("{} -> {a:?}", self.hosts[h].id));
                self.act(h, a.clone());
            }
            if kill.is_some() {
                self.killed_at(h, &a);
                return;
            }
            if self.checks.failed.is_some() {
                return;
            }
        }
        self.schedule_tick(h);
    }

    /// A request reaches a host: its guest takes it, if one runs there.
    pub fn guest_takes(&mut self, h: usize, r: Request) {
        let host = &mut self.hosts[h];
        let Some(g) = host.guest.as_mut().filter(|g| g.running) else {
            return;
        };
        let Some(s) = g.state.take(&mut self.history, r) else {
            return;
        };
        if let Some(p) = s.page {
            host.open_pages.push(p);
            for t in host.trackers.values_mut() {
                t.dirty |= 1 << p;
                if s.wrote {
                    t.dirty |= 1 << PAGES;
                }
            }
        }
        host.open_flush |= s.flushed;
        host.open_frames.push(s.reply);
        if s.flushed {
            self.give(h, Event::Flush);
        }
        self.give(h, Event::Output);
    }

    fn ask_store(&mut self, h: usize, id: u64, cas: Option<(VmRecord, VmRecord)>) {
        let i = self.hosts[h].instance;
        if self.store_cut[h] > 0 {
            return;
        }
        let us = 200 + self.rng.below(400) + self.rng.below(self.store.slow_us + 1);
        self.after(us, Ev::StoreAsk(h, i, id, cas));
    }

    /// A request reaches the store. It counts even if the asker is dead by now.
    pub fn store_ask(&mut self, h: usize, i: u64, id: u64, cas: Option<(VmRecord, VmRecord)>) {
        let swap = cas.is_some();
        if self.store.down {
            // A leader that is going down may still say that it does not know.
            if swap && self.rng.per_mille(500) {
                let reply = StoreReply::Cas {
                    id,
                    outcome: CasOutcome::Unknown,
                };
                self.after(1_000, Ev::StoreTell(h, i, reply));
            }
            return;
        }
        let reply = match cas {
            None => StoreReply::Read {
                id,
                store: self.store.id,
                record: Some(self.store.record.clone()),
            },
            Some((expect, record)) => {
                let outcome = self.store.swap(&expect, record);
                self.log(|| {
                    format!(
                        "store {outcome:?} for {}: {:?}",
                        self.hosts[h].id, self.store.record
                    )
                });
                i2::store(self);
                StoreReply::Cas { id, outcome }
            }
        };
        let lost = self.store_cut[h] > 0 || swap && self.rng.per_mille(self.store.lose_answers);
        let us = 200 + self.rng.below(400) + self.rng.below(self.store.slow_us + 1);
        if !lost {
            self.after(us, Ev::StoreTell(h, i, reply));
        } else if swap && self.rng.per_mille(500) {
            let reply = StoreReply::Cas {
                id,
                outcome: CasOutcome::Unknown,
            };
            self.after(us, Ev::StoreTell(h, i, reply));
        }
    }
}
