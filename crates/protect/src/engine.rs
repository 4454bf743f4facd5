//! The engine: one thread that owns a VM instance and does what the epoch protocol says.
//!
//! ```text
//! links, store, NICs, guest, control --> Input queue --> Replica (pure) --> actions --> machine, links, NICs, store
//! ```
//! Every decision is the protocol's; this file only carries it out. It never waits for anybody but its queue.

use crate::applying::Applying;
use crate::audit::Audit;
use crate::codec;
use crate::config::ProtectSpec;
use crate::copy_out::CopyOut;
use crate::counters::Counters;
use crate::disk_engine::Care;
use crate::disks::Disks;
use crate::failpoint::Failpoint;
use crate::former::{Built, Frozen};
use crate::handing::Handing;
use crate::input::{Input, Inputs};
use crate::life::{Ending, Remains, WaitingCut};
use crate::outgoing::{Job, PIECE};
use crate::pace::Pace;
use crate::peer::{Peer, Record};
use crate::shared::SharedDisks;
use crate::store::{self, Ask, Store, random_u64};
use crate::taking::{self, TakeControl, Taking};
use crate::throttle::Throttle;
use crate::timeline::Timeline;
use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use steadfast_capture::{Capture, PageArena, SealedPages};
use steadfast_epoch::arbiter::Instance;
use steadfast_epoch::io::{Action, Event, Notice};
use steadfast_epoch::message::{Body, Message};
use steadfast_epoch::policy::PolicySettings;
use steadfast_epoch::{Replica, Settings};
use steadfast_machine::cpuid::GuestCpu;
use steadfast_machine::devices::legacy::GuestEvent;
use steadfast_machine::memory::layout::ram_regions;
use steadfast_machine::vcpu::VcpuEvent;
use steadfast_net::Hold;
use steadfast_types::{Epoch, Gfn, HostId, VmId};
use steadfast_vmm::control::NetRate;
use steadfast_vmm::guest_care::GuestCare;
use steadfast_vmm::process::{Ended, ProcessError};
use steadfast_vmm::{AssembleError, Vm};
use steadfast_wire::record::Staged;
use steadfast_wire::{Frame, RecordId, StagedRecord, vm_hash};

/// The NICs' queues of the present machine.
pub type Holds = Arc<Mutex<Vec<Arc<Hold>>>>;
/// Builds a machine that stands still, its NICs behind [`Holds`]: the first, or the one that follows another of the same VM,
/// which stands still.
pub type MakeVm = Box<dyn Fn(Option<&Remains>) -> Result<Vm, AssembleError> + Send>;

/// Inputs handled before the clock is looked at again.
const BATCH: usize = 64;
/// What goes on by itself is looked after so often: output that a full console refused, disks, an end.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// As often while there is none of that: an idle instance costs its host little.
const LOOK_IDLE: Duration = Duration::from_millis(100);

/// What the engine is made of.
pub struct Parts {
    /// Name of the VM.
    pub name: VmId,
    /// How it is protected.
    pub spec: ProtectSpec,
    /// Builds machines.
    pub make_vm: MakeVm,
    /// Their NICs.
    pub holds: Holds,
    /// Its writable disks that are mirrored.
    pub disks: Disks,
    /// Those that all hosts reach.
    pub shared: SharedDisks,
    /// Size of RAM in bytes.
    pub ram_bytes: u64,
    /// The arbiter.
    pub store: Box<dyn Store>,
    /// Sending side of the queue.
    pub inputs: Inputs,
    /// A guest that panicked, and does not start itself anew, is reset.
    pub reset_panicked: bool,
    /// Of a VM that is taken over from another process.
    pub take_control: Option<TakeControl>,
}

