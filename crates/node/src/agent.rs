//! The part of the daemon that looks after its own host: reports and lease, instances as the store wants them, and actions that
//! the leader asks for.
//!
//! Everything is level-triggered: each round compares what the store says with what runs here. An action begins something (a
//! process is started, an instance is marked as stopping); rounds carry it on, also after a restart of the daemon.

use crate::binary;
use crate::config::StoreChoice;
use crate::engine::Came;
use crate::error::{NodeError, Result, refused};
use crate::guard::{self, boot_ms};
use crate::health::Services;
use crate::instances::{Exit, How, Meta};
use crate::journal::{self, About};
use crate::measure::Measure;
use crate::migrate;
use crate::node::Node;
use crate::pool::{Pool, PoolVm};
use crate::predict::{self, Predict};
use crate::records::{HostReport, StoredVm, VmMemory, host_report, json, now_ms, update, vm_spec, vm_state};
use crate::watchdog::Choice;
use crate::{certs, etcd, records, seat};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_cluster::Action;
use steadfast_cluster::model::{BalanceSettings, HostAdmin, HostRecord, Power, Prediction};
use steadfast_epoch::arbiter::{CasOutcome, Instance, Nonce, StoreId, VmRecord};
use steadfast_protect::store::{RecordStore, Store};
use steadfast_store::{Commit, random_u64};
use steadfast_types::{HostId, Term, VmId};
use steadfast_vmm::control::Request;

/// How long a guest may take to shut itself down, ms.
const SHUTDOWN_MS: u64 = 30_000;
/// Pause before a standby that ended is started again.
const STANDBY_AGAIN: Duration = Duration::from_secs(2);
/// A VM that could not go on in another process is tried again after so long; twice as long each time, up to an hour.
const CHANGE_AGAIN: Duration = Duration::from_secs(30);
/// How long a handover may take to be answered.
const HANDOVER_BOUND: Duration = Duration::from_secs(20);
/// A process that ends so soon after its start has failed to start, ms.
const EARLY_MS: u64 = 10_000;
/// Time between two looks at the members of etcd.
const MEMBERS_EVERY: Duration = Duration::from_secs(5);
/// As long as this host's member has no vote yet.
const MEMBERS_SOON: Duration = Duration::from_secs(1);

/// See the module.
pub struct Agent {
    node: Arc<Node>,
    seq: u64,
    measure: Measure,
    /// This host's record and the balancer's settings, as they were seen last.
    known: Option<(HostRecord, BalanceSettings)>,
    /// What this host expects of itself, as it was found last.
    prediction: Option<Prediction>,
    /// Since when this host's use is what it is, as it was seen last.
    admin_since_ms: Option<u64>,
    /// This host is emptied, or was.
    leaves: bool,
    /// People use it again.
    forgive: bool,
    /// Stops under way in this run of the daemon.
    stopping: Arc<Mutex<HashSet<VmId>>>,
    started: HashMap<VmId, Instant>,
    /// When a VM's process was to be changed last, how often that was in vain, and when that process was started.
    changed: HashMap<VmId, (Instant, u32, u64)>,
    member: etcd::Member,
    services: Services,
    certificates: certs::Keeper,
}

fn look_ahead(mut predict: Predict) -> (Predict, Option<Prediction>) {
    let found = predict.look(Instant::now());
    (predict, found)
}

impl Agent {
    /// For this host.
    #[must_use]
    pub fn new(node: Arc<Node>) -> Self {
        Self {
            seq: 0,
            measure: Measure::default(),
            known: None,
            prediction: None,
            admin_since_ms: None,
            leaves: false,
            forgive: false,
            stopping: Arc::default(),
            started: HashMap::new(),
            changed: HashMap::new(),
            member: etcd::Member::new(node.folders.clone()),
            services: Services::default(),
            certificates: certs::Keeper::default(),
            node,
        }
    }

