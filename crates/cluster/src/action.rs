//! What `decide` answers: idempotent actions with their reasons, and what it refused or waits for.
//!
//! Each action names the state that it expects (the VM's term, where that matters), so that applying it late, twice, or after
//! somebody else did it is harmless: the node that carries it out checks the expectation by the same compare-and-swap that makes
//! the change.

use crate::model::{AlarmKey, HostAdmin, HostHealth, MoveCause, Resources};
use serde::{Deserialize, Serialize};
use std::fmt;
use steadfast_types::{HostId, Term, VmId};

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Action {
    /// Write what the detector concluded about a host into its record.
    MarkHealth {
        /// The host.
        host: HostId,
        /// What to write.
        health: HostHealth,
    },
    /// Write what is wanted of a host into its record.
    MarkAdmin {
        /// The host.
        host: HostId,
        /// What to write.
        admin: HostAdmin,
    },
    /// Get the right to run a VM for `host` (compare-and-swap from `term` to the next) and boot it there.
    /// Already done when the term has moved. Whoever makes the compare-and-swap lists the instance as starting at the same
    /// time: an owner that is up and has no instance counts as "does not run it", and is started again.
    StartVm {
        /// The VM.
        vm: VmId,
        /// Where.
        host: HostId,
        /// The term that the record has now.
        term: Term,
    },
    /// Reset a guest that crashed or hangs, in place.
    ResetVm {
        /// The VM.
        vm: VmId,
        /// Where it runs.
        host: HostId,
        /// The term it runs under.
        term: Term,
    },
    /// Make the standby on `to` the primary because the present one is lost. The standby asks the arbiter itself; this only
    /// tells it that it should. Already done when the term has moved.
    Promote {
        /// The VM.
        vm: VmId,
        /// Whose standby.
        to: HostId,
        /// The term that the record has now.
        term: Term,
    },
    /// Stop the instance of a VM on a host. `in_order`: the guest is asked to shut down, and the VM's owner becomes none.
    /// Otherwise the process is ended at once: it is a left-over.
    StopInstance {
        /// The VM.
        vm: VmId,
        /// Where.
        host: HostId,
        /// By the guest's own shutdown.
        in_order: bool,
    },
    /// Make a standby on `host` (for `restart`: a replica of the disks) and fill it. Already done when it is listed.
    AddStandby {
        /// The VM.
        vm: VmId,
        /// Where.
        host: HostId,
    },
    /// End the standby on `host`, take it out of the record, remove its disks. Already done when it is not listed.
    RemoveStandby {
        /// The VM.
        vm: VmId,
        /// Where.
        host: HostId,
    },
    /// Move the running VM; one task of the node, listed as [`crate::model::Task::Migrate`] until it ends. With a standby in sync
    /// on `to`: a planned promote. Otherwise a stream to `to` until it has caught up (disks too where they are local), then a
    /// planned promote; the VM keeps its standbys meanwhile. Afterwards a VM that wants standbys has one on `from`, in sync
    /// (a surplus one is removed by the next decisions); others leave nothing there.
    /// With [`MoveCause::Drain`] the node writes `home` (unless there is one), with any other cause it clears it.
    Migrate {
        /// The VM.
        vm: VmId,
        /// Where it is.
        from: HostId,
        /// Where to.
        to: HostId,
        /// The term it runs under.
        term: Term,
        /// Why.
        cause: MoveCause,
    },
    /// Stop a migration that cannot succeed any more.
    CancelMigration {
        /// The VM.
        vm: VmId,
        /// Its target.
        to: HostId,
    },
    /// Replace the binary on an emptied host.
    UpgradeHost {
        /// The host.
        host: HostId,
        /// To which version.
        to: String,
    },
    /// Tell people.
    RaiseAlarm {
        /// Which.
        alarm: AlarmKey,
    },
    /// It is over.
    ClearAlarm {
        /// Which.
        alarm: AlarmKey,
    },
}

