//! The snapshot with indices, kept up to date while decisions are made: later decisions see the effects of earlier ones.
//!
//! Everything is by position (`usize`) in two sorted lists, so that looking at 1,000 hosts for one VM costs microseconds. State
//! is changed by [`crate::apply`] only, so that what is decided and what an action does cannot drift apart.

use super::reserve::Reserve;
use crate::action::{Action, Because, Decision, Decisions, Refusal, Wanted};
use crate::apply;
use crate::model::{
    AlarmKey, GroupRule, Host, HostAdmin, HostHealth, Keep, MoveCause, Phase, PoolSettings, Power,
    Protection, Resources, Snapshot, Task, Vm,
};
use crate::sabotage::Sabotage;
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use steadfast_types::{HostId, VmId};

/// A host and what is on it.
pub(crate) struct HostX<'a> {
    pub host: Cow<'a, Host>,
    /// What VMs may be promised: capacity less what is kept, CPU times the overcommitment.
    pub cap: Resources,
    /// What copies of VMs take or are promised.
    pub used: Resources,
    /// What would be needed here if others failed.
    pub reserve: Reserve,
    /// VMs with a copy here (owner, standby, replica, left-over, target of a migration).
    pub copies: BTreeSet<usize>,
    /// Number of its rack.
    pub rack: Option<usize>,
    /// Floating VMs that run here.
    pub floating: u64,
    /// What floating VMs that wait to be booted will take here.
    pub pending: Resources,
    /// Migrations from or to it.
    pub migrations: u32,
    /// Load that moves under way or just decided will add or take: CPU, memory, network.
    pub shift: [i64; 3],
}

impl HostX<'_> {
    pub fn usable(&self) -> bool {
        self.host.record.usable() && self.host.status.prediction.is_none()
    }

    pub fn free(&self) -> Resources {
        self.cap.minus(self.used)
    }

    pub fn id(&self) -> &HostId {
        &self.host.record.id
    }
}

/// A VM and where it is.
pub(crate) struct VmX<'a> {
    pub vm: Cow<'a, Vm>,
    pub owner: Option<usize>,
    pub standbys: Vec<usize>,
    pub migrating: Option<Move>,
    /// Groups with a rule: their number and the rule.
    pub groups: Vec<(usize, GroupRule)>,
    /// VMs that must be ready before it starts; `Err` names one that does not exist.
    pub needs: Vec<Result<usize, VmId>>,
    /// Which hosts pass the rules that do not depend on other VMs.
    pub admissible: Rc<Vec<Why>>,
    /// All hosts do (witnesses apart), and it must be apart from nobody.
    pub plain: bool,
    /// It is counted in its host's `floating`.
    counted_floating: bool,
    /// What it takes, by host.
    usage: Vec<(usize, Resources)>,
    /// What it would need, by host, if its owner failed.
    failover: Vec<(usize, Resources)>,
}

impl VmX<'_> {
    pub fn id(&self) -> &VmId {
        &self.vm.spec.id
    }

    pub fn on(&self) -> bool {
        self.vm.spec.power == Power::On
    }

    /// It takes something there, if only disk.
    pub fn has_copy(&self, h: usize) -> bool {
        self.usage.iter().any(|(u, _)| *u == h)
    }

    /// A VM with local disks that are somewhere already.
    pub fn bound_to_disks(&self) -> bool {
        self.vm.spec.has_local_disk() && !self.vm.state.replicas.is_empty()
    }

    /// Boots anywhere when its host fails: `restart` on shared storage.
    pub fn floats(&self) -> bool {
        self.on()
            && self.owner.is_some()
            && self.vm.spec.protection == Protection::Restart
            && !self.vm.spec.has_local_disk()
    }
}

/// A migration under way.
#[derive(Clone, Copy)]
pub(crate) struct Move {
    pub from: usize,
    pub to: usize,
    pub cause: MoveCause,
}

/// Why a host can never hold a VM, by its own nature.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    Fits,
    Witness,
    Baseline,
    Site,
    Storage,
}

