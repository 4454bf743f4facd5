//! What the pool keeps in its store, and under which keys.
//!
//! ```text
//! p/settings  p/timings  p/leader  p/ca  p/token/ID
//! p/host/ID/info     who the host is; its record for decisions          changed by joining, people, the leader
//! p/host/ID/report   what it measures and runs, with a counter          written by the host at intervals: its heartbeat
//! p/task/ID          long actions                                       p/alarm/HASH   alarms that are up
//! vm/ID/spec         what is wanted                                     changed by people
//! vm/ID/record       term and owner: the arbiter's, see protect::store  changed by compare-and-swap only
//! vm/ID/state        standbys, failures, home                           changed by the leader and the hosts
//! e/TIME-HOST-N      events                                             see journal.rs
//! p/cert/HOST/SERIAL a certificate that was given out, and when it ends; p/crl those that are revoked
//! p/upgrade          the last rolling upgrade: from, to: the way back      changed by people
//! p/watched          when a leader last looked at all VMs, ms           written by the leader
//! ```
//! All values are JSON. Fields that are added carry a default, so that hosts of the previous version can be read.

use crate::error::{NodeError, Result};
use crate::fence::FenceAgent;
use crate::limits::VmLimits;
use crate::paths::LostPath;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use steadfast_cluster::model::{
    DiskPlace, Home, HostAdmin, HostRecord, HostStatus, Phase, StartFailures, Task, VmLoad, VmSpecRecord,
};
use steadfast_store::{Commit, Kv};
use steadfast_types::{HostId, Term, VmId};
use steadfast_vmm::guest_care::Mishaps;
use steadfast_vmm::spec::VmSpec;

/// Settings of the pool.
pub const SETTINGS: &str = "p/settings";
/// Its intervals.
pub const TIMINGS: &str = "p/timings";
/// Who decides.
pub const LEADER: &str = "p/leader";
/// When a leader last looked at all VMs, wall clock, ms.
pub const WATCHED: &str = "p/watched";
/// The list of revoked certificates.
pub const CRL: &str = "p/crl";
/// The last rolling upgrade: from which version to which.
pub const UPGRADE: &str = "p/upgrade";
/// The CA, with its key.
pub const CA: &str = "p/ca";

/// Key of a host's info.
#[must_use]
pub fn host_info(host: &HostId) -> String {
    format!("p/host/{host}/info")
}

/// Key of a host's report.
#[must_use]
pub fn host_report(host: &HostId) -> String {
    format!("p/host/{host}/report")
}

/// Key of a VM's last drill.
#[must_use]
pub fn vm_drill(vm: &VmId) -> String {
    format!("vm/{vm}/drill")
}

/// Key of a VM's specification.
#[must_use]
pub fn vm_spec(vm: &VmId) -> String {
    format!("vm/{vm}/spec")
}

/// Key of a VM's state.
#[must_use]
pub fn vm_state(vm: &VmId) -> String {
    format!("vm/{vm}/state")
}

/// Intervals, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Between two reports of a host, which renew its lease.
    pub report_ms: u64,
    /// A host that was not heard of for so long is suspect.
    pub suspect_ms: u64,
    /// A host that was not heard of for so long on any path is dead.
    pub dead_ms: u64,
    /// A host that could not renew its lease for so long has stopped its `restart` VMs.
    pub lease_ms: u64,
    /// What the observers wait beyond the lease: for clocks that run at different speeds, and the time that killing takes.
    pub lease_margin_ms: u64,
    /// A leader that was not heard of for so long is replaced.
    pub leader_ms: u64,
    /// How long a host's certificate lives; renewed when a third is left.
    pub certificate_ms: u64,
    /// An instance of a VM that did not hear of the other for so long suspects it. Wide: the pool's hosts may be busy.
    pub vm_suspect_ms: u64,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            report_ms: 1000,
            suspect_ms: 3000,
            dead_ms: 6000,
            lease_ms: 10_000,
            lease_margin_ms: 4000,
            leader_ms: 5000,
            certificate_ms: 365 * 86_400_000,
            vm_suspect_ms: 1000,
        }
    }
}

impl Timings {
    /// With this lease, and what goes with it in proportion, from half to twice the usual: slow hosts are asked less, and doubted
    /// later.
    #[must_use]
    pub fn for_lease(lease_ms: u64) -> Self {
        let usual = Self::default();
        let share = lease_ms.clamp(usual.lease_ms / 2, usual.lease_ms * 2);
        let scaled = |ms: u64| ms * share / usual.lease_ms;
        Self {
            report_ms: scaled(usual.report_ms),
            suspect_ms: scaled(usual.suspect_ms),
            dead_ms: scaled(usual.dead_ms),
            lease_ms,
            lease_margin_ms: scaled(usual.lease_margin_ms),
            // A few rounds of a leader, and of who watches it.
            leader_ms: scaled(usual.leader_ms).max(4000),
            ..usual
        }
    }
}

