//! The pool: its settings, applications, work under way, alarms, and the snapshot of all of it.

use super::{Host, Protection, Vm};
use crate::sabotage::Sabotage;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use steadfast_types::{AppId, GroupId, HostId, VmId};

/// The rule of a placement group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupRule {
    /// No two members ever have a copy (primary or standby) on one host.
    Apart,
    /// As `Apart` where possible.
    PreferApart,
    /// Members on one host where possible.
    Together,
}

/// How an application's VMs are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Each where it fits.
    #[default]
    Free,
    /// On one host where possible, moved and drained together.
    Together,
    /// Never two on one host.
    Apart,
}

/// Several VMs managed as one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppRecord {
    /// Stages of its start: all of a stage are ready before the next starts. VMs that are in no stage start last.
    /// The VMs of an application are those whose `application` names it.
    #[serde(default)]
    pub start_order: Vec<BTreeSet<VmId>>,
    /// How they are kept.
    #[serde(default)]
    pub keep: Keep,
    /// Overrides the class of each of its VMs.
    #[serde(default)]
    pub protection: Option<Protection>,
}

/// Balancing. Loads are in thousandths of what a host has (the highest of CPU, memory and network).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalanceSettings {
    /// Off: never moves by itself.
    pub enabled: bool,
    /// A host above this is hot.
    pub hot_permille: u32,
    /// It must have been hot for so long, ms.
    pub hot_for_ms: u64,
    /// No move may bring its target above this. The gap to `hot_permille` is the hysteresis.
    pub target_max_permille: u32,
    /// A VM stays at least so long where it was put, ms.
    pub residence_ms: u64,
    /// A host rests so long after a move to or from it, ms, so that its measured load settles.
    pub settle_ms: u64,
    /// Most moves of the balancer under way in the pool.
    pub moves_max: u32,
    /// How long a move is expected to do good, s. The gain of a move is what it takes off over this time.
    pub horizon_s: u32,
    /// The gain must be at least so many times the cost, in tenths.
    pub gain_over_cost_tenths: u32,
}

impl Default for BalanceSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            hot_permille: 800,
            hot_for_ms: 60_000,
            target_max_permille: 650,
            residence_ms: 600_000,
            settle_ms: 120_000,
            moves_max: 4,
            horizon_s: 1800,
            gain_over_cost_tenths: 20,
        }
    }
}

/// Bounds on work under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Migrations to or from one host.
    pub migrations_per_host: u32,
    /// Migrations in the pool.
    pub migrations_in_pool: u32,
    /// Standbys being filled to or from one host. Kept by the node: `decide` names all standbys at once, in order.
    pub copies_per_host: u32,
    /// VMs starting on one host. Kept by the node: `decide` names all starts at once, in order of priority.
    pub starts_per_host: u32,
    /// Starts and resets of one VM on one host that may fail in a row before another host is taken, or it is given up.
    pub start_failures_per_host: u32,
    /// Pause after a failed start or a crash, ms; doubles each time, up to 32 times.
    pub start_backoff_ms: u64,
    /// Hosts being emptied by an upgrade at a time.
    pub upgrades_at_once: u32,
    /// A host that is not empty after so long has an alarm, ms.
    pub drain_alarm_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            migrations_per_host: 2,
            migrations_in_pool: 64,
            copies_per_host: 4,
            starts_per_host: 8,
            start_failures_per_host: 3,
            start_backoff_ms: 5_000,
            upgrades_at_once: 1,
            drain_alarm_ms: 900_000,
        }
    }
}