/// What a set of rules that do not depend on other VMs is made of.
type RulesKey = (String, Vec<String>, Vec<String>);

/// See the module.
pub(crate) struct World<'a> {
    pub pool: &'a PoolSettings,
    pub now_ms: u64,
    pub hosts: Vec<HostX<'a>>,
    pub vms: Vec<VmX<'a>>,
    pub tasks: Vec<Task>,
    pub alarms: BTreeSet<AlarmKey>,
    /// Alarms that hold now.
    pub alarms_wanted: BTreeSet<AlarmKey>,
    pub out: Decisions,
    /// Members of each group that has a rule.
    members: Vec<Vec<usize>>,
    /// VMs that float.
    pub floating: BTreeSet<usize>,
    host_at: HashMap<HostId, usize>,
    vm_at: HashMap<VmId, usize>,
}

impl<'a> World<'a> {
    pub fn new(snapshot: &'a Snapshot) -> Self {
        let pool = &snapshot.pool;
        let mut hosts: Vec<HostX> = snapshot
            .hosts
            .values()
            .map(|h| HostX {
                host: Cow::Borrowed(h),
                cap: capacity(h, pool),
                used: Resources::ZERO,
                reserve: Reserve::new(pool.host_failures),
                copies: BTreeSet::new(),
                rack: None,
                floating: 0,
                pending: Resources::ZERO,
                migrations: 0,
                shift: [0; 3],
            })
            .collect();
        let mut racks: HashMap<&str, usize> = HashMap::new();
        for (x, h) in hosts.iter_mut().zip(snapshot.hosts.values()) {
            let next = racks.len();
            let number = |r: &'a String| *racks.entry(r.as_str()).or_insert(next);
            x.rack = h.record.rack.as_ref().map(number);
        }
        let index = |i: usize, h: &HostX| (h.host.record.id.clone(), i);
        let host_at: HashMap<_, _> = hosts.iter().enumerate().map(|(i, h)| index(i, h)).collect();
        let vm_at: HashMap<_, _> = snapshot
            .vms
            .values()
            .enumerate()
            .map(|(i, v)| (v.spec.id.clone(), i))
            .collect();
        let vms = indexed_vms(snapshot, &hosts, &vm_at);
        let mut members: Vec<Vec<usize>> = Vec::new();
        for (v, vm) in vms.iter().enumerate() {
            for (g, _) in &vm.groups {
                if members.len() <= *g {
                    members.resize(*g + 1, Vec::new());
                }
                members[*g].push(v);
            }
        }
        let mut world = Self {
            pool,
            now_ms: snapshot.now_ms,
            hosts,
            vms,
            tasks: snapshot.tasks.clone(),
            alarms: snapshot.alarms.clone(),
            alarms_wanted: BTreeSet::new(),
            out: Decisions::default(),
            members,
            floating: BTreeSet::new(),
            host_at,
            vm_at,
        };
        if world.broken(Sabotage::ForgetTasks) {
            world.tasks.clear();
        }
        for task in world.tasks.clone() {
            world.note_migration(&task);
        }
        for v in 0..world.vms.len() {
            world.count(v);
        }
        world
    }

    pub fn broken(&self, variant: Sabotage) -> bool {
        self.pool.sabotage.is(variant)
    }

    pub fn host(&self, id: &HostId) -> Option<usize> {
        self.host_at.get(id).copied()
    }

    pub fn host_id(&self, h: usize) -> HostId {
        self.hosts[h].id().clone()
    }

