//! What the API takes and gives.

use crate::config::{NodeConfig, StoreChoice};
use crate::paths;
use crate::pool::{Pool, PoolVm};
use crate::records::{HostInfo, InstanceReport, StoredTask, TaskState, VmMemory, now_ms};
use crate::watchdog;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use steadfast_cluster::health::State;
use steadfast_cluster::model::{AlarmKey, HealthPolicy, HostAdmin, HostHealth, Phase, Power, Protection};
use steadfast_types::{HostId, SiteId, VmId};
use steadfast_vmm::spec::VmSpec;
use utoipa::ToSchema;

/// The pool on one screen.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    /// Name of the pool.
    pub pool: String,
    /// Nothing needs attention.
    pub healthy: bool,
    /// What does.
    pub problems: Vec<String>,
    /// Who decides.
    #[schema(value_type = Option<String>)]
    pub leader: Option<HostId>,
    /// `embedded`, `etcd` (the pool's own) or `external etcd`.
    pub store: String,
    /// Whose member of the pool's own etcd leads it: when that host dies, the store takes nothing for an election.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub store_led_by: Option<HostId>,
    /// Hosts.
    pub hosts: Vec<HostStatus>,
    /// VMs.
    pub vms: Vec<VmStatus>,
    /// Moves under way.
    pub tasks: Vec<StoredTask>,
}

/// A host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct HostStatus {
    /// Its name.
    #[schema(value_type = String)]
    pub host: HostId,
    /// `up`, `suspect`, `dead` or `dead, fenced`.
    pub health: String,
    /// `in use`, `draining` or `maintenance`.
    pub admin: String,
    /// Votes in the store and runs no VMs.
    pub witness: bool,
    /// CPUs in thousandths: in use, and what it has.
    pub cpu_milli: (u64, u64),
    /// Memory in bytes: in use, and what it has.
    pub memory_bytes: (u64, u64),
    /// VMs that run there.
    pub running: usize,
    /// Standbys there.
    pub standbys: usize,
    /// Shared storages that it reaches.
    #[serde(default)]
    pub storages: std::collections::BTreeSet<String>,
    /// Its API.
    pub api: String,
    /// What it runs.
    pub version: String,
    /// What its guard says about its watchdog device, while it guards something; empty: nothing.
    #[serde(default)]
    pub watchdog: String,
    /// Its member of the pool's own etcd has a vote: a majority of these hosts must be alive for anything to be decided.
    #[serde(default)]
    pub store_vote: bool,
}

/// Shared storages.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Storages {
    /// Their names.
    pub storages: std::collections::BTreeSet<String>,
}

/// A VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct VmStatus {
    /// Its name.
    #[schema(value_type = String)]
    pub vm: VmId,
    /// Its class.
    pub class: String,
    /// `running`, `starting`, `down`, `off`, `stopping`, or `unknown` when its host is not heard of.
    pub state: String,
    /// Whether it could survive the loss of its host right now (I8).
    pub protection: String,
    /// Who runs it.
    #[schema(value_type = Option<String>)]
    pub host: Option<HostId>,
    /// Standbys in sync.
    #[schema(value_type = Vec<String>)]
    pub in_sync: Vec<HostId>,
    /// Standbys that are not, or not yet.
    #[schema(value_type = Vec<String>)]
    pub filling: Vec<HostId>,
    /// Its fencing number.
    pub term: u64,
    /// Epochs sealed and not yet committed.
    pub lag_epochs: u64,
    /// What its checks say, if it has a health policy: `healthy`, `starting`, `failed: WHY`, or `unknown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
}

/// How a service is, in words.
fn service(
    policy: Option<&HealthPolicy>,
    instance: Option<&InstanceReport>,
    running: bool,
) -> Option<String> {
    policy?;
    let found = instance.and_then(|i| i.service.as_ref()).filter(|_| running);
    Some(match found {
        None => "unknown".into(),
        Some(s) => match s.state {
            State::Grace => "starting".into(),
            State::Healthy => "healthy".into(),
            State::Failed => format!("failed: {}", s.why),
        },
    })
}

fn health(h: HostHealth) -> String {
    match h {
        HostHealth::Up => "up",
        HostHealth::Suspect => "suspect",
        HostHealth::Dead { fenced: false } => "dead",
        HostHealth::Dead { fenced: true } => "dead, fenced",
    }
    .into()
}