/// A host as the pool knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// For decisions.
    pub record: HostRecord,
    /// Its number: unique in the pool, small.
    pub index: u16,
    /// Its API.
    pub api: SocketAddr,
    /// Addresses of its replication paths.
    pub replication: Vec<IpAddr>,
    /// Its etcd member, for clients.
    #[serde(default)]
    pub etcd: Option<String>,
    /// Since when `record.admin` is what it is, wall clock, ms.
    #[serde(default)]
    pub admin_since_ms: Option<u64>,
    /// How it is fenced from outside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<FenceAgent>,
}

impl HostInfo {
    /// Changes what is wanted of it.
    pub fn set_admin(&mut self, admin: HostAdmin) {
        if self.record.admin != admin {
            self.record.admin = admin;
            self.admin_since_ms = Some(now_ms());
        }
    }
}

/// What a host measures and runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostReport {
    /// Grows by one with each report of a daemon.
    pub seq: u64,
    /// Names the run of the daemon.
    pub daemon: u64,
    /// The host's wall clock, ms; for people.
    pub at_ms: u64,
    /// Its member of the store leads.
    #[serde(default)]
    pub leads_store: bool,
    /// Its member of the store has a vote.
    #[serde(default)]
    pub store_vote: bool,
    /// What its guard says about its watchdog device; empty: nothing.
    #[serde(default)]
    pub watchdog: String,
    /// Replication paths on which other hosts do not answer; none: it does not look.
    #[serde(default)]
    pub lost_paths: Option<Vec<LostPath>>,
    /// Measured.
    pub status: HostStatus,
    /// What runs there.
    #[serde(default)]
    pub instances: BTreeMap<VmId, InstanceReport>,
}

/// An instance as its host sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceReport {
    /// What it does.
    pub phase: Phase,
    /// Under which term.
    pub term: Term,
    /// Whether its VM could survive the loss of this host right now (primaries of protected VMs).
    #[serde(default)]
    pub protected: bool,
    /// A standby that holds a complete state: it can take over if the arbiter lists it.
    #[serde(default)]
    pub filled: bool,
    /// Epochs sealed and not yet committed.
    #[serde(default)]
    pub lag_epochs: u64,
    /// Standbys being filled, and bytes to go.
    #[serde(default)]
    pub copying: BTreeMap<HostId, u64>,
    /// Hosts that cannot be its standby, as they said, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unfit: BTreeMap<HostId, String>,
    /// Why the last time that it was to be handed over came to nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stays: Option<String>,
    /// How it became the primary, if by taking over.
    #[serde(default)]
    pub takeover: Option<Takeover>,
    /// How its service is, if it has a health policy and runs here.
    #[serde(default)]
    pub service: Option<ServiceReport>,
    /// What it uses, smoothed.
    #[serde(default)]
    pub load: VmLoad,
    /// What happened to its guest in its process.
    #[serde(default)]
    pub mishaps: Mishaps,
}

/// A service as its checks find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReport {
    /// What it is.
    pub state: steadfast_cluster::health::State,
    /// Why the last round of checks failed; empty if it did not.
    pub why: String,
}

/// A takeover by a standby, as that standby measured it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// When the guest ran again, wall clock of the standby, ms.
    pub at_ms: u64,
    /// From the primary's last sign of life to the suspicion.
    pub detect_us: Option<u64>,
    /// To the arbiter's word.
    pub grant_us: Option<u64>,
    /// To the guest's first step.
    pub resume_us: Option<u64>,
    /// To the first output.
    pub first_output_us: Option<u64>,
}

impl Takeover {
    /// How long the guest stood, at most, ms.
    #[must_use]
    pub fn gap_ms(&self) -> u64 {
        let parts = [self.detect_us, self.grant_us, self.resume_us];
        parts.into_iter().flatten().sum::<u64>().div_ceil(1000)
    }
}

impl std::fmt::Display for Takeover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("its standby took over")?;
        let parts = [
            ("detected", self.detect_us),
            ("granted", self.grant_us),
            ("resumed", self.resume_us),
            ("first output", self.first_output_us),
        ];
        for (name, us) in parts {
            if let Some(us) = us {
                write!(f, ", {name} in {}.{} ms", us / 1000, us % 1000 / 100)?;
            }
        }
        Ok(())
    }
}

/// A VM as people want it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredVm {
    /// For decisions.
    pub record: VmSpecRecord,
    /// For its process. `{host}` and `{data}` in its texts stand for the host's name and the daemon's data folder.
    pub machine: VmSpec,
    /// Its number: unique in the pool, small.
    pub index: u16,
    /// What its processes may use of their hosts.
    #[serde(default, skip_serializing_if = "VmLimits::is_empty")]
    pub limits: VmLimits,
    /// How often it is drilled by itself, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill_every_ms: Option<u64>,
}

impl StoredVm {
    /// Its writable disks that several hosts reach, by their number in the machine's specification.
    #[must_use]
    pub fn shared_disks(&self) -> Vec<usize> {
        let shared = |path: &Path| {
            let name = path.display().to_string();
            let mut records = self.record.disks.iter();
            records.any(|d| d.name == name && d.place != DiskPlace::Local)
        };
        let all = self.machine.disks.iter().enumerate();
        all.filter(|(_, d)| !d.read_only && shared(&d.path))
            .map(|(n, _)| n)
            .collect()
    }
}