impl Action {
    /// The VM it is about.
    #[must_use]
    pub fn vm(&self) -> Option<&VmId> {
        match self {
            Self::StartVm { vm, .. }
            | Self::ResetVm { vm, .. }
            | Self::Promote { vm, .. }
            | Self::StopInstance { vm, .. }
            | Self::AddStandby { vm, .. }
            | Self::RemoveStandby { vm, .. }
            | Self::Migrate { vm, .. }
            | Self::CancelMigration { vm, .. } => Some(vm),
            _ => None,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MarkHealth { host, health } => write!(f, "mark host {host} {health:?}"),
            Self::MarkAdmin { host, admin } => write!(f, "mark host {host} {admin:?}"),
            Self::StartVm { vm, host, .. } => write!(f, "start {vm} on {host}"),
            Self::ResetVm { vm, host, .. } => write!(f, "reset {vm} on {host}"),
            Self::Promote { vm, to, .. } => write!(f, "promote {vm} on {to}"),
            Self::StopInstance { vm, host, .. } => write!(f, "stop {vm} on {host}"),
            Self::AddStandby { vm, host } => write!(f, "add standby of {vm} on {host}"),
            Self::RemoveStandby { vm, host } => write!(f, "remove standby of {vm} on {host}"),
            Self::Migrate { vm, from, to, .. } => write!(f, "move {vm} from {from} to {to}"),
            Self::CancelMigration { vm, to } => write!(f, "cancel the move of {vm} to {to}"),
            Self::UpgradeHost { host, to } => write!(f, "upgrade {host} to {to}"),
            Self::RaiseAlarm { alarm } => write!(f, "raise alarm {alarm:?}"),
            Self::ClearAlarm { alarm } => write!(f, "clear alarm {alarm:?}"),
        }
    }
}

/// An action and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Why, for people.
    pub why: String,
}

/// What could not be decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The VM it is about, if one.
    pub vm: Option<VmId>,
    /// The host it is about, if one.
    pub host: Option<HostId>,
    /// What was wanted.
    pub wanted: Wanted,
    /// Why not.
    pub because: Because,
}

/// What was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// Power on.
    PowerOn,
    /// Boot again, or take over, after a failure.
    Recover,
    /// One more standby.
    Standby,
    /// Empty a host.
    Drain,
    /// Upgrade a host.
    Upgrade,
    /// Give a hot host relief.
    Balance,
}

/// Why something is not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Because {
    /// No host passes.
    #[error("no host fits: {0}")]
    NoHost(NoHost),
    /// It could run, but no standby could be made.
    #[error(
        "no host fits for its standby: {0}; with `host_failures` 0, or the class `none`, it may run without"
    )]
    NoStandbyHost(NoHost),
    /// Failures could not be absorbed any more.
    #[error(
        "if {failed} failed, {vm} could not go on{}: {short} missing; add hosts or room, or lower `host_failures`",
        on(.host)
    )]
    NoFailoverRoom {
        /// Which host's failure.
        failed: HostId,
        /// Which VM would have no room.
        vm: VmId,
        /// On which host, if only one comes into question.
        host: Option<HostId>,
        /// How much is missing at least.
        short: Resources,
    },
    /// The disks are on hosts that cannot be used now.
    #[error("its disks are on {} only, which cannot be used now; bring one back", list(.0))]
    DisksUnreachable(Vec<HostId>),
    /// The old host may still run it.
    #[error("host {0} is not fenced yet: its lease has not run out, so it may still run the VM")]
    NotFenced(HostId),
    /// Its host is only suspect.
    #[error("host {0} is suspect, not dead: nothing is taken from it")]
    HostSuspect(HostId),
    /// Another VM is not ready.
    #[error("it depends on {0}, which is not ready")]
    WaitsFor(VmId),
    /// The dependencies are a circle.
    #[error("its dependencies lead back to itself by way of {0}; remove one of them")]
    Circle(VmId),
    /// It depends on what is not there.
    #[error("it depends on {0}, which does not exist; remove the dependency")]
    UnknownDependency(VmId),
    /// Starts failed.
    #[error("{count} starts in a row failed on {host}; the next is tried in {wait_ms} ms")]
    BackingOff {
        /// Where.
        host: HostId,
        /// How many.
        count: u32,
        /// When again.
        wait_ms: u64,
    },
    /// Starts failed on every host.
    #[error(
        "its start failed {0} times, on every host that it fits on; see its events, correct it, and start it again"
    )]
    GaveUp(u32),
    /// Enough is under way.
    #[error("it waits its turn: {0}")]
    Limit(String),
    /// No standby is in sync.
    #[error("no standby is in sync")]
    NoStandbyInSync,
    /// Class `none`.
    #[error("its class is `none`, which promises nothing; start it by hand, or protect it")]
    ClassNone,
    /// Something else must come first.
    #[error("{0}")]
    Other(String),
}

