//! Hosts: what the pool has written down about them, and what they report.
//!
//! ```text
//!   admin:   InUse ---> Draining ---> Maintenance ---> InUse       what people (or an upgrade, or a prediction) want
//!   health:  Up <--> Suspect ---> Dead(not fenced) ---> Dead(fenced) ---> Up      what the detector found
//! ```
//! The two are apart because a host that drains can also die.

use super::Resources;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use steadfast_types::{HostId, SiteId};

/// Which of the pool's networks an address is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// API, store, heartbeats.
    Management,
    /// First replication path.
    ReplicationA,
    /// Second replication path.
    ReplicationB,
    /// What the VMs' clients use.
    Client,
}

/// What the pool keeps about a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// Its name.
    pub id: HostId,
    /// Where it stands.
    pub site: SiteId,
    /// Hosts with the same rack may fail together.
    #[serde(default)]
    pub rack: Option<String>,
    /// Addresses (`ip` or `ip:port`) by network.
    #[serde(default)]
    pub addresses: BTreeMap<Network, Vec<String>>,
    /// A witness votes in the store and never runs VMs.
    #[serde(default)]
    pub witness: bool,
    /// What the machine has.
    pub capacity: Resources,
    /// What is kept for the host itself.
    #[serde(default)]
    pub reserved: Resources,
    /// Names of the CPU baselines that this host can give a VM.
    #[serde(default)]
    pub baselines: BTreeSet<String>,
    /// Names of the shared storages that this host reaches.
    #[serde(default)]
    pub storages: BTreeSet<String>,
    /// Speed of its replication network, bytes per second; zero: unknown, taken as 1 Gbit/s.
    #[serde(default)]
    pub link_bytes_per_s: u64,
    /// What is wanted of it.
    #[serde(default)]
    pub admin: HostAdmin,
    /// What the pool has concluded about it.
    #[serde(default)]
    pub health: HostHealth,
}

/// What is wanted of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostAdmin {
    /// Runs VMs.
    #[default]
    InUse,
    /// All is being moved off.
    Draining(DrainWhy),
    /// Holds nothing, gets nothing.
    Maintenance(DrainWhy),
}

/// Why a host is emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrainWhy {
    /// Someone asked. Ends with `host resume`.
    Operator,
    /// It predicts its own failure. Ends with `host resume`.
    Prediction,
    /// The rolling upgrade has come to it. Ends by itself.
    Upgrade,
}

/// What the pool has concluded about a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostHealth {
    /// It answers.
    #[default]
    Up,
    /// It may be dead, starved or cut off: it gets nothing new, and nothing is taken from it.
    Suspect,
    /// It is dead or cut off from everybody.
    Dead {
        /// Its own VMs cannot be running any more: its lease ran out with the margin (see `lease`), a fence agent
        /// confirmed, or it was seen to have booted since. `ft` needs no fence (the arbiter decides), `restart` does.
        fenced: bool,
    },
}

/// What a host reports, and what is observed of it now. Not kept in the store for long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The verdict of the detector over all observers now; `decide` writes it into the record by `MarkHost`.
    #[serde(default)]
    pub observed: HostHealth,
    /// The host itself is short of CPU, memory or I/O (PSI, steal).
    #[serde(default)]
    pub starved: bool,
    /// Measured and smoothed (see `smooth`).
    #[serde(default)]
    pub load: HostLoad,
    /// It expects to fail.
    #[serde(default)]
    pub prediction: Option<Prediction>,
    /// What it runs.
    #[serde(default)]
    pub versions: Versions,
    /// Since when `admin` is what it is, pool time in ms; none: not known.
    #[serde(default)]
    pub admin_since_ms: Option<u64>,
    /// When a VM was last moved to or from it by the balancer, pool time in ms.
    #[serde(default)]
    pub balanced_ms: Option<u64>,
}

/// Measured use of a host, smoothed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLoad {
    /// CPU in thousandths of one CPU, everything on the host.
    #[serde(default)]
    pub cpu_milli: u64,
    /// Memory in use, bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Replication and client traffic, bytes per second.
    #[serde(default)]
    pub net_bytes_per_s: u64,
    /// Since when it has been above the balancer's `hot_permille` without a break, pool time in ms.
    #[serde(default)]
    pub hot_since_ms: Option<u64>,
}

/// Why a host expects to fail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prediction {
    /// Which part.
    pub part: FailingPart,
    /// What was seen, for people: "37 corrected memory errors in 24 h".
    pub evidence: String,
}

/// Which part of a host is failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailingPart {
    /// Disk errors (SMART, I/O errors).
    Disk,
    /// Corrected memory errors (EDAC).
    Memory,
    /// Temperature, fans, power.
    Environment,
    /// Anything else.
    Other,
}

/// Versions on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Versions {
    /// Version of the daemon and the monitor (one binary): `0.2.0`.
    #[serde(default)]
    pub steadfast: String,
    /// Version of the epoch stream that it can send and receive: lowest.
    #[serde(default)]
    pub wire_min: u32,
    /// Version of the epoch stream that it can send and receive: highest.
    #[serde(default)]
    pub wire_max: u32,
}

impl Versions {
    /// Whether an epoch stream between the two is possible. Unknown versions (zeros) are taken as fitting.
    #[must_use]
    pub fn speaks_with(&self, o: &Self) -> bool {
        self.wire_max == 0 || o.wire_max == 0 || (self.wire_min <= o.wire_max && o.wire_min <= self.wire_max)
    }
}

/// A host as `decide` sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Kept in the store.
    pub record: HostRecord,
    /// Reported and observed.
    #[serde(default)]
    pub status: HostStatus,
}

impl HostRecord {
    /// May be given VMs and standbys now.
    #[must_use]
    pub fn usable(&self) -> bool {
        !self.witness && self.admin == HostAdmin::InUse && self.health == HostHealth::Up
    }

    /// Its instances can be talked to: moved, stopped, copied from.
    #[must_use]
    pub fn reachable(&self) -> bool {
        self.health == HostHealth::Up
    }

    /// Dead, fenced or not.
    #[must_use]
    pub fn dead(&self) -> bool {
        matches!(self.health, HostHealth::Dead { .. })
    }

    /// Its own VMs cannot be running any more.
    #[must_use]
    pub fn fenced(&self) -> bool {
        self.health == HostHealth::Dead { fenced: true }
    }

    /// Must be emptied.
    #[must_use]
    pub fn leaving(&self) -> bool {
        self.admin != HostAdmin::InUse
    }

    /// Speed of its replication network, bytes per second.
    #[must_use]
    pub fn link(&self) -> u64 {
        if self.link_bytes_per_s == 0 {
            125_000_000
        } else {
            self.link_bytes_per_s
        }
    }
}