    /// Takes a decision: it is listed, and the world is as it will be once the action has begun.
    /// Nothing happens when the action's expectation does not hold.
    pub fn act(&mut self, action: Action, why: String) -> bool {
        let done = match &action {
            Action::MarkHealth { host, .. } | Action::MarkAdmin { host, .. } => match self.host(host) {
                Some(h) => apply::on_host(self.hosts[h].host.to_mut(), &action),
                None => false,
            },
            Action::Migrate { vm, .. } => {
                let v = self.vm_at.get(vm).copied();
                let may = v.is_some_and(|v| apply::may_migrate(&self.vms[v].vm, &action));
                may && self.change_tasks(&action, v)
            }
            Action::CancelMigration { vm, .. } => {
                let v = self.vm_at.get(vm).copied();
                self.change_tasks(&action, v)
            }
            Action::UpgradeHost { .. } => self.change_tasks(&action, None),
            Action::RaiseAlarm { .. } | Action::ClearAlarm { .. } => {
                apply::on_alarms(&mut self.alarms, &action)
            }
            _ => match action.vm().and_then(|vm| self.vm_at.get(vm)).copied() {
                Some(v) => {
                    self.uncount(v);
                    let done = apply::on_vm(self.vms[v].vm.to_mut(), &action);
                    self.count(v);
                    done
                }
                None => false,
            },
        };
        if done {
            self.out.actions.push(Decision { action, why });
        }
        done
    }

    /// A VM that ran elsewhere is put on `h`: it will use that host's CPUs as it did before, or as it is promised for sure.
    pub fn expect_load(&mut self, v: usize, h: usize) {
        let vm = &self.vms[v].vm;
        let overcommit = u64::from(self.pool.cpu_overcommit_permille.max(1000));
        let cpu_milli = match vm.state.load.cpu_milli {
            0 => vm.spec.demand().cpu_milli.saturating_mul(1000) / overcommit,
            measured => measured,
        };
        let cpu = i64::try_from(cpu_milli).unwrap_or(i64::MAX);
        self.hosts[h].shift[0] = self.hosts[h].shift[0].saturating_add(cpu);
    }

    /// Puts a VM back to what it was, after something was tried on it.
    pub fn restore(&mut self, v: usize, vm: Cow<'a, Vm>) {
        self.uncount(v);
        self.vms[v].vm = vm;
        self.count(v);
    }

    /// What `v` takes on `h`.
    pub fn taken(&self, v: usize, h: usize) -> Resources {
        let usage = self.vms[v].usage.iter().find(|(u, _)| *u == h);
        usage.map_or(Resources::ZERO, |(_, r)| *r)
    }

    /// Lists what is wanted and cannot be.
    pub fn refuse(&mut self, vm: Option<usize>, host: Option<usize>, wanted: Wanted, because: Because) {
        let refusal = Refusal {
            vm: vm.map(|v| self.vms[v].id().clone()),
            host: host.map(|h| self.host_id(h)),
            wanted,
            because,
        };
        self.out.refusals.push(refusal);
    }

    fn change_tasks(&mut self, action: &Action, vm: Option<usize>) -> bool {
        if let Some(v) = vm {
            self.uncount(v);
        }
        let done = apply::on_tasks(&mut self.tasks, action, self.now_ms);
        if done && let Some(v) = vm {
            if let Some(m) = self.vms[v].migrating.take() {
                self.hosts[m.from].migrations -= 1;
                self.hosts[m.to].migrations -= 1;
            }
            if let Some(task) = self.tasks.last().cloned()
                && matches!(action, Action::Migrate { .. })
            {
                self.note_migration(&task);
            }
        }
        if let Some(v) = vm {
            self.count(v);
        }
        done
    }

    fn note_migration(&mut self, task: &Task) {
        let Task::Migrate {
            vm, from, to, cause, ..
        } = task
        else {
            return;
        };
        let (Some(&v), Some(from), Some(to)) = (self.vm_at.get(vm), self.host(from), self.host(to)) else {
            return;
        };
        self.vms[v].migrating = Some(Move {
            from,
            to,
            cause: *cause,
        });
        self.hosts[from].migrations += 1;
        self.hosts[to].migrations += 1;
    }

    /// Takes a VM out of the sums of its hosts, so that it can be changed.
    fn uncount(&mut self, v: usize) {
        let vm = &mut self.vms[v];
        for (h, r) in std::mem::take(&mut vm.usage) {
            self.hosts[h].used = self.hosts[h].used.minus(r);
            self.hosts[h].copies.remove(&v);
        }
        let owner = vm.owner;
        if std::mem::take(&mut vm.counted_floating)
            && let Some(o) = owner
        {
            self.hosts[o].floating -= 1;
            self.floating.remove(&v);
        }
        for (h, r) in std::mem::take(&mut vm.failover) {
            if let Some(o) = owner {
                self.hosts[h].reserve.remove(o, r);
            }
        }
    }