/// How a drill went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DrillReport {
    /// When, wall clock, ms.
    pub at_ms: u64,
    /// The standby's host.
    #[schema(value_type = String)]
    pub host: HostId,
    /// Whether the copy ran and passed.
    pub ok: bool,
    /// In words.
    pub text: String,
    /// The epoch that was run.
    pub epoch: u64,
    /// How long it took to copy what the standby holds, ms.
    pub copy_ms: u64,
    /// The whole of it, ms.
    pub took_ms: u64,
    /// What each check of the VM's health policy said.
    pub checks: Vec<String>,
}

impl std::fmt::Display for DrillReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.ok { "drill passed" } else { "drill FAILED" };
        write!(f, "{how} in {} ms: {}", self.took_ms, self.text)
    }
}

/// What the pool remembers about a VM beside the arbiter's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmMemory {
    /// Hosts that shall stand by, in sync or not.
    pub standbys: BTreeSet<HostId>,
    /// The owner when the leader last looked: a change makes the old one a standby.
    pub last_owner: Option<HostId>,
    /// Stopped in order under this term: nobody owns it until it is started again.
    pub stopped: Option<Term>,
    /// Its guest is not asked when it is stopped.
    pub stop_now: bool,
    /// When it last moved on purpose, ms.
    pub moved_ms: Option<u64>,
    /// From where.
    pub moved_from: Option<HostId>,
    /// Starts that failed.
    pub start_failures: BTreeMap<HostId, StartFailures>,
    /// Hosts that said that they cannot go on with its guest.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub unfit: BTreeMap<HostId, Unfit>,
    /// Where it was before a drain.
    pub home: Option<Home>,
    /// What was tried for its service.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried: Option<StoredTried>,
}

/// A host that cannot go on with a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfit {
    /// Why.
    pub why: String,
    /// When it said so, wall clock, ms.
    pub at_ms: u64,
}

/// What was tried for a VM's service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTried {
    /// Under which policy: a hash.
    pub policy: String,
    /// What.
    pub tried: steadfast_cluster::health::Tried,
}

/// Who decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// The host; none: it resigned.
    pub host: Option<HostId>,
    /// Grows as long as it lives.
    pub seq: u64,
}

/// The certificates that are revoked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crl {
    /// Grows with each change.
    pub number: u64,
    /// Their numbers, and when each would have ended, wall clock, ms.
    pub revoked: BTreeMap<String, u64>,
    /// The list as the pool's CA signed it.
    pub pem: String,
}

/// A token that lets a host in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredToken {
    /// SHA-256 of its secret.
    pub hash: String,
    /// When it ends, wall clock, ms.
    pub expires_ms: u64,
    /// How many hosts it may still let in.
    pub uses: u32,
}

/// How a task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// Under way.
    Running,
    /// It succeeded.
    Done,
    /// It did not; the text says why.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
}

/// A long action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StoredTask {
    /// Its name.
    pub id: String,
    /// What it does.
    #[schema(value_type = Object)]
    pub task: Task,
    /// How it stands.
    pub state: TaskState,
    /// The step it is at, or why it ended.
    pub text: String,
    /// When it ended, wall clock, ms.
    pub ended_ms: Option<u64>,
}

/// Wall clock, ms since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

/// Reads a JSON value.
///
/// # Errors
/// It is none of this type.
pub fn parse<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| NodeError::Refused(format!("{key} in the store: {e}")))
}

/// As JSON.
///
/// # Errors
/// Never, for the types of this module.
pub fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| NodeError::Refused(e.to_string()))
}

/// Reads one key.
///
/// # Errors
/// The store's, or a value that is none of this type.
pub fn get<T: DeserializeOwned>(kv: &dyn Kv, key: &str) -> Result<Option<T>> {
    let now = kv.read(&[key])?;
    now.get(key).map(|e| parse(key, &e.value)).transpose()
}

/// How often a change is tried again when others change the same key.
const TRIES: usize = 16;

/// Changes one key as it is now; `None` from `change` leaves it alone. Returns what is there then.
///
/// # Errors
/// The store's, those of `change`, or too many others change it.
pub fn update<T: DeserializeOwned + Serialize + Clone>(
    kv: &dyn Kv,
    key: &str,
    mut change: impl FnMut(Option<T>) -> Result<Option<T>>,
) -> Result<Option<T>> {
    for _ in 0..TRIES {
        let now = kv.read(&[key])?;
        let entry = now.get(key);
        let old: Option<T> = entry.map(|e| parse(key, &e.value)).transpose()?;
        let Some(new) = change(old.clone())? else {
            return Ok(old);
        };
        let value = json(&new)?;
        if entry.is_some_and(|e| e.value == value) {
            return Ok(Some(new));
        }
        if kv
            .commit(&Commit::default().unchanged(key, entry).put(key, value))?
            .is_done()
        {
            return Ok(Some(new));
        }
    }
    Err(NodeError::Conflict(key.into()))
}
