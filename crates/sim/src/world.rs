//! The fake world: time, a queue of events, hosts, links between them, clients, the store.
//!
//! One event at a time is taken from the queue, ordered by (time, order of entry): a run is a function of its seed.
//! Hosts see only their own monotonic clock, which starts anywhere and drifts. Wall-clock time does not exist in the
//! protocol's interface, so a jump of it cannot matter; drift and freezes can, and are simulated.

use crate::disk::Disk;
use crate::faults::{Coverage, Fault, Kind, Plan};
use crate::guest::{CLIENTS, History, Op, Reply, Request, State};
use crate::invariants::Checks;
use crate::rng::Rng;
use crate::store::Store;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::rc::Rc;
use steadfast_epoch::{EpochRef, Event, Instance, Message, Replica, Settings, StoreReply, VmRecord};
use steadfast_types::{Epoch, HostId};

/// Bulk data behind a message.
#[derive(Clone, Debug)]
pub enum Bulk {
    /// A sealed record, and what a standby whose copy it completes still lacks.
    Record(Rc<Record>, Vec<(usize, u32)>),
    /// Pages of a full copy; index `PAGES` is the disk.
    Chunk(Vec<(usize, u32)>),
}

/// One sealed epoch.
#[derive(Clone, Debug)]
pub struct Record {
    /// Which; set when it is sealed.
    pub epoch: EpochRef,
    /// Pages written in it.
    pub delta: Vec<(usize, u32)>,
    /// The guest's state at its end.
    pub end: State,
    /// The guest flushed in it.
    pub flush: bool,
    /// What the guest said in it.
    pub frames: Vec<Reply>,
}

/// Work that a host does by itself and reports on.
#[derive(Clone, Debug)]
pub enum Local {
    /// An epoch's record is sealed.
    Sealed(Epoch),
    /// A record is staged; the token tells it from an earlier attempt.
    Staged(EpochRef, u64),
    /// The journal is fsynced; with a token where the record may have been dropped since.
    Synced(Epoch, Option<u64>),
    /// Applied.
    Applied(Epoch),
    /// A speculation is undone.
    Undone(bool),
    /// A piece of a copy has waited for its turn.
    Chunk(HostId, Message, u64, u64),
    /// Anything else that just takes a moment.
    Plain(Event),
}

/// What happens in the world.
#[derive(Clone, Debug)]
pub enum Ev {
    /// A host's timer.
    Tick(usize, u64),
    /// A message arrives.
    Net {
        /// Sender.
        from: usize,
        /// Receiver.
        to: usize,
        /// The message.
        message: Message,
        /// What comes behind it.
        bulk: Option<Bulk>,
        /// It was damaged on the way.
        corrupt: bool,
    },
    /// A host's own work is done.
    Local(usize, u64, Local),
    /// A request reaches the store.
    StoreAsk(usize, u64, u64, Option<(VmRecord, VmRecord)>),
    /// The store's answer reaches a host.
    StoreTell(usize, u64, StoreReply),
    /// A client's request reaches a host.
    Ask(usize, Request),
    /// A reply reaches a client.
    Answer(Reply),
    /// A client sends, or sends again.
    Client(usize, u32),
    /// A fault begins or ends.
    Fault(usize, bool),
    /// The pool's manager looks around.
    Manager,
}

struct Due {
    at: u64,
    order: u64,
    ev: Ev,
}

impl PartialEq for Due {
    fn eq(&self, o: &Self) -> bool {
        (self.at, self.order) == (o.at, o.order)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Due {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        (o.at, o.order).cmp(&(self.at, self.order))
    }
}

/// One way from host to host.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Nothing passes.
    pub cut: u32,
    /// Additional delay in microseconds.
    pub delay_us: u64,
    /// Per mille of messages lost, doubled, overtaken, damaged.
    pub loss: u64,
    /// See `loss`.
    pub dup: u64,
    /// See `loss`.
    pub reorder: u64,
    /// See `loss`.
    pub corrupt: u64,
    pub(crate) last_arrival: u64,
}

/// A running guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its state.
    pub state: State,
    /// Not frozen.
    pub running: bool,
}

/// What the primary tracks for a full copy.
#[derive(Clone, Debug)]
pub struct Tracker {
    /// Which copy.
    pub join: u64,
    /// Items that the standby lacks.
    pub dirty: u16,
    /// Items per chunk.
    pub chunks: BTreeMap<u64, u16>,
}