/// See the module.
pub struct Engine {
    pub(crate) replica: Replica,
    pub(crate) vm: Vm,
    pub(crate) vm_hash: u64,
    pub(crate) holds: Holds,
    pub(crate) disks: Disks,
    pub(crate) shared: SharedDisks,
    /// A handover that waits for them.
    pub(crate) handing: Handing,
    pub(crate) care: Care,
    pub(crate) guest: GuestCare,
    /// A disk here is dead: what works on it is left behind when the process ends.
    pub(crate) abandoned: bool,
    pub(crate) peers: BTreeMap<HostId, Peer>,
    pub(crate) capture: Capture,
    pub(crate) sealed: VecDeque<(Epoch, Arc<Record>)>,
    pub(crate) staged: BTreeMap<Epoch, StagedRecord>,
    pub(crate) arrived: Option<StagedRecord>,
    /// The epoch that RAM stands at exactly, on a standby; none while it is being filled, or an epoch applied.
    pub(crate) memory: Option<Epoch>,
    pub(crate) applying: Applying,
    /// The epoch that completes the copy, once it is staged; and whether it is awaited.
    pub(crate) base: (Option<Epoch>, bool),
    /// Machine state of the newest applied epoch.
    pub(crate) state: Vec<u8>,
    pub(crate) counters: Counters,
    pub(crate) timeline: Timeline,
    pub(crate) events: VecDeque<Event>,
    pub(crate) start: bool,
    /// None while the machine that follows a reset is made.
    pub(crate) make_vm: Option<MakeVm>,
    /// It is here while the machine before comes to rest, for no longer than this.
    pub(crate) resting: Option<(MakeVm, Instant)>,
    pub(crate) failpoint: Failpoint,
    /// A cut that was asked for meanwhile.
    pub(crate) waiting_cut: Option<WaitingCut>,
    /// Pages that changed with the machine itself; no dirty log knows them.
    pub(crate) carry: Vec<Gfn>,
    /// What a machine changed that was built anew and has not run yet: its first cut takes it.
    pub(crate) anew: Option<SealedPages>,
    pub(crate) ending: Option<Ending>,
    pub(crate) throttle: Throttle,
    /// Stopped for good by a cut, unless the protocol lets it run on.
    pub(crate) frozen: Option<Frozen>,
    /// The machine of a standby that ran the VM before is being built.
    pub(crate) next: Option<Receiver<Built>>,
    pub(crate) name: VmId,
    pub(crate) spec: ProtectSpec,
    pub(crate) ram_bytes: u64,
    pub(crate) store: Sender<Ask>,
    pub(crate) inputs: Inputs,
    clock: Instant,
    pace: Pace,
    pub(crate) log: VecDeque<String>,
    /// A cut that failed is tried again so many times.
    pub(crate) cut_failures: u32,
    pub(crate) audit: Option<Audit>,
    /// Pages that differed from the digest of their epoch; and epochs compared.
    pub(crate) audited: (u64, u64),
    pub(crate) copy_out: Option<CopyOut>,
    /// Of the present machine and those after it.
    pub(crate) net_rate: NetRate,
    /// Nothing may leave for want of a standby, whatever the class.
    pub(crate) silent: bool,
    /// All of the VM is mirrored, not only its disks ([`crate::extent`]); the same of what a standby takes, once that is known.
    pub(crate) whole: bool,
    pub(crate) taken_whole: Option<bool>,
    /// Dirty pages are tracked; when that may be tried again.
    pub(crate) tracks: bool,
    pub(crate) track_again: Option<Instant>,
    /// What a standby's guest sees of its CPU, and will see here ([`crate::cpu`]).
    pub(crate) guest_cpu: Option<GuestCpu>,
    /// Standbys are added once the next epoch is cut.
    pub(crate) add_after_cut: bool,
    /// Memory that a standby needs no more is given back.
    pub(crate) gives_back: Option<JoinHandle<()>>,
    /// The guest still runs in another process.
    pub(crate) taking: Option<Taking>,
    pub(crate) take_control: Option<TakeControl>,
}

/// When cuts are made.
pub(crate) fn policy(max_interval_us: Option<u64>) -> PolicySettings {
    let mut policy = PolicySettings::default();
    if let Some(us) = max_interval_us {
        (policy.max_interval_us, policy.idle_interval_us) = (us.max(100), us.max(100));
    }
    policy
}

