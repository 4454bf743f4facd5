//! The part of the daemon that decides for the pool, on whichever host is elected.
//!
//! ```text
//! election: p/leader, by compare-and-swap     a leader whose counter stands for leader_ms is replaced
//! round:    load the pool -> observe -> decide (pure) -> carry out
//! ```
//! Two leaders at once are harmless: every action names the state that it expects, and what changes who may run a VM is the
//! arbiter's compare-and-swap. Actions on hosts are sent to their daemons; those that only change records are made here. Each
//! action that was carried out, and each refusal that is new, is an event.

use crate::agent::mark_stopped;
use crate::error::Result;
use crate::etcd;
use crate::fence;
use crate::http::ask;
use crate::journal::{self, About, EVENTS_MAX};
use crate::migrate;
use crate::node::Node;
use crate::observe::Observer;
use crate::pool::{Pool, PoolVm, Read};
use crate::records::{HostInfo, LEADER, Leader, Unfit, VmMemory, host_info, json, now_ms, update, vm_state};
use crate::upgrade;
use crate::watch::Watch;
use hyper::Method;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use steadfast_cluster::events::What;
use steadfast_cluster::model::{AlarmKey, HostHealth, Instance, Phase, Power, Protection};
use steadfast_cluster::{Action, Decision, Wanted, decide};
use steadfast_store::Commit;
use steadfast_types::{HostId, VmId};

/// Least time between two rounds.
const ROUND: Duration = Duration::from_millis(500);
/// How long a host may take to begin an action.
const ACT_BOUND: Duration = Duration::from_secs(60);
/// How long a host may take to say that it is there.
const PING_BOUND: Duration = Duration::from_secs(2);
/// A start that was sent is believed for so long without a report of it.
const UNREPORTED: Duration = Duration::from_secs(8);
/// A host that does not decide believes what was read so long ago.
const READ_LATELY: Duration = Duration::from_secs(5);
/// A leader renews its claim so many times before it would be replaced.
const CLAIM_PART: u64 = 6;
/// An action that fails the same way each time is told of again only after so long.
const TOLD_AGAIN: Duration = Duration::from_secs(60);
/// What takes longer is told as a decision and its end, each at its time; what is shorter as one event.
const LONG_MS: u64 = 1000;
/// Tasks kept after their end, ms.
const TASK_KEPT_MS: u64 = 3_600_000;
/// A VM that has run for so long has started well, ms.
const STARTED_WELL_MS: u64 = 60_000;
/// A host that could not go on with a guest is tried again after so long.
const UNFIT_MS: u64 = 3_600_000;
/// Housekeeping every so many rounds.
const HOUSEKEEPING: u64 = 20;

/// See the module.
pub struct Decider {
    node: Arc<Node>,
    observer: Arc<Mutex<Observer>>,
    /// Another's claim, and since when it stands.
    other: Option<(Leader, Instant)>,
    mine: Option<u64>,
    /// When that was asked for.
    claimed: Instant,
    /// Actions under way, so that none is sent twice at a time.
    under_way: Arc<Mutex<HashSet<String>>>,
    /// Refusals that were told already.
    told: HashSet<String>,
    /// Actions that failed lately, and how: tried again each round, told again only now and then.
    failing: Arc<Mutex<HashMap<String, (String, Instant)>>>,
    watch: Arc<Mutex<Watch>>,
    /// What a rolling upgrade waited for in the last round.
    upgrade_waits: Option<String>,
    running_since: HashMap<VmId, u64>,
    /// Starts that were sent lately: their hosts may not have reported them yet.
    begun: HashMap<(VmId, HostId), Instant>,
    round: u64,
    /// Hosts whose fence agents were asked, and when that ended.
    fencing: Arc<Mutex<HashMap<HostId, Option<Instant>>>>,
}

impl Decider {
    /// On this host.
    #[must_use]
    pub fn new(node: Arc<Node>) -> Self {
        Self {
            node,
            observer: Arc::default(),
            other: None,
            mine: None,
            claimed: Instant::now(),
            under_way: Arc::default(),
            told: HashSet::new(),
            failing: Arc::default(),
            watch: Arc::default(),
            upgrade_waits: None,
            running_since: HashMap::new(),
            begun: HashMap::new(),
            round: 0,
            fencing: Arc::default(),
        }
    }

