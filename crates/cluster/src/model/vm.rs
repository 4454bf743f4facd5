//! VMs: what someone wants of them, and what is.

use super::{FailureClass, HealthPolicy, Resources};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use steadfast_types::{AppId, GroupId, HostId, SiteId, Term, VmId};

/// A VM's class and its promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protection {
    /// Nothing: when it dies it stays down, with an alarm.
    #[default]
    None,
    /// Booted again, on the same host if only it died, else where its disks are.
    Restart,
    /// A standby follows at an interval; outputs are not held: the last interval can be lost.
    Checkpoint {
        /// Longest time between two epochs, ms.
        interval_ms: u64,
    },
    /// A standby follows, outputs are held: nothing is lost.
    Ft,
}

impl Protection {
    /// A standby holds memory and devices, not only disks.
    #[must_use]
    pub const fn hot(self) -> bool {
        matches!(self, Self::Checkpoint { .. } | Self::Ft)
    }

    /// Its name as in the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Restart => "restart",
            Self::Checkpoint { .. } => "checkpoint",
            Self::Ft => "ft",
        }
    }
}

/// What someone wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// It runs.
    #[default]
    On,
    /// It does not.
    Off,
}

/// Where a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskPlace {
    /// An image on each host that holds a copy of the VM; replicated by us.
    Local,
    /// On a storage that several hosts reach.
    Shared(String),
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name within the VM.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Where it is.
    pub place: DiskPlace,
}

/// Where a standby's memory lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandbyMemory {
    /// In RAM: fastest failover, counts in full.
    #[default]
    Ram,
    /// In a file: a host can stand by for more VMs than it has RAM for; counts only when promoted.
    File,
}

/// At which sites a VM may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteRules {
    /// Sites where it may run; empty: all.
    #[serde(default)]
    pub run_at: BTreeSet<SiteId>,
    /// Sites where standbys may be; empty: as `run_at`.
    #[serde(default)]
    pub standby_at: BTreeSet<SiteId>,
    /// Standbys are at another site than the primary.
    #[serde(default)]
    pub standby_elsewhere: bool,
}

/// What someone wants of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpecRecord {
    /// Its name.
    pub id: VmId,
    /// CPU and memory. `disk_bytes` is added to the sizes of `disks` with [`DiskPlace::Local`] (journal, images kept
    /// outside the list).
    pub resources: Resources,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<DiskRecord>,
    /// Its class.
    #[serde(default)]
    pub protection: Protection,
    /// How many standbys; ignored for `none` and for `restart` with only shared disks. Zero is taken as one.
    #[serde(default)]
    pub standbys: u8,
    /// Where their memory lives.
    #[serde(default)]
    pub standby_memory: StandbyMemory,
    /// Name of the CPU baseline that the guest sees; empty: any host will do.
    #[serde(default)]
    pub baseline: String,
    /// Placement groups it belongs to (rules in [`super::PoolSettings::groups`]).
    #[serde(default)]
    pub groups: BTreeSet<GroupId>,
    /// At which sites it may be.
    #[serde(default)]
    pub sites: SiteRules,
    /// Higher is served first when room or time is short.
    #[serde(default)]
    pub priority: u16,
    /// VMs that must be ready before it starts.
    #[serde(default)]
    pub depends_on: BTreeSet<VmId>,
    /// The application it is a part of.
    #[serde(default)]
    pub application: Option<AppId>,
    /// How its service is checked, and what to do when it fails.
    #[serde(default)]
    pub health: Option<HealthPolicy>,
    /// On or off.
    #[serde(default)]
    pub power: Power,
    /// The balancer leaves it alone (failures and draining do not).
    #[serde(default)]
    pub pinned: bool,
}

impl VmSpecRecord {
    /// What it takes on the host that runs it.
    #[must_use]
    pub fn demand(&self) -> Resources {
        Resources {
            disk_bytes: self.local_disk_bytes(),
            ..self.resources
        }
    }

    /// What a standby takes on its host while it stands by.
    #[must_use]
    pub fn standby_demand(&self) -> Resources {
        let ram = self.protection.hot() && self.standby_memory == StandbyMemory::Ram;
        Resources {
            cpu_milli: 0,
            memory_bytes: if ram { self.resources.memory_bytes } else { 0 },
            disk_bytes: self.local_disk_bytes(),
        }
    }

    /// What promoting a standby (or booting from its disks) takes in addition on its host.
    #[must_use]
    pub fn promotion_demand(&self) -> Resources {
        self.demand().minus(self.standby_demand())
    }

    /// Bytes that each host with a copy holds.
    #[must_use]
    pub fn local_disk_bytes(&self) -> u64 {
        self.disks
            .iter()
            .filter(|d| d.place == DiskPlace::Local)
            .fold(self.resources.disk_bytes, |sum, d| sum.saturating_add(d.bytes))
    }

    /// It can only start where its disks are.
    #[must_use]
    pub fn has_local_disk(&self) -> bool {
        self.disks.iter().any(|d| d.place == DiskPlace::Local) || self.resources.disk_bytes > 0
    }