/// One host with its replica and the runtime around it.
pub struct Host {
    /// Its name.
    pub id: HostId,
    /// Powered, and the process runs.
    pub up: bool,
    /// Which process: events of an earlier one are void.
    pub instance: u64,
    /// The state machine.
    pub replica: Option<Replica>,
    /// Frozen until then.
    pub frozen_until: u64,
    /// Every event takes up to so long to be handled.
    pub starve_us: u64,
    pub(crate) busy_until: u64,
    /// Local clock: offset, and rate in parts per million.
    pub clock: (u64, u64),
    /// The disk.
    pub disk: Disk,
    /// fsync takes up to this.
    pub fsync_us: u64,
    /// The guest, if it runs here.
    pub guest: Option<Guest>,
    /// A standby's memory at the applied epoch, or being filled.
    pub mem: Option<State>,
    /// The epoch that the memory stands at.
    pub mem_epoch: u64,
    /// What this instance has sealed, sent, committed, released, by its actions.
    pub cursors: [u64; 4],
    /// The memory is a copy that is not complete.
    pub filling: bool,
    /// Sealed or staged records by epoch, with the staging token.
    pub records: BTreeMap<u64, (Rc<Record>, u64)>,
    /// A base epoch's missing items, by epoch.
    pub extras: BTreeMap<u64, Vec<(usize, u32)>>,
    /// The same on the sending side: (host, epoch).
    pub base_items: BTreeMap<(usize, u64), Vec<(usize, u32)>>,
    /// What counts as there with each host that is being filled: it is not sent again.
    pub shadows: BTreeMap<usize, BTreeMap<usize, u32>>,
    /// Pieces of copies have their turn from then on.
    pub chunks_at: u64,
    /// Cut but not yet sealed.
    pub cutting: Option<Record>,
    /// Frames and dirt of the open epoch.
    pub open_frames: Vec<Reply>,
    /// See `open_frames`.
    pub open_pages: Vec<usize>,
    /// See `open_frames`.
    pub open_flush: bool,
    /// Full copies under way, by standby.
    pub trackers: BTreeMap<usize, Tracker>,
    /// Outputs up to here have left.
    pub released: u64,
    pub(crate) stage_free: u64,
    pub(crate) token: u64,
    pub(crate) tick_gen: u64,
}

/// One client.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its outstanding request.
    pub request: Request,
    /// Replies received.
    pub replies: u64,
    /// Since when it waits.
    pub since: u64,
    /// Its longest wait.
    pub longest_us: u64,
}

/// The world.
pub struct World {
    /// True time in microseconds.
    pub now: u64,
    /// Chance.
    pub rng: Rng,
    queue: BinaryHeap<Due>,
    order: u64,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Ways between them, `[from][to]`.
    pub links: Vec<Vec<Link>>,
    /// Cut off from the store; from the clients.
    pub store_cut: Vec<u32>,
    /// See `store_cut`.
    pub client_cut: Vec<u32>,
    /// The store.
    pub store: Store,
    /// Every state the guest was in.
    pub history: History,
    /// The clients.
    pub clients: Vec<Client>,
    /// What must hold.
    pub checks: Checks,
    /// What goes wrong.
    pub plan: Plan,
    /// What went wrong.
    pub coverage: Coverage,
    /// Settings of all replicas.
    pub settings: Settings,
    /// Frames travel with the record and are released again after a takeover.
    pub carry_frames: bool,
    /// Standbys wanted.
    pub want: usize,
    /// The world is being healed.
    pub healing: bool,
    /// Frames kept for a replay.
    pub old_frames: VecDeque<(usize, usize, Message, Option<Bulk>)>,
    /// Print every event.
    pub trace: bool,
    pub(crate) instances: u64,
    pub(crate) manager_idle: u64,
    pub(crate) unconfirmed: u64,
    /// Times that an operator had to confirm a restored record.
    pub operators: u64,
}

impl World {
    /// A world of `n` hosts, everything as it should be.
    #[must_use]
    pub fn new(rng: Rng, n: usize, settings: Settings, plan: Plan, trace: bool) -> Self {
        let names = ["a", "b", "c", "d"];
        let ids: Vec<HostId> = names
            .iter()
            .take(n)
            .filter_map(|s| HostId::new(*s).ok())
            .collect();
        let mut w = Self {
            now: 0,
            rng,
            queue: BinaryHeap::new(),
            order: 0,
            store: Store::new(ids[0].clone()),
            hosts: Vec::new(),
            links: vec![vec![Link::default(); n]; n],
            store_cut: vec![0; n],
            client_cut: vec![0; n],
            history: History::default(),
            clients: Vec::new(),
            checks: Checks::default(),
            plan,
            coverage: Coverage::default(),
            settings,
            carry_frames: true,
            want: 1,
            healing: false,
            old_frames: VecDeque::new(),
            trace,
            instances: 0,
            manager_idle: 0,
            unconfirmed: 0,
            operators: 0,
        };
        for id in ids {
            let clock = (w.rng.below(1 << 40), w.rng.range(990_000, 1_010_000));
            w.hosts.push(Host::new(id, clock));
        }
        for h in 0..n {
            w.boot(h);
        }
        for c in 0..CLIENTS {
            let request = Request {
                client: c,
                number: 1,
                op: Op::Flush,
            };
            w.clients.push(Client {
                request,
                replies: 0,
                since: 0,
                longest_us: 0,
            });
            w.at(1_000 + c as u64 * 777, Ev::Client(c, 1));
        }
        for i in 0..w.plan.faults.len() {
            w.at(w.plan.faults[i].at, Ev::Fault(i, true));
        }
        w.at(0, Ev::Manager);
        w
    }