    /// Rounds until the daemon ends.
    pub async fn run(mut self) {
        let mut every = records::Timings::default().report_ms;
        let mut looking = tokio::spawn(look_at_store(Arc::clone(&self.node), etcd::Looker::default()));
        let mut looked = Instant::now();
        let (mut predicting, mut predicted) = (
            tokio::task::spawn_blocking(|| look_ahead(Predict::default())),
            looked,
        );
        loop {
            let began = Instant::now();
            let node = Arc::clone(&self.node);
            // Beside the rounds: a member whose host is dead may take seconds to be given up, and the report must not wait.
            let look_after = match node.store_vote.load(Ordering::Relaxed) {
                true => MEMBERS_EVERY,
                false => MEMBERS_SOON,
            };
            if looked.elapsed() >= look_after && looking.is_finished() {
                looked = Instant::now();
                let looker = looking.await.unwrap_or_default();
                looking = tokio::spawn(look_at_store(Arc::clone(&node), looker));
            }
            if predicted.elapsed() >= predict::LOOK && predicting.is_finished() {
                predicted = Instant::now();
                let (mut predict, found) = predicting.await.unwrap_or_default();
                self.prediction = found;
                if std::mem::take(&mut self.forgive) {
                    predict.forgive();
                    self.prediction = None;
                }
                predicting = tokio::task::spawn_blocking(|| look_ahead(predict));
            }
            // The round blocks: on the store, and on control sockets.
            let done = tokio::task::spawn_blocking(move || {
                let result = self.round();
                (self, result)
            })
            .await;
            match done {
                Ok((agent, result)) => {
                    self = agent;
                    match result {
                        Ok(timing) => every = timing,
                        Err(error) => tracing::warn!(%error, "a round failed"),
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "the agent's round ended badly; the daemon ends, VMs go on");
                    return;
                }
            }
            let every = Duration::from_millis(every.max(50));
            tokio::time::sleep(every.saturating_sub(began.elapsed())).await;
        }
    }

    /// One round; says after how many ms the next shall begin.
    fn round(&mut self) -> Result<u64> {
        let node = Arc::clone(&self.node);
        let config = node.config();
        if let Err(error) = self.member.supervise(&config) {
            tracing::error!(%error, "this host's etcd member does not run");
        }
        self.seq += 1;
        let mut instances = node.instances.report();
        for (vm, service) in self.services.report() {
            if let Some(instance) = instances.get_mut(&vm) {
                instance.service = Some(service);
            }
        }
        let known = self.known.as_ref().map(|(record, settings)| (record, settings));
        let mut status = self.measure.status(known);
        status.prediction = self.prediction.clone();
        status.admin_since_ms = self.admin_since_ms;
        let starved = status.starved;
        let report = HostReport {
            seq: self.seq,
            daemon: node.run,
            at_ms: now_ms(),
            leads_store: node.leads_store.load(Ordering::Relaxed),
            store_vote: node.store_vote.load(Ordering::Relaxed),
            watchdog: guard::watchdog_words(&node.folders),
            lost_paths: Some(node.paths.lost()),
            status,
            instances,
        };
        // The lease counts from before the store was asked: whoever saw this report saw it later.
        let asked = boot_ms();
        let report = Commit::default().put(host_report(&config.host), json(&report)?);
        let pool = node.commit_and_load(&report)?.pool;
        if let Err(error) = keep_endpoints(&node, &pool) {
            tracing::error!(%error, "where the store's members are could not be written down; tried again");
        }
        if let Err(error) = self.certificates.look(&node, &pool) {
            tracing::error!(%error, "this host's certificates could not be kept; tried again");
        }
        if config.witness {
            return Ok(pool.timings.report_ms);
        }
        let own = pool.hosts.get(&config.host);
        self.admin_since_ms = own.and_then(|h| h.admin_since_ms);
        self.known = own.map(|h| (h.record.clone(), pool.settings.balance));
        let leaves = own.is_some_and(|h| h.record.admin != HostAdmin::InUse);
        if std::mem::replace(&mut self.leaves, leaves) && !leaves {
            (self.forgive, self.prediction) = (true, None);
        }
        guard::write_lease(&node.folders, asked + pool.timings.lease_ms)?;
        let watchdog = config.watchdog.as_deref();
        let watchdog = watchdog.map(|device| Choice::new(device, pool.timings.lease_margin_ms));
        guard::ensure(&node.folders, &node.program, watchdog.as_ref())?;
        self.reconcile(&pool, &config.host);
        self.services.look(&node, &pool, &config.host, starved);
        Ok(pool.timings.report_ms)
    }