/// Why there is no protection: what a host said that cannot give it, unless another is being filled.
fn unprotected(instance: Option<&InstanceReport>, memory: &VmMemory, else_why: &str) -> String {
    let now = instance.filter(|i| i.copying.is_empty());
    let said = now.and_then(|i| i.unfit.first_key_value());
    let remembered = || now.and_then(|_| memory.unfit.first_key_value().map(|(h, u)| (h, &u.why)));
    match said.or_else(remembered) {
        Some((host, why)) => format!("unprotected: {host} cannot be its standby: {why}"),
        None => format!("unprotected: {else_why}"),
    }
}

/// How a VM stands, from what the pool knows.
#[must_use]
pub fn vm_status(pool: &Pool, id: &VmId, vm: &PoolVm) -> VmStatus {
    let spec = &vm.stored.record;
    let owner = vm.owner();
    let up = |h: &HostId| {
        pool.hosts
            .get(h)
            .is_some_and(|i| i.record.health == HostHealth::Up)
    };
    let instance = owner.and_then(|o| pool.reports.get(o)?.instances.get(id));
    let state = match (owner, instance, spec.power) {
        (Some(o), _, _) if !up(o) => "unknown",
        (Some(_), Some(i), _) => match i.phase {
            Phase::Running => "running",
            Phase::Starting | Phase::Standby => "starting",
            Phase::Stopping => "stopping",
            Phase::Failed(_) => "down",
        },
        (_, _, Power::Off) => "off",
        (Some(_) | None, None, Power::On) | (None, Some(_), Power::On) => "down",
    };
    let listed = vm.record.as_ref().map(|r| r.in_sync.clone()).unwrap_or_default();
    let in_sync: Vec<HostId> = listed
        .into_iter()
        .filter(|h| pool.can_take_over(id, vm, h))
        .collect();
    let filling = vm
        .memory
        .standbys
        .iter()
        .filter(|h| !in_sync.contains(h) && Some(*h) != owner);
    // I8: only what would hold right now is called protected.
    let protection = match (spec.protection, state) {
        (Protection::None, _) => "none promised".into(),
        (_, "off") => "off".into(),
        (_, "unknown") => "unknown: its host is not heard of".into(),
        (Protection::Restart, "running") if spec.has_local_disk() => match in_sync.iter().any(up) {
            true => "restart elsewhere".into(),
            false => unprotected(
                instance,
                &vm.memory,
                "no other host has a current copy of its disks",
            ),
        },
        (Protection::Restart, "running") => {
            let reaches = |info: &HostInfo| spec.storages().all(|s| info.record.storages.contains(s));
            let others = pool
                .hosts
                .iter()
                .filter(|(h, i)| up(h) && Some(*h) != owner && !i.record.witness);
            match (others.clone().any(|(_, info)| reaches(info)), others.count()) {
                (_, 0) => "unprotected: there is no other host".into(),
                (false, _) => {
                    "unprotected: no other host reaches its storage (`steadfast host storage`)".into()
                }
                (true, _) => "restart elsewhere".into(),
            }
        }
        (_, "running") if instance.is_some_and(|i| i.protected) && in_sync.iter().any(up) => {
            "protected".into()
        }
        (_, "running") if in_sync.iter().any(up) => {
            "degraded: the primary does not call itself protected".into()
        }
        (_, "running") => unprotected(instance, &vm.memory, "no standby is in sync"),
        (_, state) => format!("unprotected: it is {state}"),
    };
    VmStatus {
        vm: id.clone(),
        class: spec.protection.name().into(),
        state: state.into(),
        protection,
        host: owner.cloned(),
        filling: filling.cloned().collect(),
        in_sync,
        term: vm.term().0,
        lag_epochs: instance.map_or(0, |i| i.lag_epochs),
        service: service(spec.health.as_ref(), instance, state == "running"),
    }
}