    /// Rounds until the daemon ends.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.turn().await {
                tracing::warn!(%error, "a round of the leader failed");
            }
            let _ = tokio::time::timeout(ROUND * 2, self.node.wake.notified()).await;
            tokio::time::sleep(ROUND).await;
        }
    }

    async fn turn(&mut self) -> Result<()> {
        let mut read = self.pool().await?;
        let led = self.mine.is_some();
        if !self.elected(&read.pool).await? {
            let mut observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
            observer.follow(&read);
            drop(observer);
            self.told.clear();
            *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Watch::default();
            return Ok(());
        }
        if !led {
            // Decisions are made from what is there now.
            read = self.pool().await?;
        }
        let pool = Arc::clone(&read.pool);
        let (observed, silent_ms, late) = {
            let mut observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
            let observed = observer.look(&read);
            let late = observer.late(pool.timings.report_ms, read.began);
            (observed, observer.silent_ms(read.began), late)
        };
        self.ping(&pool, &late);
        self.fence(&pool, &observed);
        self.remember_owners(&pool).await?;
        self.finish_stops(&pool).await?;
        migrate::progress(&self.node, &pool).await?;
        upgrade::progress(&self.node, &pool, &self.upgrade_waits).await?;
        let mut snapshot = pool.snapshot(Some(&observed));
        self.begun.retain(|_, at| at.elapsed() < UNREPORTED);
        for (vm, host) in self.begun.keys() {
            let Some(vm) = snapshot.vms.get_mut(vm) else {
                continue;
            };
            // The engine of a protected VM takes its term a moment after its process was started.
            let owner = vm.state.owner.get_or_insert_with(|| host.clone());
            if owner == host {
                let starting = Instance::new(Phase::Starting, vm.state.term);
                vm.state.instances.entry(host.clone()).or_insert(starting);
            }
        }
        let decisions = decide(&snapshot);
        let waits = decisions.refusals.iter();
        let mut waits = waits.filter(|r| matches!(r.wanted, Wanted::Upgrade | Wanted::Drain));
        self.upgrade_waits = waits.next().map(|r| r.because.to_string());
        for decision in decisions.actions {
            self.carry_out(&pool, decision).await;
        }
        // Telling takes a write of the store for each event: after what must not wait.
        {
            let (watch, pool, observed) = (Arc::clone(&self.watch), pool.clone(), observed.clone());
            let look = move |n: &Node| {
                let mut watch = watch.lock().unwrap_or_else(PoisonError::into_inner);
                watch.look(n, &pool, &observed, &silent_ms)
            };
            if let Err(error) = self.node.blocking(look).await {
                tracing::warn!(%error, "what happened could not be told");
            }
        }
        let refused: HashSet<String> = decisions.refusals.iter().map(ToString::to_string).collect();
        for r in decisions.refusals {
            let refusal = r.to_string();
            if self.told.contains(&refusal) {
                continue;
            }
            let about = match (r.vm, r.host) {
                (Some(vm), Some(host)) => About::On(vm, host),
                (Some(vm), None) => About::Vm(vm),
                (None, Some(host)) => About::Host(host),
                (None, None) => About::Pool,
            };
            self.tell(about, What::Refused { refusal }, String::new()).await?;
        }
        self.told = refused;
        self.round += 1;
        if self.round.is_multiple_of(HOUSEKEEPING) {
            self.keep_house(&pool).await?;
        }
        Ok(())
    }

    /// The pool. Who does not decide has read it already, to report.
    async fn pool(&self) -> Result<Read> {
        let latest = self.node.latest_pool(READ_LATELY);
        match latest.filter(|_| self.mine.is_none()) {
            Some(latest) => Ok(latest),
            None => self.node.blocking(Node::load_pool).await,
        }
    }

    async fn tell(&self, about: About, what: What, why: String) -> Result<()> {
        self.node
            .blocking(move |n| {
                n.event(about, what, why);
                Ok(())
            })
            .await
    }

    /// Whether this host decides; tries to be elected if nobody does.
    async fn elected(&mut self, pool: &Pool) -> Result<bool> {
        let me = self.node.host();
        let current = pool.leader.clone();
        let taken_ms = pool.timings.leader_ms;
        let seq = match &current {
            Some(leader) if leader.host.as_ref() == Some(&me) && self.mine == Some(leader.seq) => {
                if self.claimed.elapsed() < Duration::from_millis(taken_ms / CLAIM_PART) {
                    return Ok(true);
                }
                leader.seq + 1
            }
            Some(leader) if leader.host.is_some() => {
                self.mine = None;
                let since = match &self.other {
                    Some((seen, since)) if seen == leader => *since,
                    _ => {
                        self.other = Some((leader.clone(), Instant::now()));
                        return Ok(false);
                    }
                };
                if since.elapsed() < Duration::from_millis(taken_ms) {
                    return Ok(false);
                }
                leader.seq + 1
            }
            Some(leader) => leader.seq + 1,
            None => 1,
        };
        let claimed = Instant::now();
        let claim = Leader { host: Some(me), seq };
        let value = json(&claim)?;
        let won = self
            .node
            .blocking(move |n| {
                let kv = n.kv();
                let now = kv.read(&[LEADER])?;
                let entry = now.get(LEADER);
                let expected = current.as_ref().map(json).transpose()?;
                if entry.map(|e| &e.value) != expected.as_ref() {
                    return Ok(false);
                }
                let commit = Commit::default().unchanged(LEADER, entry).put(LEADER, value);
                Ok(kv.commit(&commit)?.is_done())
            })
            .await?;
        if won && self.mine.is_none() {
            let about = About::Host(self.node.host());
            self.tell(about, What::Note, "it decides for the pool from now on".into())
                .await?;
        }
        self.mine = won.then_some(seq);
        if won {
            self.claimed = claimed;
        }
        Ok(won)
    }

    /// Asks every host that is late with its report whether it is there; answers count when they come, as do those on the replication
    /// paths.
    fn ping(&self, pool: &Pool, late: &BTreeSet<HostId>) {
        for (id, info) in pool.hosts.iter().filter(|(id, _)| late.contains(id)) {
            let Ok(target) = self.node.target(id, info) else {
                continue;
            };
            if let Some(heard) = self.node.paths.heard(id) {
                let mut observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
                observer.answered(id, heard);
            }
            let (id, observer) = (id.clone(), Arc::clone(&self.observer));
            tokio::spawn(async move {
                let answer: Result<serde_json::Value> =
                    ask(&target, Method::GET, "/internal/v1/ping", None::<&()>, PING_BOUND).await;
                if answer.is_ok() {
                    let mut observer = observer.lock().unwrap_or_else(PoisonError::into_inner);
                    observer.answered(&id, Instant::now());
                }
            });
        }
    }

    /// Who is dead with `restart` VMs that cannot be booted before its lease is out: its agent is asked to cut its power.
    fn fence(&self, pool: &Pool, observed: &BTreeMap<HostId, HostHealth>) {
        let lately = |ended: &Option<Instant>| ended.is_none_or(|at| at.elapsed() < fence::AGAIN);
        let mut fencing = self.fencing.lock().unwrap_or_else(PoisonError::into_inner);
        fencing.retain(|_, ended| lately(ended));
        for (host, health) in observed {
            let agent = pool.hosts.get(host).and_then(|info| info.fence.clone());
            let needed = pool.vms.values().any(|vm| {
                let record = &vm.stored.record;
                vm.owner() == Some(host)
                    && record.protection == Protection::Restart
                    && !record.has_local_disk()
                    && record.power == Power::On
            });
            let Some(agent) = agent.filter(|_| needed && *health == (HostHealth::Dead { fenced: false }))
            else {
                continue;
            };
            if fencing.contains_key(host) {
                continue;
            }
            let observer = self.observer.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(report) = observer.last_report(host) else {
                continue;
            };
            drop(observer);
            fencing.insert(host.clone(), None);
            let done = Arc::clone(&self.fencing);
            let (node, host, observer) = (Arc::clone(&self.node), host.clone(), Arc::clone(&self.observer));
            tokio::task::spawn_blocking(move || {
                let began = Instant::now();
                let text = match agent.fence() {
                    Ok(()) => {
                        let mut observer = observer.lock().unwrap_or_else(PoisonError::into_inner);
                        let counts = observer.was_cut(&host, report);
                        drop(observer);
                        let ms = began.elapsed().as_millis();
                        match counts {
                            true => format!("its power was cut by {} in {ms} ms: it is fenced", agent.agent),
                            false => format!(
                                "its power was cut by {} in {ms} ms; it had reported since",
                                agent.agent
                            ),
                        }
                    }
                    Err(error) => format!("its power could not be cut, its lease is waited for: {error}"),
                };
                node.note(&host, text);
                let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                done.insert(host, Some(Instant::now()));
                drop(done);
                node.wake.notify_one();
            });
        }
    }

    /// A VM whose owner changed has the old one as a standby from now on.
    async fn remember_owners(&mut self, pool: &Pool) -> Result<()> {
        for (id, vm) in &pool.vms {
            let owner = vm.owner().cloned();
            let runs = owner
                .as_ref()
                .and_then(|o| pool.reports.get(o)?.instances.get(id));
            let well = runs.is_some_and(|i| i.phase == Phase::Running);
            if !well {
                self.running_since.remove(id);
            }
            let since = *self.running_since.entry(id.clone()).or_insert_with(now_ms);
            let recovered = well
                && !vm.memory.start_failures.is_empty()
                && now_ms() > since.saturating_add(STARTED_WELL_MS);
            let said = runs.filter(|_| well).map(|i| &i.unfit);
            let in_sync = vm.record.as_ref().map(|r| &r.in_sync[..]).unwrap_or_default();
            // Who has the disks only is in sync with any CPU.
            let whole = !vm.stored.record.disks_suffice();
            let fit = |h: &HostId| Some(h) == owner.as_ref() || whole && in_sync.contains(h);
            let unfit = match runs {
                // Not heard of: that says nothing.
                None if owner.is_some() => vm.memory.unfit.clone(),
                _ => unfit_now(&vm.memory.unfit, said, fit, now_ms()),
            };
            if vm.memory.last_owner == owner && !recovered && vm.memory.unfit == unfit {
                continue;
            }
            let (key, wants) = (vm_state(id), vm.stored.record.standbys_wanted() > 0);
            let (vm_id, old_owner) = (id.clone(), vm.memory.last_owner.clone());
            let term = vm.term();
            self.node
                .blocking(move |n| {
                    update(&*n.kv(), &key, |old: Option<VmMemory>| {
                        let mut memory = old.unwrap_or_default();
                        remember(&mut memory, owner.as_ref(), wants);
                        memory.unfit.clone_from(&unfit);
                        if recovered {
                            memory.start_failures.clear();
                        }
                        Ok(Some(memory))
                    })?;
                    if let (Some(new), Some(old)) = (&owner, &old_owner)
                        && new != old
                    {
                        let text = format!("it runs on {new} now (term {term}), before on {old}");
                        n.note(About::On(vm_id, new.clone()), text);
                    }
                    Ok(())
                })
                .await?;
        }
        Ok(())
    }

    /// A VM that shall be off and has no process left is off, also if it lost its owner on the way there.
    async fn finish_stops(&self, pool: &Pool) -> Result<()> {
        for (id, vm) in &pool.vms {
            let Some(owner) = vm.owner().filter(|_| vm.stored.record.power == Power::Off) else {
                continue;
            };
            let up = pool
                .hosts
                .get(owner)
                .is_some_and(|h| h.record.health == HostHealth::Up);
            let left = pool.reports.values().any(|r| {
                r.instances
                    .get(id)
                    .is_some_and(|i| !matches!(i.phase, Phase::Failed(_)))
            });
            if up && !left {
                let (id, term) = (id.clone(), vm.term());
                self.node
                    .blocking(move |n| mark_stopped(&*n.kv(), &id, term))
                    .await?;
            }
        }
        Ok(())
    }

    async fn carry_out(&mut self, pool: &Pool, decision: Decision) {
        if let Action::StartVm { vm, host, .. } = &decision.action {
            self.begun.insert((vm.clone(), host.clone()), Instant::now());
        }
        let key = decision.action.to_string();
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if !under_way.insert(key.clone()) {
            return;
        }
        drop(under_way);
        let (node, pool, under) = (Arc::clone(&self.node), pool.clone(), Arc::clone(&self.under_way));
        let failing = Arc::clone(&self.failing);
        let work = async move {
            let (began, began_ms) = (Instant::now(), now_ms());
            let done = perform(&node, &pool, &decision.action).await;
            let took = began.elapsed().as_millis() as u64;
            let error = done.as_ref().err().map(ToString::to_string);
            let again = {
                let mut failing = failing.lock().unwrap_or_else(PoisonError::into_inner);
                failing.retain(|_, (_, at)| at.elapsed() < TOLD_AGAIN);
                match &error {
                    Some(e) if failing.get(&key).is_some_and(|(before, _)| before == e) => true,
                    Some(e) => failing
                        .insert(key.clone(), (e.clone(), began))
                        .is_some_and(|_| false),
                    None => {
                        failing.remove(&key);
                        false
                    }
                }
            };
            if !again && !matches!(done, Ok(false)) {
                let told = node.blocking(move |n| {
                    let about = about(&decision.action);
                    let action = decision.action.to_string();
                    if took >= LONG_MS || error.is_some() {
                        let decided = What::Decided {
                            action: action.clone(),
                        };
                        n.event_at(began_ms, about.clone(), decided, decision.why.clone());
                        n.event(about, journal::done(action, took, error), "");
                    } else {
                        n.event(about, journal::done(action, took, None), decision.why);
                    }
                    Ok(())
                });
                let _ = told.await;
            }
            under.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            node.wake.notify_one();
        };
        // Records are changed in the order of the decisions; what hosts do takes its time beside it.
        tokio::spawn(work);
    }

    async fn keep_house(&self, pool: &Pool) -> Result<()> {
        crate::drill::due(&self.node, pool);
        let spec = self.node.config().store_spec(&self.node.folders);
        if matches!(
            self.node.config().store,
            crate::config::StoreChoice::Managed { .. }
        ) {
            // Beside the round: a member whose host is dead may take seconds to be given up.
            tokio::spawn(async move {
                if let Err(error) = etcd::promote_learners(&spec).await {
                    tracing::debug!(%error, "etcd's learners were not looked at");
                }
            });
        }
        let old: Vec<String> = pool
            .tasks
            .iter()
            .filter(|t| t.ended_ms.is_some_and(|at| at + TASK_KEPT_MS < now_ms()))
            .map(|t| migrate::key(&t.id))
            .collect();
        let known: HashSet<VmId> = pool.vms.keys().cloned().collect();
        self.node
            .blocking(move |n| {
                let kv = n.kv();
                let mut keys = journal::surplus(&*kv, EVENTS_MAX, &known)?;
                keys.extend(old);
                for part in keys.chunks(steadfast_store::CHANGES_MAX) {
                    let delete = part.iter().fold(Commit::default(), |c, k| c.delete(k));
                    kv.commit(&delete)?;
                }
                Ok(())
            })
            .await
    }
}