    /// Brings what runs here to what the store says, where no decision is needed for it.
    fn reconcile(&mut self, pool: &Arc<Pool>, me: &HostId) {
        let metas = self.node.instances.all();
        for (vm, meta) in &metas {
            if let Err(error) = self.look_at(pool, me, vm, meta) {
                tracing::warn!(%error, %vm, "an instance");
            }
        }
        for (id, vm) in &pool.vms {
            let listed = vm.memory.standbys.contains(me) && vm.owner().is_some_and(|o| o != me);
            let wanted = listed && vm.stored.record.power == Power::On;
            let lately = self
                .started
                .get(id)
                .is_some_and(|at| at.elapsed() < STANDBY_AGAIN);
            if !wanted || metas.contains_key(id) || lately {
                continue;
            }
            self.started.insert(id.clone(), Instant::now());
            let how = How::Standby(vm.term());
            if let Err(error) = self.node.instances.start(id, vm, &how, pool) {
                self.node.note(
                    About::On(id.clone(), me.clone()),
                    format!("its standby here cannot be started: {error}"),
                );
            }
        }
    }

    fn look_at(&mut self, pool: &Arc<Pool>, me: &HostId, id: &VmId, meta: &Meta) -> Result<()> {
        let node = Arc::clone(&self.node);
        let instances = &node.instances;
        if instances.changing(id) {
            // The class may have changed since, and the process does so in a moment.
            let leased = |vm: &PoolVm| vm.leased(me, false) || vm.leased(me, true);
            if pool.vms.get(id).is_some_and(leased) {
                instances.set_leased(id, true)?;
            }
            self.change(id, pool);
            return Ok(());
        }
        let Some(vm) = pool.vms.get(id) else {
            if pool.unreadable.contains(id.as_str()) {
                // It is there, written by a newer version: it goes on as it is.
                return Ok(());
            }
            // Deleted, and nobody told this host.
            return self.stop(id, false);
        };
        if let Some((since, in_order)) = meta.stopping {
            if !in_order && vm.runs_on(me) && instances.pid(id).is_some() {
                return instances.edit_meta(id, |meta| meta.stopping = None);
            }
            self.carry_on_stopping(id, since, in_order, vm);
            return Ok(());
        }
        if instances.pid(id).is_some() {
            // First: what follows may fail, and a host that is cut off then must not run what is booted elsewhere.
            instances.set_leased(id, vm.leased(me, meta.hot))?;
            if !meta.hot && meta.start && vm.owner() == Some(me) {
                // A process that was to take it over may have taken a term for it, and did not get it.
                instances.edit_meta(id, |meta| meta.term = meta.term.max(vm.term()))?;
            }
            if meta.hot && vm.copies().contains(me) {
                instances.keep_protection(id, vm, pool)?;
            }
            if let Err(error) = instances.set_limits(id, &vm.stored) {
                let about = About::On(id.clone(), me.clone());
                self.node
                    .note(about, format!("its limits are not in force: {error}"));
            }
            let tried = self.changed.get(id).filter(|(.., of)| *of == meta.started_ms);
            let times = tried.map_or(0, |(_, times, _)| times + 1);
            let lately =
                tried.is_some_and(|(at, times, _)| at.elapsed() < CHANGE_AGAIN * 2u32.pow((*times).min(7)));
            if !meta.hot && meta.start && vm.needs_engine() && vm.owner() == Some(me) && !lately {
                self.changed
                    .insert(id.clone(), (Instant::now(), times, meta.started_ms));
                self.change(id, pool);
                return Ok(());
            }
            return Ok(());
        }
        let failed = matches!(instances.exit(id), Some(Exit::Failed(..)));
        let early = failed && now_ms() < meta.started_ms.saturating_add(EARLY_MS);
        if let Some(words) = instances.last_words(id) {
            let about = About::On(id.clone(), me.clone());
            self.node.note(about, format!("its process here ended: {words}"));
            if early && !meta.start {
                migrate::cannot_take(&self.node, pool, id, &words)?;
            }
        }
        if early && meta.start {
            count_failure(&self.node, id, me, meta.started_ms)?;
        }
        if vm.owner() != Some(me) {
            // A standby that ended, or a primary that lost: nothing of it is needed.
            return instances.forget(id);
        }
        if instances.exit(id) == Some(Exit::Clean) && (meta.hot || vm.term() == meta.term) {
            self.node.note(id, "its guest shut itself down");
            let kv = self.node.kv();
            update(&*kv, &vm_spec(id), |old: Option<StoredVm>| {
                Ok(old.map(|mut v| {
                    v.record.power = Power::Off;
                    v
                }))
            })?;
            mark_stopped(&*kv, id, vm.term())?;
            return instances.forget(id);
        }
        Ok(())
    }