    /// Names of the shared storages it needs.
    pub fn storages(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().filter_map(|d| match &d.place {
            DiskPlace::Shared(name) => Some(name.as_str()),
            DiskPlace::Local => None,
        })
    }

    /// Its standbys are copies of its disks, from which it is booted.
    #[must_use]
    pub fn disks_suffice(&self) -> bool {
        self.protection == Protection::Restart && self.has_local_disk()
    }

    /// How many standbys it shall have. For `restart` a standby is a replica of the disks.
    #[must_use]
    pub fn standbys_wanted(&self) -> usize {
        match self.protection {
            Protection::None => 0,
            Protection::Restart if !self.has_local_disk() => 0,
            _ => usize::from(self.standbys.max(1)),
        }
    }
}

/// A standby as its primary reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standby {
    /// The arbiter's record lists it: it may take over without loss.
    pub in_sync: bool,
    /// How far it is behind, ms.
    #[serde(default)]
    pub lag_ms: u64,
}

/// What an instance (process) of a VM on a host is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// On its way up, as primary.
    Starting,
    /// Runs the guest.
    Running,
    /// Stands by.
    Standby,
    /// On its way down.
    Stopping,
    /// Down because of this. It holds nothing but its disks.
    Failed(FailureClass),
}

/// An instance of a VM on a host. A host without an instance is not listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// What it does.
    pub phase: Phase,
    /// The term it was started or promoted under.
    pub term: Term,
    /// Its disk answers late or with errors. The guest does not notice: the blocks come from a standby.
    #[serde(default)]
    pub disk_fault: bool,
}

impl Instance {
    /// An instance whose disks are well.
    #[must_use]
    pub const fn new(phase: Phase, term: Term) -> Self {
        Self {
            phase,
            term,
            disk_fault: false,
        }
    }
}

/// Measured use of a VM, smoothed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLoad {
    /// CPU in thousandths of one CPU.
    #[serde(default)]
    pub cpu_milli: u64,
    /// Memory that it has touched, bytes; zero: unknown, taken as all.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Memory changed, bytes per second.
    #[serde(default)]
    pub dirty_bytes_per_s: u64,
    /// Client traffic, bytes per second.
    #[serde(default)]
    pub net_bytes_per_s: u64,
}

/// Starts that failed on one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartFailures {
    /// How many in a row.
    pub count: u32,
    /// When the last one failed, pool time in ms.
    pub last_ms: u64,
}

/// Where a VM was before a drain moved it, so that it can go back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// The host.
    pub host: HostId,
    /// When it left, pool time in ms.
    pub left_ms: u64,
}

/// What is. The owner, the term and the in-sync flags are the arbiter's; the rest is reported.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Who has the right to run it. Stays after that host's death until somebody else is granted the right; none only
    /// when it was never started or was stopped in order.
    #[serde(default)]
    pub owner: Option<HostId>,
    /// The fencing number.
    #[serde(default)]
    pub term: Term,
    /// Its standbys, the ones being filled too.
    #[serde(default)]
    pub standbys: BTreeMap<HostId, Standby>,
    /// Hosts that hold a whole and current copy of its local disks, the owner's included. Empty for a VM that was
    /// never started: it may then start anywhere.
    #[serde(default)]
    pub replicas: BTreeSet<HostId>,
    /// Its processes by host.
    #[serde(default)]
    pub instances: BTreeMap<HostId, Instance>,
    /// Measured.
    #[serde(default)]
    pub load: VmLoad,
    /// Its service answers (without a health policy: the guest runs).
    #[serde(default)]
    pub ready: bool,
    /// Its service failed by its health policy.
    #[serde(default)]
    pub service_failed: bool,
    /// When it last changed its host on purpose, pool time in ms.
    #[serde(default)]
    pub moved_ms: Option<u64>,
    /// Starts that failed, by host; emptied when it has run for a while.
    #[serde(default)]
    pub start_failures: BTreeMap<HostId, StartFailures>,
    /// Hosts that cannot go on with its guest: it has a CPU that they cannot show. It could be booted there.
    #[serde(default)]
    pub unfit: BTreeSet<HostId>,
    /// Where it was before a drain moved it.
    #[serde(default)]
    pub home: Option<Home>,
    /// Why it cannot be moved while it runs, and what would help.
    #[serde(default)]
    pub fixed: Option<String>,
}

impl VmState {
    /// The instance on the owner's host.
    #[must_use]
    pub fn primary(&self) -> Option<&Instance> {
        self.instances.get(self.owner.as_ref()?)
    }

    /// The guest runs on its owner (as far as is known).
    #[must_use]
    pub fn running(&self) -> bool {
        self.primary().is_some_and(|i| i.phase == Phase::Running)
    }

    /// Hosts of standbys that may take over.
    pub fn in_sync(&self) -> impl Iterator<Item = &HostId> {
        self.standbys.iter().filter(|(_, s)| s.in_sync).map(|(h, _)| h)
    }
}

/// A VM as `decide` sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// What is wanted.
    pub spec: VmSpecRecord,
    /// What is.
    #[serde(default)]
    pub state: VmState,
}