/// Settings of the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolSettings {
    /// Name.
    pub name: String,
    /// How many hosts may fail at once with every VM that is protected going on or being booted again. 0: no check.
    pub host_failures: u8,
    /// How much virtual CPU may be promised per real CPU, in thousandths. Memory and disk are never promised twice.
    pub cpu_overcommit_permille: u32,
    /// Rules of placement groups. A group without a rule here is without effect.
    pub groups: BTreeMap<GroupId, GroupRule>,
    /// Applications.
    pub applications: BTreeMap<AppId, AppRecord>,
    /// Balancing.
    pub balance: BalanceSettings,
    /// Bounds on work under way.
    pub limits: Limits,
    /// Empty a host that predicts its failure.
    pub evacuate_on_prediction: bool,
    /// After a drain, VMs go back to the host they were on, if it returns within this time, ms. 0: never.
    pub bring_back_ms: u64,
    /// A rolling upgrade to this version is wanted.
    pub upgrade_to: Option<String>,
    /// A deliberately broken variant; has an effect only with the crate's feature `sabotage`.
    #[serde(skip)]
    pub sabotage: Sabotage,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            name: "pool".into(),
            host_failures: 1,
            cpu_overcommit_permille: 4000,
            groups: BTreeMap::new(),
            applications: BTreeMap::new(),
            balance: BalanceSettings::default(),
            limits: Limits::default(),
            evacuate_on_prediction: true,
            bring_back_ms: 4 * 3_600_000,
            upgrade_to: None,
            sabotage: Sabotage::None,
        }
    }
}

/// Why a VM is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MoveCause {
    /// Its host is emptied.
    Drain,
    /// It goes back to where it was before a drain.
    BringBack,
    /// Its host is hot.
    Balance,
    /// Its host's disk or CPU serves it badly.
    Relief,
    /// Someone asked.
    Operator,
}

/// Work under way, as the node that does it reports. What is finished or failed is not listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// A migration or planned promote. At most one per VM.
    Migrate {
        /// The VM.
        vm: VmId,
        /// From where.
        from: HostId,
        /// To where.
        to: HostId,
        /// Why.
        cause: MoveCause,
        /// Since when, pool time in ms.
        since_ms: u64,
    },
    /// A host replaces its binary.
    Upgrade {
        /// The host.
        host: HostId,
        /// To which version.
        to: String,
        /// Since when, pool time in ms.
        since_ms: u64,
    },
    /// The pool goes from one version to another, host by host. What is to be done for it follows from
    /// [`PoolSettings::upgrade_to`]; this is what people look at and cancel.
    RollingUpgrade {
        /// From which version.
        from: String,
        /// To which version.
        to: String,
        /// Since when, pool time in ms.
        since_ms: u64,
    },
}

/// Names an alarm: the same key is the same alarm.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlarmKey {
    /// A host is dead or cut off.
    HostDead(HostId),
    /// A host expects to fail.
    HostPredictsFailure(HostId),
    /// A host is starved of CPU, memory or I/O.
    HostStarved(HostId),
    /// A host's drain cannot go on.
    DrainStuck(HostId),
    /// A VM that should run cannot.
    VmDown(VmId),
    /// A VM has fewer in-sync standbys than wanted, and no way to get them now.
    VmDegraded(VmId),
    /// A VM's service fails its checks, whatever was done about it.
    ServiceFailed(VmId),
    /// A VM's copies break an anti-affinity rule.
    VmNotApart(VmId),
    /// The failure of the named number of hosts could not be absorbed.
    NoFailoverRoom,
    /// A rolling upgrade waits.
    UpgradeWaits,
}

/// Everything that `decide` looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Pool time in ms: the leader's wall clock. Only damping and back-off use it, nothing that safety rests on.
    pub now_ms: u64,
    /// Settings.
    pub pool: PoolSettings,
    /// Hosts.
    pub hosts: BTreeMap<HostId, Host>,
    /// VMs.
    pub vms: BTreeMap<VmId, Vm>,
    /// Work under way.
    #[serde(default)]
    pub tasks: Vec<Task>,
    /// Alarms that are up.
    #[serde(default)]
    pub alarms: BTreeSet<AlarmKey>,
}

impl Snapshot {
    /// The migration of a VM that is under way: from, to.
    #[must_use]
    pub fn migration(&self, id: &VmId) -> Option<(&HostId, &HostId)> {
        self.tasks.iter().find_map(|t| match t {
            Task::Migrate { vm, from, to, .. } if vm == id => Some((from, to)),
            _ => None,
        })
    }
}