    /// Marks an instance as one that shall end, and begins.
    fn stop(&self, id: &VmId, in_order: bool) -> Result<()> {
        self.node.instances.mark_stopping(id, in_order)
    }

    /// Lets a VM go on in a process with the engine, or brings that to its end.
    fn change(&self, id: &VmId, pool: &Arc<Pool>) {
        let Some(under_way) = UnderWay::begin(&self.stopping, id) else {
            return;
        };
        let (node, id, pool) = (Arc::clone(&self.node), id.clone(), Arc::clone(pool));
        let work = move || {
            let began = Instant::now();
            let owned = || {
                let now = Pool::load(&*node.kv())?;
                let entry = now.vms.get(&id).filter(|vm| vm.owner() == Some(&node.host()));
                Ok(entry.map(PoolVm::term))
            };
            let carried_on = node.instances.changing(&id);
            let done = match carried_on {
                true => node
                    .instances
                    .end_change(&id, owned)
                    .map(|(came, _)| (came, None)),
                false => pool
                    .vm_entry(&id)
                    .and_then(|entry| node.instances.give_engine(&id, entry, &pool, owned))
                    .map(|(came, still)| (came, Some(still))),
            };
            let about = About::On(id.clone(), node.host());
            match done {
                Ok((Came::Through, still)) => {
                    let took = began.elapsed().as_millis() as u64;
                    let what = "let it go on in a process that can mirror it";
                    let still = still.map(|s| format!("its guest stood still for {} ms", s.as_millis()));
                    node.event(about, journal::done(what, took, None), still.unwrap_or_default());
                }
                Ok((came, _)) => tracing::warn!(vm = %id, ?came, "a change of process that had begun"),
                Err(error) if !node.instances.changing(&id) => {
                    let runs = match node.instances.pid(&id) {
                        Some(_) => ", and runs as before",
                        None => "",
                    };
                    node.note(about, format!("it cannot be mirrored{runs}: {error}"));
                }
                // Once; each round tries again.
                Err(error) if !carried_on => node.note(
                    about,
                    format!("the change of its process does not come to an end: {error}"),
                ),
                Err(error) => {
                    tracing::error!(vm = %id, %error, "a change of process does not come to an end")
                }
            }
            drop(under_way);
            node.wake.notify_one();
        };
        if let Err(error) = std::thread::Builder::new().name("vm-change".into()).spawn(work) {
            tracing::error!(%error, "no thread to change a VM's process with; tried again in the next round");
        }
    }