/// What an action is about.
fn about(action: &Action) -> About {
    let host = match action {
        Action::MarkHealth { host, .. }
        | Action::MarkAdmin { host, .. }
        | Action::StartVm { host, .. }
        | Action::ResetVm { host, .. }
        | Action::StopInstance { host, .. }
        | Action::Promote { to: host, .. }
        | Action::AddStandby { host, .. }
        | Action::RemoveStandby { host, .. }
        | Action::UpgradeHost { host, .. } => Some(host.clone()),
        Action::Migrate { to, .. } | Action::CancelMigration { to, .. } => Some(to.clone()),
        Action::RaiseAlarm { .. } | Action::ClearAlarm { .. } => None,
    };
    match (action.vm().cloned(), host) {
        (Some(vm), Some(host)) => About::On(vm, host),
        (Some(vm), None) => About::Vm(vm),
        (None, Some(host)) => About::Host(host),
        (None, None) => About::Pool,
    }
}

/// Hosts that cannot go on with a VM's guest, with what the owner's process has heard from them by now. `said`: none when the guest does not
/// run; it may have another CPU when it does. After a while it is tried again: hosts change.
fn unfit_now(
    before: &BTreeMap<HostId, Unfit>,
    said: Option<&BTreeMap<HostId, String>>,
    fit: impl Fn(&HostId) -> bool,
    now: u64,
) -> BTreeMap<HostId, Unfit> {
    let Some(said) = said else { return BTreeMap::new() };
    let lately = |(_, u): &(&HostId, &Unfit)| now < u.at_ms.saturating_add(UNFIT_MS);
    let mut unfit: BTreeMap<_, _> = before
        .iter()
        .filter(lately)
        .map(|(h, u)| (h.clone(), u.clone()))
        .collect();
    for (host, why) in said {
        let known = unfit.get(host).is_some_and(|u| u.why == *why);
        if !known {
            unfit.insert(
                host.clone(),
                Unfit {
                    why: why.clone(),
                    at_ms: now,
                },
            );
        }
    }
    unfit.retain(|host, _| !fit(host));
    unfit
}

