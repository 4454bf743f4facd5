//! The engine: one thread that owns a VM instance and does what the epoch protocol says.
//!
//! ```text
//! links, store, NICs, guest, control --> Input queue --> Replica (pure) --> actions --> machine, links, NICs, store
//! ```
//! Every decision is the protocol's; this file only carries it out. It never waits for anybody but its queue.

use crate::audit::Audit;
use crate::codec;
use crate::config::{PeerSpec, ProtectSpec};
use crate::disks::{Disks, SLOTS};
use crate::input::{Input, Inputs};
use crate::life::{Ending, Remains, WaitingCut};
use crate::peer::{Peer, Record};
use crate::samples::Samples;
use crate::store::{self, Ask, Store, random_u64};
use crate::throttle::Throttle;
use crate::timeline::Timeline;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_capture::{Capture, PageArena};
use steadfast_epoch::arbiter::Instance;
use steadfast_epoch::io::{Action, Event};
use steadfast_epoch::message::{Body, EpochRef, Message};
use steadfast_epoch::policy::PolicySettings;
use steadfast_epoch::primary::Phase;
use steadfast_epoch::{Replica, Settings, Status};
use steadfast_machine::devices::legacy::GuestEvent;
use steadfast_machine::memory::layout::ram_regions;
use steadfast_machine::vcpu::VcpuEvent;
use steadfast_net::Hold;
use steadfast_types::{Epoch, Gfn, HostId, VmId};
use steadfast_vmm::control::{Call, Request, failure};
use steadfast_vmm::process::{Ended, ProcessError};
use steadfast_vmm::{AssembleError, Vm};
use steadfast_wire::record::Staged;
use steadfast_wire::{Frame, StagedRecord, vm_hash};

/// The NICs' queues of the present machine.
pub type Holds = Arc<Mutex<Vec<Arc<Hold>>>>;
/// Builds a machine that stands still, its NICs behind [`Holds`]: the first, or the one that follows another of the same VM,
/// which stands still.
pub type MakeVm = Box<dyn Fn(Option<&Remains>) -> Result<Vm, AssembleError> + Send>;

/// Inputs handled before the clock is looked at again.
const BATCH: usize = 64;
/// Output that a full console refused is offered again so often.
const CONSOLE_EVERY: Duration = Duration::from_millis(20);

/// Numbers for the status.
#[derive(Default)]
pub struct Counters {
    /// Cuts made.
    pub cuts: u64,
    /// Pages sealed.
    pub pages: u64,
    /// Sum and maximum of pauses in microseconds.
    pub pause_us: (u64, u64),
    /// The last pause, by part: stop, harvest, copy, state.
    pub last: steadfast_capture::CutTimes,
    /// Frames released.
    pub released: u64,
    /// Times that the guest was started anew.
    pub resets: u64,
    /// How long the last promotion took from grant to running, in microseconds.
    pub promote_us: Option<u64>,
    /// The last pauses.
    pub pauses: Samples,
    /// From the cut to the commit, the last ones; and when the epochs that are not committed yet were cut.
    pub commits: Samples,
    /// See `commits`.
    pub cut_at: VecDeque<(Epoch, Instant)>,
}

impl Counters {
    fn committed(&mut self, through: Epoch) {
        while let Some((_, at)) = self.cut_at.front().filter(|(e, _)| *e <= through) {
            self.commits.add(at.elapsed().as_micros() as u64);
            self.cut_at.pop_front();
        }
    }
}

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
    /// Its writable disks.
    pub disks: Disks,
    /// Size of RAM in bytes.
    pub ram_bytes: u64,
    /// The arbiter.
    pub store: Box<dyn Store>,
    /// Sending side of the queue.
    pub inputs: Inputs,
}