/// The pool on one screen.
#[must_use]
pub fn pool_status(pool: &Pool, config: &NodeConfig) -> PoolStatus {
    let vms: Vec<VmStatus> = pool.vms.iter().map(|(id, vm)| vm_status(pool, id, vm)).collect();
    let hosts: Vec<HostStatus> = pool
        .hosts
        .iter()
        .map(|(id, info)| {
            let report = pool.reports.get(id);
            let load = report.map(|r| r.status.load).unwrap_or_default();
            let of = |f: &dyn Fn(&Phase) -> bool| {
                report.map_or(0, |r| r.instances.values().filter(|i| f(&i.phase)).count())
            };
            let up = info.record.health == HostHealth::Up;
            HostStatus {
                host: id.clone(),
                health: health(info.record.health),
                admin: match info.record.admin {
                    HostAdmin::InUse => "in use",
                    HostAdmin::Draining(_) => "draining",
                    HostAdmin::Maintenance(_) => "maintenance",
                }
                .into(),
                witness: info.record.witness,
                cpu_milli: (load.cpu_milli, info.record.capacity.cpu_milli),
                memory_bytes: (load.memory_bytes, info.record.capacity.memory_bytes),
                running: if up { of(&|p| *p == Phase::Running) } else { 0 },
                standbys: if up { of(&|p| *p == Phase::Standby) } else { 0 },
                storages: info.record.storages.clone(),
                api: info.api.to_string(),
                version: report
                    .map(|r| r.status.versions.steadfast.clone())
                    .unwrap_or_default(),
                watchdog: report.map(|r| r.watchdog.clone()).unwrap_or_default(),
                store_vote: report.is_some_and(|r| r.store_vote),
            }
        })
        .collect();
    let mut problems: Vec<String> = hosts
        .iter()
        .filter(|h| h.health != "up")
        .map(|h| format!("host {} is {}", h.host, h.health))
        .collect();
    let watchdogs = hosts.iter().filter(|h| h.watchdog.starts_with(watchdog::FAILED));
    problems.extend(watchdogs.map(|h| format!("host {} {}", h.host, h.watchdog)));
    let silent = paths::told(pool, &paths::lost(pool), "is down");
    problems.extend(
        silent
            .into_iter()
            .map(|(host, text)| format!("host {host}: {text}")),
    );
    problems.extend(pool.reports.iter().filter_map(|(host, report)| {
        let found = report.status.prediction.as_ref()?;
        Some(format!("host {host} is expected to fail: {}", found.evidence))
    }));
    problems.extend(vms.iter().filter(|v| v.state != "off").filter_map(|v| {
        let fine = v.state == "running"
            && !v.protection.starts_with("unprotected")
            && !v.protection.starts_with("degraded");
        (!fine).then(|| format!("VM {} is {}, {}", v.vm, v.state, v.protection))
    }));
    problems.extend(vms.iter().filter_map(|v| {
        let failed = v.service.as_ref().filter(|s| s.starts_with("failed"))?;
        Some(format!("the service in VM {} {failed}", v.vm))
    }));
    problems.extend(pool.vms.iter().filter_map(|(vm, entry)| {
        let failed = entry.drill.as_ref().filter(|d| !d.ok)?;
        Some(format!(
            "VM {vm}: its last {failed}; try again: steadfast drill {vm}"
        ))
    }));
    problems.extend(pool.alarms.iter().filter_map(|alarm| match alarm {
        AlarmKey::DrainStuck(host) => Some(format!(
            "host {host} cannot be emptied; see `steadfast pool plan` and `steadfast events --subject {host}`"
        )),
        _ => None,
    }));
    problems.extend(store_problem(&hosts));
    let leader = pool.leader.as_ref().and_then(|l| l.host.clone());
    if leader.is_none() {
        problems.push("no host decides for the pool".into());
    }
    PoolStatus {
        pool: config.pool.clone(),
        healthy: problems.is_empty(),
        problems,
        leader,
        store: match config.store {
            StoreChoice::Embedded => "embedded",
            StoreChoice::Managed { .. } => "etcd",
            StoreChoice::External(_) => "external etcd",
        }
        .into(),
        store_led_by: store_led_by(pool),
        hosts,
        vms,
        tasks: pool
            .tasks
            .iter()
            .filter(|t| t.state == TaskState::Running)
            .cloned()
            .collect(),
    }
}

/// With three votes or more the store is meant to go on without any one of them.
fn store_problem(hosts: &[HostStatus]) -> Option<String> {
    let votes = hosts.iter().filter(|h| h.store_vote).count();
    let alive = hosts.iter().filter(|h| h.store_vote && h.health == "up").count();
    (votes >= 3 && alive <= votes / 2 + 1).then(|| {
        format!(
            "the store has {alive} of its {votes} votes: without one more nothing can be decided; bring a host back, or take one \
             that is gone for good out (`steadfast host remove HOST`) and let another join"
        )
    })
}

/// As the reports of hosts that are up say, the newest first: a host that died reports no change.
fn store_led_by(pool: &Pool) -> Option<HostId> {
    let up = |host: &HostId| {
        let info = pool.hosts.get(host);
        info.is_some_and(|info| info.record.health == HostHealth::Up)
    };
    let leads = pool.reports.iter().filter(|(host, r)| r.leads_store && up(host));
    leads.max_by_key(|(_, r)| r.at_ms).map(|(host, _)| host.clone())
}

/// How available a VM was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Availability {
    /// Which.
    #[schema(value_type = String)]
    pub vm: VmId,
    /// From when, wall clock, ms.
    pub from_ms: u64,
    /// Until when.
    pub to_ms: u64,
    /// `up_ms`, `degraded_ms`, `down_ms`, `off_ms`, `unknown_ms`, `gaps`, `longest_gap_ms`, `availability`, `nines`.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub report: steadfast_cluster::availability::Report,
}