    /// Reads where a VM is and adds it to the sums of its hosts.
    fn count(&mut self, v: usize) {
        let at = &self.host_at;
        let vm = &mut self.vms[v];
        let (spec, state) = (&vm.vm.spec, &vm.vm.state);
        vm.owner = state.owner.as_ref().and_then(|h| at.get(h)).copied();
        vm.standbys = state.standbys.keys().filter_map(|h| at.get(h)).copied().collect();
        // Without an owner nothing stands by: only the disks are there.
        let live = state.owner.is_some();
        let disk = Resources {
            disk_bytes: spec.local_disk_bytes(),
            ..Resources::ZERO
        };
        let full = spec.demand();
        let mut usage: Vec<(usize, Resources)> = Vec::with_capacity(3);
        let mut add = |h: usize, r: Resources| match usage.iter_mut().find(|(u, _)| *u == h) {
            Some((_, sum)) => *sum = sum.max(r),
            None => usage.push((h, r)),
        };
        if let Some(o) = vm.owner {
            add(o, full);
        }
        for &s in &vm.standbys {
            add(s, if live { spec.standby_demand() } else { disk });
        }
        for h in state.replicas.iter().filter_map(|h| at.get(h)) {
            add(*h, disk);
        }
        for (h, i) in &state.instances {
            let Some(&h) = at.get(h) else { continue };
            let down = matches!(i.phase, Phase::Failed(_)) || vm.standbys.contains(&h);
            add(h, if down { disk } else { full });
        }
        if let Some(m) = vm.migrating {
            add(m.to, full);
        }
        vm.failover.clear();
        if let Some(owner) = vm.owner
            && spec.power == Power::On
        {
            let r = spec.promotion_demand();
            for &s in &vm.standbys {
                self.hosts[s].reserve.add(owner, r);
                vm.failover.push((s, r));
            }
        }
        for &(h, r) in &usage {
            self.hosts[h].used = self.hosts[h].used.plus(r);
            self.hosts[h].copies.insert(v);
        }
        vm.usage = usage;
        if vm.floats()
            && let Some(o) = vm.owner
        {
            vm.counted_floating = true;
            self.hosts[o].floating += 1;
            self.floating.insert(v);
        }
    }

    /// Positions of VMs, the most urgent first: by priority, then by name.
    pub fn by_priority(&self, mut list: Vec<usize>) -> Vec<usize> {
        list.sort_by_key(|&v| (std::cmp::Reverse(self.vms[v].vm.spec.priority), v));
        list
    }

    /// In-sync standbys on hosts that count: neither dead nor leaving nor with a faulty disk.
    pub fn good_standbys(&self, v: usize) -> usize {
        let vm = &self.vms[v];
        vm.standbys
            .iter()
            .filter(|&&h| self.standby_counts(v, h) && self.in_sync(v, h))
            .count()
    }

    pub fn in_sync(&self, v: usize, h: usize) -> bool {
        let standby = self.vms[v].vm.state.standbys.get(self.hosts[h].id());
        standby.is_some_and(|s| s.in_sync)
    }

    /// A standby (also one that is being filled) on this host shall be kept.
    pub fn standby_counts(&self, v: usize, h: usize) -> bool {
        let host = &self.hosts[h];
        let fault = |i: &crate::model::Instance| i.disk_fault || matches!(i.phase, Phase::Failed(_));
        !host.host.record.dead()
            && host.host.record.admin == HostAdmin::InUse
            && host.host.status.prediction.is_none()
            && self.vms[v].admissible[h] == Why::Fits
            && !self.vms[v].vm.state.instances.get(host.id()).is_some_and(fault)
            && !self.unfit(v, h, super::fit::Role::Standby)
            && !self.misplaced(v, h)
    }