/// See the module.
pub struct Engine {
    pub(crate) replica: Replica,
    pub(crate) vm: Vm,
    pub(crate) vm_hash: u64,
    pub(crate) holds: Holds,
    pub(crate) disks: Disks,
    pub(crate) peers: BTreeMap<HostId, Peer>,
    pub(crate) capture: Capture,
    pub(crate) sealed: VecDeque<(Epoch, Record)>,
    pub(crate) staged: BTreeMap<Epoch, StagedRecord>,
    pub(crate) arrived: Option<StagedRecord>,
    /// The epoch that RAM stands at exactly, on a standby; none while it is being filled.
    pub(crate) memory: Option<Epoch>,
    /// The epoch that completes the copy, once it is staged; and whether it is awaited.
    pub(crate) base: (Option<Epoch>, bool),
    /// Machine state of the newest applied epoch.
    pub(crate) state: Vec<u8>,
    pub(crate) counters: Counters,
    pub(crate) timeline: Timeline,
    pub(crate) events: VecDeque<Event>,
    pub(crate) start: bool,
    /// None while a thread builds the machine that follows a reset.
    pub(crate) make_vm: Option<MakeVm>,
    /// A cut that was asked for meanwhile.
    pub(crate) waiting_cut: Option<WaitingCut>,
    /// Pages that changed with the machine itself; no dirty log knows them.
    pub(crate) carry: Vec<Gfn>,
    pub(crate) ending: Option<Ending>,
    pub(crate) throttle: Throttle,
    /// Stopped for good by a cut, unless the protocol lets it run on.
    pub(crate) frozen: bool,
    name: VmId,
    spec: ProtectSpec,
    ram_bytes: u64,
    store: Sender<Ask>,
    pub(crate) inputs: Inputs,
    clock: Instant,
    log: VecDeque<String>,
    /// A cut that failed is tried again so many times.
    pub(crate) cut_failures: u32,
    pub(crate) audit: Option<Audit>,
    /// Pages that differed from the digest of their epoch; and epochs compared.
    pub(crate) audited: (u64, u64),
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
        let instance = random_u64().map_err(|e| setting(format!("random numbers: {e}")))?;
        let mut policy = PolicySettings::default();
        if let Some(us) = parts.spec.max_interval_us {
            (policy.max_interval_us, policy.idle_interval_us) = (us.max(100), us.max(100));
        }
        let settings = Settings {
            policy,
            suspect_us: parts.spec.suspect_ms * 1000,
            standby_lost_us: parts.spec.suspect_ms * 750,
            heartbeat_us: parts.spec.heartbeat_ms() * 1000,
            store_timeout_us: parts.spec.store_answer_ms() * 1000,
            hold_outputs: parts.spec.hold_outputs,
            speculate: false,
            resend_inherited: false,
            ..Settings::default()
        };
        let replica = Replica::new(
            0,
            parts.spec.host.clone(),
            Instance(instance),
            settings,
            EpochRef::ZERO,
        );
        Ok(Self {
            replica,
            vm,
            vm_hash: vm_hash(&parts.name),
            holds: parts.holds,
            disks: parts.disks,
            peers,
            capture: Capture::new(PageArena::new(4096, 256 << 20)),
            sealed: VecDeque::new(),
            staged: BTreeMap::new(),
            arrived: None,
            memory: None,
            base: (None, false),
            state: Vec::new(),
            counters: Counters::default(),
            timeline: Timeline::default(),
            events: VecDeque::new(),
            start: parts.spec.start,
            name: parts.name,
            make_vm: Some(parts.make_vm),
            waiting_cut: None,
            carry: Vec::new(),
            ending: None,
            throttle: Throttle::new(Instant::now()),
            frozen: false,
            spec: parts.spec,
            ram_bytes: parts.ram_bytes,
            store,
            inputs: parts.inputs,
            clock: Instant::now(),
            log: VecDeque::new(),
            cut_failures: 0,
            audit,
            audited: (0, 0),
        })
    }

    /// Runs until the VM ends.
    ///
    /// # Errors
    /// [`ProcessError`] when the instance cannot go on; its standby then takes over.
    pub fn run(&mut self, queue: &Receiver<Input>) -> Result<Ended, ProcessError> {
        crate::priority::raise("the engine");
        if self.start {
            self.step(Event::ColdStart)?;
        }
        let mut console = Instant::now();
        loop {
            let now = self.now();
            let mut wait =
                Duration::from_micros(self.replica.deadline().saturating_sub(now)).min(CONSOLE_EVERY);
            if let Some(turn) = self.turn() {
                wait = wait.min(turn);
            }
            match queue.recv_timeout(wait) {
                Ok(first) => {
                    let mut next = Some(first);
                    for _ in 0..BATCH {
                        let Some(input) = next.take() else { break };
                        if let Some(ended) = self.input(input)? {
                            return Ok(ended);
                        }
                        next = queue.try_recv().ok();
                    }
                    if let Some(input) = next
                        && let Some(ended) = self.input(input)?
                    {
                        return Ok(ended);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(Ended::Stopped),
            }
            if self.now() >= self.replica.deadline() {
                self.step(Event::Tick)?;
            }
            if console.elapsed() >= CONSOLE_EVERY {
                self.vm
                    .serial
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .flush_output();
                self.disks_moved()?;
                console = Instant::now();
                self.close_links();
                if let Some(ended) = self.end_step()? {
                    return Ok(ended);
                }
            }
        }
    }

    /// The throttle's turn; not while a frozen cut decides whether the guest runs on at all.
    fn turn(&mut self) -> Option<Duration> {
        if self.frozen || self.make_vm.is_none() || self.replica.primary().is_none() {
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

    fn act(&mut self, action: Action) -> Result<(), ProcessError> {
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
                self.frozen = false;
                if self.make_vm.is_some() {
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
                if !self.frozen && self.make_vm.is_some() {
                    self.throttle.set(percent, &self.vm.machine, Instant::now());
                }
            }
            Action::SendChunk {
                to,
                message,
                join,
                seq,
                have: _,
            } => self.send_chunk(&to, message, join, seq)?,
            Action::BeginJoin { join } => self.begin_join(join),
            Action::StoreChunk { join, seq } => self.store_chunk(join, seq),
            Action::Stage { epoch, flush } => self.stage(epoch, flush),
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
                self.note(format!("{notice:?}"));
            }
        }
        Ok(())
    }

    fn disks_moved(&mut self) -> Result<(), ProcessError> {
        self.disks.moved().into_iter().try_for_each(|e| self.step(e))
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
                let holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // Every flag is taken, so that each NIC can wake the engine again.
                if holds.iter().filter(|h| h.take_pending()).count() > 0 {
                    self.step(Event::Output)?;
                }
            }
            Input::Guest(event) => {
                self.inputs.heard(event);
                match event {
                    GuestEvent::Shutdown => return self.begin_end(Ended::Shutdown),
                    GuestEvent::Reset => self.reset_guest()?,
                    GuestEvent::Panic | GuestEvent::CrashLoaded => {
                        self.note("the guest's kernel panicked".into())
                    }
                }
            }
            Input::Vcpu(VcpuEvent::TripleFault(_)) => self.reset_guest()?,
            Input::Remade(remade) => self.go_on_anew(*remade)?,
            Input::Vcpu(fault) => return Err(ProcessError::GuestFault(fault)),
            Input::Control(call) => return self.control(call),
            Input::DiskFlush => {
                self.inputs.heard_flush();
                self.step(Event::Flush)?;
            }
            Input::DiskMoved => {
                self.inputs.heard_moved();
                self.disks_moved()?;
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
                if gone {
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
        let Some(peer) = self.peers.get_mut(host) else {
            return Ok(());
        };
        peer.link.sender().consumed(&frame);
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
            match peer.stager.chunk(frame) {
                Ok(Staged::Complete(record)) => {
                    self.arrived = Some(record);
                    peer.pending.take().map(|message| Event::Message {
                        from: host.clone(),
                        message,
                    })
                }
                Ok(Staged::Partial | Staged::Duplicate) => None,
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

    fn send(&mut self, to: &HostId, message: Message) {
        let Some(peer) = self.peers.get_mut(to) else {
            return;
        };
        let mut frames = vec![Frame::control(
            self.vm_hash,
            message.term,
            codec::encode(&message),
        )];
        match message.body {
            Body::Join { .. } => {
                peer.fed = false;
                peer.begin_session();
            }
            Body::Resume { .. } => {
                peer.fed = true;
                peer.begin_session();
            }
            _ => {}
        }
        if let Body::Epoch(header) = &message.body {
            let epoch = header.epoch.epoch;
            // A cut that nobody mirrored has no content: a host that stood there would be behind what got out.
            let whole = |(e, r): &&(_, Record)| *e == epoch && r.pages.is_some();
            let Some((_, record)) = self.sealed.iter().find(whole) else {
                // The protocol knows which epochs have content and does not ask for others.
                self.note(format!("epoch {epoch} is not at hand for {to}"));
                return;
            };
            if header.base.is_some() {
                peer.expect_base(epoch);
            }
            let disk = match header.base {
                Some(_) => record.bases.get(to),
                None => record.disk.as_ref(),
            };
            let Some(disk) = disk else {
                // What a disk did not give cannot be sent: this standby is filled anew, if it can be.
                self.note(format!("epoch {epoch} lacks its disk writes for {to}"));
                return;
            };
            let encoded = peer.encode_epoch(message.term, epoch, record, disk, header.flush, &mut frames);
            if let Err(error) = encoded {
                self.note(format!("epoch {epoch} cannot be encoded for {to}: {error}"));
                return;
            }
        }
        peer.send(frames);
    }

    fn control(&mut self, call: Call) -> Result<Option<Ended>, ProcessError> {
        let mut ended = None;
        let answer = match &call.request {
            Request::Status => self.status(),
            Request::Stop => {
                ended = self.begin_end(Ended::Stopped)?;
                json!({"ok": true})
            }
            Request::PowerButton => {
                self.vm
                    .power
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .press_power_button();
                json!({"ok": true})
            }
            Request::Type { text } => {
                let mut serial = self.vm.serial.lock().unwrap_or_else(PoisonError::into_inner);
                json!({"ok": true, "taken": serial.enqueue_input(text.as_bytes())})
            }
            Request::HandOver { to } => {
                let to = to.clone();
                self.step(Event::HandOver(to))?;
                json!({"ok": true})
            }
            Request::AddPeer { host, paths, standby } => {
                let peer = PeerSpec {
                    host: host.clone(),
                    paths: paths.clone(),
                    standby: *standby,
                };
                match self.add_peer(&peer)? {
                    Ok(()) => json!({"ok": true}),
                    Err(why) => failure(&why),
                }
            }
            Request::RemovePeer { host } => {
                let known = self.remove_peer(&host.clone())?;
                json!({"ok": true, "was_peer": known})
            }
            _ => failure(&"a protected VM cannot do this; unprotect it first"),
        };
        let _ = call.answer.send(answer);
        Ok(ended)
    }

    /// Opens a link to one more host; the inner error is for who asked.
    fn add_peer(&mut self, peer: &PeerSpec) -> Result<Result<(), String>, ProcessError> {
        if let Some(known) = self.peers.get_mut(&peer.host) {
            let back = std::mem::take(&mut known.leaving);
            known.wanted = peer.standby;
            if back && peer.standby && self.replica.primary().is_some() {
                self.step(Event::AddStandby(peer.host.clone()))?;
            }
            return Ok(Ok(()));
        }
        if peer.host == self.spec.host {
            return Ok(Err("a VM cannot be mirrored to its own host".into()));
        }
        let Some(slot) = (0..SLOTS).find(|s| self.peers.values().all(|p| p.slot != *s)) else {
            return Ok(Err(format!(
                "a VM has at most {SLOTS} other hosts; remove one first"
            )));
        };
        let pages = ram_regions(self.ram_bytes);
        match Peer::open(&self.name, &self.spec, peer, slot, pages, &self.inputs) {
            Ok(opened) => drop(self.peers.insert(peer.host.clone(), opened)),
            Err(error) => return Ok(Err(format!("link to {}: {error}", peer.host))),
        }
        self.note(format!("{} is a peer from now on", peer.host));
        if peer.standby && self.replica.primary().is_some() {
            self.step(Event::AddStandby(peer.host.clone()))?;
        }
        Ok(Ok(()))
    }

    /// Mirrors to a host no more; whether it was a peer. Its link is closed when the record no longer lists it.
    fn remove_peer(&mut self, host: &HostId) -> Result<bool, ProcessError> {
        let Some(peer) = self.peers.get_mut(host) else {
            return Ok(false);
        };
        (peer.leaving, peer.wanted) = (true, false);
        self.step(Event::RemoveStandby(host.clone()))?;
        self.close_links();
        Ok(true)
    }

    /// Closes links to hosts that are no peers any more.
    fn close_links(&mut self) {
        let members = match self.replica.status() {
            Status::Primary(p) => p.members,
            Status::Standby(_) => Vec::new(),
        };
        let gone = |p: &Peer| p.leaving && members.iter().all(|m| m.host != p.host);
        let hosts: Vec<HostId> = self
            .peers
            .values()
            .filter(|p| gone(p))
            .map(|p| p.host.clone())
            .collect();
        for host in hosts {
            self.peers.remove(&host);
            self.note(format!("{host} is no peer any more"));
        }
    }

    fn status(&self) -> Value {
        let c = &self.counters;
        let us = |d: Duration| d.as_micros() as u64;
        let [pause_p50, pause_p99] = c.pauses.percentiles([50, 99]);
        let [commit_p50, commit_p99] = c.commits.percentiles([50, 99]);
        let paths = self.peers.values().flat_map(|p| p.link.stats().paths);
        let bytes = paths.fold((0, 0), |(i, o), p| (i + p.bytes_in, o + p.bytes_out));
        let protocol = match self.replica.status() {
            Status::Primary(p) => json!({
                "role": "primary",
                "phase": format!("{:?}", p.phase),
                // I8: protected only while it could survive the loss of this host right now.
                "protected": p.phase == Phase::Protected,
                "term": p.term,
                "sealed": p.progress.sealed(), "sent": p.progress.sent(),
                "committed": p.progress.committed(), "released": p.progress.released(),
                "lag_epochs": p.progress.sealed().0 - p.progress.committed().0,
                "lag_bytes": p.bytes_in_flight,
                "members": p.members.iter().map(|m| json!({
                    "host": m.host, "in_sync": m.in_sync, "lost": m.lost, "staged": m.staged,
                    "copying_bytes": m.copying.map(|(_, left)| left),
                })).collect::<Vec<_>>(),
            }),
            Status::Standby(s) => json!({
                "role": "standby",
                "mode": format!("{:?}", s.mode),
                "term": s.term,
                "owner": s.owner,
                "staged": s.staged.map(|r| r.epoch),
                "applied": s.applied.epoch,
            }),
        };
        json!({
            "ok": true,
            "name": self.vm.spec.name,
            "protocol": protocol,
            "cuts": c.cuts,
            "pages": c.pages,
            "pause_mean_us": c.pause_us.0.checked_div(c.cuts).unwrap_or(0),
            "pause_max_us": c.pause_us.1,
            "pause_p50_us": pause_p50,
            "pause_p99_us": pause_p99,
            "commit_p50_us": commit_p50,
            "commit_p99_us": commit_p99,
            "wire_bytes_in": bytes.0,
            "wire_bytes_out": bytes.1,
            "arena_bytes": self.capture.arena_bytes(),
            "last_pause_us": us(c.last.pause),
            "last_stop_us": us(c.last.stop),
            "last_harvest_us": us(c.last.harvest),
            "last_copy_us": us(c.last.copy),
            "last_state_us": us(c.last.state),
            "frames_released": c.released,
            "promote_us": c.promote_us,
            "guest_resets": c.resets,
            "throttle_percent": self.throttle.percent(),
            "timeline": self.timeline.status(self.now()),
            "audit_stale_pages": self.audited.0,
            "audit_epochs": self.audited.1,
            "log": self.log,
        })
    }
}