/// A new VM.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// What it is made of; `{host}`, `{data}` and `{run}` in its texts stand for the host's name and the daemon's folders.
    #[schema(value_type = Object)]
    pub machine: VmSpec,
    /// Its class: `none`, `restart`, `checkpoint` or `ft`.
    pub class: String,
    /// Name of the shared storage that its writable disks are on; none: they are local files.
    #[serde(default)]
    pub shared: Option<String>,
    /// Start it at once.
    #[serde(default)]
    pub start: bool,
    /// Higher is served first when room is short.
    #[serde(default)]
    pub priority: u16,
}

/// Reads a class.
///
/// # Errors
/// What would be right.
pub fn class(text: &str) -> Result<Protection, String> {
    Ok(match text {
        "none" => Protection::None,
        "restart" => Protection::Restart,
        "checkpoint" => Protection::Checkpoint { interval_ms: 1000 },
        "ft" => Protection::Ft,
        other => {
            return Err(format!(
                "{other:?} is no class; known: none, restart, checkpoint, ft"
            ));
        }
    })
}

/// How a VM's service is looked after.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewHealth {
    /// The policy: `checks` (`{"tcp": {"to": "ADDRESS:PORT"}}`, `{"http": {"url": "http://..."}}`; for VMs with a vsock device
    /// `{"command": {"argv": ["pg_isready"]}}`, `{"heartbeat": {"within_ms": 30000}}`), `interval_ms`, `timeout_ms`, `failures`,
    /// `successes`, `grace_ms`, `ladder` (`{"remedy": "restart-service"|"reboot-vm"|"roll-over"|"alert", "tries": 1}`), `restart`
    /// (the command in the guest: `["systemctl", "restart", "redis"]`), `backoff_ms`, `backoff_max_ms`, `remedies_max`, `window_ms`. None: it is not looked after any more.
    #[schema(value_type = Option<Object>)]
    pub policy: Option<HealthPolicy>,
}

/// Another class.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewClass {
    /// `none`, `restart`, `checkpoint` or `ft`.
    pub class: String,
}

/// Where to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MoveTo {
    /// The host.
    #[schema(value_type = String)]
    pub to: HostId,
}

/// How to stop.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HowToStop {
    /// At once, as if its power failed.
    pub now: bool,
}

/// What was done, or would be.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// The plan, or what was begun, one line each.
    pub plan: Vec<String>,
    /// Nothing was changed: `dry_run` was set.
    #[serde(default)]
    pub dry_run: bool,
    /// The task that carries it out, if it takes longer.
    #[serde(default)]
    pub task: Option<String>,
}

/// A question whether to only say what would be done.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct DryRun {
    /// Change nothing.
    pub dry_run: bool,
}

/// A token for one host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// The text for `steadfast pool join`.
    pub token: String,
    /// Where to join.
    pub address: String,
    /// When it ends, wall clock, ms.
    pub expires_ms: u64,
}

/// What a joining host sends.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The token's id and secret.
    pub token: (String, String),
    /// Its name.
    pub host: HostId,
    /// Where it stands; none: as the host that lets it in.
    pub site: Option<SiteId>,
    /// Its address.
    pub address: IpAddr,
    /// Its replication addresses.
    pub replication: Vec<IpAddr>,
    /// Its ports.
    pub ports: crate::config::Ports,
    /// It votes in the store and runs no VMs.
    pub witness: bool,
    /// Request for a certificate, PEM.
    pub request: String,
    /// What it has.
    pub capacity: steadfast_cluster::model::Resources,
    /// CPU baselines that it can give.
    pub baselines: std::collections::BTreeSet<String>,
    /// What its network cards carry, bytes a second; zero: they do not say.
    #[serde(default)]
    pub link_bytes_per_s: u64,
    /// Shared storages that it reaches.
    #[serde(default)]
    pub storages: std::collections::BTreeSet<String>,
}

/// What it gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// Name of the pool.
    pub pool: String,
    /// Where it stands.
    pub site: SiteId,
    /// The pool's CA, PEM.
    pub ca: String,
    /// Its certificate, PEM.
    pub certificate: String,
    /// Those that are revoked, PEM.
    #[serde(default)]
    pub crl: String,
    /// The store as it reaches it.
    pub store: StoreChoice,
}

/// Time from now, wall clock, ms.
#[must_use]
pub fn in_ms(ms: u64) -> u64 {
    now_ms().saturating_add(ms)
}