    /// The copy of `v` on `h` breaks an anti-affinity rule, and it is the one of the two that has to go.
    pub fn misplaced(&self, v: usize, h: usize) -> bool {
        if self.vms[v].groups.is_empty() || self.broken(Sabotage::IgnoreApart) {
            return false;
        }
        let rank = |x: usize| {
            let vm = &self.vms[x];
            let primary = vm.owner == Some(h);
            (
                std::cmp::Reverse(primary),
                std::cmp::Reverse(vm.vm.spec.priority),
                x,
            )
        };
        self.apart_from(v, h).any(|other| rank(other) < rank(v))
    }

    /// The two must be apart.
    pub fn apart(&self, v: usize, x: usize) -> bool {
        let mine = &self.vms[v].groups;
        let shared =
            |(g, rule): &(usize, GroupRule)| *rule == GroupRule::Apart && mine.iter().any(|(m, _)| m == g);
        v != x && self.vms[x].groups.iter().any(shared)
    }

    /// VMs with a copy on `h` that `v` must be apart from.
    pub fn apart_from(&self, v: usize, h: usize) -> impl Iterator<Item = usize> {
        // Groups are small as a rule, and so are hosts: whichever list is shorter is looked through.
        let members: usize = self.apart_groups(v).map(|g| self.members[g].len()).sum();
        let by_host = members > self.hosts[h].copies.len();
        let here = by_host.then(|| {
            self.hosts[h]
                .copies
                .iter()
                .copied()
                .filter(move |&x| self.apart(v, x))
        });
        let there = (!by_host).then(|| {
            let all = self.apart_groups(v).flat_map(|g| self.members[g].iter().copied());
            all.filter(move |&x| x != v && self.vms[x].has_copy(h))
        });
        here.into_iter().flatten().chain(there.into_iter().flatten())
    }

    fn apart_groups(&self, v: usize) -> impl Iterator<Item = usize> {
        let groups = self.vms[v].groups.iter();
        groups.filter(|(_, r)| *r == GroupRule::Apart).map(|(g, _)| *g)
    }

    /// Members of a group of `v` with this rule that have a copy on `h`.
    pub fn group_members(&self, v: usize, h: usize, rule: GroupRule) -> usize {
        let mine = &self.vms[v].groups;
        if !mine.iter().any(|(_, r)| *r == rule) {
            return 0;
        }
        let member = |x: &&usize| {
            **x != v
                && self.vms[**x]
                    .groups
                    .iter()
                    .any(|g| g.1 == rule && mine.contains(g))
        };
        self.hosts[h].copies.iter().filter(member).count()
    }