    fn carry_on_stopping(&self, id: &VmId, since: u64, in_order: bool, vm: &PoolVm) {
        let Some(under_way) = UnderWay::begin(&self.stopping, id) else {
            return;
        };
        let (node, id) = (Arc::clone(&self.node), id.clone());
        let (term, ask_guest) = (vm.term(), in_order && !vm.memory.stop_now);
        let work = move || {
            let since = if ask_guest { since } else { 0 };
            let done = end_instance(&node, &id, since, in_order, term);
            if let Err(error) = done {
                node.note(&id, format!("it could not be stopped: {error}"));
            }
            drop(under_way);
            node.wake.notify_one();
        };
        if let Err(error) = std::thread::Builder::new().name("vm-stop".into()).spawn(work) {
            tracing::error!(%error, "no thread to stop a VM with; tried again in the next round");
        }
    }
}

/// A VM whose process is being stopped or changed: by one thread at a time, and by none any more when that ends, however it does.
struct UnderWay(Arc<Mutex<HashSet<VmId>>>, VmId);

impl UnderWay {
    fn begin(all: &Arc<Mutex<HashSet<VmId>>>, id: &VmId) -> Option<Self> {
        let new = all
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id.clone());
        new.then(|| Self(Arc::clone(all), id.clone()))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.1);
    }
}

pub(crate) fn mark_stopped(kv: &dyn steadfast_store::Kv, id: &VmId, term: Term) -> Result<()> {
    update(kv, &vm_state(id), |old: Option<VmMemory>| {
        let mut memory = old.unwrap_or_default();
        memory.stopped = Some(term);
        memory.standbys.clear();
        Ok(Some(memory))
    })
    .map(|_| ())
}

