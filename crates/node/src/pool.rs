//! The whole pool as the store has it at one instant, and as the decisions want to see it.

use crate::engine;
use crate::error::Result;
use crate::records::{
    CA, CRL, Crl, DrillReport, HostInfo, HostReport, LEADER, Leader, SETTINGS, StoredTask, StoredVm, TIMINGS,
    TaskState, Timings, VmMemory, WATCHED, now_ms, parse,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;
use steadfast_cluster::health;
use steadfast_cluster::model::{
    AlarmKey, Host, HostAdmin, HostHealth, HostStatus, Instance, Phase, PoolSettings, Power, Protection,
    Snapshot, Standby, Task, Vm, VmState,
};
use steadfast_epoch::arbiter::VmRecord;
use steadfast_store::{Commit, Entry, Kv};
use steadfast_types::{HostId, Term, VmId};

/// A VM, all of it.
#[derive(Clone)]
pub struct PoolVm {
    /// What is wanted.
    pub stored: StoredVm,
    /// The arbiter's record; none: never started.
    pub record: Option<VmRecord>,
    /// The rest.
    pub memory: VmMemory,
    /// Its last drill.
    pub drill: Option<DrillReport>,
}

impl PoolVm {
    /// Who has the right to run it.
    #[must_use]
    pub fn owner(&self) -> Option<&HostId> {
        // A protected VM's record is made before its engine has taken the first term: its owner is about to start it.
        let mirrored = self.stored.record.standbys_wanted() > 0;
        let record = self.record.as_ref().filter(|r| mirrored || r.term > Term::ZERO)?;
        (self.memory.stopped != Some(record.term)).then_some(&record.owner)
    }

    /// Hosts that have, or shall have, a copy of it: owner, standbys, and an owner that has just lost it.
    #[must_use]
    pub fn copies(&self) -> BTreeSet<HostId> {
        let mut all = self.memory.standbys.clone();
        all.extend(self.owner().cloned());
        if self.stored.record.standbys_wanted() > 0 {
            all.extend(self.memory.last_owner.clone());
        }
        all
    }

    /// Whether its process must have the engine of protection: it is mirrored, or on its way to another host.
    #[must_use]
    pub fn needs_engine(&self) -> bool {
        // A standby that has become the owner is listed for a moment.
        let elsewhere = |h: &HostId| Some(h) != self.owner();
        self.stored.record.standbys_wanted() > 0 || self.memory.standbys.iter().any(elsewhere)
    }

    /// Whether this host has the right to run it, and it shall run.
    #[must_use]
    pub fn runs_on(&self, host: &HostId) -> bool {
        self.owner() == Some(host) && self.stored.record.power == Power::On
    }

    /// Whether the pool boots it on another host when its own is dead: once that one's lease is over.
    #[must_use]
    pub fn boots_anywhere(&self) -> bool {
        self.stored.record.protection != Protection::None && !self.stored.record.has_local_disk()
    }

    /// Whether its process on its host must end with the host's lease. Not if the engine runs it and a standby is in sync: then the
    /// arbiter decides, and outputs are held until it has. Nor if only copies of its disks let it be booted: nobody boots it from one that is
    /// not current.
    #[must_use]
    pub fn leased(&self, host: &HostId, engine: bool) -> bool {
        let alone = self.record.as_ref().is_none_or(|r| r.in_sync.is_empty());
        let record = &self.stored.record;
        let restart = record.protection == Protection::Restart && !record.has_local_disk();
        restart || self.boots_anywhere() && self.owner() == Some(host) && (!engine || alone)
    }

    /// The fencing number.
    #[must_use]
    pub fn term(&self) -> Term {
        self.record.as_ref().map_or(Term::ZERO, |r| r.term)
    }
}

/// What the store has of a VM: specification, arbiter's record, state, last drill.
type Parts = (Option<StoredVm>, Option<VmRecord>, VmMemory, Option<DrillReport>);

/// All that a pool is made of in the store.
const ALL: [&str; 2] = ["p/", "vm/"];

/// A pool as it was read.
#[derive(Clone)]
pub struct Read {
    /// The pool at some moment between these two.
    pub pool: Arc<Pool>,
    /// When the store was asked.
    pub began: Instant,
    /// When it had answered.
    pub ended: Instant,
}

/// See the module.
#[derive(Clone, Default)]
pub struct Pool {
    /// Settings.
    pub settings: PoolSettings,
    /// Intervals.
    pub timings: Timings,
    /// Who decides.
    pub leader: Option<Leader>,
    /// When a leader last looked at all VMs, wall clock, ms.
    pub watched_ms: Option<u64>,
    /// Hosts.
    pub hosts: BTreeMap<HostId, HostInfo>,
    /// Their last reports.
    pub reports: BTreeMap<HostId, HostReport>,
    /// VMs.
    pub vms: BTreeMap<VmId, PoolVm>,
    /// Long actions.
    pub tasks: Vec<StoredTask>,
    /// Alarms that are up.
    pub alarms: BTreeSet<AlarmKey>,
    /// Certificates that are revoked.
    pub crl: Option<Crl>,
    /// VMs of whose records this version cannot read one: they are not looked after here, and must not be taken for deleted.
    pub unreadable: BTreeSet<String>,
}

/// The VM that a key is about.
fn id_of(key: &str) -> String {
    key.split('/').nth(1).unwrap_or_default().to_owned()
}

impl Pool {
    /// Whether this VM is on its way to another host.
    #[must_use]
    pub fn moves(&self, id: &VmId) -> bool {
        let of = |t: &StoredTask| matches!(&t.task, Task::Migrate { vm, .. } if vm == id);
        self.tasks.iter().any(|t| t.state == TaskState::Running && of(t))
    }

    /// Reads it, all as of one instant.
    ///
    /// # Errors
    /// The store's. A value that cannot be read is left out and logged: one bad record must not stop the pool.
    pub fn load(kv: &dyn Kv) -> Result<Self> {
        Ok(Self::read(kv.list_all(&ALL)?.entries))
    }

    /// Where the pool's own etcd answers, by the hosts' records, in order; nothing if it has none.
    #[must_use]
    pub fn store_endpoints(&self) -> Vec<String> {
        let all: BTreeSet<&String> = self.hosts.values().filter_map(|h| h.etcd.as_ref()).collect();
        all.into_iter().cloned().collect()
    }

    /// Makes a change, and reads it as it is then.
    ///
    /// # Errors
    /// The store's. A conflict is none: nothing is read then.
    pub fn commit_and_load(kv: &dyn Kv, commit: &Commit) -> Result<Option<Self>> {
        let (_, all) = kv.commit_and_list(commit, &ALL)?;
        Ok(all.map(|all| Self::read(all.entries)))
    }

    fn read(all: Vec<Entry>) -> Self {
        let mut pool = Self::default();
        let (vms, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|e| e.key.starts_with("vm/"));
        for entry in others {
            let (key, value) = (entry.key.as_str(), entry.value.as_slice());
            let done = match key {
                SETTINGS => parse(key, value).map(|v| pool.settings = v),
                TIMINGS => parse(key, value).map(|v| pool.timings = v),
                LEADER => parse(key, value).map(|v| pool.leader = Some(v)),
                CA => Ok(()),
                CRL => parse(key, value).map(|v| pool.crl = Some(v)),
                WATCHED => parse(key, value).map(|v| pool.watched_ms = Some(v)),
                _ => pool.take(key, value),
            };
            if let Err(error) = done {
                tracing::error!(%error, key, "a value in the store is left out");
            }
        }
        let mut parts: BTreeMap<VmId, Parts> = BTreeMap::new();
        for entry in vms {
            let mut path = entry.key.split('/').skip(1);
            let (Some(Ok(id)), Some(part)) = (path.next().map(VmId::new), path.next()) else {
                continue;
            };
            let vm = parts.entry(id).or_default();
            let done = match part {
                "spec" => parse(&entry.key, &entry.value).map(|v| vm.0 = Some(v)),
                "record" => steadfast_protect::store::parse(&entry.value)
                    .map(|v| vm.1 = Some(v))
                    .map_err(|e| crate::error::NodeError::Refused(e.to_string())),
                "state" => parse(&entry.key, &entry.value).map(|v| vm.2 = v),
                "drill" => parse(&entry.key, &entry.value).map(|v| vm.3 = Some(v)),
                _ => Ok(()),
            };
            if let Err(error) = done {
                tracing::error!(%error, key = entry.key, "a value in the store is left out");
                pool.unreadable.insert(id_of(&entry.key));
            }
        }
        pool.vms = parts
            .into_iter()
            .filter_map(|(id, (stored, record, memory, drill))| {
                let stored = stored?;
                Some((
                    id,
                    PoolVm {
                        stored,
                        record,
                        memory,
                        drill,
                    },
                ))
            })
            .collect();
        pool
    }

    fn take(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let mut path = key.split('/').skip(1);
        match (path.next(), path.next(), path.next()) {
            (Some("host"), Some(id), Some(part)) => {
                let Ok(id) = HostId::new(id) else { return Ok(()) };
                if part == "info" {
                    self.hosts.insert(id, parse(key, value)?);
                } else {
                    self.reports.insert(id, parse(key, value)?);
                }
            }
            (Some("task"), ..) => self.tasks.push(parse(key, value)?),
            (Some("alarm"), ..) => {
                self.alarms.insert(parse(key, value)?);
            }
            _ => {}
        }
        Ok(())
    }

    /// What `decide` looks at. `observed` is what the detector says now; without it, what is written down.
    #[must_use]
    pub fn snapshot(&self, observed: Option<&BTreeMap<HostId, HostHealth>>) -> Snapshot {
        let hosts = self.hosts.iter().map(|(id, info)| {
            let report = self.reports.get(id);
            let mut status: HostStatus = report.map(|r| r.status.clone()).unwrap_or_default();
            status.observed = match observed {
                Some(seen) => seen.get(id).copied().unwrap_or(info.record.health),
                None => info.record.health,
            };
            // What it expected before somebody used it again does not empty it once more.
            if info.record.admin == HostAdmin::InUse && status.admin_since_ms != info.admin_since_ms {
                status.prediction = None;
            }
            status.admin_since_ms = info.admin_since_ms;
            status.balanced_ms = self.moved_at(id);
            let record = info.record.clone();
            (id.clone(), Host { record, status })
        });
        let tasks = self.tasks.iter().filter(|t| t.state == TaskState::Running);
        let mut hosts: BTreeMap<HostId, Host> = hosts.collect();
        let expect = hosts.values().filter(|h| h.status.prediction.is_some()).count();
        if expect > usize::from(self.settings.host_failures).max(1) {
            // What so many expect at once is the room's or the sensors'; the others could not take their VMs. `steadfast status` has it.
            for host in hosts.values_mut().filter(|h| h.record.admin == HostAdmin::InUse) {
                host.status.prediction = None;
            }
        }
        Snapshot {
            now_ms: now_ms(),
            pool: self.settings.clone(),
            hosts,
            vms: self
                .vms
                .iter()
                .map(|(id, vm)| (id.clone(), self.vm(id, vm)))
                .collect(),
            tasks: tasks.map(|t| t.task.clone()).collect(),
            alarms: self.alarms.clone(),
        }
    }

    fn vm(&self, id: &VmId, vm: &PoolVm) -> Vm {
        let (spec, memory) = (vm.stored.record.clone(), &vm.memory);
        let owner = vm.owner().cloned();
        let in_sync = |h: &HostId| self.can_take_over(id, vm, h);
        let mut standbys: BTreeMap<HostId, Standby> = memory
            .standbys
            .iter()
            .filter(|h| Some(*h) != owner.as_ref())
            .map(|h| {
                (
                    h.clone(),
                    Standby {
                        in_sync: in_sync(h),
                        lag_ms: 0,
                    },
                )
            })
            .collect();
        // The leader has not seen the change of owner yet: the old one is a standby from now on.
        if let (Some(new), Some(old)) = (&owner, &memory.last_owner)
            && new != old
            && spec.standbys_wanted() > 0
        {
            standbys.entry(old.clone()).or_insert(Standby {
                in_sync: in_sync(old),
                lag_ms: 0,
            });
        }
        let mut replicas = BTreeSet::new();
        if let Some(record) = vm.record.as_ref().filter(|r| r.term > Term::ZERO)
            && spec.has_local_disk()
        {
            replicas.insert(record.owner.clone());
            replicas.extend(record.in_sync.iter().cloned());
        }
        let instances: BTreeMap<HostId, Instance> = self
            .reports
            .iter()
            .filter(|(h, _)| self.hosts.get(*h).is_some_and(|i| !i.record.dead()))
            .filter_map(|(h, r)| {
                let i = r.instances.get(id)?;
                Some((h.clone(), Instance::new(i.phase, i.term)))
            })
            .collect();
        let running = owner
            .as_ref()
            .and_then(|o| instances.get(o))
            .is_some_and(|i| i.phase == Phase::Running);
        let service = owner
            .as_ref()
            .and_then(|o| self.reports.get(o)?.instances.get(id)?.service.as_ref())
            .map(|s| s.state);
        let load = owner
            .as_ref()
            .and_then(|o| self.reports.get(o)?.instances.get(id));
        let ready = match spec.health {
            Some(_) => running && service == Some(health::State::Healthy),
            None => running,
        };
        Vm {
            state: VmState {
                owner,
                term: vm.term(),
                standbys,
                replicas,
                instances,
                ready,
                service_failed: running && service == Some(health::State::Failed),
                moved_ms: memory.moved_ms,
                start_failures: memory.start_failures.clone(),
                unfit: memory.unfit.keys().cloned().collect(),
                home: memory.home.clone(),
                fixed: self.fixed(&vm.stored),
                load: load.map(|i| i.load).unwrap_or_default(),
            },
            spec,
        }
    }

    /// Whether all hosts run the version of this one: what older ones cannot read must not be written.
    #[must_use]
    pub fn one_version(&self) -> bool {
        let own = &crate::binary::own().version;
        // What a host that was taken out said last does not count.
        let reports = self.hosts.keys().filter_map(|h| self.reports.get(h));
        reports.into_iter().all(|r| r.status.versions.steadfast == *own)
    }

    /// When a VM last moved from or to a host on purpose: what is measured there since tells of before for a while.
    fn moved_at(&self, host: &HostId) -> Option<u64> {
        let here = |vm: &&PoolVm| vm.owner() == Some(host) || vm.memory.moved_from.as_ref() == Some(host);
        self.vms
            .values()
            .filter(here)
            .filter_map(|vm| vm.memory.moved_ms)
            .max()
    }

    /// Why a VM cannot be moved while it runs: what moves is mirrored first.
    fn fixed(&self, vm: &StoredVm) -> Option<String> {
        let why = engine::fits(self, vm).err()?;
        Some(format!("it cannot be moved while it runs, stop it: {why}"))
    }

    /// Whether the standby on a host could take over now: the arbiter lists it, and its process holds a complete state (I8). One
    /// that was started again is listed until the primary drops it, but holds nothing.
    #[must_use]
    pub fn can_take_over(&self, id: &VmId, vm: &PoolVm, host: &HostId) -> bool {
        let listed = vm
            .record
            .as_ref()
            .is_some_and(|r| vm.owner().is_some() && r.in_sync.contains(host));
        let report = self.reports.get(host).and_then(|r| r.instances.get(id));
        // A host that has just taken over still reports what it was; its own record says the rest.
        listed && report.is_some_and(|i| i.filled || i.phase == Phase::Running)
    }

    /// A number that no host of the pool, or no VM, has.
    #[must_use]
    pub fn free_index(used: impl Iterator<Item = u16>) -> u16 {
        let used: BTreeSet<u16> = used.collect();
        (0..u16::MAX).find(|i| !used.contains(i)).unwrap_or(u16::MAX)
    }

    /// A host's entry.
    ///
    /// # Errors
    /// There is none.
    pub fn host(&self, id: &HostId) -> Result<&HostInfo> {
        let found = self.hosts.get(id);
        found.ok_or_else(|| crate::error::NodeError::NotFound(format!("host {id} in this pool")))
    }

    /// A VM's entry.
    ///
    /// # Errors
    /// There is none.
    pub fn vm_entry(&self, id: &VmId) -> Result<&PoolVm> {
        let found = self.vms.get(id);
        found.ok_or_else(|| crate::error::NodeError::NotFound(format!("VM {id} in this pool")))
    }
}

/// Pools for tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use steadfast_cluster::model::{HostRecord, Resources};
    use steadfast_types::SiteId;

    /// Two hosts with the counters of their reports.
    pub(crate) fn two_hosts(a: u64, b: u64) -> Pool {
        let mut pool = Pool::default();
        for (host, seq) in [("a", a), ("b", b)] {
            let id = HostId::new(host).unwrap();
            let record = HostRecord {
                id: id.clone(),
                site: SiteId::new("s").unwrap(),
                rack: None,
                addresses: BTreeMap::new(),
                witness: false,
                capacity: Resources::new(1, 1, 1),
                reserved: Resources::ZERO,
                baselines: Default::default(),
                storages: Default::default(),
                link_bytes_per_s: 0,
                admin: Default::default(),
                health: HostHealth::Up,
            };
            let info = HostInfo {
                record,
                index: 0,
                api: ([127, 0, 0, 1], 1).into(),
                replication: Vec::new(),
                etcd: None,
                admin_since_ms: None,
                fence: None,
            };
            pool.hosts.insert(id.clone(), info);
            let report = HostReport {
                seq,
                ..HostReport::default()
            };
            pool.reports.insert(id, report);
        }
        pool
    }
}