    /// Migrations under way in the pool.
    pub fn migrations(&self) -> u32 {
        let count = self
            .tasks
            .iter()
            .filter(|t| matches!(t, Task::Migrate { .. }))
            .count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    pub fn health(&self, h: usize) -> HostHealth {
        self.hosts[h].host.record.health
    }
}

/// Time passed since `then`. A `then` in the future (the leader's clock was set back) counts as "just now" for an hour, and
/// then as long ago, so that a wrong clock cannot hold something up for good.
pub(crate) fn elapsed(now_ms: u64, then_ms: u64) -> u64 {
    if then_ms > now_ms.saturating_add(3_600_000) {
        return u64::MAX;
    }
    now_ms.saturating_sub(then_ms)
}

fn capacity(host: &Host, pool: &PoolSettings) -> Resources {
    let mut cap = host.record.capacity.minus(host.record.reserved);
    cap.cpu_milli = cap
        .cpu_milli
        .saturating_mul(u64::from(pool.cpu_overcommit_permille.max(1)))
        / 1000;
    cap
}

fn indexed_vms<'a>(
    snapshot: &'a Snapshot,
    hosts: &[HostX<'a>],
    vm_at: &HashMap<VmId, usize>,
) -> Vec<VmX<'a>> {
    let pool = &snapshot.pool;
    let mut groups: HashMap<String, usize> = HashMap::new();
    let mut group = |name: String| {
        let next = groups.len();
        *groups.entry(name).or_insert(next)
    };
    let mut rules: HashMap<RulesKey, Rc<Vec<Why>>> = HashMap::new();
    let mut uniform = HashMap::new();
    let mut vms: Vec<VmX> = Vec::with_capacity(snapshot.vms.len());
    for vm in snapshot.vms.values() {
        let mut x = VmX {
            vm: Cow::Borrowed(vm),
            owner: None,
            standbys: Vec::new(),
            migrating: None,
            groups: Vec::new(),
            needs: Vec::new(),
            admissible: admissible(vm, hosts, &mut rules),
            plain: false,
            counted_floating: false,
            usage: Vec::new(),
            failover: Vec::new(),
        };
        for g in &vm.spec.groups {
            if let Some(rule) = pool.groups.get(g) {
                x.groups.push((group(format!("group {g}")), *rule));
            }
        }
        let need = |id: &VmId| vm_at.get(id).copied().ok_or_else(|| id.clone());
        x.needs.extend(vm.spec.depends_on.iter().map(need));
        if let Some((name, app)) = vm
            .spec
            .application
            .as_ref()
            .and_then(|a| Some((a, pool.applications.get(a)?)))
        {
            match app.keep {
                Keep::Together => x.groups.push((group(format!("app {name}")), GroupRule::Together)),
                Keep::Apart => x.groups.push((group(format!("app {name}")), GroupRule::Apart)),
                Keep::Free => {}
            }
            let stage = app.start_order.iter().position(|s| s.contains(&vm.spec.id));
            let before = stage.unwrap_or(app.start_order.len());
            // Only the stage right before: it waits for the ones before it in turn.
            let earlier = app.start_order[..before].iter().rev().find(|s| !s.is_empty());
            x.needs.extend(earlier.into_iter().flatten().map(need));
            if let Some(p) = app.protection.filter(|p| *p != vm.spec.protection) {
                x.vm.to_mut().spec.protection = p;
            }
        }
        x.plain =
            !x.groups.iter().any(|(_, r)| *r == GroupRule::Apart) && everywhere(&x.admissible, &mut uniform);
        vms.push(x);
    }
    vms
}

/// All hosts fit, witnesses apart; looked at once per set of rules.
fn everywhere(admissible: &Rc<Vec<Why>>, known: &mut HashMap<*const Vec<Why>, bool>) -> bool {
    let fits = || admissible.iter().all(|w| matches!(w, Why::Fits | Why::Witness));
    *known.entry(Rc::as_ptr(admissible)).or_insert_with(fits)
}

/// Which hosts pass the VM's rules that depend on nothing but the host, shared between VMs with equal rules.
fn admissible(vm: &Vm, hosts: &[HostX], cache: &mut HashMap<RulesKey, Rc<Vec<Why>>>) -> Rc<Vec<Why>> {
    let spec = &vm.spec;
    let sites = |s: &BTreeSet<steadfast_types::SiteId>| s.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut at = sites(&spec.sites.run_at);
    if !at.is_empty() {
        at.extend(sites(&spec.sites.standby_at));
    }
    let storages: Vec<String> = spec.storages().map(str::to_owned).collect();
    let key = (spec.baseline.clone(), at, storages);
    if let Some(found) = cache.get(&key) {
        return Rc::clone(found);
    }
    let (baseline, at, storages) = &key;
    let judged = hosts.iter().map(|h| {
        let r = &h.host.record;
        if r.witness {
            Why::Witness
        } else if !baseline.is_empty() && !r.baselines.contains(baseline) {
            Why::Baseline
        } else if !at.is_empty() && !at.iter().any(|s| s == r.site.as_str()) {
            Why::Site
        } else if !storages.iter().all(|s| r.storages.contains(s)) {
            Why::Storage
        } else {
            Why::Fits
        }
    });
    let judged = Rc::new(judged.collect::<Vec<_>>());
    cache.insert(key, Rc::clone(&judged));
    judged
}