fn on(host: &Option<HostId>) -> String {
    host.as_ref().map_or_else(String::new, |h| format!(" on {h}"))
}

fn list(hosts: &[HostId]) -> String {
    let names: Vec<&str> = hosts.iter().map(HostId::as_str).collect();
    names.join(", ")
}

/// How many hosts failed which rule, and how close the best came. Every host of the pool is counted once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoHost {
    /// Dead, suspect, draining, in maintenance, or a witness.
    pub not_in_use: u32,
    /// Cannot give the VM's CPU baseline.
    pub baseline: u32,
    /// At a site where the VM may not be.
    pub site: u32,
    /// Does not reach a shared storage that it needs.
    pub storage: u32,
    /// Has a copy of it already.
    pub has_copy: u32,
    /// Has a copy of a VM that it must be apart from.
    pub apart: u32,
    /// Its versions do not fit.
    pub version: u32,
    /// Cannot show the CPU that its guest has.
    #[serde(default)]
    pub cpu: u32,
    /// Its start failed there too often.
    pub failed_there: u32,
    /// Its disks are not there.
    pub disks: u32,
    /// Has no room.
    pub room: u32,
    /// What is missing on the host that came closest (only of those without room).
    pub short: Resources,
    /// That host.
    pub closest: Option<HostId>,
}

impl fmt::Display for NoHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        for (count, what) in [
            (self.not_in_use, "not in use"),
            (self.baseline, "without its CPU baseline"),
            (self.site, "at a site where it may not be"),
            (self.storage, "without its storage"),
            (self.has_copy, "with a copy already"),
            (self.apart, "with a VM that it must be apart from"),
            (self.version, "of a version that does not fit"),
            (self.cpu, "that cannot show its guest's CPU"),
            (self.failed_there, "where its start failed"),
            (self.disks, "without its disks"),
            (self.room, "without room"),
        ] {
            if count > 0 {
                parts.push(format!("{count} {what}"));
            }
        }
        if parts.is_empty() {
            parts.push("the pool has no host".into());
        }
        f.write_str(&parts.join(", "))?;
        if let Some(host) = &self.closest {
            write!(f, " (closest: {host}, {} missing)", self.short)?;
        }
        Ok(())
    }
}

/// What `decide` answers.
///
/// Actions are begun in order. Later ones may rely on room that earlier ones give free, so when a compare-and-swap finds that
/// the record has moved, the rest of the list is dropped, and `decide` is asked again with a new snapshot. A step of work that
/// fails later (a boot, a copy) is no reason for that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decisions {
    /// In the order in which they shall be begun.
    pub actions: Vec<Decision>,
    /// What is wanted and not done now, and why.
    pub refusals: Vec<Refusal>,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.action, self.why)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.vm, &self.host) {
            (Some(vm), _) => write!(f, "VM {vm}")?,
            (None, Some(host)) => write!(f, "host {host}")?,
            (None, None) => f.write_str("pool")?,
        }
        write!(f, ", {:?}: {}", self.wanted, self.because)
    }
}

/// The plan, one line each.
impl fmt::Display for Decisions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for d in &self.actions {
            writeln!(f, "{d}")?;
        }
        for r in &self.refusals {
            writeln!(f, "not now: {r}")?;
        }
        Ok(())
    }
}