#[cfg(test)]
mod tests {
    use super::testing::two_hosts;
    use super::*;
    use steadfast_cluster::model::{FailingPart, Prediction};

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn expects(pool: &mut Pool, name: &str) {
        let report = pool.reports.get_mut(&host(name)).unwrap();
        report.status.prediction = Some(Prediction {
            part: FailingPart::Memory,
            evidence: "errors".into(),
        });
    }

    fn expected(pool: &Pool) -> Vec<String> {
        let hosts = pool.snapshot(None).hosts;
        let found = hosts.iter().filter(|(_, h)| h.status.prediction.is_some());
        found.map(|(id, _)| id.to_string()).collect()
    }

    /// A daemon must not stop a VM because a newer one wrote its record.
    #[test]
    fn a_vm_whose_record_cannot_be_read_is_no_deleted_one() {
        let entry = |key: &str, value: &str| Entry {
            key: key.into(),
            value: value.into(),
            revision: 1,
        };
        let pool = Pool::read(vec![
            entry("vm/new/spec", "{\"of\": \"a version to come\"}"),
            entry("vm/gone/state", "{}"),
        ]);
        assert!(pool.vms.is_empty());
        assert_eq!(pool.unreadable, BTreeSet::from(["new".to_owned()]));
    }

    #[test]
    fn what_a_host_expected_before_it_was_used_again_is_not_believed_nor_what_all_expect() {
        let mut pool = two_hosts(1, 1);
        expects(&mut pool, "a");
        assert_eq!(expected(&pool), ["a"]);
        // It was used again; its report is from before.
        pool.hosts.get_mut(&host("a")).unwrap().admin_since_ms = Some(7);
        assert!(expected(&pool).is_empty());
        let report = pool.reports.get_mut(&host("a")).unwrap();
        report.status.admin_since_ms = Some(7);
        assert_eq!(expected(&pool), ["a"]);
        expects(&mut pool, "b");
        assert!(expected(&pool).is_empty(), "nobody is left");
    }

    #[test]
    fn one_version_is_that_of_all_hosts_that_are_in_the_pool() {
        let mut pool = two_hosts(1, 1);
        let own = crate::binary::own().version.clone();
        for report in pool.reports.values_mut() {
            report.status.versions.steadfast.clone_from(&own);
        }
        assert!(pool.one_version());
        let old = pool.reports.get_mut(&host("b")).unwrap();
        old.status.versions.steadfast = "0.0.1".into();
        assert!(!pool.one_version());
        pool.hosts.remove(&host("b"));
        assert!(pool.one_version(), "it was taken out");
    }
}