    /// Puts an event into the future.
    pub fn at(&mut self, at: u64, ev: Ev) {
        self.order += 1;
        self.queue.push(Due {
            at: at.max(self.now),
            order: self.order,
            ev,
        });
    }

    /// Puts an event a little into the future.
    pub fn after(&mut self, us: u64, ev: Ev) {
        self.at(self.now + us, ev);
    }

    /// A line of the trace.
    pub fn log(&self, line: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>10} {}", self.now, line());
        }
    }

    /// The index of a host.
    #[must_use]
    pub fn index(&self, id: &HostId) -> usize {
        self.hosts.iter().position(|h| h.id == *id).unwrap_or(0)
    }

    /// A host's own time.
    #[must_use]
    pub fn local_time(&self, h: usize) -> u64 {
        let (offset, ppm) = self.hosts[h].clock;
        offset + self.now * ppm / 1_000_000
    }

    /// Starts a process on a host; its disk says where its volumes stand.
    pub fn boot(&mut self, h: usize) {
        self.instances += 1;
        let instance = self.instances;
        let seed = self.rng.draw() >> 1;
        let now = self.local_time(h);
        let settings = self.settings.clone();
        let host = &mut self.hosts[h];
        host.reset();
        host.up = true;
        host.instance = instance;
        let disk = host.disk.recover().map_or(EpochRef::ZERO, |e| e.epoch);
        host.replica = Some(Replica::new(now, host.id.clone(), Instance(seed), settings, disk));
        self.log(|| format!("{} boots, disk at {disk}", self.hosts[h].id));
        self.schedule_tick(h);
    }

    /// Ends a process at once; with `power` its unsynced writes may be lost.
    pub fn kill(&mut self, h: usize, power: bool) {
        if !self.hosts[h].up {
            return;
        }
        self.log(|| format!("{} dies, power {power}", self.hosts[h].id));
        let host = &mut self.hosts[h];
        host.reset();
        host.up = false;
        if power && host.disk.power_loss(&mut self.rng) > 0 {
            self.coverage.count(Kind::TornWrites);
        }
    }

    /// Asks for the next tick of a host.
    pub fn schedule_tick(&mut self, h: usize) {
        let local = self.local_time(h);
        let host = &mut self.hosts[h];
        let Some(r) = &host.replica else { return };
        let wait = r.deadline().saturating_sub(local).clamp(20, 20_000);
        host.tick_gen += 1;
        let ev = Ev::Tick(h, host.tick_gen);
        self.after(wait, ev);
    }

    /// Runs until the given time, or until a check fails.
    pub fn run_until(&mut self, end: u64) {
        while self.checks.failed.is_none() {
            match self.queue.peek() {
                Some(d) if d.at <= end => {}
                _ => break,
            }
            let Some(d) = self.queue.pop() else { break };
            self.now = d.at;
            self.step(d.ev);
        }
        self.now = self.now.max(end);
    }

    fn host_of(ev: &Ev) -> Option<usize> {
        match ev {
            Ev::Tick(h, _) | Ev::Local(h, ..) | Ev::StoreTell(h, ..) | Ev::Ask(h, _) => Some(*h),
            Ev::Net { to, .. } => Some(*to),
            _ => None,
        }
    }

    fn step(&mut self, ev: Ev) {
        if let Some(h) = Self::host_of(&ev) {
            let host = &mut self.hosts[h];
            if !host.up {
                return;
            }
            let free = host.frozen_until.max(host.busy_until);
            if free > self.now {
                // Keeps its place: events pushed at the same time come out in the order of entry.
                self.at(free, ev);
                return;
            }
            if host.starve_us > 0 && self.rng.per_mille(20) {
                let pause = self.rng.below(host.starve_us);
                self.hosts[h].busy_until = self.now + pause;
                self.at(self.now + pause, ev);
                return;
            }
        }
        match ev {
            Ev::Tick(h, tick) => {
                if self.hosts[h].tick_gen == tick {
                    self.give(h, Event::Tick);
                }
            }
            Ev::Net {
                from,
                to,
                message,
                bulk,
                corrupt,
            } => self.arrive(from, to, message, bulk, corrupt),
            Ev::Local(h, i, l) => {
                if self.hosts[h].instance == i {
                    self.local(h, l);
                }
            }
            Ev::StoreAsk(h, i, id, cas) => self.store_ask(h, i, id, cas),
            Ev::StoreTell(h, i, reply) => {
                if self.hosts[h].instance == i {
                    self.give(h, Event::Store(reply));
                }
            }
            Ev::Ask(h, r) => self.guest_takes(h, r),
            Ev::Answer(r) => self.client_hears(r),
            Ev::Client(c, number) => self.client_sends(c, number),
            Ev::Fault(i, begin) => self.fault(i, begin),
            Ev::Manager => {
                self.manage();
                self.after(50_000, Ev::Manager);
            }
        }
    }

    /// Sends a message over a link, with all that can happen to it there.
    pub fn transmit(&mut self, from: usize, to: usize, message: &Message, bulk: Option<Bulk>) {
        let size_us = if bulk.is_some() { 40 } else { 5 };
        let jitter = self.rng.below(60);
        let l = self.links[from][to].clone();
        if l.cut > 0 || self.rng.per_mille(l.loss) {
            return;
        }
        let copies = 1 + usize::from(self.rng.per_mille(l.dup));
        for _ in 0..copies {
            let mut at = self.now + 30 + size_us + jitter + l.delay_us;
            if self.rng.per_mille(l.reorder) {
                at += self.rng.below(20_000);
            } else {
                at = at.max(self.links[from][to].last_arrival);
                self.links[from][to].last_arrival = at;
            }
            let corrupt = self.rng.per_mille(l.corrupt);
            let (message, bulk) = (message.clone(), bulk.clone());
            self.at(
                at,
                Ev::Net {
                    from,
                    to,
                    message,
                    bulk,
                    corrupt,
                },
            );
        }
        if self.plan.keeps_frames && self.rng.per_mille(10) && self.old_frames.len() < 64 {
            self.old_frames.push_back((from, to, message.clone(), bulk));
        }
    }

    fn client_sends(&mut self, c: usize, number: u32) {
        let r = self.clients[c].request;
        if r.number != number {
            return;
        }
        for h in 0..self.hosts.len() {
            if self.client_cut[h] == 0 {
                let us = 50 + self.rng.below(100);
                self.after(us, Ev::Ask(h, r));
            }
        }
        self.after(30_000, Ev::Client(c, number));
    }

    fn client_hears(&mut self, r: Reply) {
        let think = self.rng.range(2_000, 12_000);
        let op = self.rng.pick(&[Op::Memory, Op::Memory, Op::Write, Op::Flush]);
        let now = self.now;
        let c = &mut self.clients[r.client];
        if r.number != c.request.number {
            return;
        }
        c.replies += 1;
        c.longest_us = c.longest_us.max(now - c.since);
        c.since = now + think;
        c.request = Request {
            client: r.client,
            number: r.number + 1,
            op,
        };
        let (client, number) = (r.client, r.number + 1);
        self.after(think, Ev::Client(client, number));
    }

    /// Whether this fault is planned and not over.
    #[must_use]
    pub fn planned(&self, i: usize) -> Fault {
        self.plan.faults[i]
    }
}