impl Engine {
    /// Builds the machine, opens the links, starts the store's thread.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn new(parts: Parts) -> Result<Self, ProcessError> {
        let setting = |text: String| ProcessError::Assemble(AssembleError::Setting(text));
        let vm = (parts.make_vm)(None)?;
        let mut peers = BTreeMap::new();
        for (slot, peer) in parts.spec.peers.iter().enumerate() {
            let pages = ram_regions(parts.ram_bytes);
            let opened = Peer::open(&parts.name, &parts.spec, peer, slot, pages, &parts.inputs)
                .map_err(|e| setting(format!("link to {}: {e}", peer.host)))?;
            peers.insert(peer.host.clone(), opened);
        }
        let inputs = parts.inputs.clone();
        let store = store::serve(parts.store, move |reply| inputs.send(Input::Store(reply)))
            .map_err(|e| setting(format!("store: {e}")))?;
        let audit = parts.spec.audit.as_deref().map(Audit::new).transpose();
        let audit = audit.map_err(|e| setting(format!("audit folder: {e}")))?;
        let failpoint = Failpoint::new(parts.spec.die_at.as_deref()).map_err(setting)?;
        let pace = Pace::new(Duration::from_millis(parts.spec.suspect_ms));
        let instance = random_u64().map_err(|e| setting(format!("random numbers: {e}")))?;
        let settings = Settings {
            policy: policy(parts.spec.max_interval_us),
            suspect_us: parts.spec.suspect_us(!parts.spec.memory),
            standby_lost_us: parts.spec.suspect_ms * 750,
            heartbeat_us: parts.spec.heartbeat_ms() * 1000,
            step_cap_us: parts.spec.step_cap_us(),
            store_timeout_us: parts.spec.store_answer_ms() * 1000,
            hold_outputs: parts.spec.hold_outputs,
            acks_required: parts.spec.acks.unwrap_or(0),
            speculate: false,
            resend_inherited: false,
            planned_only: !parts.spec.shared_disks.is_empty(),
            // A copy is not over before all of it was sent once and again, in the smallest pieces.
            max_chunks: 100_000 + (parts.disks.capacity() + parts.ram_bytes) / (16 << 10),
            ..Settings::default()
        };
        let replica = Replica::new(
            0,
            parts.spec.host.clone(),
            Instance(instance),
            settings,
            parts.disks.boot_at(),
        );
        Ok(Self {
            replica,
            vm,
            vm_hash: vm_hash(&parts.name),
            holds: parts.holds,
            disks: parts.disks,
            shared: parts.shared,
            handing: Handing::default(),
            care: Care::new(parts.spec.copy_bytes_per_s),
            abandoned: false,
            peers,
            capture: Capture::new(PageArena::new(4096, 256 << 20)),
            sealed: VecDeque::new(),
            staged: BTreeMap::new(),
            arrived: None,
            memory: None,
            applying: Applying::default(),
            base: (None, false),
            state: Vec::new(),
            counters: Counters::default(),
            guest: GuestCare::new(parts.reset_panicked),
            timeline: Timeline::default(),
            events: VecDeque::new(),
            start: parts.spec.start,
            whole: parts.spec.memory,
            tracks: false,
            track_again: None,
            guest_cpu: None,
            add_after_cut: false,
            gives_back: None,
            taken_whole: None,
            name: parts.name,
            make_vm: Some(parts.make_vm),
            resting: None,
            waiting_cut: None,
            failpoint,
            carry: Vec::new(),
            anew: None,
            ending: None,
            throttle: Throttle::new(Instant::now()),
            frozen: None,
            next: None,
            spec: parts.spec,
            ram_bytes: parts.ram_bytes,
            store,
            inputs: parts.inputs,
            clock: Instant::now(),
            pace,
            log: VecDeque::new(),
            cut_failures: 0,
            audit,
            audited: (0, 0),
            copy_out: None,
            net_rate: NetRate::default(),
            silent: false,
            taking: None,
            take_control: parts.take_control,
        })
    }

    /// Runs until the VM ends.
    ///
    /// # Errors
    /// [`ProcessError`] when the instance cannot go on; its standby then takes over.
    pub fn run(&mut self, queue: &Receiver<Input>) -> Result<Ended, ProcessError> {
        crate::priority::raise("the engine");
        crate::ask::this_is_the_engine();
        if self.start {
            // Nobody else could go on once this instance had the right.
            if let Some(why) = self.disks.unusable() {
                return Err(ProcessError::DiskFault(why));
            }
            self.step(Event::ColdStart)?;
        }
        let mut looked = Instant::now();
        loop {
            let now = self.now();
            let every = self.look_every();
            let mut wait = Duration::from_micros(self.replica.deadline().saturating_sub(now)).min(every);
            if let Some(turn) = self.turn() {
                wait = wait.min(turn);
            }
            if self.takes_over() {
                wait = wait.min(taking::LOOK);
            }
            if self.has_work() {
                wait = Duration::ZERO;
            }
            let asleep = Instant::now();
            match queue.recv_timeout(wait) {
                Ok(first) => {
                    self.pace.begin(Instant::now());
                    let (mut next, mut left) = (Some(first), BATCH);
                    while let Some(input) = next {
                        let what = input.name();
                        if let Some(ended) = self.input(input)? {
                            return Ok(ended);
                        }
                        self.took(what);
                        left -= 1;
                        next = if left > 0 { queue.try_recv().ok() } else { None };
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.pace.begin(asleep + wait);
                    self.took("waiting for a CPU");
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Stopped),
            }
            self.take_if_left()?;
            self.work()?;
            self.took("a piece of what is large");
            if self.now() >= self.replica.deadline() {
                self.step(Event::Tick)?;
                self.took("a tick");
            }
            if looked.elapsed() >= every {
                self.vm
                    .serial
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .flush_output();
                self.disks_moved()?;
                self.bound_copy()?;
                self.rest()?;
                self.look_after_guest()?;
                self.keep_extent()?;
                self.keep_shared()?;
                looked = Instant::now();
                self.close_links();
                if let Some(ended) = self.end_step()? {
                    return Ok(ended);
                }
                self.took("looking after disks and console");
            }
        }
    }

    fn look_every(&self) -> Duration {
        let serial = self.vm.serial.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = serial.output_pending() == 0
            && self.disks.is_empty()
            && self.shared.is_empty()
            && !self.care.waits()
            && self.resting.is_none()
            && self.ending.is_none()
            && self.copy_out.is_none();
        if idle { LOOK_IDLE } else { LOOK_EVERY }
    }

    /// Notes what took too long since the last call.
    fn took(&mut self, what: &str) {
        if let Some(slow) = self.pace.mark(what, Instant::now()) {
            self.note(slow);
        }
    }

    /// Notes a pause that took too long, and which part of it.
    pub(crate) fn slow_pause(&mut self, times: steadfast_capture::CutTimes) {
        if self.pace.is_slow(times.pause) {
            self.note(format!("slow: a pause took {times}"));
        }
    }

    /// The throttle's turn; not while a frozen cut decides whether the guest runs on at all.
    fn turn(&mut self) -> Option<Duration> {
        if self.frozen.is_some() || self.between_machines() || self.replica.primary().is_none() {
            return None;
        }
        self.throttle.turn(&self.vm.machine, Instant::now())
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.elapsed().as_micros() as u64
    }

    /// Gives the protocol an event and carries out what it says, and what follows from that.
    pub(crate) fn step(&mut self, event: Event) -> Result<(), ProcessError> {
        self.events.push_back(event);
        while let Some(event) = self.events.pop_front() {
            let now = self.now();
            for action in self.replica.handle(now, event) {
                self.act(action)?;
            }
        }
        Ok(())
    }

    /// Tests may kill this process here.
    pub(crate) fn reached(&mut self, step: &str) {
        let replica = &self.replica;
        self.failpoint.at(step, || replica.status());
    }

    /// The step of an epoch or a promotion that an action belongs to.
    fn reached_by(&mut self, action: &Action) {
        let step = match action {
            Action::Send { message, .. } if matches!(message.body, Body::Ack { .. }) => "ack",
            Action::Send { message, .. } if matches!(message.body, Body::Epoch(_)) => "send",
            Action::Send { message, .. } if matches!(message.body, Body::Handover { .. }) => "handed",
            Action::StoreCas { record, .. } if record.owner != self.spec.host => "give",
            Action::Stage { .. } => "stage",
            Action::SyncJournal { .. } => "fsync",
            Action::Commit { .. } => "commit",
            Action::Release { .. } => "release",
            Action::Apply { .. } => "apply",
            Action::Promote { .. } => "grant",
            Action::Notice(Notice::Suspected(_)) => "suspect",
            _ => return,
        };
        self.reached(step);
    }

    fn act(&mut self, action: Action) -> Result<(), ProcessError> {
        self.reached_by(&action);
        match action {
            Action::Send { to, message } => self.send(&to, message),
            Action::StoreRead { id } => {
                let _ = self.store.send(Ask::Read(id));
            }
            Action::StoreCas { id, expect, record } => {
                let _ = self.store.send(Ask::Cas(id, Box::new(expect), Box::new(record)));
            }
            Action::Cut { epoch, bases, freeze } => self.cut(epoch, &bases, freeze)?,
            Action::ResumeGuest => {
                self.frozen = None;
                self.take_shared_back()?;
                if !self.between_machines() {
                    self.vm.machine.resume();
                }
            }
            Action::SyncJournal { through } if self.disks.is_empty() => {
                self.events.push_back(Event::JournalSynced { through });
            }
            Action::SyncJournal { through } => self.events.extend(self.disks.request_sync(through)),
            Action::Commit { through } => {
                tracing::debug!(at_us = self.now(), %through, "commit");
                self.counters.committed(through);
                self.events.extend(self.disks.commit(through, false));
            }
            Action::Release { through } => {
                tracing::debug!(at_us = self.now(), %through, "release");
                self.release(through);
            }
            Action::Forget { through } => self.forget(through),
            Action::Throttle { percent } => {
                self.note(format!("the guest is slowed down by {percent} %"));
                if self.frozen.is_none() {
                    self.throttle.set(percent, &self.vm.machine, Instant::now());
                }
            }
            Action::SendChunk {
                to,
                message,
                join,
                seq,
                have,
            } => self.pace_chunk(to, message, join, seq, have)?,
            Action::BeginJoin { join } => self.begin_join(join),
            Action::StoreChunk { join, seq } => self.store_chunk(join, seq),
            Action::Stage { epoch, flush } => self.stage(epoch, flush),
            Action::Apply { through } if self.apply_waits(through) => {}
            Action::Apply { through } => self.apply(through),
            Action::Truncate { after } => self.truncate(after),
            Action::Speculate { at } => self.note(format!("speculation at {at} is not enabled")),
            Action::DiscardSpeculation => self
                .events
                .push_back(Event::SpeculationDiscarded { intact: true }),
            Action::Promote {
                term,
                at,
                released,
                running: _,
            } => self.promote(term, at, released)?,
            Action::ColdBoot { term, at } => self.cold_boot(term, at)?,
            Action::StopGuest { keep } => self.stop_guest(keep)?,
            Action::Notice(notice) => {
                self.timeline.notice(&notice, self.now());
                // Another may be about to run the VM, or runs it: whatever the class promises, two must not speak (I2).
                if matches!(notice, Notice::Holding | Notice::Flowing) {
                    self.silent = notice == Notice::Holding;
                    self.set_holds(self.hold_mode());
                }
                self.note(format!("{notice:?}"));
            }
        }
        Ok(())
    }

    fn disks_moved(&mut self) -> Result<(), ProcessError> {
        self.disks.moved().into_iter().try_for_each(|e| self.step(e))?;
        self.care()
    }

    pub(crate) fn note(&mut self, text: String) {
        tracing::info!(at_us = self.now(), "{text}");
        if self.log.len() == 256 {
            self.log.pop_front();
        }
        self.log.push_back(format!("{} {text}", self.now()));
    }

    fn input(&mut self, input: Input) -> Result<Option<Ended>, ProcessError> {
        match input {
            Input::Link(host, event) => self.link_event(&host, event)?,
            Input::Store(reply) => self.step(Event::Store(reply))?,
            Input::Output => {
                let holds = self.nics();
                // Every flag is taken, so that each NIC can wake the engine again.
                if holds.iter().filter(|h| h.take_pending()).count() > 0 {
                    self.step(Event::Output)?;
                }
            }
            Input::Guest(event) => {
                self.inputs.heard(event);
                if self.replica.primary().is_none() {
                    // It runs elsewhere by now, from before it said this.
                    return Ok(None);
                }
                match event {
                    GuestEvent::Shutdown => return self.begin_end(Ended::Shutdown),
                    GuestEvent::Reset => self.reset_guest()?,
                    GuestEvent::Panic | GuestEvent::CrashLoaded => {
                        let crash_kernel = event == GuestEvent::CrashLoaded;
                        self.guest.panicked(Instant::now(), 1, crash_kernel);
                        self.note("the guest's kernel panicked".into())
                    }
                }
            }
            // It runs elsewhere by now.
            Input::Vcpu(_) if self.replica.primary().is_none() => {}
            Input::Vcpu(VcpuEvent::TripleFault(_)) => self.reset_guest()?,
            Input::Remade(remade) => self.go_on_anew(*remade)?,
            Input::Built => self.built()?,
            Input::Vcpu(fault) => return Err(ProcessError::GuestFault(fault)),
            Input::Control(call) => return self.control(call),
            Input::DiskFlush => {
                self.inputs.heard_flush();
                self.step(Event::Flush)?;
            }
            Input::DiskFull => {
                self.inputs.heard_full();
                self.step(Event::CutWanted)?;
            }
            Input::DiskMoved => {
                self.inputs.heard_moved();
                self.disks_moved()?;
            }
            Input::DiskAsk {
                id,
                volume,
                offset,
                len,
            } => self.disk_ask(id, volume, offset, len),
            Input::DiskServed(host, id, got) => self.aside(&host, &crate::aside::Aside::Block { id, got }),
            Input::CopiedOut(done) => self.copied_out(done)?,
            Input::LetGo(done) => self.let_go(done)?,
            Input::SharedFlushed(to, done) => self.hand_over_flushed(to, done)?,
            Input::SharedSeen(host, id, same) => {
                let why = same.err();
                self.aside(&host, &crate::aside::Aside::SharedSeen { id, why });
            }
            Input::DiskCopied(join, result) => {
                let events = self.disks.copied(join, result);
                events.into_iter().try_for_each(|e| self.step(e))?;
            }
        }
        Ok(None)
    }

    fn link_event(&mut self, host: &HostId, event: steadfast_wire::Event) -> Result<(), ProcessError> {
        use steadfast_wire::Event as E;
        let Some(peer) = self.peers.get_mut(host) else {
            return Ok(());
        };
        match event {
            E::SessionUp { .. } => {
                peer.connected = true;
                peer.dead = false;
                (peer.cpu, peer.unfit) = (None, None);
                peer.reset_stream();
                self.step(Event::Connected(host.clone()))?;
            }
            E::PeerReset => {
                peer.connected = false;
                peer.reset_stream();
                self.step(Event::Disconnected(host.clone()))?;
            }
            E::PathDown { why, left, path } => {
                let gone = left == 0 && why.is_process_gone();
                if gone {
                    (peer.dead, peer.fed) = (true, false);
                }
                self.note(format!("path {path} to {host} down, {left} left: {why}"));
                // Where a guest would be booted, its own host has the first try.
                if gone && !self.stands_by_with_disks() {
                    self.step(Event::PeerDied(host.clone()))?;
                }
            }
            E::PathUp { path } => self.note(format!("path {path} to {host} up")),
            E::Received(frame) => self.received(host, frame)?,
            E::Writable => peer.flush(),
            E::ConnectFailed { .. } | E::PeerSilent { .. } | E::Starved { .. } => {}
        }
        Ok(())
    }

    /// A frame: a message, or a piece of the bulk of the message before it. The protocol hears of a message with bulk
    /// only when all of it is here and valid.
    fn received(&mut self, host: &HostId, frame: Frame) -> Result<(), ProcessError> {
        self.timeline.heard(host, self.now());
        // The memory here is that of a guest that runs elsewhere: nobody fills it.
        let deaf = self.takes_over();
        let Some(peer) = self.peers.get_mut(host) else {
            return Ok(());
        };
        peer.link.sender().consumed(&frame);
        if deaf {
            return Ok(());
        }
        if frame.kind == steadfast_wire::Kind::Control
            && let Some(message) = crate::aside::decode(frame.payload())
        {
            return self.heard_aside(host, message);
        }
        let event = if frame.kind == steadfast_wire::Kind::Control {
            match codec::decode(frame.payload()) {
                Some(m) if matches!(m.body, Body::Epoch(_) | Body::Chunk { .. }) => {
                    peer.pending = Some(m);
                    None
                }
                Some(message) => Some(Event::Message {
                    from: host.clone(),
                    message,
                }),
                None => {
                    self.note(format!("{host} sent a message that does not parse"));
                    None
                }
            }
        } else {
            let term = frame.term;
            match peer.stager.chunk(frame) {
                Ok(Staged::Complete(record)) => {
                    self.failpoint.at("receive", || self.replica.status());
                    self.arrived = Some(record);
                    peer.pending.take().map(|message| Event::Message {
                        from: host.clone(),
                        message,
                    })
                }
                Ok(Staged::Partial | Staged::Duplicate) => Some(Event::Bulk {
                    from: host.clone(),
                    term,
                }),
                Err(error) => {
                    let first = peer.pending.take().is_some();
                    // What follows of the same record is of no use either; it is reported once.
                    if first {
                        self.note(format!("bulk from {host}: {error}"));
                    }
                    first.then(|| Event::Corrupt { from: host.clone() })
                }
            }
        };
        if let Some(event) = event {
            self.step(event)?;
        }
        self.arrived = None;
        Ok(())
    }

    fn send(&mut self, to: &HostId, mut message: Message) {
        if matches!(message.body, Body::Hello) {
            self.show_cpu(to);
        }
        if let Body::Welcome(welcome) = &mut message.body
            && !self.welcome(to, welcome)
        {
            return;
        }
        let Some(peer) = self.peers.get_mut(to) else {
            return;
        };
        let frame = Frame::control(self.vm_hash, message.term, codec::encode(&message));
        match &message.body {
            Body::Join { .. } | Body::Resume { .. } => {
                peer.fed = matches!(message.body, Body::Resume { .. });
                peer.out.restart();
                peer.out.message(frame);
            }
            Body::Heartbeat { .. } => peer.out.heartbeat(frame),
            Body::Epoch(header) => {
                let epoch = header.epoch.epoch;
                // A cut that nobody mirrored has no content: a host that stood there would be behind what got out.
                let whole = |(e, r): &&(_, Arc<Record>)| *e == epoch && r.pages.is_some();
                let Some((_, record)) = self.sealed.iter().find(whole) else {
                    // The protocol knows which epochs have content and does not ask for others.
                    self.note(format!("epoch {epoch} is not at hand for {to}"));
                    return;
                };
                let completes = header.base.map(|_| to.clone());
                let lacks = match &completes {
                    Some(host) => !record.bases.contains_key(host),
                    None => record.disk.is_none(),
                };
                if lacks {
                    // What a disk did not give cannot be sent: this standby is filled anew, if it can be.
                    self.note(format!("epoch {epoch} lacks its disk writes for {to}"));
                    return;
                }
                let mut job = Job::new(frame, message.term, RecordId::Epoch(epoch), Arc::clone(record));
                (job.completes, job.flush) = (completes, header.flush);
                peer.out.record(job);
            }
            _ => peer.out.message(frame),
        }
        peer.flush();
    }

    /// What is large goes on: encoding for peers whose links take more, and applying.
    fn work(&mut self) -> Result<(), ProcessError> {
        for peer in self.peers.values_mut().filter(|p| p.out.is_busy()) {
            let began = Instant::now();
            peer.flush();
            if peer.join.is_some() {
                self.care.worked(began.elapsed());
            }
        }
        self.count_copied();
        if self.applying.is_busy() {
            self.apply_piece(Some(Instant::now() + PIECE));
            self.step(Event::Tick)?;
        }
        Ok(())
    }

    fn has_work(&self) -> bool {
        self.applying.is_busy() || self.peers.values().any(|p| p.out.is_busy())
    }

    /// Full copies keep to their rate.
    pub(crate) fn count_copied(&mut self) {
        let copied = self.peers.values_mut().map(|p| p.out.take_copied()).sum();
        if copied > 0 {
            let now = self.now();
            self.care.sent(now, copied);
        }
    }
}