/// What a change of owner does to the standbys.
fn remember(memory: &mut VmMemory, owner: Option<&HostId>, wants_standbys: bool) {
    if let Some(new) = owner {
        if let Some(old) = memory.last_owner.replace(new.clone()).filter(|old| old != new)
            && wants_standbys
        {
            memory.standbys.insert(old);
        }
        memory.standbys.remove(new);
        memory.stopped = None;
    } else {
        memory.last_owner = None;
    }
}

/// Asks a host's daemon to carry out an action.
///
/// # Errors
/// It cannot be reached, or says why not.
pub async fn send(node: &Arc<Node>, pool: &Pool, host: &HostId, action: &Action) -> Result<()> {
    if *host == node.host() {
        let action = action.clone();
        return node.blocking(move |n| crate::agent::act(n, &action)).await;
    }
    let target = node.target(host, pool.host(host)?)?;
    let _: serde_json::Value =
        ask(&target, Method::POST, "/internal/v1/act", Some(action), ACT_BOUND).await?;
    Ok(())
}

/// Does one action. False: there was nothing (new) to do.
async fn perform(node: &Arc<Node>, pool: &Pool, action: &Action) -> Result<bool> {
    match action {
        Action::MarkHealth { host, .. } | Action::MarkAdmin { host, .. } => {
            let (key, action) = (host_info(host), action.clone());
            node.blocking(move |n| {
                update(&*n.kv(), &key, |old: Option<HostInfo>| {
                    Ok(old.map(|mut info| {
                        match &action {
                            Action::MarkHealth { health, .. } => info.record.health = *health,
                            Action::MarkAdmin { admin, .. } => info.set_admin(*admin),
                            _ => {}
                        }
                        info
                    }))
                })
            })
            .await?;
            Ok(true)
        }
        Action::StartVm { host, .. } | Action::ResetVm { host, .. } => {
            send(node, pool, host, action).await.map(|()| true)
        }
        Action::StopInstance { vm, host, in_order } => {
            let entry = pool.vms.get(vm);
            if *in_order && let Some(entry) = entry {
                stop_standbys(node, pool, vm, entry).await?;
            }
            send(node, pool, host, action).await.map(|()| true)
        }
        // The standby finds that out by itself, faster than we can; the arbiter lets it.
        Action::Promote { .. } => Ok(true),
        Action::AddStandby { vm, host } => change_standbys(node, vm, host, true).await.map(|()| true),
        Action::RemoveStandby { vm, host } => change_standbys(node, vm, host, false).await.map(|()| true),
        Action::Migrate {
            vm, from, to, cause, ..
        } => migrate::begin(node, pool, vm, from, to, *cause)
            .await
            .map(|_| true),
        Action::CancelMigration { vm, to } => migrate::cancel(node, pool, vm, to).await.map(|()| true),
        Action::UpgradeHost { host, to } => upgrade::host(node, pool, host, to).await.map(|()| true),
        Action::RaiseAlarm { alarm } => set_alarm(node, alarm, true).await,
        Action::ClearAlarm { alarm } => set_alarm(node, alarm, false).await,
    }
}