impl Host {
    fn new(id: HostId, clock: (u64, u64)) -> Self {
        Self {
            id,
            up: false,
            instance: 0,
            replica: None,
            frozen_until: 0,
            starve_us: 0,
            busy_until: 0,
            clock,
            disk: Disk::default(),
            fsync_us: 400,
            guest: None,
            mem: None,
            mem_epoch: 0,
            cursors: [0; 4],
            filling: false,
            records: BTreeMap::new(),
            extras: BTreeMap::new(),
            base_items: BTreeMap::new(),
            shadows: BTreeMap::new(),
            chunks_at: 0,
            cutting: None,
            open_frames: Vec::new(),
            open_pages: Vec::new(),
            open_flush: false,
            trackers: BTreeMap::new(),
            released: 0,
            stage_free: 0,
            token: 0,
            tick_gen: 0,
        }
    }

    /// Everything a process holds in memory is gone.
    pub fn reset(&mut self) {
        self.replica = None;
        self.instance = 0;
        self.frozen_until = 0;
        self.busy_until = 0;
        self.guest = None;
        self.mem = None;
        self.mem_epoch = 0;
        self.cursors = [0; 4];
        self.filling = false;
        self.records.clear();
        self.extras.clear();
        self.base_items.clear();
        self.shadows.clear();
        self.cutting = None;
        self.open_frames.clear();
        self.open_pages.clear();
        self.open_flush = false;
        self.trackers.clear();
        self.released = 0;
        self.stage_free = 0;
    }

    /// Drops the guest and all it said that did not leave.
    pub fn stop_guest(&mut self) {
        self.guest = None;
        self.cutting = None;
        self.open_frames.clear();
        self.open_pages.clear();
        self.open_flush = false;
        self.trackers.clear();
        self.base_items.clear();
    }
}