fn end_instance(node: &Node, id: &VmId, since: u64, in_order: bool, term: Term) -> Result<()> {
    let began = Instant::now();
    if in_order && since > 0 {
        let _ = node
            .instances
            .ask(id, &Request::PowerButton, Duration::from_secs(3));
        while node.instances.pid(id).is_some() && now_ms() < since.saturating_add(SHUTDOWN_MS) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    node.instances.end(id)?;
    let kv = node.kv();
    let owner = Pool::load(&*kv)?.vms.get(id).and_then(|vm| vm.owner().cloned());
    if in_order && owner.as_ref() == Some(&node.host()) {
        mark_stopped(&*kv, id, term)?;
        let took = began.elapsed().as_millis() as u64;
        node.event(id, journal::done("stop it in order", took, None), "");
    }
    Ok(())
}

/// Carries out an action that the leader sent to this host. Blocks for a bounded time.
///
/// # Errors
/// Why it was not begun. Asking again is safe.
pub fn act(node: &Node, action: &Action) -> Result<()> {
    let me = node.host();
    match action {
        Action::StartVm { vm, host, term } if *host == me => start_vm(node, vm, *term, &me),
        Action::StopInstance { vm, host, in_order } if *host == me => {
            let pool = Pool::load(&*node.kv())?;
            if !in_order && pool.vms.get(vm).is_some_and(|entry| entry.runs_on(&me)) {
                // Decided before its new host died, and this one took it back.
                return refused(format!("VM {vm} runs here, and shall"));
            }
            node.instances.mark_stopping(vm, *in_order)
        }
        Action::ResetVm { vm, host, .. } if *host == me => {
            // The process is ended; the leader finds it gone and starts it again here.
            node.instances.end(vm)
        }
        Action::Migrate { vm, from, to, .. } if *from == me => {
            let request = Request::HandOver { to: to.clone() };
            node.instances.ask(vm, &request, HANDOVER_BOUND).map(|_| ())
        }
        Action::UpgradeHost { host, to } if *host == me => replace_binary(node, to),
        other => refused(format!("{other}: not for host {me}")),
    }
}

/// Puts another binary in place, and has the daemon become it once this request is answered.
fn replace_binary(node: &Node, to: &str) -> Result<()> {
    let own = &binary::own().version;
    if own == to {
        return Ok(());
    }
    binary::install(&node.folders, to, &node.program)?;
    renew_standbys(node)?;
    node.note(
        &node.host(),
        format!("its binary is {to} now, {own} is kept; the daemon becomes it"),
    );
    // The permit stays until somebody waits for it.
    node.replaced.notify_one();
    Ok(())
}

/// Standbys that have no other place are still here: they begin anew, in the new binary.
fn renew_standbys(node: &Node) -> Result<()> {
    let me = node.host();
    for (id, meta) in node.instances.all() {
        // Each time: it may have taken over meanwhile.
        let pool = Pool::load(&*node.kv())?;
        let standby = |vm: &PoolVm| vm.owner().is_some_and(|o| *o != me);
        if !meta.hot || node.instances.changing(&id) || !pool.vms.get(&id).is_some_and(standby) {
            continue;
        }
        if let Err(error) = node.instances.end(&id) {
            node.note(&id, format!("its standby here stays in the old binary: {error}"));
        }
    }
    Ok(())
}

fn start_vm(node: &Node, id: &VmId, term: Term, me: &HostId) -> Result<()> {
    let began = Instant::now();
    let kv = node.kv();
    let pool = Pool::load(&*kv)?;
    let vm = pool.vm_entry(id)?;
    if vm.stored.record.power == Power::Off {
        return refused(format!("VM {id} shall be off"));
    }
    if vm.term() != term {
        // Somebody was faster, or this is an old request.
        return Ok(());
    }
    let spec = &vm.stored.record;
    let left = guard::lease_until(&node.folders).saturating_sub(boot_ms());
    if vm.boots_anywhere() && left < pool.timings.lease_ms / 2 {
        return refused(format!("host {me} has no lease now, so it may not start VM {id}"));
    }
    if node.instances.changing(id) {
        return refused(format!("VM {id}: its process is being changed; try again"));
    }
    if let Some(meta) = node.instances.meta(id) {
        let alive = node.instances.pid(id).is_some() && meta.stopping.is_none();
        let ours = vm.owner() == Some(me) || vm.owner().is_none() && meta.term == term;
        if alive && meta.start && ours {
            // Begun already, and not reported yet when this was decided.
            return Ok(());
        }
        // What is left of an earlier run, or a standby's process: the new start begins from the disks.
        node.instances.end(id)?;
    }
    // What is in a journal only the engine reads: a VM that was protected once is run by it also when it is not any more.
    let how = match spec.standbys_wanted() > 0 || node.instances.has_journals(&vm.stored) {
        true => {
            claim_cold(node, id, vm, me)?;
            How::Primary(term)
        }
        false => How::Plain(claim(node, id, vm, me)?),
    };
    let started = node.instances.start(id, vm, &how, &pool);
    if started.is_err() {
        count_failure(node, id, me, now_ms())?;
    }
    let took = began.elapsed().as_millis() as u64;
    let error = started.as_ref().err().map(ToString::to_string);
    let about = About::On(id.clone(), me.clone());
    node.event(about, journal::done("start its process", took, error), "");
    started
}

/// Counts a start that failed, once.
fn count_failure(node: &Node, id: &VmId, me: &HostId, began_ms: u64) -> Result<()> {
    update(&*node.kv(), &vm_state(id), |old: Option<VmMemory>| {
        let mut memory = old.unwrap_or_default();
        let failures = memory.start_failures.entry(me.clone()).or_default();
        if failures.last_ms >= began_ms {
            return Ok(None);
        }
        failures.count += 1;
        failures.last_ms = now_ms();
        Ok(Some(memory))
    })
    .map(|_| ())
}

fn random() -> Result<u64> {
    random_u64().map_err(|source| NodeError::Io {
        what: "random numbers".into(),
        source,
    })
}

fn propose(store: &mut RecordStore, id: &VmId, vm: &PoolVm, me: &HostId) -> Result<Term> {
    let named = |source| NodeError::Io {
        what: format!("the record of VM {id}"),
        source,
    };
    let (identity, record) = store.read().map_err(named)?;
    let old = record.unwrap_or_else(|| VmRecord::new(me.clone(), identity));
    if old.term != vm.term() {
        return Err(NodeError::Conflict(format!("VM {id}")));
    }
    let new = VmRecord {
        term: old.term.next(),
        nonce: Nonce {
            instance: Instance(random()?),
            count: 1,
        },
        ..VmRecord::new(me.clone(), StoreId(identity.0))
    };
    match store.cas(&old, &new) {
        CasOutcome::Done => Ok(new.term),
        CasOutcome::Conflict { .. } => Err(NodeError::Conflict(format!("VM {id}"))),
        // Asked again, the term tells.
        CasOutcome::Unknown => refused(format!("VM {id}: the store did not say who may run it")),
    }
}

/// The right to run an unprotected VM here: the next term.
fn claim(node: &Node, id: &VmId, vm: &PoolVm, me: &HostId) -> Result<Term> {
    propose(&mut RecordStore::new(node.kv(), id.clone()), id, vm, me)
}

/// Lets the engine of a protected VM boot it here. It takes the right itself, which the record allows only to its owner and to those
/// in sync; a VM without disks of its own may be booted anywhere once its owner is gone, so the owner is changed first.
fn claim_cold(node: &Node, id: &VmId, vm: &PoolVm, me: &HostId) -> Result<()> {
    let mut store = RecordStore::new(node.kv(), id.clone());
    let Some(record) = &vm.record else {
        return store.create(me).map_err(|source| NodeError::Io {
            what: format!("the record of VM {id}"),
            source,
        });
    };
    if record.owner == *me {
        return Ok(());
    }
    if record.term > Term::ZERO && vm.stored.record.has_local_disk() {
        // The engine asks the arbiter whether this copy will do.
        return match record.in_sync.contains(me) {
            true => Ok(()),
            false => refused(format!("VM {id}: this host has no current copy of its disks")),
        };
    }
    propose(&mut store, id, vm, me).map(|_| ())
}

/// Gives etcd's lead away where that is better.
async fn look_at_store(node: Arc<Node>, mut looker: etcd::Looker) -> etcd::Looker {
    let config = node.config();
    if !matches!(config.store, StoreChoice::Managed { .. }) {
        return looker;
    }
    let done = async {
        let cluster = looker.look(&config.store_spec(&node.folders)).await?;
        seat::look(&node, &cluster).await
    };
    if let Err(error) = done.await {
        tracing::debug!(%error, "etcd's members are not known now");
    }
    looker
}

/// Writes down where the store's members are, so that the loss of one does not keep this host from the others. Those that have no vote
/// yet are among them: they say so when asked, and the next is asked.
fn keep_endpoints(node: &Node, pool: &Pool) -> Result<()> {
    let mut config = node.config();
    let StoreChoice::Managed { endpoints, .. } = &mut config.store else {
        return Ok(());
    };
    let now = pool.store_endpoints();
    if now.is_empty() || now == *endpoints {
        return Ok(());
    }
    *endpoints = now;
    node.set_config(config)
}

/// Bytes to go of each standby that is being filled, by VM.
#[must_use]
pub fn copying(pool: &Pool, id: &VmId) -> BTreeMap<HostId, u64> {
    let owner = pool.vms.get(id).and_then(PoolVm::owner);
    let report = owner.and_then(|o| pool.reports.get(o)?.instances.get(id));
    report.map(|i| i.copying.clone()).unwrap_or_default()
}