/// A standby must not take over from a primary that is stopped on purpose: it goes first.
async fn stop_standbys(node: &Arc<Node>, pool: &Pool, vm: &VmId, entry: &PoolVm) -> Result<()> {
    for host in entry.memory.standbys.clone() {
        change_standbys(node, vm, &host, false).await?;
        let there = pool
            .reports
            .get(&host)
            .is_some_and(|r| r.instances.contains_key(vm));
        if there && pool.hosts.get(&host).is_some_and(|h| h.record.reachable()) {
            let stop = Action::StopInstance {
                vm: vm.clone(),
                host: host.clone(),
                in_order: false,
            };
            send(node, pool, &host, &stop).await?;
        }
    }
    Ok(())
}

/// Lists a host as a standby, or no more.
///
/// # Errors
/// The store's.
pub async fn change_standbys(node: &Arc<Node>, vm: &VmId, host: &HostId, add: bool) -> Result<()> {
    let (key, host) = (vm_state(vm), host.clone());
    node.blocking(move |n| {
        update(&*n.kv(), &key, |old: Option<VmMemory>| {
            let mut memory = old.unwrap_or_default();
            match add {
                true => memory.standbys.insert(host.clone()),
                false => memory.standbys.remove(&host),
            };
            Ok(Some(memory))
        })
    })
    .await
    .map(|_| ())
}

async fn set_alarm(node: &Arc<Node>, alarm: &AlarmKey, up: bool) -> Result<bool> {
    let value = json(alarm)?;
    let key = format!("p/alarm/{}", crate::pki::fingerprint(&value));
    node.blocking(move |n| {
        let commit = match up {
            true => Commit::default().put(key, value),
            false => Commit::default().delete(key),
        };
        Ok(n.kv().commit(&commit)?.is_done())
    })
    .await
}

/// Gives the leadership up, so that another host need not wait for its end.
///
/// # Errors
/// The store's.
pub fn resign(node: &Node) -> Result<()> {
    let me = node.host();
    update(&*node.kv(), LEADER, |old: Option<Leader>| {
        Ok(old.filter(|l| l.host.as_ref() == Some(&me)).map(|l| Leader {
            host: None,
            seq: l.seq + 1,
        }))
    })
    .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_cannot_go_on_with_a_guest_is_remembered_for_a_while() {
        let (b, c) = (HostId::new("b").unwrap(), HostId::new("c").unwrap());
        let says = |why: &str| BTreeMap::from([(b.clone(), why.to_owned())]);
        let nothing = BTreeMap::new();
        let none = |_: &HostId| false;
        let at_10 = unfit_now(&BTreeMap::new(), Some(&says("no sse2")), none, 10);
        assert_eq!(at_10.keys().collect::<Vec<_>>(), [&b]);
        // Its standby is gone, and says nothing any more; one that says it again does not count anew.
        assert_eq!(unfit_now(&at_10, Some(&nothing), none, 20), at_10);
        assert_eq!(unfit_now(&at_10, Some(&says("no sse2")), none, 20), at_10);
        assert_ne!(unfit_now(&at_10, Some(&says("no avx")), none, 20), at_10);
        assert!(unfit_now(&at_10, Some(&nothing), none, 10 + UNFIT_MS).is_empty());
        // It runs the VM, or is in sync; the guest does not run.
        assert!(unfit_now(&at_10, Some(&nothing), |h| *h == b, 20).is_empty());
        assert_eq!(unfit_now(&at_10, Some(&nothing), |h| *h == c, 20), at_10);
        assert!(unfit_now(&at_10, None, none, 20).is_empty());
    }
}
